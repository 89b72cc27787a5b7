"""manyhands: train one model with many machines."""

__version__ = "0.1.0"
