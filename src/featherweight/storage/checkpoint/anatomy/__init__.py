"""What is in a checkpoint: blocks, linear layers, shared inputs, norms, ties; from names, shapes and config alone.

`geometry` tells heads, neurons and experts in it, `residual` what reads and writes the residual stream.
"""

from featherweight.storage.checkpoint.anatomy.anatomy import (
    Anatomy,
    LinearLayer,
    config_ties,
    own_head,
    own_head_text,
    read_anatomy,
)

__all__ = ["Anatomy", "LinearLayer", "config_ties", "own_head", "own_head_text", "read_anatomy"]
