"""What writing a LoRA costs, and the pack that does it: ``python -m benchmarks.generate``.

A pack for 100 concepts at the size of Stable Diffusion 1.5. Only the gate knows how many concepts there are, one output each; neither
hypernetwork has a part of its own for a concept, but the paper's is made wider for many.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from unhype.families import FamilySpec, family_of_host_class
from unhype.host.bypass import find_targets
from unhype.hypernetwork import Architecture, HypernetworkConfig

from . import machine
from .models import sd15_layers
from .packs import default_sizes, make_pack

NUM_CONCEPTS = 100
REPETITIONS, QUICK_REPETITIONS = 50, 3
QUICK_HIDDEN = 8


def hypernetworks(family: FamilySpec) -> dict[str, HypernetworkConfig]:
    """What is compared: the default, a four times wider one, and the paper's for 100 concepts."""
    atoms = default_sizes(family)
    return {
        "atoms": atoms,
        "atoms_wide": replace(atoms, rank=4 * atoms.rank, hidden_dim=4 * atoms.hidden_dim),
        "heads": replace(
            atoms, architecture=Architecture.HEADS, rank=6, hidden_dim=512, num_frequencies=16
        ),
    }


def measure(console: Console, *, quick: bool = False) -> dict[str, Any]:
    """Seconds to write one prompt's LoRA and bytes of the pack, by hypernetwork; ComfyUI must be importable.

    Args:
        quick: hypernetworks too narrow to mean anything.
    """
    family = family_of_host_class("SD15")
    assert family is not None
    targets = find_targets(sd15_layers(), family.targets)
    packs, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in hypernetworks(family).items():
            console.print(f"generate: building {name}")
            path = Path(folder) / f"{name}.safetensors"
            sizes = replace(config, hidden_dim=QUICK_HIDDEN) if quick else config
            packs[name] = make_pack(path, family, targets, sizes, num_concepts=NUM_CONCEPTS)
            results[name] = {
                "bytes": path.stat().st_size,
                "parameters": sum(p.numel() for p in packs[name].hypernetwork.parameters()),
                "rank": sizes.rank,
                "hidden_dim": sizes.hidden_dim,
            }
            path.unlink()
    times: dict[str, list[float]] = {name: [] for name in packs}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(QUICK_REPETITIONS if quick else REPETITIONS):
            embedding = torch.randn(1, family.embedding.dim, generator=generator)
            for name, pack in packs.items():
                started = time.perf_counter()
                pack.generate(embedding)
                times[name].append(time.perf_counter() - started)
    for name in packs:
        results[name]["seconds"] = statistics.median(times[name])
    return {
        "concepts": NUM_CONCEPTS,
        "target_modules": len(targets),
        "heads_over_atoms_time": results["heads"]["seconds"] / results["atoms"]["seconds"],
        "heads_over_atoms_bytes": results["heads"]["bytes"] / results["atoms"]["bytes"],
        **results,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """A table of sizes and times."""
    table = Table(
        "hypernetwork", title=f"A pack for {results['concepts']} concepts", title_justify="left"
    )
    for heading in ("rank", "hidden", "parameters", "file (MiB)", "one LoRA (ms)"):
        table.add_column(heading, justify="right")
    for name, row in results.items():
        if isinstance(row, dict):
            table.add_row(
                name,
                str(row["rank"]),
                str(row["hidden_dim"]),
                f"{row['parameters']:,}",
                f"{row['bytes'] / 2**20:.2f}",
                f"{row['seconds'] * 1000:.2f}",
            )
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option(help="Hypernetworks too narrow to mean anything.")] = False,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "generate.json",
) -> None:
    """Time writing one LoRA with the default hypernetwork and with the paper's."""
    console = Console()
    described = machine.start(console)
    results = measure(console, quick=quick)
    show(results, console)
    machine.write(output, {"machine": described, "quick": quick, "generate": results}, console)


if __name__ == "__main__":
    typer.run(main)
