"""Convolutions as products with a matrix: the inputs of every position in the output, one row each (im2col)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Those that are products of unfolded inputs; transposed convolutions are not."""


def unfolded(module: Convolution, inputs: Tensor) -> Tensor:
    """What the kernels of a convolution are multiplied with.

    Parameters
    ----------
    module : its stride, padding (with its mode) and dilation count; groups do not
    inputs : [batch, in, *sizes], or [in, *sizes] without a batch

    Returns
    -------
    [batch * positions, in * product of kernel], the columns in the order in which a weight [out, in, *kernel] lies, so
    that rows @ weight.flatten(1).T are the outputs before the bias; with g groups, columns [i * n / g, (i + 1) * n / g)
    are the inputs of group i.
    """
    dims = len(module.kernel_size)
    batched = inputs if inputs.dim() == dims + 2 else inputs.unsqueeze(0)
    padding: list[int] = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        batched = F.pad(batched, padding, mode=mode)
    for dim in range(dims):
        size, step, apart = module.kernel_size[dim], module.stride[dim], module.dilation[dim]
        batched = batched.unfold(2 + dim, (size - 1) * apart + 1, step)[..., ::apart]
    positions, kernel = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    rows = batched.permute(0, *positions, 1, *kernel)
    return rows.reshape(-1, module.in_channels * batched.shape[2 + dims :].numel())
