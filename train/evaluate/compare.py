"""Several methods on the same tasks: train each, ask it the same questions, put the figures side by side.

Every finished cell (method, number of concepts, seed) is a file, so an interrupted comparison goes on with the same command, and
processes under ``accelerate launch`` share the tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState

from ..config import ConfigError
from ..loop import Event
from ..state import written_whole
from .attacks import Aim, TokenModel, Victim, attack_interpolation, attack_rate
from .base import Evaluator, Kind, PictureModel, Question, World
from .erasers import Eraser, NoEraser
from .exam import Answer, Sheet, draw_sheet, mark
from .methods import METHODS, Workshop
from .scores import Figures, summarise

FIRST_SEED = 3_000_000
"""Of the noise of pictures; no training draws from here on."""
SEEDS_APART = 10_000
ATTACKED = 32
"""Prompts whose word is moved."""
ATTACK_SHARE = 0.5


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    Attributes:
        attacked, base_attacked: share of pictures that hold the erased thing when its word is moved half of the way to
            random words, with the eraser and without.
    """

    method: str
    concepts: int
    seed: int
    train_seconds: float
    pack_bytes: int
    answers: tuple[Answer, ...]
    attacked: float | None = None
    base_attacked: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: a method on all tasks with so many concepts."""

    method: str
    concepts: int
    seeds: int
    figures: Figures
    train_seconds: float
    pack_bytes: int
    attack_50: float | None
    base_attack_50: float | None

    def plain(self) -> dict[str, object]:
        """As ``compare.json`` has it."""
        scores = self.figures.erased
        return {
            "method": self.method,
            "concepts": self.concepts,
            "acc_e": scores.acc_e,
            "acc_g": scores.acc_g,
            "acc_s": scores.acc_s,
            "acc_s_siblings": scores.acc_s_siblings,
            "h_o": self.figures.h_o.value,
            "h_o_low": self.figures.h_o.low,
            "h_o_high": self.figures.h_o.high,
            "train_seconds": self.train_seconds,
            "pack_bytes": self.pack_bytes,
            "attack_50": self.attack_50,
            "seeds": self.seeds,
            "base": {**asdict(self.figures.base), "attack_50": self.base_attack_50},
            "figures": asdict(self.figures),
        }


def compare(
    world: World,
    *,
    methods: Sequence[str],
    sizes: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
    report: Callable[[Event], None],
) -> list[Row]:
    """Fill in the cells that are missing, and sum all up.

    Args:
        sizes: numbers of concepts.
        seeds: one task each; another seed has other concepts, other training and other pictures.
        folder: where cells are kept.

    Raises:
        ConfigError: a method is unknown, or a size is not possible.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"There is no method {unknown[0]!r}. Known: {', '.join(METHODS)}.")
    too_many = [size for size in sizes if not 1 <= size <= world.most]
    if too_many:
        raise ConfigError(
            f"Tasks of the world {world.name!r} have 1 to {world.most} concepts, got {too_many[0]}."
        )
    processes = PartialState(cpu=True)
    tasks = sorted(((size, seed) for size in sizes for seed in seeds), key=lambda t: (t[1], -t[0]))
    for size, seed in tasks[processes.process_index :: processes.num_processes]:
        missing = [m for m in methods if not _path(folder, m, size, seed).exists()]
        if missing:
            _run_task(world, size, seed, missing, folder, report)
    processes.wait_for_everyone()
    cells = [
        read_cell(path)
        for size, seed in tasks
        for method in methods
        if (path := _path(folder, method, size, seed)).exists()
    ]
    return summarise_cells(cells)


def summarise_cells(cells: Sequence[Cell]) -> list[Row]:
    """A row for every method and number of concepts, in the order of the table."""
    rows = []
    for concepts in sorted({cell.concepts for cell in cells}):
        for method in METHODS:
            own = [c for c in cells if (c.concepts, c.method) == (concepts, method)]
            if own:
                rows.append(_row(method, concepts, own))
    return rows


