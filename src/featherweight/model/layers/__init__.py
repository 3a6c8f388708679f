"""Layers that hold codes in place of weights, as modules of PyTorch."""
