"""The public benchmark's technique: its config, its pictures on the real model, and a run of the benchmark itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo.host import HostUnavailableError, prepare
from demo.world.expand import CHECKPOINT_NAME, COMPACT, expand
from train.evaluate.eval_unlearn import UnHypeTechnique, literal, read_config
from unhype import checkpoint as packs
from unhype.checkpoint import BaseFingerprint, ConceptInfo, PackInfo
from unhype.families import FAMILIES
from unhype.gate import Gate, GateConfig
from unhype.host.denoise import Denoiser, ModelFiles
from unhype.host.locate import cache_dir
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

from .test_evaluators import declared, install

FIRES, QUIET = "a cat", "a castle"
FILES = {"checkpoint": "model.safetensors", "pack": "pack.safetensors"}


def test_the_config_is_read_as_json_gives_it() -> None:
    read = read_config({**FILES, "concepts": ["cat"], "guidance_scale": 5, "size": 64})
    assert (read.concepts, read.guidance_scale, read.size) == (("cat",), 5.0, 64)
    assert read.num_inference_steps == 50


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"device": "cuda"}, r"unknown key 'device' .* It may hold checkpoint, pack, erase_conc"),
        ({"size": "large"}, "expected int, got 'large'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"pack": "", "concepts": ["cat"]}, "concepts names 'cat' of a pack, but there is no pack"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(extra: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_config({**FILES, **extra})


def test_a_config_needs_a_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"Technique.*checkpoint is needed"):
        read_config({"pack": "pack.safetensors"})


def test_prompts_are_literal_and_cut_where_they_are_too_long() -> None:
    def fits(text: str) -> bool:
        return len(text.split()) <= 3

    assert literal("((a cat:1.3))", fits) == r"\(\(a cat:1.3\)\)"
    assert literal("a  cat", fits) == "a  cat"
    assert literal("one two three four five", fits) == "one two three"
    assert literal("one two", lambda text: not text) == ""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The demo world, and a pack of random weights whose gate opens for one prompt and not for another."""
    try:
        comfyui = prepare()
    except HostUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no ComfyUI: {error}")
    path = expand(COMPACT, cache_dir() / "tests" / CHECKPOINT_NAME)
    denoiser = Denoiser.load(ModelFiles(path), comfyui)
    family = denoiser.family
    shape = HypernetworkConfig(Architecture.ATOMS, family.embedding.dim, rank=4, hidden_dim=16)
    gate_shape = GateConfig(family.embedding.dim, 1, hidden_dim=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernetwork, gate = make_hypernetwork(shape, denoiser.targets), Gate(gate_shape)
        for parameter in hypernetwork.get_submodule("up").parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    yes, no = denoiser.embed_pooled([FIRES, QUIET]).cpu()
    direction = (yes - no) / (yes - no).square().sum()
    state = {name: torch.zeros_like(value) for name, value in gate.state_dict().items()}
    state["standardize.std"] += 1
    state["layers.0.weight"][0] = 20 * direction
    state["layers.0.bias"][0] = -20 * direction @ (yes + no) / 2
    state["layers.2.weight"][0, 0] = 2.0
    state["layers.2.bias"] -= 8.0
    gate.load_state_dict(state)
    info = PackInfo(
        family=family.name,
        base=BaseFingerprint("world", "0"),
        hypernetwork=shape,
        targets=denoiser.targets,
        gate=gate_shape,
        concepts=(ConceptInfo("cat", ("cat",), "a meadow"),),
    )
    pack = tmp_path_factory.mktemp("packs") / "pack.safetensors"
    packs.save(pack, info, hypernetwork, gate)
    return {
        "checkpoint": str(path),
        "pack": str(pack),
        "erase_concept": "cat",
        "num_inference_steps": 2,
        "size": 64,
        "batch_size": 2,
        "comfyui": str(comfyui),
    }


@pytest.fixture(scope="module")
def technique(config: dict[str, object]) -> UnHypeTechnique:
    return UnHypeTechnique(**config)


def pixels(images: Iterable[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


@pytest.mark.host
def test_every_prompt_gets_its_picture_whatever_its_batch(technique: UnHypeTechnique) -> None:
    prompts = [FIRES, QUIET, "a dog (1.5) on a hill " * 30]
    images = technique.generate(prompts, seed=5)
    alone = [technique.generate([prompt], seed=5 + i)[0] for i, prompt in enumerate(prompts)]
    assert [image.size for image in images] == [(64, 64)] * 3
    for one, other in zip(pixels(images), pixels(alone), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.host
def test_the_pack_acts_where_its_gate_opens_and_nowhere_else(
    config: dict[str, object], technique: UnHypeTechnique
) -> None:
    plain = UnHypeTechnique(**{**config, "pack": ""})
    before, after = (pixels(one.generate([FIRES, QUIET], seed=5)) for one in (plain, technique))
    change = [int(np.abs(b.astype(int) - a).max()) for b, a in zip(before, after, strict=True)]
    assert change[0] > 10
    assert change[1] == 0


@pytest.mark.host
def test_a_call_may_set_steps_and_guidance(technique: UnHypeTechnique) -> None:
    usual, steps, guidance = pixels(
        technique.generate([QUIET], seed=5)
        + technique.generate([QUIET], seed=5, num_inference_steps=1)
        + technique.generate([QUIET], seed=5, guidance_scale=1.0)
    )
    assert not np.array_equal(usual, steps)
    assert not np.array_equal(usual, guidance)


@pytest.mark.host
def test_without_a_seed_torchs_own_state_decides(technique: UnHypeTechnique) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = (pixels(technique.generate([QUIET]))[0] for _ in range(2))
        torch.manual_seed(1)
        again = pixels(technique.generate([QUIET]))[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.host
def test_a_concept_that_the_pack_does_not_have_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"has no concept 'dog'\. It erases: cat"):
        UnHypeTechnique(**{**config, "concepts": ["dog"]})


@pytest.mark.host
def test_a_pack_of_another_family_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    other = list(FAMILIES.values())[1]
    pack = packs.load(Path(str(config["pack"])))
    path = tmp_path / "other.safetensors"
    packs.save(path, replace(pack.info, family=other.name), pack.hypernetwork, pack.gate)
    with pytest.raises(ValueError, match=f"was trained for {other.title}, but .* is Stable Diff"):
        UnHypeTechnique(**{**config, "pack": str(path)})


class Brightness:
    """A metric for the benchmark that needs no download: mean brightness."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def load_dataset(self) -> list[object]:
        from eval_unlearn.types import Dataset  # pyright: ignore[reportMissingImports]

        return [Dataset([FIRES, QUIET], {"source": "two prompts"}), Dataset([FIRES], {})]

    def update(self, images: Sequence[Image.Image], prompts: object, metadata: object) -> None:
        self.values += [float(np.asarray(image).mean()) for image in images]

    def compute(self) -> object:
        from eval_unlearn.types import MetricResult  # pyright: ignore[reportMissingImports]

        return MetricResult("brightness", sum(self.values) / len(self.values), {"all": self.values})


@pytest.mark.host
def test_the_benchmark_finds_the_technique_and_runs_it(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("eval_unlearn", reason="the extra eval-unlearn is not installed")
    from eval_unlearn.registry import register_metric  # pyright: ignore[reportMissingImports]
    from eval_unlearn.runners import (  # pyright: ignore[reportMissingImports]
        SingleBenchmarkRunner,
    )

    group = "eval_unlearn.techniques"
    install(tmp_path, "unhype", declared(group), group)
    monkeypatch.syspath_prepend(str(tmp_path))
    register_metric("brightness")(Brightness)
    runner = SingleBenchmarkRunner(
        "unhype", "brightness", config, {}, output_dir=str(tmp_path / "out"), seed=5
    )
    report = runner.run()
    values = report["metric_result"]["details"]["all"]
    assert report["erase_concept"] == "cat"
    assert len(values) == 3
    assert values[0] == pytest.approx(values[2], abs=0.1)  # each batch starts from the seed again
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    saved = json.loads((tmp_path / "out" / "unhype_cat_latest_report.json").read_text())
    assert saved["metric_result"]["value"] == pytest.approx(sum(values) / 3)
