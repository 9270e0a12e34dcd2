"""The frozen diffusion model, for training outside the server: the checkpoint that ComfyUI loads, run by ComfyUI's own code.

Training applies LoRA by the same bypass (``bypass.adapted``) that the nodes use for sampling, on the same layers: what is trained is
what is served. What a family's network takes beside states and text is asked of the host's own model, as its samplers do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import BaseFingerprint
from ..families import Branch, FamilySpec
from ..lora import LoRAFactors, TargetModule
from .bypass import Site, adapted, find_sites, find_targets
from .euler import draw_noise, euler, guide, keep, on_first
from .files import CheckpointRefusedError, ModelFiles, load_parts
from .lift import GradientLift
from .locate import find_comfyui, use_as_library
from .text import TextBatch, TextEncoder, Tokens

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

__all__ = ["CheckpointRefusedError", "Denoiser", "ModelFiles", "TextBatch"]

SCHEDULER = "normal"
DIGEST_LENGTH = 16
PIXELS = 8
"""Of a picture's side to one of its latents, where the host tells a model of the size."""


class Denoiser:
    """A frozen model that predicts noise or velocity, with LoRA on some of its layers."""

    def __init__(
        self,
        patcher: ModelPatcher,
        text_encoder: TextEncoder,
        family: FamilySpec,
        name: str,
        vae: VAE | None = None,
    ) -> None:
        self.family = family
        self._vae = vae
        self._patcher = patcher
        self._model = model = patcher.model.eval().requires_grad_(False)
        self._text = text_encoder
        self.targets: tuple[TargetModule, ...] = find_targets(model.diffusion_model, family.targets)
        self._sites: tuple[Site, ...] = find_sites(model.diffusion_model, self.targets)
        self._overwritten = _overwritten(model.diffusion_model)
        self.fingerprint = BaseFingerprint(name, self._digest())

    @classmethod
    def load(
        cls, files: ModelFiles, comfyui: Path | None = None, *, pictures: bool = False
    ) -> Denoiser:
        """Load a model from the files that ComfyUI loads.

        Args:
            comfyui: where ComfyUI is, if it is not to be looked for.
            pictures: whether ``decode`` is wanted, too; training itself never leaves latent space.

        Raises:
            FileNotFoundError: there is no such file, or no ComfyUI.
            CheckpointRefusedError: a file is damaged or something else, a part is in none of them, or the family is unknown.
        """
        files.check_there()
        use_as_library(find_comfyui(comfyui))
        parts = load_parts(files, pictures=pictures)
        denoiser = cls(
            parts.patcher,
            TextEncoder(parts.clip),
            parts.family,
            files.checkpoint.name,
            parts.vae,
        )
        denoiser._load()
        return denoiser

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._patcher.load_device

    def embed(self, texts: Sequence[str]) -> TextBatch:
        """Encode prompts; ``ValueError`` if one is longer than what the model reads at once."""
        batch = self._text.embed(texts)
        self._load()
        return batch.to(self.device)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, each up to the one that ends the text."""
        return self._text.token_ids(texts)

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), fast."""
        pooled = self._text.embed_pooled(texts)
        self._load()
        return pooled.to(self.device)

    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """What ``embed`` says of every token, (texts, tokens, embedding_dim), zeros behind each end; fast."""
        said = self._text.embed_tokens(texts)
        self._load()
        return said.to(self.device)

    def token_embeddings(self, texts: Sequence[str]) -> Tokens:
        """Tokens of prompts; ``ValueError`` if CLIP-L is not the only text encoder, or a prompt is too long or weighted."""
        return self._text.token_embeddings(texts)

    def encode_embeddings(self, embeddings: Tensor, ends: Tensor) -> TextBatch:
        """``embed`` from token embeddings (batch, tokens, dim) that end at ``ends`` (batch,), differentiable in them."""
        batch = self._text.encode_embeddings(embeddings, ends)
        self._load()
        return batch.to(self.device)

    def vocabulary(self) -> Tensor:
        """The embedding of every token, (tokens, dim)."""
        return self._text.vocabulary()

    def spell(self, ids: Tensor) -> list[str]:
        """The text of each row of token ids (batch, tokens), up to its end."""
        return self._text.spell(ids)

    def words(self) -> list[str]:
        """Whole words of the text encoder that the hypernetwork reads, the most frequent ones first."""
        return self._text.words()

    def target_weights(self) -> tuple[Tensor, ...]:
        """Weights (out_features, in_features) of the target modules, of fused layers the rows that change."""
        layers = [self._model.diffusion_model.get_submodule(t.name) for t in self.targets]
        return tuple(
            layer.get_parameter("weight").narrow(0, t.start, t.out_features).float()
            for layer, t in zip(layers, self.targets, strict=True)
        )

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        """The network's raw prediction, differentiable in ``factors``.

        Args:
            x_t: states, (batch, channels, height, width)
            sigma: noise levels, (batch,)
            text: prompts, one a state.
            factors: LoRA, one set a state; none for the plain model.
        """
        device = self.device
        x_t, sigma = x_t.to(device), sigma.to(device)
        counts = [len(x_t), len(sigma), len(text), len(x_t if factors is None else factors)]
        if len(set(counts)) > 1:
            raise ValueError(
                "States, noise levels, prompts and LoRA must be as many as one another, "
                f"got {', '.join(map(str, counts))}."
            )
        model, sampling, dtype = self._model, self._model.model_sampling, self._dtype
        lift = GradientLift()
        if dtype == torch.float16:
            x_t, factors = lift.before(x_t), None if factors is None else _through(factors, lift)
            text = replace(
                text, cross=lift.before(text.cross), host_pooled=lift.before(text.host_pooled)
            )
        arguments = self._arguments(x_t, text)
        times = model.process_timestep(sampling.timestep(sigma).float(), x=x_t, **arguments)
        with self._adapted(factors):
            prediction = model.diffusion_model(
                sampling.calculate_input(sigma, x_t).to(dtype),
                times,
                transformer_options={"optimized_attention_override": _plain_attention},
                **arguments,
            )
        prediction = prediction.float()
        return lift.after(prediction) if dtype == torch.float16 else prediction

    def _arguments(self, x_t: Tensor, text: TextBatch) -> dict[str, Any]:
        """What the network takes beside states and times, made as the host's samplers make it of a conditioning."""
        conds = self._model.extra_conds(
            cross_attn=text.cross.to(self.device),
            pooled_output=text.host_pooled.to(self.device),
            noise=x_t,
            width=x_t.shape[3] * PIXELS,
            height=x_t.shape[2] * PIXELS,
            prompt_type="positive",
            device=self.device,
        )
        arguments = {}
        for name, cond in conds.items():
            value = cond.process_cond(batch_size=len(x_t), area=None).cond
            if isinstance(value, Tensor):
                floating = value.is_floating_point()
                value = value.to(self.device, self._dtype if floating else value.dtype)
            arguments["context" if name == "c_crossattn" else name] = value
        return arguments

    @contextmanager
    def _adapted(self, factors: LoRAFactors | None) -> Iterator[None]:
        """LoRA on the target modules inside the block, and an exact gradient."""
        hooks = []
        if torch.is_grad_enabled():
            hooks = [norm.register_forward_pre_hook(_clone_input) for norm in self._overwritten]
        try:
            with adapted(self._sites, factors) if factors is not None else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
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
        """Sample with the frozen model (Euler, classifier-free guidance) and keep states on the way.

        A family whose whole sampling carries the LoRA is made for sampling without guidance, and is sampled so.

        Args:
            text: prompts.
            seed: of the noise; the batch draws the same as the host's sampler would.
            size: of the picture in pixels.
            stop_indices: steps before which the state is kept.

        Returns:
            States (kept, batch, channels, height, width) in the order of the steps, and their sigmas (kept,).
        """
        kept = sorted(set(stop_indices))
        if not kept or kept[0] < 0 or kept[-1] >= steps:
            raise ValueError(f"stop_indices must be steps from 0 to {steps - 1}, got {kept}.")
        shape = (len(text), *self._latent_shape(size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        sigmas, states = self._euler(text, None, noise, steps, guidance_scale)
        return keep(states, kept), sigmas[kept]

    @torch.no_grad()
    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        """Sample whole (Euler, classifier-free guidance), with LoRA on the branch that the nodes apply it to.

        Args:
            text: prompts.
            factors: LoRA, one set a prompt; none for the plain model.
            noise: as of ``noise``.

        Returns:
            Latents, (batch, channels, height, width).
        """
        *_, latents = self._euler(text, factors, noise, steps, guidance_scale)[1]
        return latents

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        """Noise for pictures of ``size`` pixels, each from its own seed, (seeds, channels, height, width)."""
        return draw_noise(seeds, self._latent_shape(size))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1] of latents; ``ValueError`` if loaded without ``pictures``."""
        if self._vae is None:
            raise ValueError("The model was loaded for training alone; load it with pictures=True.")
        decoded = self._vae.decode(self._model.process_latent_out(latents.float()))
        self._load()
        return decoded.movedim(-1, 1).float().clamp(0, 1)

    def _euler(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Noise levels (steps + 1,), and the states before each step and after the last, made as they are asked for."""
        from comfy.samplers import calculate_sigmas

        sampling, device = self._model.model_sampling, self.device
        sigmas = calculate_sigmas(sampling, SCHEDULER, steps).to(device)
        noise = noise.to(device)
        first = float(sigmas[0])
        largest = float(sampling.sigma_max)
        full_noise = first > largest or math.isclose(first, largest, rel_tol=1e-5)
        guided = self.family.branch is not Branch.ALL and not math.isclose(guidance_scale, 1.0)
        both, applied = text, factors
        if guided:
            both = TextBatch.cat([text, self._empty.rows([0] * len(text))])
            applied = None if factors is None else on_first(factors)

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            levels = sigma.expand(len(both))
            inputs = torch.cat([x_t, x_t]) if guided else x_t
            raw = self.predict(inputs, levels, both, applied)
            denoised = sampling.calculate_denoised(levels, raw, inputs)
            return guide(denoised, guidance_scale) if guided else denoised

        x_t = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), full_noise)
        return sigmas, euler(denoise, x_t, sigmas)

    def _load(self) -> None:
        """Bring the model to its device, from which loading the text encoder may have moved it."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self._patcher], force_full_load=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self._model.manual_cast_dtype or self._model.get_dtype()

    def _latent_shape(self, size: int) -> tuple[int, int, int]:
        downscale = getattr(self._model.latent_format, "spacial_downscale_ratio", 8)
        if size % downscale or size < downscale:
            raise ValueError(f"size must be a multiple of {downscale} pixels, got {size}.")
        return self._model.latent_format.latent_channels, size // downscale, size // downscale

    @cached_property
    def _empty(self) -> TextBatch:
        """The empty prompt."""
        return self.embed([""])

    def _digest(self) -> str:
        """Hash of the target modules' names, shapes and weights."""
        hashed = hashlib.sha256()
        for target in sorted(self.targets, key=lambda target: (target.name, target.start)):
            layer = self._model.diffusion_model.get_submodule(target.name)
            rows = (
                layer.get_parameter("weight").detach().narrow(0, target.start, target.out_features)
            )
            # In one precision: which one the host loads a file in depends on the device.
            weight = rows.to(torch.float16).cpu().contiguous()
            hashed.update(f"{target.name} {tuple(weight.shape)} {weight.dtype}".encode())
            hashed.update(weight.view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()[:DIGEST_LENGTH]


def _through(factors: LoRAFactors, lift: GradientLift) -> LoRAFactors:
    """The factors, their gradient divided by what ``lift`` multiplies it with."""
    return replace(
        factors,
        down=tuple(map(lift.before, factors.down)),
        up=tuple(map(lift.before, factors.up)),
        scale=lift.before(factors.scale),
    )


def _overwritten(diffusion_model: nn.Module) -> tuple[nn.Module, ...]:
    """Layers whose input the host's code changes in place afterwards, so that the gradient needs a copy of it."""
    from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

    return tuple(
        layer
        for block in diffusion_model.modules()
        if isinstance(block, DoubleStreamBlock | SingleStreamBlock)
        for layer in block.children()
        if isinstance(layer, nn.LayerNorm)
    )


def _clone_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0].clone(), *args[1:]


def _plain_attention(chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own attention in place of the one the host chose: it carries the gradient, and depends on no free memory."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)
