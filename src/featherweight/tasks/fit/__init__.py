"""The best model in so many bytes: what each choice costs in each layer is measured, then the bytes are given out."""
