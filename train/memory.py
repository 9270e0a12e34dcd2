"""Going on when memory runs out: compute fewer samples at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger("unhype")
Value = TypeVar("Value")


class TooLittleMemoryError(RuntimeError):
    """Not even one sample at a time fits into memory."""


@dataclass
class Share:
    """How many samples are computed at once: as many as were asked for, and half of it whenever memory runs out.

    Attributes:
        what: they are, for messages.
        remedy: what helps if not even one fits.
    """

    at_once: int
    what: str
    remedy: str

    def attempt(self, action: Callable[[int], Value]) -> Value:
        """The result of ``action(at_once)``, which must be as if new when it is called again.

        Raises:
            TooLittleMemoryError: not even one sample at once fits.
        """
        while True:
            try:
                return action(self.at_once)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.at_once == 1:
                    raise TooLittleMemoryError(
                        f"Out of memory with {self.what}: not even one at a time fits. {self.remedy}, "
                        "or close what else uses this memory."
                    ) from error
            # Here, not above: the error keeps alive what its frames hold.
            free_memory()
            before, self.at_once = self.at_once, (self.at_once + 1) // 2
            log.warning(
                "Out of memory with %d %s at once; going on with %d at once, which is slower.",
                before,
                self.what,
                self.at_once,
            )


def step_share(batch_size: int) -> Share:
    """For the samples of a training step."""
    return Share(
        batch_size,
        "samples of a training step",
        "Lower trajectories.size, objective.retain_batch_size, network.rank or network.hidden_dim",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of an accelerator or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Of the CPU there is no class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
