"""What objectives have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
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


Backward = Callable[[int, torch.Generator, int], Mapping[str, float]]


@dataclass(frozen=True)
class Phase:
    """A part of every step that has an optimizer of its own.

    Attributes:
        backward: given batch size, generator and a number of parts, adds a gradient to the hypernetwork; returns named values,
            ``loss`` among them. What it draws does not depend on the parts that it is computed in, for the sake of memory.
        repeats: how often a step takes it.
        lr: highest learning rate; ``train.lr`` by default.
        relative: whether learning rates are in units of each parameter's root mean square at the start.
    """

    backward: Backward
    repeats: int = 1
    lr: float | None = None
    relative: bool = False


class Objective(Protocol):
    """One training signal."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What a step does, one after another."""
        ...

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        """Figures of the finished network, for the pack."""
        ...


def cut(size: int, parts: int) -> Iterator[tuple[slice, float]]:
    """A batch in nearly equal parts, none of them empty, and which share of it each is."""
    parts = min(size, parts)
    for part in range(parts):
        start, stop = size * part // parts, size * (part + 1) // parts
        yield slice(start, stop), (stop - start) / size


def accumulate(
    size: int, parts: int, loss: Callable[[slice], Tensor], weight: float = 1.0
) -> float:
    """Add the gradient of a weighted loss that is a mean over a batch, part by part.

    Returns:
        The loss without the weight.
    """
    total = 0.0
    for part, share in cut(size, parts):
        value = loss(part)
        (weight * share * value).backward()
        total += share * float(value.detach())
    return total


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
    parts: int,
) -> dict[str, float]:
    """The erase loss at s = S over some batches, each in parts, and what it is without LoRA."""
    losses = []
    for _ in range(MEASURED_BATCHES):
        batch = draw(pool, batch_size, generator)
        plain = torch.nn.functional.mse_loss(batch.prediction, end(batch, negative_guidance))
        adapted = sum(
            share * float(loss_at_end(batch.part(part))) for part, share in cut(batch_size, parts)
        )
        losses.append((adapted, float(plain)))
    erase, without = (statistics.fmean(values) for values in zip(*losses, strict=True))
    return {"erase_loss": erase, "erase_loss_without": without}
