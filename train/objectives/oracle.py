"""How long a step of the simulated descent must be, measured by the real one."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import step_share
from ..trajectories import Batch, Tick, draw
from .base import MEASURED_BATCHES, cut
from .trajectory import InertError, Trajectory

log = logging.getLogger("unhype")

RATIO, MOST = 10**0.5, 7
"""Between the etas tried, and how many."""
DIVERGED = 100.0
"""Times the loss at the start; batches differ, so no small multiple tells."""
TINY = 1e-30

Average = Callable[[Tensor], Tensor]
"""Over the processes that train together."""


@dataclass(frozen=True)
class Descent:
    """Plain gradient descent with this eta, and the task loss it ends at."""

    eta: float
    loss: float


def mean_gradient(
    objective: Trajectory, batch: Batch, theta: Tensor, at_once: int
) -> tuple[float, Tensor]:
    """L_task over a batch and its gradient, (size,), with the same theta, (1, size), for all samples; some at once."""
    size = len(batch.latents)
    loss, gradient = 0.0, torch.zeros_like(theta[0])
    for part, share in cut(size, math.ceil(size / at_once)):
        rows = batch.part(part)
        here, g = objective.task_gradient(rows, theta.expand(len(rows.latents), -1))
        loss, gradient = loss + share * here, gradient + share * g.mean(dim=0)
    return loss, gradient


def find_eta(
    objective: Trajectory, batch_size: int, *, seed: int, average: Average, tick: Tick
) -> Descent:
    """The eta with which S steps of plain gradient descent on one static LoRA, from theta_0, end lowest.

    Tried in turn, until one does worse than that before: eta_0, RATIO eta_0, .... If the loss fell as steeply all the way as
    it does at first, eta_0 = L / (S |g|^2) would bring it to zero.

    Raises:
        InertError: the loss falls with none.
    """
    start, num_steps, share = objective.start(), objective.num_steps, step_share(batch_size)

    def descend(theta: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        """L_task and its gradient, (1, size), for the same theta in all samples."""
        batch = draw(objective.material.forget, batch_size, generator)
        loss, g = share.attempt(lambda at_once: mean_gradient(objective, batch, theta, at_once))
        both = average(torch.cat([g, g.new_tensor([loss])]))
        return float(both[-1]), both[None, :-1]

    def survey(theta: Tensor) -> tuple[float, Tensor]:
        """The same over some batches."""
        generator = torch.Generator().manual_seed(seed)
        losses, gradients = zip(
            *(descend(theta, generator) for _ in range(MEASURED_BATCHES)), strict=True
        )
        return statistics.fmean(losses), torch.stack(gradients).mean(dim=0)

    first, g = survey(start)
    eta = first / max(num_steps * float(g.square().sum()), TINY)
    best: Descent | None = None
    for attempt in range(MOST):
        theta, loss = start, first
        generator = torch.Generator().manual_seed(seed + 1)
        for step in range(num_steps):
            loss, g = descend(theta, generator)
            if not loss < DIVERGED * first:
                break
            theta = theta - eta * g
            tick(attempt * num_steps + step + 1, MOST * num_steps)
        else:
            loss, _ = survey(theta)
        log.info("eta %.3g: the erase loss goes from %.4g to %.4g", eta, first, loss)
        if not loss < (best.loss if best else first):
            break
        best = Descent(eta, loss)
        eta *= RATIO
    tick(MOST * num_steps, MOST * num_steps)
    if best is None:
        raise InertError(
            f"The erase loss, {first:.4g} without LoRA, falls with no step of gradient descent tried, from eta {eta:.3g} on. "
            "Give objective.eta a number, or use objective.name direct."
        )
    return best
