"""Euler's method as the host's sampler of that name, for models that are run outside its samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..lora import LoRAFactors

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Denoised states, given states (batch, channels, height, width) and a noise level."""


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit noise, each row from its own seed, (seeds, *shape)."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def euler(denoise: Denoise, x_t: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """The states before each step and after the last, made as they are asked for.

    Args:
        x_t: where it starts, with as much noise as ``sigmas`` begin with.
        sigmas: noise levels, (steps + 1,)
    """
    yield x_t
    for sigma, following in pairwise(sigmas):
        x_t = x_t + (x_t - denoise(x_t, sigma)) / sigma * (following - sigma)
        yield x_t


def keep(states: Iterator[Tensor], stop_indices: Sequence[int]) -> Tensor:
    """The states of some steps, (stop_indices, batch, ...); none behind the last of them is made."""
    drawn = dict(zip(range(max(stop_indices) + 1), states, strict=False))
    return torch.stack([drawn[step] for step in stop_indices])


def guide(both: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance of conditional rows and, behind them, as many unconditional ones."""
    cond, uncond = both.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def on_first(factors: LoRAFactors) -> LoRAFactors:
    """Factors of the conditional rows, and as many without effect behind them."""
    twice = factors.rows([*range(len(factors)), *range(len(factors))])
    first = torch.arange(len(twice), device=twice.scale.device) < len(factors)
    return twice.scaled(first.to(twice.scale))
