from robsparse.api.evaluation import evaluate as evaluate
from robsparse.api.loading import load as load
from robsparse.api.results import read_results as read_results

__version__: str
