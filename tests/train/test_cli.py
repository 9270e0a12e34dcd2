"""The command line: exit codes, sentences on stderr, output for people and machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from train.cli import app
from train.config import TrainConfig
from train.run import Event, Result, train

from .conftest import TinyDenoiser

REPOSITORY = Path(__file__).resolve().parents[2]
runner = CliRunner()


@pytest.fixture
def config_path(tmp_path: Path, data: dict[str, object]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("command", [["-P", "-m", "train.cli"], ["-P", "train/cli.py"]])
def test_the_program_starts_as_a_module_and_as_a_file(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("train", "validate", "inspect"))


def test_validate_tells_what_a_run_would_do(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").touch()
    done = runner.invoke(
        app, ["validate", str(config_path), "--set", f"checkpoint={tmp_path / 'tiny.safetensors'}"]
    )
    assert done.exit_code == 0, done.stderr
    assert "erases cat; keeps 10 phrases" in done.stdout


def test_bad_configs_end_with_two_and_a_sentence(config_path: Path) -> None:
    done = runner.invoke(app, ["validate", str(config_path), "--set", "retain=[]"])
    assert done.exit_code == 2
    assert "the retain set is empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_checkpoint_is_told_before_anything_starts(config_path: Path) -> None:
    for command in ("validate", "train"):
        done = runner.invoke(app, [command, str(config_path)])
        assert done.exit_code == 2
        assert "no checkpoint tiny.safetensors" in done.stderr


def test_a_folder_that_is_no_comfyui_is_named(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").touch()
    override = f"checkpoint={tmp_path / 'tiny.safetensors'}"
    done = runner.invoke(
        app, ["train", str(config_path), "--comfyui", str(tmp_path), "--set", override]
    )
    assert done.exit_code == 2
    assert "to be a ComfyUI folder" in done.stderr


@pytest.fixture
def ready(tmp_path: Path) -> list[str]:
    """Arguments that make the config's checkpoint one that is there."""
    (tmp_path / "tiny.safetensors").touch()
    return ["--set", f"checkpoint={tmp_path / 'tiny.safetensors'}"]


def test_no_comfyui_ends_with_one_and_says_how_to_get_it(
    config_path: Path, ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("UNHYPE_CACHE", str(tmp_path / "nothing"))
    done = runner.invoke(app, ["train", str(config_path), *ready])
    assert done.exit_code == 1
    assert "No ComfyUI found" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_in_a_pipe_prints_a_line_a_stage_and_the_pack(
    config_path: Path, ready: list[str], denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.cli.run", partial(train, denoiser=denoiser))
    done = runner.invoke(app, ["train", str(config_path), *ready])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines().count("training the hypernetwork ...") == 1
    assert "pack.safetensors (" in done.stdout


def test_an_interrupted_run_ends_with_130_and_the_same_command_finishes_it(
    config_path: Path, ready: list[str], denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig, **kwargs: object) -> Result:
        def press(event: Event) -> None:
            if event.values and event.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

        return train(config, denoiser=denoiser, progress=press)

    monkeypatch.setattr("train.cli.run", interrupted)
    done = runner.invoke(app, ["train", str(config_path), *ready])
    assert done.exit_code == 130
    assert "Interrupted at step 4 of 12. Run the same command again to go on." in done.stderr
    monkeypatch.setattr("train.cli.run", partial(train, denoiser=denoiser))
    assert runner.invoke(app, ["train", str(config_path), *ready]).exit_code == 0


def test_too_little_memory_names_the_knobs(
    config_path: Path, ready: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: TrainConfig, **kwargs: object) -> Result:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.cli.run", run)
    done = runner.invoke(app, ["train", str(config_path), *ready])
    assert done.exit_code == 1
    assert "Lower train.batch_size" in done.stderr


def test_inspect_of_no_file_ends_with_two(tmp_path: Path) -> None:
    done = runner.invoke(app, ["inspect", str(tmp_path / "absent.safetensors")])
    assert done.exit_code == 2
    assert "There is no pack" in done.stderr


def test_inspect_shows_a_pack_to_people_and_machines(
    make: Callable[..., TrainConfig], denoiser: TinyDenoiser
) -> None:
    path = train(make(), denoiser=denoiser).path
    done = runner.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 0, done.stderr
    assert "cat" in done.stdout
    assert "an empty meadow" in done.stdout
    described = json.loads(runner.invoke(app, ["inspect", str(path), "--json"]).stdout)
    assert described["concepts"][0]["name"] == "cat"
    assert described["bytes"] == path.stat().st_size


def test_inspect_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("no")
    done = runner.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 2
    assert "cannot be read as safetensors" in done.stderr
