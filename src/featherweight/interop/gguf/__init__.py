"""GGUF files: the header and its checks, what blocks stand for, names, config and tokenizer of the models in them."""
