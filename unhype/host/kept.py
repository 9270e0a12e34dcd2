"""What layers make of a text, kept from one step of sampling to the next.

A U-Net asks for keys and values of the same text at every step. With a LoRA each of them takes three products; kept, it takes a
copy, and a GPU that is faster than Python no longer waits for their start. Nothing here goes by what ought to be the same: inputs
and results are compared.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROOM = 64 * 2**20
"""Bytes of results that a run keeps: one guided picture of Stable Diffusion XL needs 49 MiB in half precision, of 1.5 it needs 7."""
TRIES = 2
"""Records that may turn out useless, one after the other, until nothing is kept of such inputs any more."""


class KeptResults:
    """Results of layers in one sampling run, by what asks for them."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._records: dict[Hashable, Record] = {}

    def open(self, key: Hashable, x: Tensor) -> Record:
        """The record of inputs like this, begun anew if the last one was not equal."""
        key = (key, x.shape, x.dtype, x.device)
        if key not in self._records:
            self._records[key] = Record(self)
        record = self._records[key]
        record.begin(x)
        return record

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes, which is then taken."""
        if size > self._room:
            return False
        self._room -= size
        return True

    def give(self, size: int) -> None:
        """So many bytes are free again."""
        self._room += size


@dataclass(frozen=True)
class Result:
    """What a layer made of an input, and the weight it had then."""

    value: Tensor
    weight: object

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the layer still has that weight; the host gives it another one where it merges a LoRA."""
        return getattr(layer, "weight", None) is self.weight


class Record:
    """An input and what layers made of it.

    The layer that is given the input first computes its result at every step. While that stays the same to the last bit, other
    layers may ``get`` what they made of the input before. A layer whose weight is changed in place, between two steps, where the
    first one's is not, would not be seen; the host does so by hooks alone, and no run with hooks keeps anything.
    """

    def __init__(self, kept: KeptResults) -> None:
        self._kept = kept
        self._input: Tensor | None = None
        self._results: dict[nn.Module, Result] = {}
        self._tries = TRIES
        self._known = False

    def begin(self, x: Tensor) -> None:
        """A step gives this input, compared before a layer may change it in place."""
        self._known = False
        if self._input is None or not torch.equal(x, self._input):
            self._clear()
            self._input = x.clone() if self._tries else None

    def check(self, layer: nn.Module, value: Tensor) -> None:
        """What the first layer made of the input in this step."""
        before = self._results.get(layer)
        self._known = before is not None and torch.equal(value, before.value)
        if self._known:
            self._tries = TRIES
        else:
            self._clear()
            self.add(layer, value)

    def add(self, layer: nn.Module, value: Tensor) -> None:
        """Keep what a layer made of the input, if there is room."""
        before = self._results.pop(layer, None)
        self._kept.give(0 if before is None else before.value.nbytes)
        if self._tries and not value.requires_grad and self._kept.take(value.nbytes):
            # A copy: whoever asked for it may change it in place.
            self._results[layer] = Result(value.clone(), getattr(layer, "weight", None))

    def get(self, layer: nn.Module) -> Tensor | None:
        """A copy of what a layer made of the input, if that is kept and would be the same now."""
        result = self._results.get(layer) if self._known else None
        return result.value.clone() if result is not None and result.is_of(layer) else None

    def _clear(self) -> None:
        """Forget results that turned out to be of something else."""
        self._tries -= bool(self._results)
        self._kept.give(sum(result.value.nbytes for result in self._results.values()))
        self._results.clear()
