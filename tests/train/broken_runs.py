"""Run as a program: training runs that are killed, or find the disk full, and are then run again.

``broken_runs.py kill|full FOLDER``; writes ``seen.json``, and fails where a rerun is not the unbroken run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from train import state
from train.config import TrainConfig, make_config
from train.loop import STAGE
from train.record import metrics_path
from train.run import Event, train
from unhype import checkpoint

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

STEPS = {"kill": 100, "full": 12}
SMALL = 4096
"""Bytes: less than a state, a pool or a pack, more than the metrics of these runs."""
Prepare = Callable[[], Callable[[Event], None] | None]


def make(folder: Path, name: str) -> TrainConfig:
    return make_config(
        {**tiny.small_data(folder), "output": str(folder / f"{name}.safetensors")},
        [f"train.steps={steps}", "train.save_every=2", "gate.steps=5", "gate.num_negatives=10"],
    )


def start(config: TrainConfig, prepare: Prepare = lambda: None) -> int:
    """Train in a new process, which leaves a file that says why it could not."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        train(config, denoiser=tiny.TinyDenoiser(), progress=prepare())
        code = 0
    except OSError as error:
        (config.output.parent / "said").write_text(str(error))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(process: int) -> int:
    """Its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_a_state() -> None:
    def half(tensors: dict, path: Path, metadata: dict) -> None:
        if metadata.get(state.STEP) == "6":
            whole(tensors, path, metadata)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()
        whole(tensors, path, metadata)

    whole, state.save_file = state.save_file, half


def in_the_middle_of_the_pack() -> None:
    def half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        die()

    checkpoint.save_file = half


def between_the_pack_and_the_end() -> None:
    def save(*arguments: object) -> None:
        whole(*arguments)  # pyright: ignore[reportArgumentType]
        die()

    whole, checkpoint.save = checkpoint.save, save


def in_the_middle_of_a_line() -> Callable[[Event], None]:
    def report(event: Event) -> None:
        if event.stage == STAGE and event.step == 7:
            with next(Path(folder).glob("killed.metrics.jsonl")).open("a") as file:
                file.write('{"step": 8, "lo')
                file.flush()
                die()

    return report


def check_whole(config: TrainConfig) -> bool:
    """Whatever has its name is whole; whether there is a state to go on from."""
    for path in (state.pool_path(config.output), state.state_path(config.output)):
        if path.exists():
            state.read(path)
    if config.output.exists():
        checkpoint.load(config.output)
    return state.state_path(config.output).exists()


def check_end(config: TrainConfig, whole: TrainConfig) -> None:
    """The run, run again, ends as the unbroken one and leaves nothing else."""
    assert end(start(config)) == 0
    first, second = (state.read(one.output)[0] for one in (config, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)
    left = {path.name for path in config.output.parent.glob(f"{config.output.stem}.*")}
    assert left == {config.output.name, metrics_path(config.output).name}, left
    lines = [json.loads(line) for line in metrics_path(config.output).read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == list(range(1, steps + 1))


def kill() -> dict[str, int]:
    """Kill at chosen moments, then at random ones."""
    config = make(folder, "killed")
    states = 0
    for moment in (
        in_the_middle_of_a_state,
        in_the_middle_of_a_line,
        in_the_middle_of_the_pack,
        between_the_pack_and_the_end,
    ):
        assert end(start(config, moment)) == -signal.SIGKILL
        assert check_whole(config)
        states += 1
    check_end(config, whole)
    config.output.unlink()
    rng = random.Random(0)
    for _ in range(10):
        process = start(config)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        os.kill(process, signal.SIGKILL)
        end(process)
        states += check_whole(config)
    check_end(config, whole)
    return {"states": states}


def full() -> dict[str, str]:
    """Let files grow to a limit only, from some moment on."""
    moments = {
        "pool": ("training the gate", 1, SMALL),
        "metrics": (STAGE, 5, 800),
        "state": (STAGE, 7, SMALL),
        "pack": (STAGE, steps, SMALL),
    }
    said = {}
    for name, (stage, step, limit) in moments.items():
        config = make(folder, name)

        def fill(
            stage: str = stage, step: int = step, limit: int = limit
        ) -> Callable[[Event], None]:
            def report(event: Event) -> None:
                if (event.stage, event.step) == (stage, step):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            return report

        assert end(start(config, fill)) == 1
        said[name] = (folder / "said").read_text()
        assert not list(folder.glob("*.part"))
        assert not config.output.exists()
        check_whole(config)
        check_end(config, whole)
    return said


torch.set_num_threads(1)
what, folder = sys.argv[1], Path(sys.argv[2])
steps = STEPS[what]
whole = make(folder, "whole")
begin = time.monotonic()
assert end(start(whole)) == 0
seconds = time.monotonic() - begin
(folder / "seen.json").write_text(json.dumps({"kill": kill, "full": full}[what]()))
