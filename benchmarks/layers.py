"""What the processor does for a layer with a LoRA, whatever computes: ``python -m benchmarks.layers``.

A GPU with one picture is done with a layer before Python has started the next. Layers too small to take any time show what it waits
for: as many of ComfyUI's own as attention to the text has in Stable Diffusion 1.5, all given one text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from unhype.host.bypass import RowTable, find_sites
from unhype.lora import LoRAFactors, TargetModule

from . import machine

NUM_LAYERS, WIDTH, TOKENS, RANK = 32, 16, 7, 4
ROUNDS, QUICK_ROUNDS = 3000, 3
ROWS = (0, None)
"""A prompt with a LoRA and the negative in one batch."""


def measure(console: Console, *, quick: bool = False) -> dict[str, Any]:
    """Microseconds for a layer at a step: ``plain``, with products ``shared`` where the text is another at every step, and with results
    ``kept`` where it is the same; ComfyUI must be importable."""
    import comfy.ops

    layers = nn.ModuleList(
        comfy.ops.disable_weight_init.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)
    )
    targets = tuple(TargetModule(str(index), WIDTH, WIDTH) for index in range(NUM_LAYERS))
    torch.manual_seed(0)
    for layer in layers:
        nn.init.normal_(layer.get_parameter("weight"))
    factors = LoRAFactors(
        targets,
        tuple(torch.randn(1, RANK, WIDTH) for _ in targets),
        tuple(torch.randn(1, WIDTH, RANK) for _ in targets),
        torch.ones(1),
    )
    sites, text = find_sites(layers, targets), torch.randn(len(ROWS), TOKENS, WIDTH)
    shared, kept = RowTable(factors), RowTable(factors)
    ways: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "shared": lambda: shared.adapted(sites, ROWS, keep=""),
        "kept": lambda: kept.adapted(sites, ROWS, keep=""),
    }

    def step(way: str, number: int) -> list[Tensor]:
        states = text + number if way == "shared" else text.clone()
        with ways[way]():
            return [layer(states) for layer in layers]

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    console.print("layers: measuring")
    with torch.inference_mode(), _one_thread():
        for number in range(QUICK_ROUNDS if quick else ROUNDS):
            for way, own in seconds.items():
                started = time.perf_counter()
                step(way, number)
                own.append(time.perf_counter() - started)
    medians = {way: statistics.median(own) for way, own in seconds.items()}
    return {
        "layers": NUM_LAYERS,
        "shared_over_plain": medians["shared"] / medians["plain"],
        "kept_over_plain": medians["kept"] / medians["plain"],
        **{f"{way}_microseconds": median / NUM_LAYERS * 1e6 for way, median in medians.items()},
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other would be measured in place of what is started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def show(results: dict[str, Any], console: Console) -> None:
    """A table of the times."""
    table = Table("a layer", title="The processor's work for a layer", title_justify="left")
    table.add_column("µs", justify="right")
    for way in ("plain", "shared", "kept"):
        table.add_row(way, f"{results[f'{way}_microseconds']:.1f}")
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option(help="Only see whether it runs.")] = False,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "layers.json",
) -> None:
    """Time starting the operations of a layer, with a LoRA and without."""
    console = Console()
    described = machine.start(console)
    results = measure(console, quick=quick)
    show(results, console)
    machine.write(output, {"machine": described, "quick": quick, "layers": results}, console)


if __name__ == "__main__":
    typer.run(main)
