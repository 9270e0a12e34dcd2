"""What training needs of a frozen diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unhype.checkpoint import BaseFingerprint
from unhype.families import FamilySpec
from unhype.host.denoise import TextBatch
from unhype.lora import LoRAFactors, TargetModule


class DenoiserLike(Protocol):
    """A frozen model that predicts noise, with LoRA on some of its layers."""

    @property
    def family(self) -> FamilySpec: ...

    @property
    def targets(self) -> tuple[TargetModule, ...]: ...

    @property
    def fingerprint(self) -> BaseFingerprint: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, texts: Sequence[str]) -> TextBatch: ...

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), fast."""
        ...

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        """The raw prediction (batch, channels, height, width), differentiable in ``factors``."""
        ...

    def rollout(
        self,
        text: TextBatch,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        size: int,
        stop_indices: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """States (kept, batch, channels, height, width) before the steps named, and their sigmas (kept,)."""
        ...


def rows(text: TextBatch, index: Tensor) -> TextBatch:
    """Some rows of a batch of texts, in the order of ``index``."""
    return TextBatch(cross=text.cross[index], pooled=text.pooled[index])
