"""What is drawn in place of the erased, with edits as they were solved for and as they were refined: ``python -m benchmarks.instead``.

Target prompts of the demo world's tasks are drawn from the same noise by the model itself for the anchor, and with each pack for the target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from demo.world.bench import DemoWorld
from train.config import TrainConfig, in_closed_form
from train.evaluate.base import Evaluator, Kind, PictureModel, Question, Task
from train.evaluate.erasers import NoEraser, PackEraser
from train.evaluate.exam import Drawn, Sheet, draw_sheet
from train.prompts import fill
from train.run import train
from unhype import checkpoint

from . import machine

FIRST_SEED = 6_000_000
"""Of the noise; no training and no other benchmark has it."""
SOLVED, REFINED = "solved", "refined"
DEFAULT_COUNTS = (1, 4, 16)

Change = Callable[[TrainConfig], TrainConfig]


def measure(
    world: DemoWorld, counts: tuple[int, ...], console: Console, *, change: Change = lambda c: c
) -> dict[str, Any]:
    """Figures of each number of concepts, for both kinds of edits.

    Args:
        change: of every training, for a quick try.
    """
    model, evaluator = world.model(), world.evaluator()
    measured: dict[str, Any] = {}
    for count in counts:
        task = world.task(count, 0)
        asked, meant = ask(task)
        anchors = draw_sheet(meant, model, evaluator, NoEraser(), world.sampling)
        for name in (SOLVED, REFINED):
            pack, seconds = make_pack(
                change(in_closed_form(task.config, own_length=True)), model, name
            )
            drawn = draw_sheet(asked, model, evaluator, PackEraser(pack), world.sampling)
            figures = {"train_seconds": seconds, **look(asked, drawn, anchors, evaluator)}
            measured.setdefault(str(count), {})[name] = figures
            console.print(f"{count} concepts, {name}: {figures}")
    return measured


def ask(task: Task) -> tuple[Sheet, Sheet]:
    """The task's target prompts, and the same prompts for the anchor, with the same seeds."""
    anchors = {concept.name: concept.anchor for concept in task.config.concepts}
    targets = [question for question in task.questions if question.kind is Kind.TARGET]
    sheet = Sheet.of(targets, FIRST_SEED)
    return sheet, replace(sheet, questions=tuple(_meant(q, anchors) for q in sheet.questions))


def _meant(question: Question, anchors: dict[str, str]) -> Question:
    form = question.text.replace(question.word, "{}", 1)
    return replace(question, text=fill(form, anchors[question.shows[0]]))


def make_pack(config: TrainConfig, model: PictureModel, name: str) -> tuple[checkpoint.Pack, float]:
    """A pack with its edits left as they were solved for, or refined; and its seconds."""
    objective = config.objective.model_copy(update={"refine": name == REFINED})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack.safetensors"
        config = config.model_copy(update={"output": path, "objective": objective})
        seconds = train(config, denoiser=model).seconds
        return checkpoint.load(path), seconds


def look(sheet: Sheet, drawn: Drawn, anchors: Drawn, evaluator: Evaluator) -> dict[str, float]:
    """Shares of pictures with the erased thing and with another, and the distance of features from the anchor's, relative to their length."""
    own = torch.tensor([evaluator.labels.index(q.shows[0]) for q in sheet.questions])
    there = drawn.judgement.scores > evaluator.present
    erased = there.gather(1, own[:, None])[:, 0]
    others = there.scatter(1, own[:, None], False).any(1)
    features, wanted = drawn.judgement.features, anchors.judgement.features
    distance = (features - wanted).norm(dim=1) / wanted.norm(dim=1)
    return {
        "pictures": len(sheet),
        "erased": erased.float().mean().item(),
        "another": others.float().mean().item(),
        "distance": distance.mean().item(),
    }


def show(measured: dict[str, Any], console: Console) -> None:
    """One row for each pack."""
    table = Table("concepts", "edits", "erased", "another thing", "distance from anchor", "seconds")
    for count, packs in measured.items():
        for name, figures in packs.items():
            shares = (f"{100 * figures[key]:.1f} %" for key in ("erased", "another"))
            table.add_row(
                count,
                name,
                *shares,
                f"{figures['distance']:.3f}",
                f"{figures['train_seconds']:.0f}",
            )
    console.print(table)


def main(
    concepts: Annotated[
        str, typer.Option(help="Numbers of concepts, with commas between.")
    ] = ",".join(map(str, DEFAULT_COUNTS)),
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "instead.json",
) -> None:
    """Compare what is drawn in place of the erased with the anchor's pictures."""
    console = Console()
    described = machine.start(console)
    try:
        counts = tuple(int(number) for number in concepts.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"--concepts is {concepts!r}, expected numbers like 1,4,16."
        ) from error
    measured = measure(DemoWorld(), counts, console)
    show(measured, console)
    machine.write(output, {"machine": described, "instead": measured}, console)


if __name__ == "__main__":
    typer.run(main)
