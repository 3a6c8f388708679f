"""A network, block by block: its module without weights, where weights lie in it, streams of hidden states."""
