"""CellVM's server: sandboxes that are microVMs, their kernels and files, over REST."""

__version__ = "0.1.0"