def _row(method: str, concepts: int, cells: Sequence[Cell]) -> Row:
    def mean(values: Sequence[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return sum(found) / len(found) if found else None

    return Row(
        method,
        concepts,
        len(cells),
        summarise([cell.answers for cell in cells]),
        train_seconds=mean([cell.train_seconds for cell in cells]) or 0.0,
        pack_bytes=round(mean([float(cell.pack_bytes) for cell in cells]) or 0),
        attack_50=mean([cell.attacked for cell in cells]),
        base_attack_50=mean([cell.base_attacked for cell in cells]),
    )


def _run_task(
    world: World,
    size: int,
    seed: int,
    methods: Sequence[str],
    folder: Path,
    report: Callable[[Event], None],
) -> None:
    """All missing methods on one task, which share its trajectories and the model's own pictures."""
    model, evaluator, task = world.model(), world.evaluator(), world.task(size, seed)
    sheet = Sheet.of(task.questions, FIRST_SEED + SEEDS_APART * seed)
    name = f"{size}-{seed}"

    def tick(stage: str) -> Callable[[int, int], None]:
        return lambda step, total: report(Event(f"{name}: {stage}", step, total))

    base = draw_sheet(
        sheet, model, evaluator, NoEraser(), world.sampling, tick=tick("the model's own pictures")
    )
    packs = folder / "packs" / name
    packs.mkdir(parents=True, exist_ok=True)
    shop = Workshop(
        task.config,
        model,
        packs,
        lambda event: report(Event(f"{name}: {event.stage}", event.step, event.total)),
    )
    for method in methods:
        trained = METHODS[method](shop)
        drawn = draw_sheet(
            sheet,
            model,
            evaluator,
            trained.eraser,
            world.sampling,
            base=base,
            tick=tick(f"pictures of {method}"),
        )
        answers = mark(sheet, evaluator, base, drawn)
        attacked, base_attacked = _attack(world, model, evaluator, trained.eraser, sheet, seed)
        cell = Cell(
            method,
            size,
            seed,
            trained.seconds,
            trained.bytes,
            tuple(answers),
            attacked,
            base_attacked,
        )
        write_cell(_path(folder, method, size, seed), cell)


def _attack(
    world: World,
    model: PictureModel,
    evaluator: Evaluator,
    eraser: Eraser,
    sheet: Sheet,
    seed: int,
) -> tuple[float | None, float | None]:
    """How often pictures hold the erased thing when its word is half of the way to a random one, with and without the eraser."""
    if not isinstance(model, TokenModel):
        return None, None
    questions = dict.fromkeys(q for q in sheet.questions if q.kind is Kind.TARGET)
    aims = [Aim(q.text, q.word, q.shows[0]) for q in questions][:ATTACKED]
    (attacked,) = attack_interpolation(
        Victim.of(model, eraser),
        aims,
        shares=(ATTACK_SHARE,),
        directions=max(1, round(ATTACKED / len(aims))),
        seed=seed,
    )
    rate = attack_rate(
        model,
        eraser,
        evaluator,
        attacked,
        world.sampling,
        first_seed=FIRST_SEED + SEEDS_APART * seed + SEEDS_APART // 2,
    )
    return rate.erased, rate.base


def _path(folder: Path, method: str, concepts: int, seed: int) -> Path:
    return folder / "cells" / f"{method.replace(' ', '-')}.{concepts}.{seed}.json"


def write_cell(path: Path, cell: Cell) -> None:
    """Write a cell; it appears only when whole."""
    questions = list(dict.fromkeys(answer.question for answer in cell.answers))
    place = {question: index for index, question in enumerate(questions)}
    plain = {
        **{key: value for key, value in vars(cell).items() if key != "answers"},
        "questions": [{**vars(q), "kind": q.kind.value} for q in questions],
        "answers": [
            {**vars(answer), "question": place[answer.question]} for answer in cell.answers
        ],
    }
    with written_whole(path) as part:
        part.write_text(json.dumps(plain), encoding="utf-8")


def read_cell(path: Path) -> Cell:
    """Read back what ``write_cell`` wrote."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    questions = [
        Question(Kind(q["kind"]), q["text"], tuple(q["shows"]), q["word"])
        for q in plain.pop("questions")
    ]
    answers = tuple(
        Answer(**{**answer, "question": questions[answer["question"]]})
        for answer in plain.pop("answers")
    )
    return Cell(**plain, answers=answers)
