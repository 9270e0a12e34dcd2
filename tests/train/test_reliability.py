"""Whatever happens to a run, what is on disk is whole and the next one goes on from it."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.config import ConfigError, TrainConfig
from train.objectives import dial
from train.processes import share_work
from train.run import prompts_at_once, train
from train.trajectories import collect, draw
from unhype import checkpoint
from unhype.families import FAMILIES, Branch
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork
from unhype.lora import TargetModule

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]
HERE = Path(__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes with fork")


def run(script: str, *arguments: object, launch: tuple[str, ...] = ()) -> None:
    """Run a program of this folder."""
    command = [sys.executable, "-P", *launch, HERE / script, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_fork
def test_a_kill_at_any_moment_costs_the_steps_since_the_last_state(tmp_path: Path) -> None:
    run("broken_runs.py", "kill", tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["states"] > 4, "none of the kills at random came while there was a state"


@needs_fork
def test_a_full_disk_breaks_nothing_and_is_told(tmp_path: Path) -> None:
    run("broken_runs.py", "full", tmp_path)
    said = json.loads((tmp_path / "seen.json").read_text())
    assert set(said) == {"pool", "metrics", "state", "pack"}
    for name, text in said.items():
        assert f"{name}." in text
        assert "cannot be written" in text
        assert "File too large" in text  # the limit that stands for a full disk
        assert "Make room, then run the same command again" in text


def test_two_processes_learn_what_one_does_with_the_whole_batch(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    run("two_halves.py", tmp_path, 8)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    run("two_halves.py", tmp_path, 4, launch=launch)

    whole, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("of1.0.json", "of2.0.json", "of2.1.json")
    )
    together = [statistics.fmean(pair) for pair in zip(first, second, strict=True)]
    assert first != second
    assert together == pytest.approx(whole, rel=1e-3)
    assert whole[-1] < 0.5 * whole[0]

    prompts = [("a photo of a cat", "a photo of an empty meadow"), ("a kitty", "an empty meadow")]
    pool = collect(denoiser, prompts, make().trajectories, seed=5, tick=lambda *_: None)
    batch = draw(pool, 64, torch.Generator().manual_seed(0))
    wanted = dial(batch, torch.ones(64), 1.0)
    one, two = (
        (
            denoiser.predict(
                batch.latents,
                batch.sigmas,
                batch.text,
                checkpoint.load(tmp_path / f"of{number}.safetensors")
                .generate(batch.text.pooled)
                .factors,
            )
            - wanted
        )
        .square()
        .mean()
        .item()
        for number in (1, 2)
    )
    without = (batch.prediction - wanted).square().mean().item()
    assert max(one, two) < 0.6 * without
    assert two == pytest.approx(one, abs=0.1 * without)


def test_a_guidance_scale_without_effect_is_told(
    make: Make, denoiser: TinyDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    unguided = next(family for family in FAMILIES.values() if family.branch is Branch.ALL)
    assert denoiser.family.branch is not Branch.ALL
    texts = {}
    for name, family in (("guided", denoiser.family), ("unguided", unguided)):
        # Its embedding, too, is the tiny model's.
        denoiser.family = replace(family, embedding=denoiser.family.embedding)
        for scale in (5.0, 3.0):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "unhype"):
                train(make(f"trajectories.guidance_scale={scale}"), denoiser=denoiser)
            texts[name, scale] = "guidance_scale" in caplog.text
    assert texts == {
        ("guided", 5.0): False,
        ("guided", 3.0): False,
        ("unguided", 5.0): False,
        ("unguided", 3.0): True,
    }


@pytest.mark.parametrize(
    ("width", "layers", "expected"), [(64, 2, 256), (3000, 100, 6), (3000, 9000, 1)]
)
def test_lora_is_measured_for_as_many_prompts_as_fit(
    width: int, layers: int, expected: int
) -> None:
    targets = [TargetModule(f"layer{index}", width, width) for index in range(layers)]
    with torch.device("meta"):
        sizes = HypernetworkConfig(Architecture.ATOMS, 8, rank=16, hidden_dim=2)
        hypernetwork = make_hypernetwork(sizes, targets)
    assert prompts_at_once(hypernetwork) == expected


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started for 1 GPU. .*num_processes 1"):
        share_work()
