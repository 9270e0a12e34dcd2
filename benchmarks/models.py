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
CPU_BLOCKS = 4
"""Of Stable Diffusion 3's 24, at full width, where there is no accelerator."""


@dataclass(frozen=True)
class Subject:
    """A model to sample with, and a CLIP that the guard can read."""

    patcher: ModelPatcher
    clip: CLIP

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
    from comfy.model_management import get_torch_device

    blocks = {"num_blocks": CPU_BLOCKS} if get_torch_device().type == "cpu" else {}
    stage: Any = world.clip.cond_stage_model
    clip = comfy.sd.load_text_encoder_state_dicts(
        [stage.clip_l.transformer.state_dict()], clip_type=comfy.sd.CLIPType.SD3
    )
    return Subject(_random("SD3", STABLE_DIFFUSION_3_MEDIUM | blocks), tap(clip))


def sd15_layers() -> nn.Module:
    """The denoiser of Stable Diffusion 1.5 without weights: names and sizes only."""
    meta = torch.device("meta")
    return _build("SD15", STABLE_DIFFUSION_15, meta, torch.float32).diffusion_model


def _random(host_class: str, config: dict[str, Any]) -> ModelPatcher:
    """A model of one of ComfyUI's classes: single precision on the CPU, else half."""
    from comfy.model_management import get_torch_device, unet_offload_device
    from comfy.model_patcher import ModelPatcher

    device = get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = _build(host_class, config, device, dtype)
    _fill(model.diffusion_model)
    return ModelPatcher(model, device, unet_offload_device())


def _build(
    host_class: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> BaseModel:
    import comfy.supported_models

    settings = getattr(comfy.supported_models, host_class)(config)
    settings.set_inference_dtype(dtype, None)
    return settings.get_model({}, "", device=device).requires_grad_(False)


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    """Weights N(0, 1 / inputs), norms 1, biases 0: ComfyUI leaves them at whatever the memory held."""
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if value.dim() > 1:
            value.normal_(std=1 / math.sqrt(value[0].numel()))
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
