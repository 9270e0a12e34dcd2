"""Every benchmark: ``python -m benchmarks.run`` (or ``make bench``) writes ``benchmarks/out/bench.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import generate, layers, machine, sampling, training


def main(
    quick: Annotated[bool, typer.Option(help="Only see whether everything runs.")] = False,
    with_training: Annotated[
        bool, typer.Option("--training", help="Training, too, for most of an hour more.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "bench.json",
) -> None:
    """Run every benchmark on this machine; leave it idle meanwhile."""
    console = Console()
    results = {"machine": machine.start(console), "quick": quick}
    results["generate"] = generate.measure(console, quick=quick)
    results["layers"] = layers.measure(console, quick=quick)
    results["sampling"] = sampling.measure(list(sampling.SUBJECTS), console, quick=quick)
    if with_training:
        results["training"] = training.measure(training.DEFAULT_PARTS, console, quick=quick)
    generate.show(results["generate"], console)
    layers.show(results["layers"], console)
    sampling.show(results["sampling"], console)
    if with_training:
        training.show(results["training"], console)
    machine.write(output, results, console)


if __name__ == "__main__":
    typer.run(main)
