"""The metrics file: a line a step, once each, whatever happens to the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from train import state
from train.config import ConfigError, TrainConfig
from train.record import events_path, metrics_path
from train.run import Event, train

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]


def lines_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics_path(config.output).read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def die_at(step: int) -> Callable[[Event], None]:
    """A reporter that ends the run after a step, with no chance to save."""

    def report(event: Event) -> None:
        if event.values and event.step == step:
            raise KeyboardInterrupt

    return report


def test_the_first_line_says_which_run_it_is(make: Make, denoiser: TinyDenoiser) -> None:
    config = make("seed=3")
    train(config, denoiser=denoiser)
    first = lines_of(config)[0]
    assert first["config"] == config.digest()
    assert (first["seed"], first["model"], first["processes"]) == (3, "tiny", 1)
    assert first["versions"]["torch"] == metadata.version("torch")
    assert first["versions"]["unhype"] == metadata.version("unhype")


def test_every_step_has_a_line(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    told: list[dict[str, float]] = []
    train(
        config,
        denoiser=denoiser,
        progress=lambda event: told.append(dict(event.values)) if event.values else None,
    )
    lines = lines_of(config)[1:]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line, values in zip(lines, told, strict=True):
        assert {name: line[name] for name in values} == values
        assert line["seconds"] > 0
    assert lines[1]["lr"] == config.train.lr  # warmed up in two steps
    assert lines[0]["lr"] == config.train.lr / 2


def test_an_optimizer_of_its_own_has_a_rate_of_its_own(make: Make, denoiser: TinyDenoiser) -> None:
    config = make("objective.name=joint", "objective.retain_lr=0.5")
    train(config, denoiser=denoiser)
    line = lines_of(config)[2]
    assert (line["lr"], line["lr1"]) == (config.train.lr, 0.5)


def test_some_steps_and_the_last(make: Make, denoiser: TinyDenoiser) -> None:
    config = make("log.every=5")
    train(config, denoiser=denoiser)
    assert [line["step"] for line in lines_of(config)[1:]] == [5, 10, 12]


def test_no_file_where_none_is_wanted(make: Make, denoiser: TinyDenoiser) -> None:
    config = make("log.every=0")
    train(config, denoiser=denoiser)
    assert not metrics_path(config.output).exists()


def test_a_resumed_run_has_the_lines_of_an_unbroken_one(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    whole, broken = make(), make(f"output={tmp_path / 'broken.safetensors'}")
    train(whole, denoiser=denoiser)
    with pytest.raises(KeyboardInterrupt):
        train(broken, denoiser=denoiser, progress=die_at(8))
    assert lines_of(broken)[-1]["step"] == 8  # the state is of step 5
    with metrics_path(broken.output).open("a") as file:
        file.write('{"step": 9, "lo')  # as a kill may leave it
    train(broken, denoiser=denoiser)
    assert timeless(lines_of(broken)) == timeless(lines_of(whole))


def test_another_run_starts_its_file_afresh(make: Make, denoiser: TinyDenoiser) -> None:
    train(make(), denoiser=denoiser)
    config = make("train.lr=1e-4", "train.steps=3")
    train(config, denoiser=denoiser)
    lines = lines_of(config)
    assert lines[0]["config"] == config.digest()
    assert [line["step"] for line in lines[1:]] == [1, 2, 3]


def test_a_file_of_another_run_is_not_continued(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    with pytest.raises(KeyboardInterrupt):
        train(config, denoiser=denoiser, progress=die_at(8))
    metrics_path(config.output).write_text('["notes", "of mine"]\n')
    train(config, denoiser=denoiser)
    lines = lines_of(config)
    assert lines[0]["config"] == config.digest()
    assert [line["step"] for line in lines[1:]] == list(range(6, 13))


def test_what_is_logged_does_not_belong_to_the_run(make: Make, denoiser: TinyDenoiser) -> None:
    assert make("log.every=7", "samples.every=3").digest() == make().digest()
    with pytest.raises(KeyboardInterrupt):
        train(make(), denoiser=denoiser, progress=die_at(8))
    config = make("log.every=2")
    train(config, denoiser=denoiser)
    assert [line["step"] for line in lines_of(config)[1:]] == [1, 2, 3, 4, 5, 6, 8, 10, 12]


def test_a_file_that_cannot_be_written_is_named(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    metrics_path(config.output).mkdir()
    with pytest.raises(OSError, match=r"pack\.metrics\.jsonl cannot be written .*Make room"):
        train(config, denoiser=denoiser)


def test_tensorboard_that_is_not_there_is_asked_for_in_a_sentence(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"log\.tensorboard is true.*pip install tensorboard"):
        train(make("log.tensorboard=true"), denoiser=None)


def test_tensorboard_has_every_step_once(make: Make, denoiser: TinyDenoiser) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard is not installed",
    )
    config = make("log.tensorboard=true")
    with pytest.raises(KeyboardInterrupt):
        train(config, denoiser=denoiser, progress=die_at(8))
    train(config, denoiser=denoiser)
    events = reader.EventAccumulator(str(events_path(config.output)))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    losses = [line["loss"] for line in lines_of(config)[1:]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_the_state_never_runs_ahead_of_the_file(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    with pytest.raises(KeyboardInterrupt):
        train(config, denoiser=denoiser, progress=die_at(5))
    assert not state.state_path(config.output).exists()
    assert lines_of(config)[-1]["step"] == 5
