"""What the hypernetwork is trained towards."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unhype.hypernetwork import Hypernetwork

from .config import ObjectiveConfig, ObjectiveName
from .denoiser import DenoiserLike
from .trajectories import Batch, Pool, draw

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


class Objective(Protocol):
    """One training signal."""

    def backward(self, batch_size: int, generator: torch.Generator) -> Mapping[str, float]:
        """Add the gradient of one step to the hypernetwork; return named values, ``loss`` among them."""
        ...

    def measure(self, batch_size: int, generator: torch.Generator) -> Mapping[str, float]:
        """Figures of the finished network, for the pack."""
        ...


@dataclass(frozen=True)
class Direct:
    """Regress the adapted prediction onto the base prediction, moved towards the anchor by s / S.

    y(s) = e_p + s/S ((e_m - gamma (e_p - e_m)) - e_p)
    L = mean |e_{theta + H(c, s)}(z, t, p) - y(s)|^2 + lambda_w mean |dW(c_r, S)|_F^2 + lambda_f mean |e_{theta + H(c_r, S)}(z, t, r) - e_r|^2
    """

    config: ObjectiveConfig
    hypernetwork: Hypernetwork
    denoiser: DenoiserLike
    material: Material

    def backward(self, batch_size: int, generator: torch.Generator) -> Mapping[str, float]:
        forget = draw(self.material.forget, batch_size, generator)
        erase = self._regression(forget, self._positions(batch_size, generator))
        erase.backward()
        values = {"erase": float(erase.detach())}

        if self.config.weight_retention:
            embeddings = self.material.retain_embeddings
            size = min(self.config.retain_batch_size, len(embeddings))
            chosen = torch.randperm(len(embeddings), generator=generator)[:size]
            factors = self.hypernetwork.generate(embeddings[chosen.to(embeddings.device)])
            retain = factors.squared_norm().mean()
            (self.config.weight_retention * retain).backward()
            values["retain"] = float(retain.detach())

        if self.config.function_retention and self.material.retain is not None:
            kept = draw(self.material.retain, batch_size, generator)
            full = torch.full((batch_size,), float(self.hypernetwork.config.num_steps))
            change = self._regression(kept, full)
            (self.config.function_retention * change).backward()
            values["change"] = float(change.detach())

        loss = (
            values["erase"]
            + self.config.weight_retention * values.get("retain", 0.0)
            + self.config.function_retention * values.get("change", 0.0)
        )
        return {"loss": loss, **values}

    @torch.no_grad()
    def measure(self, batch_size: int, generator: torch.Generator) -> Mapping[str, float]:
        """The erase loss at s = S over some batches, and what it is without LoRA."""
        full = torch.full((batch_size,), float(self.hypernetwork.config.num_steps))
        losses = []
        for _ in range(MEASURED_BATCHES):
            batch = draw(self.material.forget, batch_size, generator)
            target = dial(batch, torch.ones_like(batch.sigmas), self.config.negative_guidance)
            plain = torch.nn.functional.mse_loss(batch.prediction, target)
            losses.append((float(self._regression(batch, full)), float(plain)))
        erase, without = (statistics.fmean(values) for values in zip(*losses, strict=True))
        return {"erase_loss": erase, "erase_loss_without": without}

    def _positions(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """s, one a sample: S for a share of them, else uniform in [0, S)."""
        full = torch.rand(batch_size, generator=generator) < self.config.full_strength
        position = torch.rand(batch_size, generator=generator).masked_fill(full, 1.0)
        return position * self.hypernetwork.config.num_steps

    def _regression(self, batch: Batch, s: Tensor) -> Tensor:
        s = s.to(batch.latents.device)
        factors = self.hypernetwork.generate(batch.text.pooled, s)
        prediction = self.denoiser.predict(batch.latents, batch.sigmas, batch.text, factors)
        target = dial(batch, s / self.hypernetwork.config.num_steps, self.config.negative_guidance)
        return torch.nn.functional.mse_loss(prediction.float(), target)


def dial(batch: Batch, share: Tensor, negative_guidance: float) -> Tensor:
    """y(s) for share = s / S, (batch,)."""
    away = batch.anchor_prediction - batch.prediction
    beyond = batch.anchor_prediction + negative_guidance * away
    share = share.view(-1, *[1] * (batch.prediction.dim() - 1))
    return torch.lerp(batch.prediction, beyond, share)


def make_objective(
    config: ObjectiveConfig,
    *,
    hypernetwork: Hypernetwork,
    denoiser: DenoiserLike,
    material: Material,
) -> Objective:
    """The objective that the config names."""
    match config.name:
        case ObjectiveName.DIRECT:
            return Direct(config, hypernetwork, denoiser, material)
