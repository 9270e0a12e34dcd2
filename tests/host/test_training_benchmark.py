"""That the benchmark of training runs, and what it writes; not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import models
from benchmarks.training import QUICK, full_step, main, time_steps
from unhype.host.denoise import Denoiser
from unhype.host.text import TextEncoder


def test_the_quick_run_writes_every_figure(comfy: Path, tmp_path: Path) -> None:
    main(quick=True, output=tmp_path / "training.json")
    results = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    training = results["training"]
    assert training["authors_seconds"] > 0
    assert training["is_lower_bound"] is not training["authors_reached"]
    assert set(training["curves"]) == {"ours", "ours direct", *training["recipes"]}
    assert all(point["seconds"] > 0 for point in training["curves"]["ours"])
    assert set(training["cost"]) == {"1", "4"}
    assert training["cost"]["1"]["over_one"] == 1


def test_a_step_is_timed_on_a_model_of_the_host(comfy: Path, tmp_path: Path) -> None:
    subject = models.load_demo(tmp_path)
    denoiser = Denoiser(subject.patcher, TextEncoder(subject.clip), subject.family, "demo")
    timed = time_steps(denoiser, tmp_path, steps=2, size=64)
    assert timed["steps_per_second"] is not None
    assert timed["steps_per_second"] > 0
    assert timed["at_once"] == timed["batch_size"]


def test_a_device_that_the_host_does_not_use_is_refused(comfy: Path) -> None:
    with pytest.raises(RuntimeError, match="not on tpu"):
        full_step(QUICK, Console(), "tpu")
