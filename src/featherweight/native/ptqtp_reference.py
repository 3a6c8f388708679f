"""PTQTP trit-planes in plain PyTorch: the readable form, the oracle of the native one, and what other devices run.

"PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv 2509.16989. A group of weights w
becomes sum_k scale_k t_k with trits t_k in {-1, 0, 1}, by alternating a ridge regression for the scales and an
exhaustive search over the 3^K code tuples of every weight. Everything is float64: in float32 the first normal equations
are singular.

Groups are the rows of a matrix [R, G]. Shorter last groups are padded; a mask keeps padding out of every sum.
Departures, all options: several starts, a closing trit step, a final least squares, tied scales, canonical plane order.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from featherweight.native.ptqtp_settings import NonFiniteWeightError, TieOrder, TritPlaneSettings, join_trits

# Solutions of two starts that are the same up to rounding must not be told apart by that rounding.
START_MARGIN = 1 - 1e-9
START_FLOOR = 1e-12  # of the sum of squared weights

SWEEP_STEPS = 65
CHUNK_WEIGHTS = 1 << 22


class Window(NamedTuple):
    """What a backend finds for some rows: codes uint8 [n, d], scales float64, steps uint8 [n, g], and for every
    iteration whether any group moved its scales by the tolerance or more (uint8 [cap + 1], entry t for iteration t)."""

    codes: Tensor
    scales: Tensor
    steps: Tensor
    moving: Tensor


class Groups(NamedTuple):
    """Weights float64 [R, G] (0 in the padding) and which entries are weights, bool [R, G]."""

    weights: Tensor
    mask: Tensor


def solve_window(weight: Tensor, settings: TritPlaneSettings, cap: int) -> Window:
    """Every group to its exact fixed point, or through `cap` iterations.

    Raises NonFiniteWeightError at the first NaN or infinity in row-major order.
    """
    check_finite(weight)
    n, d = weight.shape
    rows = max(1, CHUNK_WEIGHTS // d)
    parts = [_solve_rows(weight[r : r + rows], settings, cap) for r in range(0, n, rows)]
    codes, scales, steps, moving = zip(*parts, strict=True)
    return Window(torch.cat(codes), torch.cat(scales), torch.cat(steps), torch.stack(moving).amax(0))


def assign_window(weight: Tensor, scales: Tensor, settings: TritPlaneSettings) -> Tensor:
    """The trit step alone: codes uint8 [n, d] nearest to the weights for given scales ([n, g, K], tied [n, g])."""
    groups = group_rows(weight, settings.group_size)
    n, d = weight.shape
    if settings.one_scale:
        trits = _tied_trits(
            _tied_codes(groups, scales.reshape(-1, 1).to(torch.float64), (3**settings.planes - 1) // 2), settings.planes
        )
    else:
        flat = scales.to(torch.float64).reshape(-1, settings.planes)
        trits = nearest_trits(groups, flat, settings.tie_order)
        trits = trits * (flat != 0).T.unsqueeze(-1)
    return join_trits(trits).reshape(n, -1)[:, :d].contiguous()


def group_rows(weight: Tensor, group_size: int) -> Groups:
    """Cut rows into groups: [n, d] to R = n ceil(d / G) rows of G, the last group of a row padded."""
    n, d = weight.shape
    size = min(group_size, d)
    count = -(-d // size)
    padded = torch.zeros(n, count * size, dtype=torch.float64, device=weight.device)
    padded[:, :d] = weight.to(torch.float64)
    mask = (torch.arange(count * size, device=weight.device) < d).expand(n, -1).reshape(n * count, size)
    return Groups(padded.reshape(n * count, size), mask)


def _solve_rows(weight: Tensor, settings: TritPlaneSettings, cap: int) -> Window:
    groups = group_rows(weight, settings.group_size)
    n, d = weight.shape
    moving = torch.zeros(cap + 1, dtype=torch.uint8, device=weight.device)
    if settings.one_scale:
        tied_scales, trits = tied_sweep(groups, settings.planes)
        steps = torch.zeros(len(tied_scales), dtype=torch.uint8, device=weight.device)
        scales = tied_scales.reshape(n, -1)
    else:
        free_scales, trits, steps = _best_start(groups, settings, cap, moving)
        if settings.canonical:
            free_scales, trits = canonical(free_scales, trits)
        scales = free_scales.reshape(n, -1) if settings.tied else free_scales.reshape(n, -1, settings.planes)
    codes = join_trits(trits).reshape(n, -1)[:, :d].contiguous()
    return Window(codes, scales, steps.reshape(n, -1), moving)


def _best_start(groups: Groups, settings: TritPlaneSettings, cap: int, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loop from one or several starts; of several, the solution with the least squared error of each group."""
    scales, trits, steps = alternate(groups, settings, cap, first_trits(groups, settings), moving)
    if settings.starts == 1:
        return scales, trits, steps
    error = squared_error(groups, scales, trits)
    floor = START_FLOOR * (groups.weights**2).sum(-1)
    other: TieOrder = "paired" if settings.tie_order == "lexicographic" else "lexicographic"
    for start in ("greedy", other)[: settings.starts - 1]:
        first: tuple[Tensor | None, Tensor]
        if start == "greedy":
            first = None, greedy_trits(groups, settings.planes)
        else:
            first = closed_form(groups, settings.planes, other)
        candidate = alternate(groups, settings, cap, first, moving)
        found = squared_error(groups, candidate[0], candidate[1])
        better = found < error * START_MARGIN - floor
        scales = torch.where(better[:, None], candidate[0], scales)
        trits = torch.where(better[None, :, None], candidate[1], trits)
        steps = torch.where(better, candidate[2], steps)
        error = torch.where(better, found, error)
    return scales, trits, steps


