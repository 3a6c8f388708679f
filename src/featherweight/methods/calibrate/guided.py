"""How a calibration and its sessions use the loss's gradients; guidance.py finds them."""

from __future__ import annotations

import abc
from collections.abc import Collection
from typing import cast

from torch import Tensor

from featherweight.methods.calibrate.feed import Feed
from featherweight.methods.calibrate.fitting import fitting
from featherweight.methods.calibrate.guidance import LEAST_SHARE, Guidance, GuidanceStore, HeldGuidance, guide
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.model.network.host import Host


class GuidedFeed(abc.ABC):
    """The part of `Calibration` that has to do with gradients."""

    host: Host
    settings: CalibrationSettings
    needs: frozenset[str]
    head: str | None
    embeddings: dict[str, Tensor]
    _guidance: Guidance | None = None

    @abc.abstractmethod
    def _start(self) -> None:
        """Find the hidden states in front of the first block."""

    def guide(self, layers: Collection[str] | None = None, store: GuidanceStore | None = None) -> None:
        """Run the network backward over all windows, for `calibration.guidance` and the Fisher factors, if these are
        wanted and were not found yet. Transforms of the whole model come before, `blocks` after it.

        Parameters
        ----------
        layers : those whose statistics will be gathered; None for all
        store : what has been found is kept there, and not computed again
        """
        factors = "output_gram" in self.needs
        if self._guidance is not None or not (self.settings.guidance or factors):
            return
        coded, self.embeddings = self.embeddings, {}  # the original's gradients
        fitting(cast(Feed, self), self._start)
        self.embeddings = coded
        within = [name for name, layer in self.host.layers.items() if layer.block is not None or name == self.head]
        wanted = [name for name in within if layers is None or name in layers]
        held: GuidanceStore = HeldGuidance() if store is None else store
        self._guidance = guide(cast(Feed, self), wanted, self.settings.guidance, factors, held)

    def guidance(self, layer: str) -> tuple[Tensor, float] | None:
        """Weights float32 [g, windows, T] of the tokens for a layer, and their effective number; see `Guidance`."""
        if self._guidance is None or not self.settings.guidance:
            return None
        tokens = self._guidance.feed.ids
        share = 0 if tokens is None else tokens.numel() // LEAST_SHARE
        return self._guidance.weights(layer, max(share, self.host.layers[layer].shape[1]))

    def fisher_factors(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """H_I float32 [in, in] and H_O [out, out] of a layer; "output_gram" must be among the needs."""
        block = self.host.layers[layer].block
        if self._guidance is None or not self._guidance.factors:
            raise ValueError(
                f"there are no Fisher factors of {layer}: declare 'output_gram' in the calibration's needs"
            )
        return self._guidance.fisher_factors(layer, len(self.host.blocks) if block is None else block)


class LayerWeights:
    """What each token counts for the layers of a block.

    effective : of layers whose gradients have been asked for, the effective number of tokens
    """

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.effective: dict[str, float] = {}
        self._found: dict[str, Tensor | None] = {}

    def guided(self, layer: str) -> Tensor | None:
        """float32 [g, windows, T] of a layer; a word goes to the log where there are none though they are wanted."""
        if not self.feed.settings.guidance:
            return None
        if layer not in self._found:
            found = self.feed.guidance(layer)
            self._found[layer] = None if found is None else found[0]
            if found is None:
                text = f"no gradient of the loss reached {layer}: its tokens count alike"
                self.feed.notify({"event": "note", "layer": layer, "text": text})
            else:
                self.effective[layer] = found[1]
        return self._found[layer]

    def runs(self, layer: str) -> int:
        """How many runs of output rows have weights of their own, 0 where tokens count alike."""
        found = self.guided(layer)
        return 0 if found is None else len(found)

    def of_rows(
        self, layer: str, batch: int, rows: Tensor, tokens: Tensor | None, block: Tensor | None
    ) -> Tensor | None:
        """Weights [n] of the tokens in rows [n, in], or [g, n] where the gradients give them; None: all alike.

        tokens : of each row, its number in the batch, None where they are all
        block : weights [B, T] of the batch for all layers of the block
        """
        weights, guided = None if block is None else block.reshape(-1), self.guided(layer)
        if guided is not None:
            first = self.feed.first_window(batch)
            count = len(self.feed.batches[batch]["input_ids"])
            own = guided[:, first : first + count].reshape(len(guided), -1).to(rows.device)
            weights = own if weights is None else own * weights
        if weights is None:
            return None
        weights = weights if tokens is None else weights[..., tokens]
        return weights if weights.shape[-1] == len(rows) else None  # not one row a token: all count the same
