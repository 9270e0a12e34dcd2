"""Reading a model's files, all in one or each part in its own, with ComfyUI's own loaders; and refusing what is not whole."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..families import FAMILIES, FamilySpec, family_of_host_class
from .clip_l import READER

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

OPTIONAL = (
    "logit_scale",
    f"{READER}.transformer.text_projection.weight",
    "scaled_fp8",
    "scale_weight",
    "scale_input",
)
"""How weights end that nothing here depends on, or that the host sets where a file lacks them."""
IN_ENCODER = "transformer."
"""Before a weight's name in a text encoder's own file, as the host's module has it."""
MOST_ENCODERS = 3
"""Of one model; the host takes four files for models of other families."""
QUANTIZATION = "_quantization_metadata"
"""Where the host looks for how a file's weights are quantized."""
DECODER = ("decoder.", "post_quant_conv.", "taesd_decoder.")
"""What of a VAE makes pictures."""
DIFFUSERS_VAE = "decoder.up_blocks.0.resnets.0.norm1.weight"
"""A weight by which the host tells diffusers' layout."""


class CheckpointRefusedError(ValueError):
    """A file is not a checkpoint that this version can train on."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is.

    Attributes:
        checkpoint: the whole model, or the diffusion model alone.
        text_encoders: their own files, in any order, in place of those in the checkpoint.
        vae: its own file, in place of that in the checkpoint.
    """

    checkpoint: Path
    text_encoders: tuple[Path, ...] = ()
    vae: Path | None = None

    @property
    def parts(self) -> tuple[Path, ...]:
        """What is beside the checkpoint."""
        return (*self.text_encoders, *((self.vae,) if self.vae else ()))

    def check_there(self) -> None:
        """Raise ``FileNotFoundError`` if one is missing."""
        kinds = (
            ("checkpoint", self.checkpoint),
            *(("text encoder", path) for path in self.text_encoders),
            *((("VAE", self.vae),) if self.vae else ()),
        )
        for what, path in kinds:
            if not path.is_file():
                raise FileNotFoundError(
                    f"There is no {what} {path}. Give the path of the file that ComfyUI loads."
                )


@dataclass(frozen=True)
class Parts:
    """A model as the host loads it."""

    family: FamilySpec
    patcher: ModelPatcher
    clip: CLIP
    vae: VAE | None


def load_parts(files: ModelFiles, *, pictures: bool) -> Parts:
    """Load what the files hold; with the VAE if ``pictures`` are wanted.

    Raises:
        CheckpointRefusedError: see :meth:`.denoise.Denoiser.load`.
    """
    import comfy.sd

    name = files.checkpoint.name
    state, metadata = _read(files.checkpoint)
    held = _inspect(name, state)
    clip, vae = None, None
    if held.is_whole:
        patcher, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            state,
            output_vae=pictures and files.vae is None,
            output_clip=not files.text_encoders,
            metadata=metadata,
        ) or (None, None, None, None)
    else:
        patcher = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    if patcher is None:
        raise CheckpointRefusedError(f"ComfyUI cannot load {files.checkpoint}; is it whole?")
    _check_ordinary(name, patcher.model)
    network = patcher.model.diffusion_model
    _check_complete(name, "diffusion model", held.weights, _names(network))
    if files.text_encoders:
        clip = _load_text_encoders(files.text_encoders, held.family)
    elif clip is None:
        raise CheckpointRefusedError(
            f"{name} has no text encoder, and training embeds prompts. Give --text-encoder the file of "
            f"{_needed(held.family)}, or a full checkpoint with model and CLIP in one file."
        )
    elif getattr(clip.cond_stage_model, READER, None) is None:
        raise CheckpointRefusedError(
            f"{name} has no CLIP-L among its text encoders, which reads the prompts for the hypernetwork. "
            f"Give --text-encoder the file of {_needed(held.family)}, or a full checkpoint with it."
        )
    else:
        text_model = clip.cond_stage_model
        _check_complete(name, "text encoder", held.text_weights, _names(text_model))
    if not pictures:
        return Parts(held.family, patcher, clip, None)
    channels = patcher.model.latent_format.latent_channels
    return Parts(held.family, patcher, clip, _pick_vae(files, vae, channels, held=held.vae_weights))


