"""What an edit in closed form is refined towards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.hypernetwork import EditsHypernetwork

from ..config import ObjectiveConfig
from ..denoiser import DenoiserLike
from ..trajectories import Batch, Pool, draw
from .base import Material, Phase, accumulate, end, measure_erasing


@dataclass(frozen=True)
class Refinement:
    """Regress the prediction with an edit onto the anchor's, and change what stays no more than the solution does.

    With E_k the edit of concept k, r the states of what stays and L_0 the loss without LoRA,

        L = mean |e_{theta + H(c, S)}(z, t, p) - (e_m - gamma (e_p - e_m))|^2 + lambda L_0 R / R_start,    R = mean_k mean_r |E_k r|^2

    summed over layers. The solution brings the text's states near the anchor's; the model may see a thing in what is left between.

    Attributes:
        kept: mean of r r^T, (dim, dim).
        unit: L_0 / R_start.
    """

    config: ObjectiveConfig
    hypernetwork: EditsHypernetwork
    denoiser: DenoiserLike
    material: Material
    kept: Tensor
    unit: float

    @staticmethod
    def of(
        config: ObjectiveConfig,
        hypernetwork: EditsHypernetwork,
        denoiser: DenoiserLike,
        material: Material,
        kept: Tensor,
    ) -> Refinement:
        """Of a hypernetwork that holds the solution."""
        with torch.no_grad():
            start = float(change_of_kept(hypernetwork, kept))
        without = loss_without(material.forget, config.negative_guidance)
        return Refinement(
            config, hypernetwork, denoiser, material, kept, without / max(start, 1e-12)
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.backward, relative=True),)

    def backward(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        batch = draw(self.material.forget, batch_size, generator)
        erase = accumulate(batch_size, parts, lambda part: self._regression(batch.part(part)))
        values = {"erase": erase}
        if weight := self.config.hold:
            change = self.unit * change_of_kept(self.hypernetwork, self.kept)
            (weight * change).backward()
            values["change"] = float(change.detach())
        return {"loss": erase + self.config.hold * values.get("change", 0.0), **values}

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        guidance = self.config.negative_guidance
        return measure_erasing(
            self._regression, self.material.forget, guidance, batch_size, generator, parts
        )

    def _regression(self, batch: Batch) -> Tensor:
        factors = self.hypernetwork.generate(batch.text.pooled)
        prediction = self.denoiser.predict(batch.latents, batch.sigmas, batch.text, factors)
        return F.mse_loss(prediction.float(), end(batch, self.config.negative_guidance))


def change_of_kept(hypernetwork: EditsHypernetwork, kept: Tensor) -> Tensor:
    """R: how far the edits move states with mean r r^T = ``kept`` (dim, dim), in what the layers make of them."""
    down, mix = hypernetwork.down, hypernetwork.mix
    seen = sum((up.mT @ up for up in hypernetwork.up), torch.zeros_like(mix[0, :1, :1]))
    moved = down @ kept.to(down) @ down.mT  # (concepts, rank, rank)
    return (mix.mT @ seen @ mix * moved).sum((1, 2)).mean()


def loss_without(pool: Pool, negative_guidance: float) -> float:
    """L_0 over all of a pool."""
    away = pool.anchor_prediction - pool.prediction
    return float(((1 + negative_guidance) * away).square().mean())
