"""The real ComfyUI, for the tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.host import HostUnavailableError, prepare
from demo.world.expand import CHECKPOINT_NAME, COMPACT, expand
from unhype import checkpoint as packs
from unhype.checkpoint import BaseFingerprint, ConceptInfo, Pack, PackInfo
from unhype.families import family_of_host_class
from unhype.gate import Gate, GateConfig
from unhype.host.bypass import find_targets
from unhype.host.guard import warn_once
from unhype.host.locate import cache_dir, use_as_library
from unhype.host.tap import LEDGER
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

from .tiny import TINY, Tiny, make_tiny

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Return a ComfyUI that this Python can run."""
    try:
        return prepare()
    except HostUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no ComfyUI: {error}")


@pytest.fixture(scope="session")
def comfy(comfyui: Path) -> Path:
    """Make ``import comfy`` work in this process; import it inside the test."""
    use_as_library(comfyui)
    return comfyui


@pytest.fixture(scope="session")
def checkpoint(comfy: Path) -> Path:
    """The demo world as ComfyUI loads it, expanded once."""
    return expand(COMPACT, cache_dir() / "tests" / CHECKPOINT_NAME)


@dataclass(frozen=True)
class World:
    """The demo world, loaded as CheckpointLoaderSimple does."""

    model: Any
    clip: Any

    def encode(self, text: str) -> list:
        with torch.no_grad():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def pooled(self, text: str) -> Tensor:
        """(768,)"""
        return self.encode(text)[0][1]["pooled_output"][0].float()


@pytest.fixture(scope="session")
def world(checkpoint: Path) -> World:
    import comfy.sd

    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
    return World(model, clip)


MakePack = Callable[..., Pack]


@pytest.fixture(scope="session")
def make_pack(world: World, tmp_path_factory: pytest.TempPathFactory) -> MakePack:
    """Build real packs with random weights, saved and loaded again, whose gate is set by hand."""
    default = tmp_path_factory.mktemp("packs")

    def make(
        *,
        concepts: tuple[str, ...] = ("cat",),
        fires: bool | tuple[str, str] = True,
        tokens: bool = False,
        seed: int = 0,
        name: str = "pack.safetensors",
        folder: Path = default,
    ) -> Pack:
        """``fires``: always, never, or the pair (prompt that fires, prompt that does not); ``tokens``: of the gate."""
        family = family_of_host_class("SD15")
        assert family is not None
        targets = find_targets(world.model.model.diffusion_model, family.targets)
        config = HypernetworkConfig(Architecture.ATOMS, family.embedding.dim, rank=4, hidden_dim=16)
        gate_config = GateConfig(family.embedding.dim, len(concepts), hidden_dim=2, tokens=tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hypernetwork, gate = make_hypernetwork(config, targets), Gate(gate_config)
            for parameter in hypernetwork.get_submodule("up").parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        first, last = gate.layers[0], gate.layers[2]
        assert isinstance(first, torch.nn.Linear)
        assert isinstance(last, torch.nn.Linear)
        for layer in (first, last):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        if isinstance(fires, bool):
            torch.nn.init.constant_(last.bias, 8.0 if fires else -8.0)
        else:
            yes, no = (world.pooled(text) for text in fires)
            direction = (yes - no) / (yes - no).square().sum()
            with torch.no_grad():
                first.weight[0] = 20 * direction
                first.bias[0] = -20 * direction @ (yes + no) / 2
                last.weight[:, 0] = 2.0
                last.bias.fill_(-8.0)
        info = PackInfo(
            family=family.name,
            base=BaseFingerprint("world", "0"),
            hypernetwork=config,
            targets=targets,
            gate=gate_config,
            concepts=tuple(ConceptInfo(concept, (concept,), "") for concept in concepts),
        )
        packs.save(folder / name, info, hypernetwork, gate)
        return packs.load(folder / name)

    return make


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Prompts that one test encodes are unknown to the next, and warnings come again."""
    LEDGER.clear()
    warn_once.cache_clear()


@pytest.fixture(scope="module", params=TINY)
def tiny(comfy: Path, request: pytest.FixtureRequest) -> Tiny:
    """A small model of every family."""
    return make_tiny(request.param)
