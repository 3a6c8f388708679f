"""The operators: PyTorch references, the native library, and the choice between them."""
