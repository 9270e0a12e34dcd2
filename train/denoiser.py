"""What training needs of a frozen diffusion model, and whether it has it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from unhype.checkpoint import BaseFingerprint, Pack
from unhype.families import FamilySpec
from unhype.host.denoise import ModelFiles, TextBatch
from unhype.lora import LoRAFactors, TargetModule

from .config import ConfigError, TrainConfig

log = logging.getLogger("unhype")


class DenoiserLike(Protocol):
    """A frozen model that predicts noise or velocity, with LoRA on some of its layers."""

    @property
    def family(self) -> FamilySpec: ...

    @property
    def targets(self) -> tuple[TargetModule, ...]: ...

    @property
    def fingerprint(self) -> BaseFingerprint: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, texts: Sequence[str]) -> TextBatch: ...

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts as the states of ``embed`` stand for them, from the first to the one that ends the text."""
        ...

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), fast."""
        ...

    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """What ``embed`` says of every token up to the end, (texts, tokens, embedding_dim), zeros behind; as fast."""
        ...

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        """The raw prediction (batch, channels, height, width), differentiable in ``factors``."""
        ...

    def target_weights(self) -> tuple[Tensor, ...]:
        """Weights (out_features, in_features) of the target modules."""
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


def files_of(config: TrainConfig) -> ModelFiles:
    """Where the config says that the model is."""
    return ModelFiles(config.checkpoint, config.text_encoders, config.vae)


def check_family(pack: Pack, denoiser: DenoiserLike) -> None:
    """Warn of another base model than the pack's.

    Raises:
        ConfigError: it is of another family: its text encoder and layers are not those that the pack knows.
    """
    info, name = pack.info, denoiser.fingerprint.name
    if denoiser.family != info.spec:
        raise ConfigError(
            f"{pack.name} was trained for {info.spec.title}, but {name} is {denoiser.family.title}. "
            f"Give {info.base.name} or a model like it."
        )
    if denoiser.fingerprint.digest != info.base.digest:
        log.warning(
            "%s was trained on %s, not on %s. That works as far as their text encoders agree.",
            pack.name,
            info.base.name,
            name,
        )


def reader(denoiser: DenoiserLike, pack: Pack) -> Callable[[Sequence[str]], Tensor]:
    """How to read prompts for a pack's gate: their ends, or all their tokens."""
    return denoiser.embed_tokens if pack.gate.config.tokens else denoiser.embed_pooled


class WrongGradientError(ValueError):
    """The gradient of a model does not agree with what the model computes."""


PROBE_CHANGE, PROBE_STEPS = 0.05, (0.25, 0.0625)
"""Of the prediction by random LoRA, and of that LoRA: the first is far above rounding, the second for states about which the model
is less linear. A gradient that is wrong agrees with neither."""
TOLERANCE = 0.25
"""Half precision is off by a few hundredths, a gradient that lost a tensor by half or more."""


def check_gradient(denoiser: DenoiserLike, x_t: Tensor, sigma: Tensor, text: TextBatch) -> None:
    """Make sure that training can trust a model's gradient: some models' code overwrites what the gradient needs.

    Args:
        x_t, sigma, text: what to try it on, as for ``predict``; a little of it is enough.

    Raises:
        WrongGradientError: it cannot.
    """
    coarse, fine = PROBE_STEPS
    try:
        error = gradient_error(denoiser, x_t, sigma, text, step=coarse)
        if error > TOLERANCE:
            error = min(error, gradient_error(denoiser, x_t, sigma, text, step=fine))
    except RuntimeError as reason:
        if "inplace operation" not in str(reason):
            raise
        error, problem = math.inf, "lost"
    else:
        problem = f"off by {error:.0%}"
    if error > TOLERANCE:
        raise WrongGradientError(
            f"The gradient of {denoiser.fingerprint.name} is {problem}, so it cannot be trained on: this ComfyUI computes "
            "such models in a way that training does not know. Update this package, or use ComfyUI 0.3.75."
        )


def gradient_error(
    denoiser: DenoiserLike,
    x_t: Tensor,
    sigma: Tensor,
    text: TextBatch,
    *,
    step: float = PROBE_STEPS[0],
) -> float:
    """Relative distance of a model's gradient from a finite difference, with random LoRA.

    With all of up, or all of down, times a: d/da e(a) at a = 1 is <up, de/d up>, and <down, de/d down> as well.
    """

    def predict(factors: LoRAFactors | None) -> Tensor:
        return denoiser.predict(x_t, sigma, text, factors).double()

    with torch.no_grad():
        plain = predict(None)
        factors = _random_factors(denoiser, len(x_t))
        change = (predict(factors) - plain).norm() / plain.norm()
        factors = factors.scaled(float(PROBE_CHANGE / change.clamp(min=1e-6)))
    for factor in (*factors.down, *factors.up):
        factor.requires_grad_()
    prediction = predict(factors)
    direction = (prediction - plain).detach()
    (prediction * direction).sum().backward()
    with torch.no_grad():
        more, less = (predict(factors.scaled(1 + sign * step)) for sign in (1, -1))
        wanted = float(((more - less) * direction).sum()) / (2 * step)
        slopes = [
            sum(float((f.grad * f).sum()) for f in side if f.grad is not None)
            for side in (factors.down, factors.up)
        ]
    return max(abs(slope - wanted) for slope in slopes) / max(abs(wanted), 1e-30)


def _random_factors(denoiser: DenoiserLike, batch: int) -> LoRAFactors:
    """Random matrices of rank 1 for the target modules."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(denoiser.device)

    targets = denoiser.targets
    return LoRAFactors(
        targets,
        tuple(draw(batch, 1, target.in_features) for target in targets),
        tuple(draw(batch, target.out_features, 1) for target in targets),
        torch.ones(batch, device=denoiser.device),
    )
