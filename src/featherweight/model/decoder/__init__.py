"""The native decoder: text from a model on a CPU, without transformers."""
