"""Models of every family, built from ComfyUI's own classes: small ones with random weights, full-size ones without any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import FLUX_DEV, STABLE_DIFFUSION_XL
from unhype.checkpoint import BaseFingerprint, ConceptInfo, Pack, PackInfo
from unhype.families import FamilySpec, family_of_host_class
from unhype.gate import Gate, GateConfig
from unhype.host.bypass import find_targets
from unhype.host.tap import TOKENS, VECTORS
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

CPU, META = torch.device("cpu"), torch.device("meta")
BLOCK = 65537
"""A prime number of random values, repeated to fill large weights fast; no two rows come out equal."""

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
SDXL_UNET = {**STABLE_DIFFUSION_XL, **UNET}
FLUX = {"image_model": "flux", **FLUX_DEV}


def _sd3(depth: int, **changes: Any) -> dict[str, Any]:
    hidden = {"in_features": 4096, "out_features": 64 * depth}
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": hidden},
        "num_patches": 36864,
        "pos_embed_max_size": 192,
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [],
        **changes,
    }


FULL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Stable Diffusion 1.5": (
        "SD15",
        {
            **UNET,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "num_heads": 8,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        },
    ),
    "SDXL": ("SDXL", SDXL_UNET),
    "SD3 medium": ("SD3", _sd3(24)),
    "SD3.5 large": ("SD3", _sd3(38, qk_norm="rms")),
    "Flux dev": ("Flux", {**FLUX, "guidance_embed": True}),
    "Flux schnell": ("FluxSchnell", {**FLUX, "guidance_embed": False}),
}
"""Published models: the host's class and what it reads from their files."""

SHALLOW_UNET = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "model_channels": 64,
}
SHALLOW_FLUX = {
    "depth": 1,
    "depth_single_blocks": 1,
    "hidden_size": 256,
    "num_heads": 2,
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "SD15": {**FULL["Stable Diffusion 1.5"][1], **SHALLOW_UNET},
    "SDXL": {**SDXL_UNET, **SHALLOW_UNET},
    "SD3": _sd3(2, num_patches=256, pos_embed_max_size=16),
    "Flux": {**FULL["Flux dev"][1], **SHALLOW_FLUX},
    "FluxSchnell": {**FULL["Flux schnell"][1], **SHALLOW_FLUX},
}
"""A small model of a host class that every family has."""

IN_FILES: Mapping[str, Mapping[str, Any]] = {
    "KOALA_700M": {
        **SDXL_UNET,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 1, 1],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_output": [0] * 6,
        "transformer_depth_middle": -2,
    },
    "SD3": TINY["SD3"],
}
"""Small models that the host still tells by their files."""
SHALLOW_TEXT = {
    "clip_l_model_config": {"num_hidden_layers": 3},
    "clip_g_model_config": {"num_hidden_layers": 3},
    "t5xxl_model_config": {"num_layers": 1, "num_heads": 4, "d_ff": 64},
}
"""Of the text encoders, whose widths the host does not let change."""
TEXT_NORMS = {
    "clip_l": "clip_l.transformer.text_model.final_layer_norm",
    "clip_g": "clip_g.transformer.text_model.final_layer_norm",
    "t5xxl": "t5xxl.transformer.encoder.final_layer_norm",
}
"""Layers by whose weights the host tells which text encoders a file has."""
RESIDUAL = ("out_proj.weight", "fc2.weight", "c_proj.weight")
"""Layers of text encoders that add to the states; kept small, or the states would grow from layer to layer."""
ROW_STRIDE = 7