def alternate(
    groups: Groups,
    settings: TritPlaneSettings,
    cap: int,
    first: tuple[Tensor | None, Tensor],
    moving: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge step and trit step in turn, for every group until its exact fixed point or iteration `cap`.

    `first` holds scales and trits after iteration 1, or no scales and the trits iteration 1 begins with. A group is at
    its fixed point when its trits give the normal equations, with the lambda, that its scales came from: nothing can
    change any more, so it leaves the active set. Sets moving[t] where some group moved in iteration t >= 2.
    Returns scales [R, K], trits int8 [K, R, G], steps uint8 [R].
    """
    count, device = groups.weights.shape[0], groups.weights.device
    trits = first[1].clone()
    none = torch.zeros(count, settings.planes, dtype=torch.float64, device=device)
    scales = none if first[0] is None else first[0].clone()
    steps = torch.full((count,), cap, dtype=torch.uint8, device=device)
    ridge = torch.full((count,), settings.ridge, dtype=torch.float64, device=device)
    active = torch.arange(count, device=device)
    gram, right = normal_equations(groups, trits)
    for t in range(1 if first[0] is None else 2, cap + 1):
        part = Groups(groups.weights[active], groups.mask[active])
        new_scales, new_ridge = ridge_step(gram, right, ridge[active], settings)
        change = _squared_change(new_scales, scales[active])
        if t > 1:
            moving[t] |= (change >= settings.tolerance**2).any().to(torch.uint8)
        new_trits = nearest_trits(part, new_scales, settings.tie_order)
        new_gram, new_right = normal_equations(part, new_trits)
        fixed = (new_gram == gram).all(-1).all(-1) & (new_right == right).all(-1) & (new_ridge == ridge[active])
        scales[active], trits[:, active], ridge[active] = new_scales, new_trits, new_ridge
        steps[active[fixed]] = t
        active, gram, right = active[~fixed], new_gram[~fixed], new_right[~fixed]
        if len(active) == 0:
            break
    if settings.final_least_squares and len(active):
        scales[active], _ = ridge_step(gram, right, ridge[active], settings)
    return scales, trits, steps


def _squared_change(new: Tensor, old: Tensor) -> Tensor:
    """Sum of squared differences, planes in order: the sum whose last bit the native solver shares."""
    total = (new[:, 0] - old[:, 0]) ** 2
    for k in range(1, new.shape[1]):
        total = total + (new[:, k] - old[:, k]) ** 2
    return total


def first_trits(groups: Groups, settings: TritPlaneSettings) -> tuple[Tensor, Tensor]:
    """Scales and trits after iteration 1 of the published start."""
    return closed_form(groups, settings.planes, settings.tie_order)


def closed_form(groups: Groups, planes: int, order: TieOrder) -> tuple[Tensor, Tensor]:
    """Iteration 1 from t_k = sign(w): all scales are a = sum |w| / (K G), and the ties of the trit step are exact.

    In lexicographic order plane k is a ternary quantiser shifted by (K + 1 - 2k) a, ties to the lower level. In paired
    order the planes fill from the last to the first, symmetrically, ties towards zero.
    """
    w = groups.weights
    a = w.abs().sum(-1) / (planes * groups.mask.sum(-1)).to(torch.float64)
    trits = []
    for k in range(1, planes + 1):
        if order == "lexicographic":
            centre = (planes + 1 - 2 * k) * a
            up, down = w > (centre + a / 2)[:, None], w <= (centre - a / 2)[:, None]
        else:
            edge = ((planes - k + 0.5) * a)[:, None]
            up, down = w > edge, w < -edge
        trits.append((up.to(torch.int8) - down.to(torch.int8)) * groups.mask)
    return a[:, None].repeat(1, planes), torch.stack(trits)


def greedy_trits(groups: Groups, planes: int) -> Tensor:
    """Plane by plane, the ternary plane with the least squared error for what the planes before left.

    Of the m largest magnitudes with sum S_m, the best m maximises S_m^2 / m; the scale is S_m / m.
    """
    rest = groups.weights.clone()
    trits = []
    for _ in range(planes):
        values, indices = torch.sort(rest.abs(), dim=-1, descending=True, stable=True)
        sums = torch.cumsum(values, -1)
        sizes = torch.arange(1, values.shape[1] + 1, dtype=torch.float64, device=values.device)
        # Magnitudes equal to the least one kept must all be kept or the choice would hang on the order of a sort.
        last_of_equal = torch.nn.functional.pad(values[:, :-1] != values[:, 1:], (0, 1), value=True)
        best = torch.where(last_of_equal, sums * sums / sizes, -1.0).argmax(-1, keepdim=True)
        kept = torch.zeros_like(values).scatter_(-1, indices, (sizes - 1 <= best).to(torch.float64))
        plane = rest.sign() * kept * groups.mask
        scale = sums.gather(-1, best) / (best + 1)
        rest = rest - scale * plane
        trits.append(plane.to(torch.int8))
    return torch.stack(trits)


def normal_equations(groups: Groups, trits: Tensor) -> tuple[Tensor, Tensor]:
    """S^T S as float64 [R, K, K] (small integers) and S^T w as float64 [R, K]."""
    planes = trits.shape[0]
    gram = torch.empty(trits.shape[1], planes, planes, dtype=torch.float64, device=trits.device)
    for k, other in itertools.product(range(planes), repeat=2):
        gram[:, k, other] = (trits[k] * trits[other]).sum(-1).to(torch.float64)
    right = torch.stack([(plane * groups.weights).sum(-1) for plane in trits], -1)
    return gram, right


def ridge_step(gram: Tensor, right: Tensor, ridge: Tensor, settings: TritPlaneSettings) -> tuple[Tensor, Tensor]:
    """Scales (S^T S + lambda I)^-1 S^T w, float64 [R, K], and lambda [R] after the condition guard."""
    condition = _condition(_with_ridge(gram, ridge))
    bad = ~(condition < settings.condition_threshold)
    raised = (ridge * torch.sqrt(condition / settings.condition_threshold)).clamp(max=settings.ridge_max)
    ridge = torch.where(bad, torch.where(raised.isnan(), settings.ridge_max, raised), ridge)
    return _solve(_with_ridge(gram, ridge), right), ridge


def _with_ridge(gram: Tensor, ridge: Tensor) -> Tensor:
    return gram + torch.diag_embed(ridge[:, None].expand(-1, gram.shape[-1]))


def _condition(a: Tensor) -> Tensor:
    """||A||_F ||A^-1||_F of symmetric positive definite matrices [R, K, K], K <= 3."""
    planes = a.shape[-1]
    if planes == 1:
        return torch.ones(a.shape[0], dtype=torch.float64, device=a.device)
    if planes == 2:
        a11, a22, s12 = a[:, 0, 0], a[:, 1, 1], a[:, 0, 1]
        return (a11 * a11 + a22 * a22 + 2 * (s12 * s12)) / (a11 * a22 - s12 * s12)
    l21, l31, l32, d1, d2, d3 = _factor(a)
    # A^-1 = M^T D^-1 M with M = L^-1: unit lower triangular, entries -l21, -l32 and m31.
    m31 = l21 * l32 - l31
    i33 = 1 / d3
    i22 = 1 / d2 + l32 * l32 * i33
    i11 = 1 / d1 + l21 * l21 / d2 + m31 * m31 * i33
    i12 = -l21 / d2 - m31 * l32 * i33
    i13, i23 = m31 * i33, -l32 * i33
    inverse = i11 * i11 + i22 * i22 + i33 * i33 + 2 * (i12 * i12 + i13 * i13 + i23 * i23)
    own = a[:, 0, 0] ** 2 + a[:, 1, 1] ** 2 + a[:, 2, 2] ** 2
    own = own + 2 * (a[:, 0, 1] ** 2 + a[:, 0, 2] ** 2 + a[:, 1, 2] ** 2)
    return torch.sqrt(own * inverse)


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """A^-1 b for [R, K, K] and [R, K]: adjugate for K = 2, L D L^T for K = 3.

    With all three planes equal the 3x3 determinant is of order lambda^2 and lost in rounding; the pivots are of order
    lambda and are not.
    """
    planes = a.shape[-1]
    if planes == 1:
        return b / a[:, 0]
    if planes == 2:
        a11, a22, s12 = a[:, 0, 0], a[:, 1, 1], a[:, 0, 1]
        determinant = a11 * a22 - s12 * s12
        first = (a22 * b[:, 0] - s12 * b[:, 1]) / determinant
        return torch.stack([first, (a11 * b[:, 1] - s12 * b[:, 0]) / determinant], -1)
    l21, l31, l32, d1, d2, d3 = _factor(a)
    y2 = b[:, 1] - l21 * b[:, 0]
    y3 = b[:, 2] - l31 * b[:, 0] - l32 * y2
    x3 = y3 / d3
    x2 = y2 / d2 - l32 * x3
    x1 = b[:, 0] / d1 - l21 * x2 - l31 * x3
    return torch.stack([x1, x2, x3], -1)


def _factor(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L D L^T of [R, 3, 3]: l21, l31, l32, d1, d2, d3."""
    d1 = a[:, 0, 0]
    l21, l31 = a[:, 0, 1] / d1, a[:, 0, 2] / d1
    d2 = a[:, 1, 1] - l21 * a[:, 0, 1]
    u = a[:, 1, 2] - l31 * a[:, 0, 1]
    l32 = u / d2
    return l21, l31, l32, d1, d2, a[:, 2, 2] - l31 * a[:, 0, 2] - l32 * u


def candidates(planes: int, order: TieOrder) -> list[tuple[int, ...]]:
    """All code tuples in the order in which ties are resolved."""
    digits = (-1, 0, 1) if order == "lexicographic" else (0, -1, 1)
    return list(itertools.product(digits, repeat=planes))


def nearest_trits(groups: Groups, scales: Tensor, order: TieOrder) -> Tensor:
    """Trit step: for every weight the first code tuple with the least squared error; int8 [K, R, G]."""
    w, planes = groups.weights, scales.shape[1]
    best = torch.full_like(w, torch.inf)
    trits = torch.zeros(planes, *w.shape, dtype=torch.int8, device=w.device)
    for candidate in candidates(planes, order):
        level = candidate[0] * scales[:, :1]
        for k in range(1, planes):
            level = level + candidate[k] * scales[:, k : k + 1]
        error = (w - level) ** 2
        better = error < best
        best = torch.where(better, error, best)
        for k in range(planes):
            trits[k].masked_fill_(better, candidate[k])
    return trits * groups.mask


def squared_error(groups: Groups, scales: Tensor, trits: Tensor) -> Tensor:
    """Sum of squared errors of every group, float64 [R]."""
    decoded = torch.zeros_like(groups.weights)
    for k, plane in enumerate(trits):
        decoded = decoded + scales[:, k : k + 1] * plane
    return ((groups.weights - decoded) ** 2).sum(-1)


def canonical(scales: Tensor, trits: Tensor) -> tuple[Tensor, Tensor]:
    """Planes in descending order of positive scales; a plane without scale has no trits.

    Negating a scale with its plane, and swapping planes, change nothing that is decoded.
    """
    trits = trits * scales.sign().to(torch.int8).T.unsqueeze(-1)
    ordered, index = torch.sort(scales.abs(), dim=-1, descending=True, stable=True)
    return ordered, trits.gather(0, index.T.unsqueeze(-1).expand(-1, -1, trits.shape[-1]))


def tied_sweep(groups: Groups, planes: int) -> tuple[Tensor, Tensor]:
    """One scale a group: the best of 65 roundings to integers -M..M, M = (3^K - 1) / 2, each with its least squares
    scale.

    The i-th rounding divides by max |w| / delta with delta = (3.25 + i / 32) M / 4. Returns scales [R], trits int8 [K,
    R, G].
    """
    levels = (3**planes - 1) // 2
    largest = groups.weights.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, -1.0)
    scales = torch.zeros_like(largest)
    codes = torch.zeros(groups.weights.shape, dtype=torch.int8, device=groups.weights.device)
    for i in range(SWEEP_STEPS):
        rounded = _tied_codes(groups, largest / ((3.25 + i / 32) * levels / 4), levels)
        product = (rounded * groups.weights).sum(-1, keepdim=True)
        norm = (rounded.to(torch.float64) ** 2).sum(-1, keepdim=True)
        gain = torch.where(norm > 0, product * product / norm, 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scales = torch.where(better, torch.where(norm > 0, product / norm, 0.0), scales)
        codes = torch.where(better, rounded, codes)
    return scales[:, 0], _tied_trits(codes, planes)


def _tied_codes(groups: Groups, scale: Tensor, levels: int) -> Tensor:
    """Integer codes int8 [R, G] nearest to w / scale, halves away from zero; 0 where the scale is 0."""
    magnitude = groups.weights.abs()
    codes = torch.zeros(magnitude.shape, dtype=torch.int8, device=magnitude.device)
    for level in range(1, levels + 1):
        codes += (magnitude >= (level - 0.5) * scale).to(torch.int8)
    return codes * groups.weights.sign().to(torch.int8) * (scale > 0)


def _tied_trits(codes: Tensor, planes: int) -> Tensor:
    """Balanced ternary digits int8 [K, ...] of integer codes, the most significant first."""
    shifted = codes.to(torch.int16) + (3**planes - 1) // 2
    return torch.stack([(shifted // 3 ** (planes - 1 - k) % 3 - 1).to(torch.int8) for k in range(planes)])


def check_finite(weight: Tensor) -> None:
    """NonFiniteWeightError with the first NaN or infinity, if there is one."""
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), weight.shape[1])
        raise NonFiniteWeightError(row, column)
