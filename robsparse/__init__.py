"""robsparse: train sparse networks that resist adversarial attacks, and measure them."""

__version__ = "0.1.0"
