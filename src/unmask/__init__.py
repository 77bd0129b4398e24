"""unmask: train a language model layer by layer, and see what each layer did."""

__version__ = "0.1.0"
