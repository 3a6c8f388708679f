"""Distillation of TBT (arXiv 2306.01841): a low-bit model is to say, and to see, what the full one does.

    task x its loss + logits x KL(teacher || student) + hidden x MSE of hidden states + attention x MSE of maps

at temperature 1, terms of layers added up, those of positions that are padding left out. Of an encoder-decoder the
hidden states of both and the maps of both and of cross-attention count. All weights are 1 in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError

HIDDEN = (("encoder_hidden_states", True), ("decoder_hidden_states", False), ("hidden_states", False))
MAPS = (("encoder_attentions", True), ("decoder_attentions", False), ("cross_attentions", False), ("attentions", False))
"""Fields of transformers' outputs, and whether their positions are those of an encoder-decoder's encoder."""


def distillation_loss(
    student: Any,
    teacher: Any,
    mask: Tensor | None = None,
    encoder_mask: Tensor | None = None,
    *,
    task: float = 1.0,
    logits: float = 1.0,
    hidden: float = 1.0,
    attention: float = 1.0,
) -> Tensor:
    """What a student's outputs lack of a teacher's.

    Parameters
    ----------
    student, teacher : ModelOutput
        Of two models of transformers of the same shape, called with the same inputs, with output_hidden_states=True
        where `hidden` counts and output_attentions=True where `attention` does; the teacher's without gradients.
    mask : Tensor, optional
        [B, N], 0 where a position of the (decoder's) text is padding; all count without it.
    encoder_mask : Tensor, optional
        [B, M], the same for the encoder of an encoder-decoder.
    task, logits, hidden, attention : float
        Weights of the terms; a term of weight 0 is not computed.

    Returns
    -------
    Tensor
        A scalar, differentiable in the student's outputs.

    Raises
    ------
    FeatherError
        Outputs lack what a term needs; the text says how to ask for it.
    """
    terms = []
    if task:
        if student.loss is None:
            raise FeatherError("the student's outputs have no loss: call it with labels, or set task=0")
        terms.append(task * student.loss)
    if logits:
        ours, theirs = student.logits.log_softmax(-1), teacher.logits.log_softmax(-1)
        terms.append(logits * mean_where((theirs.exp() * (theirs - ours)).sum(-1), mask))
    for weight, fields, option in ((hidden, HIDDEN, "output_hidden_states"), (attention, MAPS, "output_attentions")):
        if weight:
            terms.append(weight * _layers(student, teacher, fields, (mask, encoder_mask), option))
    if not terms:
        raise FeatherError("all terms of the distillation have the weight 0: give one of them another")
    return torch.stack([term.float() for term in terms]).sum()


def _layers(
    student: Any,
    teacher: Any,
    fields: tuple[tuple[str, bool], ...],
    masks: tuple[Tensor | None, Tensor | None],
    how: str,
) -> Tensor:
    """Sum of the mean squared differences of all tensors in these fields."""
    terms = []
    for field, of_encoder in fields:
        ours, theirs = getattr(student, field, None), getattr(teacher, field, None)
        if not ours or not theirs:
            continue
        if len(ours) != len(theirs) or ours[0].shape != theirs[0].shape:
            raise FeatherError(f"student and teacher differ in {field}: distil between models of one shape")
        mask = masks[of_encoder]
        for one, other in zip(ours, theirs, strict=True):
            squares = (one - other).square()
            by_position = squares.mean(-1) if squares.dim() == 3 else squares.mean((1, 3))
            terms.append(mean_where(by_position, mask))
    if not terms:
        raise FeatherError(f"the outputs lack what is compared: call student and teacher with {how}=True")
    return torch.stack(terms).sum()


def mean_where(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values where the mask, of the same shape, is not 0; of all without a mask."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)