def _needed(family: FamilySpec) -> str:
    """Names of a family's text encoders, for a sentence."""
    needed = [name for name in family.text_encoders if name not in family.optional_encoders]
    also = f" ({' and '.join(family.optional_encoders)} too, if you use them)"
    return " and that of ".join(needed) + (also if family.optional_encoders else "")


def _is_misfit(error: Exception) -> bool:
    """Whether the host failed because weights are of something else; memory can run out, too."""
    return not isinstance(error, RuntimeError) or "loading state_dict" in str(error)


def _pick_vae(files: ModelFiles, own: VAE | None, channels: int, *, held: Set[str]) -> VAE:
    """The VAE of its own file, else the checkpoint's.

    Args:
        channels: of the model's latents.
        held: names of what the checkpoint holds of its VAE.
    """
    import comfy.sd

    name = (files.vae or files.checkpoint).name
    if files.vae is not None:
        state, metadata = _read(files.vae)
        held = _names_of_vae(state)
        # What is none makes a VAE without a model, or fails on the way.
        try:
            own = comfy.sd.VAE(sd=state, metadata=metadata)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            if not _is_misfit(error):
                raise
            raise CheckpointRefusedError(f"{name} is no VAE that ComfyUI knows.") from error
    if own is None or own.first_stage_model is None:
        if files.vae is not None:
            raise CheckpointRefusedError(f"{name} is no VAE that ComfyUI knows.")
        raise CheckpointRefusedError(
            f"{name} has no VAE, which makes pictures of latents. Name its file (`vae` in a config, --vae for `unhype eval`), "
            "or give a full checkpoint with one."
        )
    if own.latent_channels != channels:
        raise CheckpointRefusedError(
            f"{name} is a VAE of {own.latent_channels} channels, and the latents of {files.checkpoint.name} have {channels}. "
            "Give the VAE of its family."
        )
    makes_pictures = {w for w in _names(own.first_stage_model) if w.startswith(DECODER)}
    # If few of them are there, the host has names of its own for this kind.
    if len(held & makes_pictures) > len(makes_pictures) / 2:
        _check_complete(name, "VAE", held, makes_pictures)
    return own


def _names_of_vae(state: dict[str, Any]) -> set[str]:
    """Of a VAE's weights, as the host's module has them; diffusers' layout is another."""
    from comfy.diffusers_convert import convert_vae_state_dict

    empty = {key: value.to("meta") for key, value in state.items() if isinstance(value, Tensor)}
    names = convert_vae_state_dict(empty) if DIFFUSERS_VAE in empty else empty
    return {name.replace("decoder.post_quant_conv.", "post_quant_conv.") for name in names}


def _load_text_encoders(paths: Sequence[Path], family: FamilySpec) -> CLIP:
    """The family's text encoders from files of their own."""
    import comfy.sd

    names = ", ".join(path.name for path in paths)
    states = []
    for path in paths:
        state, metadata = _read(path)
        if quantization := (metadata or {}).get(QUANTIZATION):
            state[QUANTIZATION] = quantization
        states.append(state)
    held = [set(state) for state in states]
    wrong = CheckpointRefusedError(
        f"{names}: these are not the text encoders of {family.title}. Give --text-encoder the file of {_needed(family)}, "
        "as ComfyUI's CLIP loaders take them."
    )
    if len(paths) > MOST_ENCODERS:
        raise wrong
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states, clip_type=comfy.sd.CLIPType[family.clip_type]
        )
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        if not _is_misfit(error):
            raise
        raise wrong from error
    # The host renames some on the way, and takes others out.
    held = [own | set(state) for own, state in zip(held, states, strict=True)]
    model = clip.cond_stage_model
    encoders = dict(model.named_children())
    wanted = set(family.text_encoders)
    if not wanted - set(family.optional_encoders) <= set(encoders) <= wanted:
        raise wrong
    if len(encoders) != len(paths):
        raise wrong
    # Names as in the host's module, by their names in a file.
    weights = [
        {
            name.removeprefix(IN_ENCODER): f"{encoder}.{name}"
            for name, _ in module.named_parameters()
        }
        for encoder, module in encoders.items()
    ]
    # Which file is whose: as they have most names in common.
    order = max(
        permutations(range(len(paths))),
        key=lambda order: sum(
            len(own.keys() & held[index]) for own, index in zip(weights, order, strict=True)
        ),
    )
    for own, index in zip(weights, order, strict=True):
        there = {own[name] for name in own.keys() & held[index]}
        if len(there) < len(own) / 2:
            raise wrong
        _check_complete(paths[index].name, "text encoder", there, own.values())
    return clip


