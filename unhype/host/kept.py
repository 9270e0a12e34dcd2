"""What layers make of a text, kept from one step of sampling to the next.

A U-Net asks for keys and values of the same text at every step. With a LoRA each of them takes three products; kept, it takes a
copy, and a GPU that is faster than Python no longer waits for their start. Nothing here goes by what ought to be the same: inputs
and results are compared.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

ROOM = 128 * 2**20
"""Bytes of results that a run keeps. One guided picture of Stable Diffusion XL needs 49 MiB in half precision for 77 tokens, of 1.5 it
needs 7; where pictures or tokens are so many that there is no room, the GPU is busy without."""
TRIES = 2
"""How often in a row an input may turn out to be another one until results of its kind are kept no longer."""
STALE = 16
"""After so many inputs of other kinds a record makes room."""


class KeptResults:
    """Results of layers in one sampling run, by a key for inputs that may be the same."""

    def __init__(self, room: int = ROOM) -> None:
        self._room, self._opened = room, 0
        self._records: dict[Hashable, Record] = {}

    def open(self, key: Hashable, x: Tensor, size: int) -> Record | None:
        """The record of inputs like this, for as many bytes of results; none if there is no room, or no use.

        Must come before a layer may change the input in place.
        """
        self._opened += 1
        key = (key, x.shape, x.dtype, x.device)
        record = self._records.get(key)
        if record is None:
            for other, found in list(self._records.items()):
                if found.size and self._opened - found.opened > STALE:
                    self._records.pop(other, None)
            if size > self._room - sum(found.size for found in self._records.values()):
                return None
            record = self._records[key] = Record(size)
        record.opened = self._opened
        if not record.size:
            return None
        record.begin(x)
        return record


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

    The layer that is given the input first computes its result at every step. While that and the input stay the same, other
    layers may ``get`` what they made of it before. A layer whose weight is changed in place, between two steps, where the first
    one's is not, would not be seen; the host does so by hooks alone, and no run with hooks keeps anything.

    Attributes:
        size: bytes that results may take; 0 once it is given up.
        opened: when it was last asked for.
    """

    def __init__(self, size: int) -> None:
        self.size, self.opened = size, 0
        self._tries, self._used, self._known = TRIES, 0, False
        self._input: Tensor | None = None
        self._now: Tensor | None = None
        self._same: Tensor | None = None
        self._results: dict[nn.Module, Result] = {}

    def begin(self, x: Tensor) -> None:
        """A step gives this input; whether it is the same is asked for with ``check``, so that the device is waited for once."""
        self._known, self._now = False, x.clone()
        self._same = None if self._input is None else (x == self._input).all()

    def check(self, layer: nn.Module, value: Tensor) -> None:
        """What the first layer made of the input in this step."""
        before = self._results.get(layer)
        if self._same is not None and before is not None:
            self._known = bool(self._same & (value == before.value).all())
        if self._known:
            self._tries = TRIES
        else:
            self._start(layer, value)
        self._now = self._same = None

    def _start(self, layer: nn.Module, value: Tensor) -> None:
        """Forget what turned out to be of something else, and begin with this step's input."""
        self._tries -= bool(self._results)
        self._results.clear()
        self._used, self._input = 0, self._now
        if self._tries:
            self.add(layer, value)
        else:
            self.size, self._input = 0, None

    def add(self, layer: nn.Module, value: Tensor) -> None:
        """Keep what a layer made of the input."""
        before = self._results.pop(layer, None)
        self._used -= 0 if before is None else before.value.nbytes
        if self._used + value.nbytes <= self.size:
            self._used += value.nbytes
            # A copy: whoever asked for it may change it in place.
            self._results[layer] = Result(value.clone(), getattr(layer, "weight", None))

    def get(self, layer: nn.Module) -> Tensor | None:
        """A copy of what a layer made of the input, if that is kept and would be the same now."""
        result = self._results.get(layer) if self._known else None
        return result.value.clone() if result is not None and result.is_of(layer) else None
