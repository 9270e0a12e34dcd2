"""The default objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unhype.hypernetwork import Hypernetwork

from ..config import ObjectiveConfig
from ..denoiser import DenoiserLike
from ..trajectories import Batch, draw
from .base import Material, Phase, accumulate, dial, measure_erasing


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

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.backward),)

    def backward(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        forget = draw(self.material.forget, batch_size, generator)
        s = self.positions(batch_size, generator)
        erase = accumulate(
            batch_size, parts, lambda part: self._regression(forget.part(part), s[part])
        )
        values = {"erase": erase}

        if weight := self.config.weight_retention:
            embeddings = self.material.draw_retained(self.config.retain_batch_size, generator)
            values["retain"] = accumulate(
                len(embeddings),
                parts,
                lambda part: self.hypernetwork.generate(embeddings[part]).squared_norm().mean(),
                weight,
            )

        if (weight := self.config.function_retention) and self.material.retain is not None:
            kept = draw(self.material.retain, batch_size, generator)
            values["change"] = accumulate(
                batch_size, parts, lambda part: self._at_end(kept.part(part)), weight
            )

        loss = (
            values["erase"]
            + self.config.weight_retention * values.get("retain", 0.0)
            + self.config.function_retention * values.get("change", 0.0)
        )
        return {"loss": loss, **values}

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        return measure_erasing(
            self._at_end,
            self.material.forget,
            self.config.negative_guidance,
            batch_size,
            generator,
            parts,
        )

    def _at_end(self, batch: Batch) -> Tensor:
        """The regression at s = S for every sample."""
        return self._regression(
            batch, torch.full_like(batch.sigmas, self.hypernetwork.config.num_steps)
        )

    def positions(self, batch_size: int, generator: torch.Generator) -> Tensor:
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
