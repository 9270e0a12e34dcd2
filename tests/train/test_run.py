"""Whole runs on the tiny denoiser: what they write, and that stopping costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train import state
from train.config import ConfigError, TrainConfig
from train.loop import STAGE
from train.record import metrics_path
from train.run import Event, TrainingDivergedError, TrainingInterrupted, train
from unhype import checkpoint
from unhype.checkpoint import BaseFingerprint

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return state.read(path)[0]


def stop_at(step: int, stage: str = STAGE) -> Callable[[Event], None]:
    """A reporter that interrupts this process at a step of a stage, as Ctrl-C does."""

    def report(event: Event) -> None:
        if event.stage == stage and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


def test_a_run_ends_in_a_pack_that_says_everything(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    stages: list[str] = []
    result = train(config, denoiser=denoiser, progress=lambda event: stages.append(event.stage))
    pack = checkpoint.load(result.path)
    assert pack.info.concept_names == ("cat",)
    assert pack.info.targets == denoiser.targets
    assert pack.info.training == config.plain()
    assert pack.info.training_digest == config.digest()
    assert pack.info.metrics == result.metrics
    assert pack.info.calibration is not None
    assert pack.info.version
    assert list(dict.fromkeys(stages)) == [
        "loading the model",
        "reading prompts",
        "training the gate",
        "collecting trajectories",
        "training the hypernetwork",
    ]
    left = {path.name for path in config.output.parent.iterdir()}
    assert left == {config.output.name, metrics_path(config.output).name}


def test_training_lowers_the_erase_loss(make: Make, denoiser: TinyDenoiser) -> None:
    losses: list[float] = []
    config = make("train.steps=150", "train.lr=1e-2", "objective.weight_retention=1e-5")
    train(
        config,
        denoiser=denoiser,
        progress=lambda e: losses.append(e.values["erase"]) if e.values else None,
    )
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_a_packs_lora_lowers_the_erase_loss(make: Make, denoiser: TinyDenoiser) -> None:
    config = make("train.steps=150", "train.lr=1e-2", "objective.weight_retention=1e-5")
    pack = checkpoint.load(train(config, denoiser=denoiser).path)
    metrics = pack.info.metrics
    assert metrics["erase_loss"] < 0.5 * metrics["erase_loss_without"]
    text, anchor = (denoiser.embed([t]) for t in ("a cat", "an empty meadow"))
    x, sigma = (
        5 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.ones(1) * 5,
    )
    plain, replaced = (denoiser.predict(x, sigma, batch, None) for batch in (text, anchor))
    wanted = replaced + config.objective.negative_guidance * (replaced - plain)
    adapted = denoiser.predict(x, sigma, text, pack.generate(text.pooled).factors)
    assert (adapted - wanted).square().mean() < 0.75 * (plain - wanted).square().mean()


def test_the_gate_fires_for_the_target_and_not_for_others(
    make: Make, denoiser: TinyDenoiser
) -> None:
    pack = checkpoint.load(train(make("gate.steps=300"), denoiser=denoiser).path)
    texts = ["a photo of a cat", "a kitty", "a photo of a dog", "a calm morning"]
    opened = pack.generate(denoiser.embed_pooled(texts)).reading.open.tolist()
    assert opened == [True, True, False, False]


def test_what_is_trained_on_trajectories_can_read_every_token(
    make: Make, denoiser: TinyDenoiser
) -> None:
    settings = (
        "gate.tokens=true",
        "gate.steps=300",
        "trajectories.retain_rollouts=4",
        "objective.function_retention=0.1",
        "train.steps=150",
        "train.lr=1e-2",
        "objective.weight_retention=1e-5",
    )
    pack = checkpoint.load(train(make(*settings), denoiser=denoiser).path)
    metrics = pack.info.metrics
    assert metrics["erase_loss"] < 0.5 * metrics["erase_loss_without"]
    others = "a zebra beside the violin under seven lamps on the wide beach"
    texts = [f"a cat and {others}", others]
    for text, fires in zip(texts, (True, False), strict=True):
        generated = pack.generate(denoiser.embed_tokens([text]))
        assert generated.reading.open.tolist() == [fires]


def test_the_same_config_writes_the_same_pack(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    first = tensors_of(train(make(), denoiser=denoiser).path)
    again = tensors_of(
        train(make(f"output={tmp_path / 'again.safetensors'}"), denoiser=denoiser).path
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_equals_an_unbroken_one(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path, ema: float
) -> None:
    unbroken = train(make(f"train.ema={ema}"), denoiser=denoiser)
    whole, metrics = tensors_of(unbroken.path), unbroken.metrics
    config = make(f"output={tmp_path / 'broken.safetensors'}", f"train.ema={ema}")
    with pytest.raises(TrainingInterrupted, match=r"step 7 of 12.*same command again"):
        train(config, denoiser=denoiser, progress=stop_at(7))
    assert not config.output.exists()
    steps: list[int] = []
    train(config, denoiser=denoiser, progress=lambda e: steps.append(e.step) if e.values else None)
    assert steps[0] == 8
    assert checkpoint.read_info(config.output).metrics == metrics
    resumed = tensors_of(config.output)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_kill_leaves_the_last_whole_state(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()

    def die(event: Event) -> None:
        if event.values and event.step == 8:
            raise KeyboardInterrupt  # any end that gives no chance to save

    with pytest.raises(KeyboardInterrupt):
        train(config, denoiser=denoiser, progress=die)
    _, metadata = state.read(state.state_path(config.output))
    assert metadata[state.STEP] == "5"
    assert not config.output.exists()


def test_a_state_of_other_settings_is_not_continued(make: Make, denoiser: TinyDenoiser) -> None:
    with pytest.raises(TrainingInterrupted):
        train(make(), denoiser=denoiser, progress=stop_at(3))
    with pytest.raises(
        ConfigError, match="unfinished run with other settings or another model. Delete"
    ):
        train(make("train.lr=1e-4"), denoiser=denoiser)


def test_a_state_of_another_model_is_not_continued(make: Make, denoiser: TinyDenoiser) -> None:
    with pytest.raises(TrainingInterrupted):
        train(make(), denoiser=denoiser, progress=stop_at(3))
    denoiser.fingerprint = BaseFingerprint("tiny", "1")
    with pytest.raises(ConfigError, match="or another model. Delete"):
        train(make(), denoiser=denoiser)


def test_an_interrupt_before_training_keeps_nothing(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    with pytest.raises(TrainingInterrupted, match="while training the gate, before training began"):
        train(config, denoiser=denoiser, progress=stop_at(5, "training the gate"))
    assert not list(config.output.parent.iterdir())


def test_a_second_interrupt_ends_at_once(make: Make, denoiser: TinyDenoiser) -> None:
    def impatient(event: Event) -> None:
        if event.stage == STAGE and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(make(), denoiser=denoiser, progress=impatient)


def test_a_run_gives_the_signals_back(make: Make, denoiser: TinyDenoiser) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make(), denoiser=denoiser)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_save_that_fails_leaves_the_state_before_it(
    make: Make, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, save_file = make(), state.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if metadata.get(state.STEP) == "10":
            path.write_bytes(b"half")
            raise OSError("no space left")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        train(config, denoiser=denoiser)
    assert state.read(state.state_path(config.output))[1][state.STEP] == "5"
    assert not list(config.output.parent.glob("*.part"))


def test_a_damaged_state_is_named(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    state.state_path(config.output).write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read .*Delete it"):
        train(config, denoiser=denoiser)


def test_kept_trajectories_are_used_again(
    make: Make, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make("trajectories.keep=true"), denoiser=denoiser)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("rolled out again")

    monkeypatch.setattr(denoiser, "rollout", refuse)
    train(make("trajectories.keep=true", "train.lr=1e-4"), denoiser=denoiser)
    with pytest.raises(AssertionError, match="rolled out again"):
        train(make("trajectories.keep=true", "trajectories.steps=5"), denoiser=denoiser)


def test_a_loss_that_is_no_number_stops_the_run(
    make: Make, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = denoiser.predict
    monkeypatch.setattr(
        denoiser,
        "predict",
        lambda x, s, t, f: predict(x, s, t, f) * (float("nan") if f is not None else 1),
    )
    with pytest.raises(TrainingDivergedError, match=r"nan at step 1\. Lower train\.lr"):
        train(make(), denoiser=denoiser)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(make(f"output={tmp_path / 'file' / 'pack.safetensors'}"), denoiser=None)


def test_two_processes_stop_together_and_resume_exactly(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    launch = ["-P", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in tmp_path.iterdir()}
    kept = {
        f"{run}.{kind}" for run in ("whole", "broken") for kind in ("safetensors", "metrics.jsonl")
    }
    assert names == {*kept, "stopped0", "stopped1"}
