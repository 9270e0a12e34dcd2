"""What a stricter gate would have done: ``python -m benchmarks.thresholds FOLDER`` reads packs and answers that ``unhype compare`` wrote there.

A prompt that a stricter threshold silences gives the model's own picture, which the comparison drew, too, so nothing is drawn anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo.world.bench import DemoWorld
from train.calibrate import in_batches, read_captions
from train.config import TrainConfig, make_config
from train.evaluate.compare import Cell, read_cell
from train.evaluate.exam import Answer
from train.evaluate.scores import summarise
from train.gate import READ_AT_ONCE, calibrate, gather
from unhype import checkpoint
from unhype.checkpoint import Pack
from unhype.gate import Gate

from . import machine

POSITIONS = (0.0, 0.1, 0.25, 0.4)
EMBEDDED_AT_ONCE = 256
METHOD, PACK = "ours", "ours.safetensors"

Embed = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a pack would have done at one threshold.

    Attributes:
        answers: to the comparison's questions; none if a prompt fires that did not when pictures were drawn, or where the pack
            writes less of its LoRA the less sure its gate is.
        captions: share of ordinary captions that fire; none without captions.
    """

    answers: tuple[Answer, ...] | None
    captions: float | None


def measure(
    folder: Path, embed: Embed, console: Console, *, captions: Path | None = None
) -> dict[str, Any]:
    """Figures of every number of concepts and threshold position.

    Args:
        folder: the ``--out`` of a comparison.
        embed: reads prompts as the packs do, (prompts, tokens, dim).
        captions: a text file of ordinary captions; those that name an erased concept are left out.

    Raises:
        ConfigError: there is no caption.
        FileNotFoundError: the folder holds no cell of ``ours``.
    """
    cells = [read_cell(path) for path in sorted((folder / "cells").glob(f"{METHOD}.*.json"))]
    if not cells:
        raise FileNotFoundError(
            f"{folder} has no cells/{METHOD}.*.json. Give the folder that `unhype compare --out` wrote."
        )
    outcomes: dict[int, dict[float, list[Outcome]]] = {}
    for cell in cells:
        name = f"{cell.concepts}-{cell.seed}"
        pack = checkpoint.load(folder / "packs" / name / PACK)
        console.print(f"{name}: reading prompts")
        spoken = None if captions is None else embed(list(read_captions(captions, pack.info).texts))
        of_size = outcomes.setdefault(cell.concepts, {position: [] for position in POSITIONS})
        for position, outcome in judge(pack, cell, embed, spoken).items():
            of_size[position].append(outcome)
    return {
        str(concepts): {str(position): _figures(of_tasks) for position, of_tasks in by.items()}
        for concepts, by in sorted(outcomes.items())
    }


def judge(
    pack: Pack, cell: Cell, embed: Embed, captions: Tensor | None = None
) -> dict[float, Outcome]:
    """One pack at every position; ``captions`` are embedded, (captions, tokens, dim)."""
    config = make_config(dict(pack.info.training))
    material = gather(config, embed)
    texts = list(dict.fromkeys(answer.question.text for answer in cell.answers))
    asked = embed(texts)
    outcomes = {}
    for position in POSITIONS:
        gate = copy.deepcopy(pack.gate)
        calibrate(gate, material, _placed(config, position))
        fires = dict(zip(texts, fired(gate, asked).tolist(), strict=True))
        answers = tuple(_silenced(a) if not fires[a.question.text] else a for a in cell.answers)
        known = all(a.acts for a in cell.answers if fires[a.question.text])
        # Elsewhere, a graded pack's threshold would have let it write more or less of its LoRA.
        known = known and pack.gate.config.least_strength == 1
        share = None if captions is None else fired(gate, captions).float().mean().item()
        outcomes[position] = Outcome(answers if known else None, share)
    return outcomes


def _placed(config: TrainConfig, position: float) -> TrainConfig:
    gate = config.gate.model_copy(update={"threshold_position": position})
    return config.model_copy(update={"gate": gate})


@torch.no_grad()
def fired(gate: Gate, embeddings: Tensor, threshold: float | None = None) -> Tensor:
    """Which prompts fire anything, (prompts,)."""
    parts = embeddings.split(READ_AT_ONCE)
    return torch.cat([gate.read(part, threshold=threshold).open for part in parts])


def _silenced(answer: Answer) -> Answer:
    """What the model itself showed."""
    return replace(answer, hit=answer.base_hit, other=answer.base_other, acts=False, identical=True)


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    shares = [outcome.captions for outcome in outcomes if outcome.captions is not None]
    found: dict[str, Any] = {"tasks": len(outcomes), "captions": shares}
    answers = [outcome.answers for outcome in outcomes if outcome.answers is not None]
    if len(answers) < len(outcomes):
        return found
    figures = summarise(answers)
    own, base = figures.erased, figures.base
    names = ("acc_e", "acc_g", "acc_s", "acc_s_siblings")
    return {
        **found,
        **{name: getattr(own, name) for name in names},
        "base": {name: getattr(base, name) for name in names},
        "h_o": [figures.h_o.value, figures.h_o.low, figures.h_o.high],
    }


def show(measured: dict[str, Any], console: Console) -> None:
    """One row for each number of concepts and position."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    def against(row: dict[str, Any], name: str) -> str:
        if row.get(name) is None:
            return ""
        return f"{100 * (row[name] - row['base'][name]):+.1f}"

    headings = ("Acc_e", "Acc_g", "Acc_s", "look-alikes", "H_o", "captions that fire")
    table = Table("concepts", "position", *headings)
    for concepts, positions in measured.items():
        for position, row in positions.items():
            fired = row["captions"]
            table.add_row(
                concepts,
                position,
                share(row.get("acc_e")),
                share(row.get("acc_g")),
                against(row, "acc_s"),
                against(row, "acc_s_siblings"),
                " ".join(share(value) for value in row.get("h_o", ())),
                share(sum(fired) / len(fired)) if fired else "",
            )
    console.print(table)


def main(
    folder: Annotated[Path, typer.Argument(help="What `unhype compare --world demo --out` wrote.")],
    captions: Annotated[
        Path | None, typer.Option(help="A text file of ordinary captions, one a line.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "thresholds.json",
) -> None:
    """Put the gate's threshold elsewhere, and count again."""
    console = Console()
    described = machine.start(console)
    embed = in_batches(DemoWorld().model().embed_tokens, EMBEDDED_AT_ONCE, lambda *_: None)
    measured = measure(folder, embed, console, captions=captions)
    show(measured, console)
    machine.write(output, {"machine": described, "thresholds": measured}, console)


if __name__ == "__main__":
    typer.run(main)
