"""What is sampled with: the demo world, and full-size models with random weights in ComfyUI's own classes.

A benchmark times ComfyUI, so this folder imports it, after ``unhype.host.locate.use_as_library``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from demo.world.expand import CHECKPOINT_NAME, COMPACT, expand
from unhype.families import FamilySpec, family_of_host_class
from unhype.host.tap import tap

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

STABLE_DIFFUSION_15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
}
STABLE_DIFFUSION_3_MEDIUM = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "input_size": None,
    "depth": 24,
    "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 1536},
    },
    "num_patches": 192 * 192,
    "pos_embed_max_size": 192,
}
STABLE_DIFFUSION_XL = {
    **STABLE_DIFFUSION_15,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
FLUX_DEV = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
}
FEWER_ON_CPU: dict[str, dict[str, Any]] = {
    "SDXL": {
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    "SD3": {"num_blocks": 4},
    "Flux": {"depth": 1, "depth_single_blocks": 2},
}
"""Blocks, at full width, where there is no accelerator: of Stable Diffusion 3's 24, and of Flux's 19 and 38."""


@dataclass(frozen=True)
class Subject:
    """A model to sample with, and a CLIP that the guard can read.

    Attributes:
        guidance: scale of classifier-free guidance; 1 for a model that is made for sampling without.
        states_width: to which the CLIP's states are filled up with zeros; 0 to leave them.
    """

    patcher: ModelPatcher
    clip: CLIP
    guidance: float = 5.0
    states_width: int = 0

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return self.patcher.model.diffusion_model

    @property
    def family(self) -> FamilySpec:
        """The entry of its family."""
        family = family_of_host_class(type(self.patcher.model.model_config).__name__)
        assert family is not None
        return family


def load_demo(folder: Path) -> Subject:
    """The demo world, expanded into ``folder`` and loaded as CheckpointLoaderSimple does."""
    import comfy.sd

    checkpoint = expand(COMPACT, folder / CHECKPOINT_NAME)
    patcher, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
    assert patcher is not None
    assert clip is not None
    return Subject(patcher, tap(clip))


def demo(world: Subject) -> Subject:
    """The demo world itself."""
    return world


def sd15_full(world: Subject) -> Subject:
    """Stable Diffusion 1.5 at full size, reading prompts with the demo world's CLIP-L."""
    return Subject(_random("SD15", STABLE_DIFFUSION_15), world.clip)


def sd3(world: Subject) -> Subject:
    """Stable Diffusion 3 medium at full width, reading prompts with the demo world's CLIP-L alone."""
    import comfy.sd

    stage: Any = world.clip.cond_stage_model
    clip = comfy.sd.load_text_encoder_state_dicts(
        [stage.clip_l.transformer.state_dict()], clip_type=comfy.sd.CLIPType.SD3
    )
    return Subject(_random("SD3", STABLE_DIFFUSION_3_MEDIUM), tap(clip))


def flux(world: Subject) -> Subject:
    """Flux dev at full width, reading prompts with the demo world's CLIP-L alone: no T5, its states in the first 768 of 4096."""
    width = FLUX_DEV["context_in_dim"]
    return Subject(_random("Flux", FLUX_DEV), world.clip, guidance=1.0, states_width=width)


def sd15_layers() -> nn.Module:
    """The denoiser of Stable Diffusion 1.5 without weights: names and sizes only."""
    meta = torch.device("meta")
    return _build("SD15", STABLE_DIFFUSION_15, meta, torch.float32).diffusion_model


def _random(host_class: str, config: dict[str, Any]) -> ModelPatcher:
    """A model of one of ComfyUI's classes: single precision on the CPU, else what the host prefers for it."""
    from comfy.model_management import get_torch_device, unet_offload_device
    from comfy.model_patcher import ModelPatcher

    device = get_torch_device()
    return ModelPatcher(build_random(host_class, config), device, unet_offload_device())


def build_random(
    host_class: str, config: dict[str, Any], dtype: torch.dtype | None = None
) -> BaseModel:
    """A model with random weights on the host's device; with fewer blocks where that is a CPU."""
    from comfy.model_management import get_torch_device

    device = get_torch_device()
    fewer = FEWER_ON_CPU.get(host_class, {}) if device.type == "cpu" else {}
    wanted = torch.float32 if device.type == "cpu" and dtype is None else dtype
    model = _build(host_class, config | fewer, device, wanted)
    _fill(model.diffusion_model)
    return model


def _build(
    host_class: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype | None
) -> BaseModel:
    """A model of one of ComfyUI's classes, in what the host prefers for it where no precision is given."""
    import comfy.supported_models

    found = getattr(comfy.supported_models, host_class)
    settings = found({**found.unet_config, **config})
    settings.set_inference_dtype(dtype or settings.supported_inference_dtypes[0], None)
    return settings.get_model({}, "", device=device).requires_grad_(False)


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    """Weights N(0, 1 / inputs), norms 1, biases 0: ComfyUI leaves them at whatever the memory held."""
    torch.manual_seed(0)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if value.dim() > 1:
            value.normal_(std=1 / math.sqrt(value[0].numel()))
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