def build(
    host_class: str,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Any:
    """One of the host's models, its weights unset."""
    import comfy.supported_models

    model_config = getattr(comfy.supported_models, host_class)(dict(config))
    model_config.set_inference_dtype(dtype, None)
    return model_config.get_model({}, "", device=device)


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Random weights: matrices keep the size of what passes through, norms are near one, biases and the like small."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    for index, (name, value) in enumerate(sorted(module.state_dict().items())):
        if value.is_floating_point():
            mean, std = _statistics(name, value)
            random = block.roll(index * 7919).repeat(value.numel() // BLOCK + 1)
            value.copy_(mean + std * random[: value.numel()].view(value.shape))


def _statistics(name: str, value: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a weight."""
    if "norm" in name and name.endswith(("weight", "scale")):
        return 1.0, 0.1
    if "token_embedding" in name:
        return 0.0, 1.0
    if value.dim() < 2 or "position" in name or "pos_embed" in name:
        return 0.0, 0.1
    share = 0.1 if name.endswith(RESIDUAL) else 1.0
    return 0.0, share * value[0].numel() ** -0.5


def set_gate(gate: Gate, *, fires: bool) -> None:
    """Make a gate fire for every prompt, or for none."""
    last = gate.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 8.0 if fires else -8.0)


@dataclass(frozen=True)
class Tiny:
    """A small model with random weights, and conditionings for it."""

    host_class: str
    model: Any

    @property
    def spec(self) -> FamilySpec:
        spec = family_of_host_class(self.host_class)
        assert spec is not None
        return spec

    @property
    def network(self) -> nn.Module:
        return self.model.model.diffusion_model

    def encode(self, seed: int, tokens: int = 12) -> list:
        """What an encoded prompt of these models looks like, with the vector that the hypernetwork reads."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        spec = self.spec.embedding
        width = {**TINY, **IN_FILES}[self.host_class].get("context_dim", 4096)
        extras = {"pooled_output": draw(1, spec.pooled_width or 1280)}
        if spec.pooled_width is None:
            extras[VECTORS] = extras[TOKENS] = draw(1, spec.dim)
        return [[draw(1, tokens, width), extras]]

    def latent(self, batch: int = 1) -> Tensor:
        """An empty picture."""
        return torch.zeros(batch, self.model.model.latent_format.latent_channels, 8, 8)

    def pack(self, *, fires: bool = True, seed: int = 0) -> Pack:
        """A pack with random weights, whose gate always fires, or never."""
        spec = self.spec
        targets = find_targets(self.network, spec.targets)
        config = HypernetworkConfig(
            Architecture.ATOMS, spec.embedding.dim, rank=4, hidden_dim=16, num_steps=10
        )
        gate_config = GateConfig(spec.embedding.dim, 1, hidden_dim=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hypernetwork, gate = make_hypernetwork(config, targets), Gate(gate_config)
            for parameter in hypernetwork.get_submodule("up").parameters():
                nn.init.normal_(parameter, std=0.2)
        set_gate(gate, fires=fires)
        info = PackInfo(
            family=spec.name,
            base=BaseFingerprint(self.host_class, "0"),
            hypernetwork=config,
            targets=targets,
            gate=gate_config,
            concepts=(ConceptInfo("cat", ("cat",), ""),),
        )
        for part in (hypernetwork, gate):
            part.eval().requires_grad_(False)
        return Pack(info, hypernetwork, gate, name=f"{spec.title}.safetensors")


def make_tiny(host_class: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """A small model of a host class."""
    from comfy.model_patcher import ModelPatcher

    model = build(host_class, TINY[host_class], dtype=dtype)
    fill(model.diffusion_model)
    return Tiny(host_class, ModelPatcher(model, CPU, CPU))


def make_clip(tiny: Tiny) -> Any:
    """All text encoders that go with a model, shallow and with random weights."""
    clip = _clip(tiny.model.model, TEXT_NORMS, SHALLOW_TEXT)
    fill(clip.cond_stage_model)
    return clip


def _clip(model: Any, text_encoders: Iterable[str], options: Mapping[str, Any]) -> Any:
    from comfy.sd import CLIP

    names = [f"text_encoders.{TEXT_NORMS[name]}.weight" for name in text_encoders]
    norms = {name: torch.empty(0, dtype=torch.float16) for name in names}
    return CLIP(model.model_config.clip_target(norms), model_options=dict(options))


def write_checkpoint(
    host_class: str, path: Path, *, text_encoders: Sequence[str] = ("clip_l",)
) -> Path:
    """A checkpoint file with a small model and text encoders of the published sizes; fewer only where the family allows it.

    The weights overlap in memory, so that a few megabytes are written for more than a gigabyte.
    """
    model = build(host_class, IN_FILES[host_class], device=META)
    clip = _clip(model, text_encoders, {"initial_device": META})
    return _write(model.state_dict_for_saving(clip.cond_stage_model.state_dict()), path)


def write_parts(
    host_class: str, folder: Path, *, text_encoders: Sequence[str] = ("clip_l",)
) -> dict[str, Path]:
    """The same in files of their own, by part: ``model`` and the text encoders' names."""
    model = build(host_class, IN_FILES[host_class], device=META)
    clip = _clip(model, text_encoders, {"initial_device": META})
    parts = {"model": model.diffusion_model} | {
        name: getattr(clip.cond_stage_model, name).transformer for name in text_encoders
    }
    return {
        name: _write(part.state_dict(), folder / f"{name}.ckpt") for name, part in parts.items()
    }


def _write(state: Mapping[str, Tensor], path: Path) -> Path:
    """Random weights of these names and shapes, which overlap in memory."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).repeat(8)
    blocks: dict[tuple[float, float], Tensor] = {}
    overlapping = {}
    for index, (name, value) in enumerate(sorted(state.items())):
        if not value.is_floating_point():
            continue
        mean, std = _statistics(name, value)
        if (mean, std) not in blocks:
            blocks[mean, std] = (mean + std * block).half()
        strides = (ROW_STRIDE, *value[0].contiguous().stride()) if value.dim() else ()
        overlapping[name] = blocks[mean, std].as_strided(value.shape, strides, index % BLOCK)
    torch.save(overlapping, path)
    return path
