"""Packs with random weights, saved and loaded again as the nodes do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from train.config import NetworkConfig
from unhype import checkpoint
from unhype.checkpoint import BaseFingerprint, ConceptInfo, Pack, PackInfo
from unhype.families import FamilySpec
from unhype.gate import Gate, GateConfig
from unhype.hypernetwork import HypernetworkConfig, make_hypernetwork
from unhype.lora import TargetModule

SURE = 8.0
"""A logit so far from zero that the gate is always, or never, open."""


def default_sizes(family: FamilySpec) -> HypernetworkConfig:
    """The hypernetwork that a training run has by default."""
    sizes = NetworkConfig()
    return HypernetworkConfig(
        sizes.architecture,
        family.embedding.dim,
        rank=sizes.rank,
        hidden_dim=sizes.hidden_dim,
        num_steps=sizes.num_steps,
    )


def make_pack(
    path: Path,
    family: FamilySpec,
    targets: Sequence[TargetModule],
    config: HypernetworkConfig,
    *,
    num_concepts: int = 1,
    fires: bool = True,
) -> Pack:
    """A pack whose gate fires for every prompt, or for none, and whose LoRA differs from prompt to prompt."""
    names = [f"concept {index + 1}" for index in range(num_concepts)]
    gate_config = GateConfig(family.embedding.dim, num_concepts)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hypernetwork, gate = make_hypernetwork(config, targets), Gate(gate_config)
        for name, parameter in hypernetwork.named_parameters():
            if name.startswith("up."):  # zero in a new one
                parameter.normal_(std=0.1 / config.rank)
        last = gate.layers[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.zero_()
        last.bias.fill_(SURE if fires else -SURE)
    info = PackInfo(
        family=family.name,
        base=BaseFingerprint("random", "0"),
        hypernetwork=config,
        targets=tuple(targets),
        gate=gate_config,
        concepts=tuple(ConceptInfo(name, (name,), "an empty meadow") for name in names),
    )
    checkpoint.save(path, info, hypernetwork, gate)
    return checkpoint.load(path)
