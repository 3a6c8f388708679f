"""What a weight becomes: one file per kind of code, bit packing, exact byte counts."""

from featherweight.storage.codes.base import (
    Code,
    TensorLayout,
    UnknownCodeError,
    code_from,
    code_layout,
    code_prefix,
    describe_code,
)

__all__ = ["Code", "TensorLayout", "UnknownCodeError", "code_from", "code_layout", "code_prefix", "describe_code"]
