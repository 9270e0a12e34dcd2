"""What objectives have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..trajectories import Batch, Pool, draw

MEASURED_BATCHES = 8


@dataclass(frozen=True)
class Material:
    """What every objective may draw from.

    Attributes:
        forget: states with predictions for a target prompt and for its anchor.
        retain: states of retain prompts, or none.
        retain_embeddings: (num_prompts, embedding_dim)
    """

    forget: Pool
    retain: Pool | None
    retain_embeddings: Tensor

    def draw_retained(self, size: int, generator: torch.Generator) -> Tensor:
        """Different retain embeddings, all of them if there are no more than ``size``."""
        size = min(size, len(self.retain_embeddings))
        chosen = torch.randperm(len(self.retain_embeddings), generator=generator)[:size]
        return self.retain_embeddings[chosen.to(self.retain_embeddings.device)]


Backward = Callable[[int, torch.Generator], Mapping[str, float]]


@dataclass(frozen=True)
class Phase:
    """A part of every step that has an optimizer of its own.

    Attributes:
        backward: given batch size and generator, adds a gradient to the hypernetwork; returns named values, ``loss`` among them.
        repeats: how often a step takes it.
        lr: highest learning rate; ``train.lr`` by default.
    """

    backward: Backward
    repeats: int = 1
    lr: float | None = None


class Objective(Protocol):
    """One training signal."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What a step does, one after another."""
        ...

    def measure(self, batch_size: int, generator: torch.Generator) -> Mapping[str, float]:
        """Figures of the finished network, for the pack."""
        ...


def dial(batch: Batch, share: Tensor, negative_guidance: float) -> Tensor:
    """y(s) for share = s / S, (batch,)."""
    away = batch.anchor_prediction - batch.prediction
    beyond = batch.anchor_prediction + negative_guidance * away
    share = share.view(-1, *[1] * (batch.prediction.dim() - 1))
    return torch.lerp(batch.prediction, beyond, share)


def end(batch: Batch, negative_guidance: float) -> Tensor:
    """y = e_m - gamma (e_p - e_m)."""
    return dial(batch, torch.ones_like(batch.sigmas), negative_guidance)


@torch.no_grad()
def measure_erasing(
    loss_at_end: Callable[[Batch], Tensor],
    pool: Pool,
    negative_guidance: float,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """The erase loss at s = S over some batches, and what it is without LoRA."""
    losses = []
    for _ in range(MEASURED_BATCHES):
        batch = draw(pool, batch_size, generator)
        plain = torch.nn.functional.mse_loss(batch.prediction, end(batch, negative_guidance))
        losses.append((float(loss_at_end(batch)), float(plain)))
    erase, without = (statistics.fmean(values) for values in zip(*losses, strict=True))
    return {"erase_loss": erase, "erase_loss_without": without}
