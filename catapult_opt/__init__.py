"""Train above the critical learning rate, on purpose."""

__version__ = "0.1.0"
