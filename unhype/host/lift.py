"""A gradient that half precision can hold.

A loss that is a mean over latents gives each of them a gradient around 1e-6, and float16 ends at 6e-8: inside a network of that
precision most of it would be lost. So it is made larger on the way in and as much smaller on the way out; powers of two, which
round nothing. Unlike a scale of the loss, this needs no guess and never overflows at the entrance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOP = 2.0**-6
"""About as large as the largest part of a gradient becomes: further inside they grow where they are summed over tokens."""
SMALLEST = 2.0**-100
"""Of a gradient's largest part; what is smaller is left as it is."""


class GradientLift:
    """For one call of a network: its arguments go through ``before``, its result through ``after``."""

    def __init__(self) -> None:
        self._factor: Tensor | None = None

    def before(self, argument: Tensor) -> Tensor:
        """The argument, whose gradient will be divided; one that needs no gradient is returned as it is."""
        return _through(argument, self._lower) if argument.requires_grad else argument

    def after(self, result: Tensor) -> Tensor:
        """The result, the largest part of whose gradient will be about ``TOP``."""
        return _through(result, self._raise) if result.requires_grad else result

    def _raise(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax()
        usable = torch.isfinite(largest) & (largest > SMALLEST)
        self._factor = TOP * torch.exp2(-torch.where(usable, largest, 1.0).log2().floor())
        return gradient * self._factor

    def _lower(self, gradient: Tensor) -> Tensor:
        if self._factor is None:
            raise RuntimeError("The result of the call did not go through `after`.")
        return gradient / self._factor.to(gradient.device)


def _through(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The value, whose gradient will be changed."""
    result: Any = _Through.apply(value, change)
    return result


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.change(gradient), None
