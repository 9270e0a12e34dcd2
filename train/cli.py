"""Train UnHype packs: ``python -m train.cli --help`` (also installed as ``unhype``)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file: Python has put this folder first, where the repository must be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from train.config import ConfigError, TrainConfig, load_config
from train.loop import Event, Report
from train.run import TrainingDivergedError, TrainingInterrupted
from train.run import train as run
from unhype import checkpoint
from unhype.checkpoint import CheckpointError, PackInfo
from unhype.host.denoise import CheckpointRefusedError
from unhype.host.locate import ComfyUINotFoundError, NotComfyUIError

log = logging.getLogger("unhype")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train hypernetworks that make a text-to-image model forget concepts, for the UnHype nodes of ComfyUI.",
)
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
BAD_INPUT_ERRORS = (
    CheckpointError,
    CheckpointRefusedError,
    ConfigError,
    FileNotFoundError,
    NotComfyUIError,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value, e.g. train.lr=1e-3; repeatable."
    ),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    comfyui: Annotated[
        Path | None,
        typer.Option(
            help="Folder of ComfyUI; by default COMFYUI_PATH, the one around this pack, or the cached copy."
        ),
    ] = None,
) -> None:
    """Train a pack. Interrupted with Ctrl-C, the same command goes on where it stopped.

    On several devices: accelerate launch -m train.cli train CONFIG
    """
    with _errors_as_sentences():
        settings = _load(config, overrides)
        with _progress(Console(stderr=True)) as report:
            result = run(settings, progress=report, comfyui=comfyui)
        if PartialState().is_main_process:
            size = result.path.stat().st_size / 1024
            print(f"{result.path} ({size:.0f} KiB) after {result.seconds:.0f} s")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config without training: every mistake, each with its line."""
    with _errors_as_sentences():
        settings = _load(config, overrides)
        names = ", ".join(concept.name for concept in settings.concepts)
        print(
            f"{config} is fine: erases {names}; keeps {len(settings.retain)} phrases; writes {settings.output}"
        )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pack (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a pack says of itself."""
    with _errors_as_sentences():
        info = checkpoint.read_info(file)
        if as_json:
            print(json.dumps({"bytes": file.stat().st_size, **checkpoint.to_plain(info)}, indent=2))
        else:
            Console().print(_describe(file, info))


def _load(config: Path, overrides: list[str] | None) -> TrainConfig:
    """A config whose checkpoint is there."""
    settings = load_config(config, overrides or [])
    if not settings.checkpoint.is_file():
        raise ConfigError(
            f"{config}: there is no checkpoint {settings.checkpoint}. Give the file that ComfyUI loads."
        )
    return settings


def _describe(file: Path, info: PackInfo) -> Table:
    table = Table(title=file.name, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for concept in info.concepts:
        table.add_row(
            "erases",
            f"{concept.name} ({', '.join(concept.target)}), draws {concept.anchor!r} instead",
        )
    network = info.hypernetwork
    table.add_row("for", f"{info.spec.title}, trained on {info.base.name} [{info.base.digest}]")
    table.add_row(
        "hypernetwork",
        f"{network.architecture.value}, rank {network.rank}, hidden {network.hidden_dim}, S = {network.num_steps}, "
        f"{len(info.targets)} target modules, {file.stat().st_size / 1024:.0f} KiB",
    )
    table.add_row("gate", f"fires from probability {info.gate.threshold:g}")
    if info.calibration:
        c = info.calibration
        table.add_row(
            "calibration",
            f"{c.false_fire_rate:.2%} of {c.num_negatives} held-back other prompts fire, "
            f"{c.miss_rate:.2%} of {c.num_positives} held-back target prompts do not",
        )
    for name, value in info.metrics.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row(
        "training", f"config {info.training_digest[:12]}, seed {info.training.get('seed')}"
    )
    table.add_row("version", info.version)
    table.add_row("license", info.license or "not stated")
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """A reporter of events: a bar with rate and time left on a terminal, else a line a stage."""
    if not console.is_terminal:
        stages: set[str] = set()

        def line(event: Event) -> None:
            if event.stage not in stages:
                stages.add(event.stage)
                console.print(f"{event.stage} ...", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, values="")
            values = "  ".join(f"{name} {value:.4g}" for name, value in event.values.items())
            bars.update(tasks[event.stage], completed=event.step, total=event.total, values=values)

        yield bar


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Say what is wrong on stderr, without a traceback, and end with the exit code of its kind."""
    logging.basicConfig(level=logging.WARNING)
    try:
        yield
    except ComfyUINotFoundError as error:
        code, text = FAILED, str(error)
    except BAD_INPUT_ERRORS as error:
        code, text = BAD_INPUT, str(error)
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        code = INTERRUPTED
        text = str(error) or "Stopped at once. The same command goes on from the last saved state."
    except torch.OutOfMemoryError:
        code = FAILED
        text = (
            "Out of memory. Lower train.batch_size, trajectories.batch_size or trajectories.size."
        )
    except (OSError, ValueError, TrainingDivergedError) as error:
        log.debug("The error was raised here:", exc_info=True)
        code, text = FAILED, str(error)
    else:
        return
    print(text, file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """The command line."""
    app()


if __name__ == "__main__":
    main()
