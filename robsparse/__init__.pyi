from robsparse.api.loading import load as load

__version__: str
