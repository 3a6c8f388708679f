"""Weights that are pairs of pulse counters behind a saturating curve (arXiv 1707.06381).

A device's conductance grows with identical pulses, less and less; a weight is the difference of two devices. Learning
sends single pulses by the sign of delta * x: no gradient is kept, and weights have few levels.

LARGELY RECONSTRUCTED. Of the paper the abstract alone was at hand: that forward, backward and update steps fit devices
of discrete, bounded conductance, and that unidirectional updating cancels what is asymmetric. Curve, refresh, dead
zone, random pulses, variation and every constant are from the common practice of that literature, none the authors'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import FeatherError

START = 0.125
"""Share of all pulses that counters have at most at the start: with more, those of a bent curve hardly move."""


@dataclass(frozen=True)
class Devices:
    """What devices do.

    pulses : P, after which a device is full
    tau : in pulses, how soon the curve saturates; infinite: a straight line
    least, most : conductances of no pulse and of P
    device_variation : deviation of a device's increments, as a share of them, drawn once for each device
    pulse_variation : the same of each pulse
    """

    pulses: int = 64
    tau: float = math.inf
    least: float = 0.02
    most: float = 1.0
    device_variation: float = 0.0
    pulse_variation: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.pulses <= 127:
            raise FeatherError(f"devices take 1 to 127 pulses, and not {self.pulses}: counters are int8")
        if self.tau <= 0 or not 0 <= self.least < self.most:
            raise FeatherError("a device has tau above 0, and conductances 0 <= least < most")

    def grown(self, n: Tensor) -> Tensor:
        """The share of the way from least to most after n pulses, a whole number or not, float32."""
        n = n.to(torch.float32)
        if math.isinf(self.tau):
            return n / self.pulses
        return -torch.expm1(-n / self.tau) / -math.expm1(-self.pulses / self.tau)

    def counted(self, share: Tensor) -> Tensor:
        """The inverse of `grown`: pulses, not whole."""
        if math.isinf(self.tau):
            return share * self.pulses
        return -self.tau * torch.log1p(share * math.expm1(-self.pulses / self.tau))

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """[P + 1] conductances."""
        n = torch.arange(self.pulses + 1, device=device)
        return self.least + (self.most - self.least) * self.grown(n)


class Unidirectional:
    """A matrix of pairs of counters, int8 [out, in] each; pulses only ever go up.

    weight() = gain * (G(plus) - G(minus)). A pair of which one is full begins anew: both are set to 0, then the
    stronger side to the count that is nearest the difference. The gain is such that weights deviate by 1 / sqrt(in) at
    the start, where counters are random.

    refreshed : the share of full pairs that begin anew in a step, so that not all do together; a full one takes no
        further pulse until it has
    """

    def __init__(
        self, shape: tuple[int, int], devices: Devices, generator: torch.Generator, *, refreshed: float = 1.0
    ) -> None:
        self.devices, self.generator, self.refreshed = devices, generator, refreshed
        self.device = generator.device
        self.table = devices.table(self.device)
        high = max(1, int(devices.pulses * START)) + 1
        self.plus, self.minus = (
            torch.randint(high, shape, generator=generator, device=self.device).to(torch.int8) for _ in range(2)
        )
        vary = devices.device_variation
        self.factors = [1 + vary * self._normal(shape) for _ in range(2)] if vary else None
        self.offsets = [torch.zeros(shape, device=self.device) for _ in range(2)] if devices.pulse_variation else None
        self.gain = 1.0
        self.gain = 1 / (math.sqrt(shape[1]) * float(self.weight().std()))

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def conductances(self) -> tuple[Tensor, Tensor]:
        """Of both sides, float32 [out, in]: the table's, with each device's own variation."""
        both = []
        for i, counter in enumerate((self.plus, self.minus)):
            grown = self.table[counter.long()] - self.devices.least
            grown = grown * self.factors[i] if self.factors is not None else grown
            both.append(self.devices.least + (grown + self.offsets[i] if self.offsets is not None else grown))
        return both[0], both[1]

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        plus, minus = self.conductances()
        return self.gain * (plus - minus)

    def pulse(self, direction: Tensor) -> None:
        """A pulse for each weight: int8 [out, in] of -1, 0 (none) and 1."""
        full = torch.maximum(self.plus, self.minus) >= self.devices.pulses
        # Full pairs that are called for make room first, so that no pulse is lost by those that do.
        turn = torch.rand(full.shape, generator=self.generator, device=self.device) < self.refreshed
        self.refresh(full & (direction != 0) & turn)
        for i, (counter, sign) in enumerate(((self.plus, 1), (self.minus, -1))):
            sent = (direction == sign) & (counter < self.devices.pulses)
            if self.offsets is not None:
                n = counter.long()
                step = self.table[(n + 1).clamp(max=self.devices.pulses)] - self.table[n]
                self.offsets[i] += sent * step * self.devices.pulse_variation * self._normal(tuple(n.shape))
            counter += sent.to(torch.int8)

    def refresh(self, chosen: Tensor) -> None:
        """Begin chosen pairs (bool [out, in]) anew, with the level nearest their weight and never the other sign."""
        weight = self.weight() / self.gain
        nearest = (weight.abs().unsqueeze(-1) - (self.table - self.devices.least)).abs().argmin(-1).to(torch.int8)
        # The last level would be full again: a weight there takes the level before.
        nearest = nearest.clamp(max=max(1, self.devices.pulses - 1))
        self.plus = torch.where(chosen, torch.where(weight > 0, nearest, 0), self.plus)
        self.minus = torch.where(chosen, torch.where(weight < 0, nearest, 0), self.minus)
        if self.offsets is not None:
            self.offsets = [offset.masked_fill(chosen, 0) for offset in self.offsets]


class Bidirectional:
    """The baseline: one device a weight against a reference at mid-range; pulses go up, or down by the mirrored curve.

    weight() = gain * (G - (least + most) / 2). As a conductance that went up and down lies on no common table, it is
    kept as a share of the range, float32 [out, in].
    """

    def __init__(self, shape: tuple[int, int], devices: Devices, generator: torch.Generator) -> None:
        self.devices, self.generator, self.device = devices, generator, generator.device
        self.share = 0.25 + 0.5 * torch.rand(shape, generator=generator, device=self.device)
        vary = devices.device_variation
        self.factor = 1 + vary * torch.randn(shape, generator=generator, device=self.device) if vary else None
        self.gain = 1.0
        self.gain = 1 / (math.sqrt(shape[1]) * float(self.weight().std()))

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self.gain * (self.devices.most - self.devices.least) * (self.share - 0.5)

    def steps(self) -> tuple[Tensor, Tensor]:
        """What a pulse up would add to the share, and one down take from it."""
        up, down = (self._raised(share) - share for share in (self.share, 1 - self.share))
        return up, down

    def _raised(self, share: Tensor) -> Tensor:
        n = (self.devices.counted(share) + 1).clamp(max=self.devices.pulses)
        return self.devices.grown(n)

    def pulse(self, direction: Tensor) -> None:
        """A pulse for each weight: int8 [out, in] of -1, 0 (none) and 1."""
        up, down = self.steps()
        step = torch.where(direction > 0, up, -down) * (direction != 0)
        if self.factor is not None:
            step = step * self.factor
        if self.devices.pulse_variation:
            noise = torch.randn(step.shape, generator=self.generator, device=self.device)
            step = step * (1 + self.devices.pulse_variation * noise)
        self.share = (self.share + step).clamp(0, 1)


def directions(
    delta: Tensor, x: Tensor, *, dead_zone: float = 0.0, rate: float | None = None, generator: torch.Generator
) -> Tensor:
    """Which weights get a pulse: against the sign of delta x, a batch's outer products summed, then the sign.

    Parameters
    ----------
    delta, x : [batch, out] and [batch, in]: the loss's gradient at a layer's sums, and its input
    dead_zone : products of no greater magnitude send none
    rate : pulses are sent with the probability min(1, rate * magnitude), so that the mean step is proportional; None:
        always

    Returns
    -------
    int8 [out, in] of -1, 0 and 1; 0 where the product is 0.
    """
    product = delta.T @ x
    sent = product.abs() > dead_zone
    if rate is not None:
        drawn = torch.rand(product.shape, generator=generator, device=product.device)
        sent &= drawn < rate * product.abs()
    return (-product.sign() * sent).to(torch.int8)


@dataclass(frozen=True)
class SynapseSettings:
    """A perceptron of pulses.

    sizes : of the layers, input first
    rule : "unidirectional", the paper's, or "bidirectional", the baseline
    busy : the dead zone of each step is set so that this share of a layer's weights gets a pulse; 1: none
    refreshed : see `Unidirectional`
    """

    sizes: tuple[int, ...]
    devices: Devices = Devices()
    rule: Literal["unidirectional", "bidirectional"] = "unidirectional"
    busy: float = 0.03
    refreshed: float = 1.0
    seed: int = 0


class SynapseNetwork:
    """Layers of devices with ReLU between them, and softmax with cross-entropy behind.

    A constant one beside the inputs of each layer is for its bias. Both directions see the same conductances.
    """

    def __init__(self, settings: SynapseSettings, device: torch.device | str = "cpu") -> None:
        if len(settings.sizes) < 2:
            raise FeatherError("a network has an input size and a size for each layer: give two or more sizes")
        self.settings = settings
        self.generator = torch.Generator(device=torch.device(device)).manual_seed(settings.seed)
        self.layers: list[Unidirectional | Bidirectional] = []
        for columns, rows in zip(settings.sizes[:-1], settings.sizes[1:], strict=True):
            shape = (rows, columns + 1)
            if settings.rule == "unidirectional":
                layer = Unidirectional(shape, settings.devices, self.generator, refreshed=settings.refreshed)
                self.layers.append(layer)
            else:
                self.layers.append(Bidirectional(shape, settings.devices, self.generator))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in] -> [batch, out] logits."""
        return self._forward(x)[-1][:, :-1]

    def _forward(self, x: Tensor) -> list[Tensor]:
        """Inputs of all layers with their constant, and the logits."""
        given = [_with_one(x)]
        for i, layer in enumerate(self.layers):
            z = given[-1] @ layer.weight().T
            given.append(_with_one(z.relu() if i + 1 < len(self.layers) else z))
        return given

    def learn(self, x: Tensor, y: Tensor) -> float:
        """One step on a batch: [batch, in], int64 [batch] of classes. Returns the loss before it."""
        given = self._forward(x)
        logits = given[-1][:, :-1]
        loss = float(torch.nn.functional.cross_entropy(logits, y))
        delta = (logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1])) / len(y)
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            magnitudes = (delta.T @ given[i]).abs().flatten()
            zone = 0.0
            if self.settings.busy < 1:
                place = min(len(magnitudes) - 1, int(len(magnitudes) * (1 - self.settings.busy)))
                zone = float(magnitudes.kthvalue(place + 1).values)
            sent = directions(delta, given[i], dead_zone=zone, generator=self.generator)
            if i:
                delta = (delta @ layer.weight())[:, :-1] * (given[i][:, :-1] > 0)
            layer.pulse(sent)
        return loss


def _with_one(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_ones(len(x), 1)), 1)
