"""The LoRA that a pack writes for one prompt, as an ordinary LoRA file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unhype.checkpoint import Generated, Pack
from unhype.lora import Spelling

from . import state
from .config import ConfigError
from .gate import surest

KEY = "unhype.export"


class NothingFiresError(ValueError):
    """The prompt asks for nothing that the pack erases."""


@torch.no_grad()
def export(
    pack: Pack, prompt: str, embedding: Tensor, output: Path, spelling: Spelling, *, force: bool
) -> Generated:
    """Write the LoRA at full strength; it has no gate any more.

    Args:
        embedding: of the prompt, (1, embedding_dim) or (1, tokens, embedding_dim), as the gate reads it.
        force: also write what the hypernetwork makes of a prompt for which nothing fires.

    Raises:
        NothingFiresError: nothing fires, and ``force`` is off.
        ConfigError: the output is no safetensors file.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output got {output}, expected a file name ending in .safetensors.")
    reading = pack.read(embedding)
    probability = dict(zip(pack.info.concept_names, reading.probability[0].tolist(), strict=True))
    if not reading.open.item() and not force:
        nearest, name = max((value, name) for name, value in probability.items())
        raise NothingFiresError(
            f"{prompt!r} asks for nothing that {pack.name} erases (nearest: {name} at {nearest:.2f}, it fires from "
            f"{pack.info.gate.threshold:.2f}). Name the concept in the prompt, or give --force to write the LoRA anyway."
        )
    if reading.open.item():
        generated = replace(pack, graded=False).generate(embedding)
    else:
        factors = pack.hypernetwork.generate(surest(pack.gate, embedding))
        generated = Generated(factors, reading, torch.zeros_like(reading.probability))
    info = pack.info
    fires = zip(info.concept_names, reading.fired[0].tolist(), strict=True)
    fired = [name for name, yes in fires if yes]
    about = {
        "pack": pack.name,
        "prompt": prompt,
        "fired": fired,
        "probability": probability,
        "forced": not fired,
        "spelling": spelling.value,
        "family": info.family,
        "base": info.base.name,
        "concepts": {concept.name: concept.anchor for concept in info.concepts},
        "version": info.version,
    }
    metadata = {
        KEY: json.dumps(about),
        "modelspec.title": f"{pack.name}: the LoRA for {prompt!r}",
        "modelspec.description": f"A static LoRA for {info.spec.title} that an UnHype pack wrote for one prompt. Unlike the "
        "pack it acts on every prompt.",
        "modelspec.license": info.license,
    }
    state.write(output, generated.factors.to("cpu").state_dict(spelling=spelling), metadata)
    return generated
