"""The frozen diffusion model, for training outside the server: the checkpoint that ComfyUI loads, run by ComfyUI's own code.

Training applies LoRA by the same bypass (``bypass.adapted``) that the nodes use for sampling, on the same layers: what is trained is
what is served.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import BaseFingerprint
from ..families import FAMILIES, FamilySpec, family_of_host_class
from ..lora import LoRAFactors, TargetModule
from .bypass import Site, adapted, find_sites, find_targets
from .locate import find_comfyui, use_as_library
from .text import TextBatch, TextEncoder

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

__all__ = ["CheckpointRefusedError", "Denoiser", "TextBatch"]

SCHEDULER = "normal"
DIGEST_LENGTH = 16
OPTIONAL = {"text_projection.weight", "clip_l.logit_scale"}
"""Weights of the text encoder that its states do not depend on."""


class CheckpointRefusedError(ValueError):
    """A file is not a checkpoint that this version can train on."""


class Denoiser:
    """A frozen model that predicts noise, with LoRA on some of its layers."""

    def __init__(
        self, patcher: ModelPatcher, text_encoder: TextEncoder, family: FamilySpec, name: str
    ) -> None:
        self.family = family
        self._patcher = patcher
        self._model = model = patcher.model.eval().requires_grad_(False)
        self._text = text_encoder
        self.targets: tuple[TargetModule, ...] = find_targets(model.diffusion_model, family.targets)
        self._sites: tuple[Site, ...] = find_sites(model.diffusion_model, self.targets)
        self.fingerprint = BaseFingerprint(name, self._digest())

    @classmethod
    def load(cls, checkpoint: Path, comfyui: Path | None = None) -> Denoiser:
        """Load a single-file checkpoint.

        Args:
            comfyui: where ComfyUI is, if it is not to be looked for.

        Raises:
            FileNotFoundError: there is no such file, or no ComfyUI.
            CheckpointRefusedError: the file is damaged, no checkpoint, without a text encoder, or of no known family.
        """
        if not checkpoint.is_file():
            raise FileNotFoundError(
                f"There is no checkpoint {checkpoint}. Give the path of the model file that ComfyUI loads."
            )
        use_as_library(find_comfyui(comfyui))
        import comfy.sd

        state = _read(checkpoint)
        family = _family_of(checkpoint, state)
        names = set(state)
        # No output_vae: training never leaves latent space.
        patcher, clip, _, _ = comfy.sd.load_state_dict_guess_config(
            state, output_vae=False, output_clip=True
        ) or (None, None, None, None)
        if patcher is None:
            raise CheckpointRefusedError(f"ComfyUI cannot load {checkpoint}; is it whole?")
        if clip is None:
            raise CheckpointRefusedError(
                f"{checkpoint.name} has no text encoder. Training embeds prompts; give a full checkpoint "
                "with model and CLIP in one file."
            )
        _check_complete(checkpoint, names, patcher.model, clip.cond_stage_model)
        denoiser = cls(patcher, TextEncoder(clip), family, checkpoint.name)
        denoiser._load()
        return denoiser

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._patcher.load_device

    def embed(self, texts: Sequence[str]) -> TextBatch:
        """Encode prompts: states (batch, 77, dim) and pooled vectors (batch, embedding_dim)."""
        batch = self._text.embed(texts)
        self._load()
        return TextBatch(batch.cross.to(self.device), batch.pooled.to(self.device))

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), fast."""
        pooled = self._text.embed_pooled(texts)
        self._load()
        return pooled.to(self.device)

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
        counts = [len(x_t), len(sigma), len(text.cross), len(x_t if factors is None else factors)]
        if len(set(counts)) > 1:
            raise ValueError(
                "States, noise levels, prompts and LoRA must be as many as one another, "
                f"got {', '.join(map(str, counts))}."
            )
        sampling, dtype = self._model.model_sampling, self._dtype
        with adapted(self._sites, factors) if factors is not None else nullcontext():
            prediction = self._model.diffusion_model(
                sampling.calculate_input(sigma, x_t).to(dtype),
                sampling.timestep(sigma).float(),
                context=text.cross.to(device, dtype),
                transformer_options={"optimized_attention_override": _plain_attention},
            )
        return prediction.float()

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

        Args:
            text: prompts.
            seed: of the noise; the batch draws the same as the host's sampler would.
            size: of the picture in pixels.
            stop_indices: steps before which the state is kept.

        Returns:
            States (kept, batch, channels, height, width) in the order of the steps, and their sigmas (kept,).
        """
        from comfy.samplers import calculate_sigmas

        kept = sorted(set(stop_indices))
        if not kept or kept[0] < 0 or kept[-1] >= steps:
            raise ValueError(f"stop_indices must be steps from 0 to {steps - 1}, got {kept}.")
        sampling, device = self._model.model_sampling, self.device
        sigmas = calculate_sigmas(sampling, SCHEDULER, steps).to(device)
        shape = (len(text.cross), *self._latent_shape(size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        first = float(sigmas[0])
        largest = float(sampling.sigma_max)
        full_noise = first > largest or math.isclose(first, largest, rel_tol=1e-5)
        x_t = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), full_noise)
        both = self._with_empty(text)
        states = []
        for step in range(kept[-1] + 1):
            if step in kept:
                states.append(x_t)
            if step == kept[-1]:
                break
            sigma = sigmas[step]
            levels = sigma.expand(2 * len(x_t))
            doubled = torch.cat([x_t, x_t])
            raw = self.predict(doubled, levels, both, None)
            cond, uncond = sampling.calculate_denoised(levels, raw, doubled).chunk(2)
            denoised = uncond + guidance_scale * (cond - uncond)
            x_t = x_t + (x_t - denoised) / sigma * (sigmas[step + 1] - sigma)
        return torch.stack(states), sigmas[kept]

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

    def _with_empty(self, text: TextBatch) -> TextBatch:
        """The prompts, and after them as many empty ones."""
        empty = self.embed([""])
        return TextBatch(
            torch.cat([text.cross.to(self.device), empty.cross.expand_as(text.cross)]),
            torch.cat([text.pooled.to(self.device), empty.pooled.expand_as(text.pooled)]),
        )

    def _digest(self) -> str:
        """Hash of the target modules' names, shapes and weights."""
        hashed = hashlib.sha256()
        layers = {
            target.name: self._model.diffusion_model.get_submodule(target.name)
            for target in self.targets
        }
        for name, layer in sorted(layers.items()):
            weight = layer.get_parameter("weight").detach().cpu().contiguous()
            hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            hashed.update(weight.view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()[:DIGEST_LENGTH]


def _plain_attention(chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own attention in place of the one the host chose: it carries the gradient, and depends on no free memory."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)


def _read(checkpoint: Path) -> dict[str, Tensor]:
    import comfy.utils

    try:
        state = comfy.utils.load_torch_file(str(checkpoint))
    except (
        SafetensorError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointRefusedError(
            f"{checkpoint} cannot be read ({str(error).splitlines()[0]}). It is cut short or no model file; copy it again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointRefusedError(f"{checkpoint} holds no weights by name; it is no checkpoint.")
    return state


def _family_of(checkpoint: Path, state: dict[str, Tensor]) -> FamilySpec:
    """The family of a checkpoint's diffusion model, before any of it is built."""
    from comfy.model_detection import model_config_from_unet, unet_prefix_from_state_dict

    config = model_config_from_unet(state, unet_prefix_from_state_dict(state))
    known = ", ".join(spec.title for spec in FAMILIES.values())
    if config is None:
        raise CheckpointRefusedError(
            f"{checkpoint.name} holds no diffusion model that ComfyUI knows (LoRA, VAE and text encoder files hold none). "
            f"Give a full checkpoint of {known}."
        )
    host_class = type(config).__name__
    family = family_of_host_class(host_class)
    if family is None:
        raise CheckpointRefusedError(
            f"{checkpoint.name} is a model of class {host_class}. This version trains on {known}."
        )
    return family


def _check_complete(
    checkpoint: Path, names: set[str], model: BaseModel, text_model: torch.nn.Module
) -> None:
    """Refuse a file that lacks weights: the host leaves them at whatever the memory held."""
    if getattr(model, "concat_keys", ()):
        raise CheckpointRefusedError(
            f"{checkpoint.name} is an inpainting model. Give the ordinary model of the same family."
        )
    for what, module, below in (
        ("diffusion model", model.diffusion_model, "diffusion_model."),
        ("text encoder", text_model, "transformer."),
    ):
        have = {_short(name, below) for name in names if below in name}
        wanted = {_short(name, below) for name, _ in module.named_parameters()} - OPTIONAL
        if missing := wanted - have:
            raise CheckpointRefusedError(
                f"{checkpoint.name} lacks {len(missing)} of the {len(wanted)} weights of its {what}, for example "
                f"{min(missing)}. It was cut or converted badly; fetch it again."
            )


def _short(name: str, below: str) -> str:
    """A weight's name below a module; some files leave ``text_model`` out."""
    return name.rpartition(below)[2].removeprefix("text_model.")