@dataclass(frozen=True)
class _Held:
    """What a file holds.

    Attributes:
        weights: names of the diffusion model's weights as the host's module has them.
        text_weights: the same of the text encoders in the file, with others.
        vae_weights: the same of the VAE.
        is_whole: whether it may hold more than the diffusion model.
    """

    family: FamilySpec
    weights: set[str]
    text_weights: set[str]
    vae_weights: set[str]
    is_whole: bool


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Weights by name, and what the file says of itself."""
    import comfy.utils

    try:
        state, metadata = comfy.utils.load_torch_file(
            str(path), safe_load=True, return_metadata=True
        )
    except (
        SafetensorError,
        ValueError,
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointRefusedError(
            f"{path} cannot be read ({str(error).splitlines()[0]}). It is cut short or no model file; copy it again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointRefusedError(f"{path} holds no weights by name; it is no checkpoint.")
    return state, metadata


def _inspect(name: str, state: dict[str, Any]) -> _Held:
    """The family of a file's diffusion model, and the names of what it holds."""
    from comfy.model_detection import model_config_from_unet, unet_prefix_from_state_dict

    # Without their values, in a dictionary of its own: the host takes names out of it and rewrites others.
    empty = {key: value.to("meta") for key, value in state.items() if isinstance(value, Tensor)}
    prefix = unet_prefix_from_state_dict(empty)
    is_whole = any(key.startswith(prefix) for key in empty)
    prefix = prefix if is_whole else ""
    config = model_config_from_unet(empty, prefix)
    known = ", ".join(spec.title for spec in FAMILIES.values())
    if config is None:
        raise CheckpointRefusedError(
            f"{name} holds no diffusion model that ComfyUI knows (LoRA, VAE and text encoder files hold none, and diffusers' "
            f"layout is not read). Give a model file of {known}."
        )
    host_class = type(config).__name__
    family = family_of_host_class(host_class)
    if family is None:
        raise CheckpointRefusedError(
            f"{name} is a model of class {host_class}. This version trains on {known}."
        )
    weights = {key.removeprefix(prefix) for key in empty if key.startswith(prefix)}
    text_weights = set(config.process_clip_state_dict(empty)) if is_whole else set()
    vae_weights = _names_of_vae(
        {
            key.removeprefix(prefix): value
            for prefix in config.vae_key_prefix
            for key, value in empty.items()
            if key.startswith(prefix)
        }
    )
    return _Held(family, weights, text_weights, vae_weights, is_whole)


def _check_ordinary(name: str, model: BaseModel) -> None:
    """Refuse a model that is made for other input than noise and text."""
    noise = torch.zeros(1, model.latent_format.latent_channels, 1, 1)
    if model.concat_keys or model.concat_cond(noise=noise, device=noise.device) is not None:
        raise CheckpointRefusedError(
            f"{name} is an inpainting or control model. Give the ordinary model of the same family."
        )


def _names(module: nn.Module) -> list[str]:
    """Of its weights."""
    return [name for name, _ in module.named_parameters()]


def _check_complete(source: str, what: str, held: Set[str], weights: Iterable[str]) -> None:
    """Refuse a file that lacks some of these weights: the host leaves them at whatever the memory held."""
    wanted = {name for name in weights if not name.endswith(OPTIONAL)}
    if missing := wanted - held:
        raise CheckpointRefusedError(
            f"{source} lacks {len(missing)} of the {len(wanted)} weights of its {what}, for example {min(missing)}. "
            "It was cut or converted badly; fetch it again."
        )
