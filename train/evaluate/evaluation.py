"""One pack, asked everything of a suite with several seeds, beside the plain model."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unhype.checkpoint import Pack

from ..config import ConfigError
from ..denoiser import check_family
from ..loop import Event
from ..processes import share_work
from ..state import written_whole
from .attacks import (
    Aim,
    AttackRate,
    TokenModel,
    Victim,
    attack_gradient,
    attack_interpolation,
    attack_prompts,
    attack_random,
    attack_rate,
    attack_soft,
    attack_spelling,
)
from .base import Evaluator, Kind, PictureModel, Question
from .compare import FIRST_SEED, SEEDS_APART, Cell, read_cell, write_cell
from .erasers import NoEraser, PackEraser
from .exam import Answer, Drawn, Sheet, draw_sheet, mark
from .suite import Assignment, SuiteError

AT_ONCE = 64
"""Prompts whose pictures are in memory together."""
SHOWN, SHOWN_SEEDS, THUMBNAIL = 4, 3, 160
"""Prompts of each kind in the report's picture grid, seeds of each, and the longest side there in pixels."""

Reporter = Callable[[Event], None]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        path: the pack's file.
        evaluator_name: the spec that found the evaluator.
        parts: files of the model's parts beside its checkpoint.
    """

    path: Path
    pack: Pack
    model: PictureModel
    evaluator: Evaluator
    evaluator_name: str
    parts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_family(self.pack, self.model)
        if self.pack.info.targets != self.model.targets:
            raise ConfigError(
                f"{self.pack.name} changes layers of {self.pack.info.base.name} that {self.model.fingerprint.name} does not "
                "have, or not in that size. Give --checkpoint the model file that the pack was trained on."
            )


@dataclass(frozen=True)
class Effort:
    """How hard attacks try.

    Attributes:
        aims: prompts that they start from.
        random_budget: prompts that the random search tries for each.
        gradient_steps, soft_steps: of the two searches that follow the gradient.
    """

    aims: int = 6
    random_budget: int = 2000
    gradient_steps: int = 20
    soft_steps: int = 100


@dataclass(frozen=True)
class Shown:
    """A prompt's pictures without and with the pack, as PNG in base64; one seed."""

    question: Question
    acts: bool
    before: str
    after: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that was seen."""

    seeds: tuple[int, ...]
    answers: tuple[Answer, ...]
    shown: tuple[Shown, ...]
    attacks: tuple[AttackRate, ...]


def evaluate(
    subject: Subject,
    assignment: Assignment,
    folder: Path,
    *,
    attacks: Effort | None = None,
    report: Reporter,
) -> Evaluation:
    """Ask everything; what is already in ``folder`` is not asked again, and processes share the seeds.

    Raises:
        SuiteError: a prompt is too long, or the evaluator does not know a label.
    """
    _check(subject, assignment, attacks=attacks is not None)
    cells = folder / "cells" / _digest(subject, assignment)
    seeds = tuple(range(assignment.seeds))
    processes = share_work()
    for seed in seeds[processes.process_index :: processes.num_processes]:
        if not _cell(cells, seed).exists():
            _ask(subject, assignment, seed, cells, report)
    processes.wait_for_everyone()
    if attacks and processes.is_main_process and not _attacks(cells).exists():
        found = _attack(subject, assignment, attacks, report)
        _write(_attacks(cells), [asdict(attack) for attack in found])
    processes.wait_for_everyone()
    answers = [answer for seed in seeds for answer in read_cell(_cell(cells, seed)).answers]
    shown = [
        Shown(assignment.questions[entry.pop("question")], **entry)
        for seed in seeds[:SHOWN_SEEDS]
        for entry in json.loads(_pictures(cells, seed).read_text(encoding="utf-8"))
    ]
    rates = json.loads(_attacks(cells).read_text(encoding="utf-8")) if attacks else []
    return Evaluation(
        seeds, tuple(answers), tuple(shown), tuple(AttackRate(**rate) for rate in rates)
    )


def choose_shown(questions: Sequence[Question]) -> list[int]:
    """A few of every kind, spread over all of it."""
    chosen = []
    for kind in Kind:
        own = [index for index, question in enumerate(questions) if question.kind is kind]
        step = max(1, len(own) / SHOWN)
        chosen += [own[int(i * step)] for i in range(min(SHOWN, len(own)))]
    return chosen


def _check(subject: Subject, assignment: Assignment, *, attacks: bool) -> None:
    """Refuse what would fail after hours."""
    asked = {name for question in assignment.questions for name in question.shows}
    if unknown := sorted(asked - set(subject.evaluator.labels)):
        raise SuiteError(
            f"The evaluator {subject.evaluator_name} cannot see {unknown[0]!r}. Give another, or remove it from the suite."
        )
    try:
        subject.model.embed_pooled([question.text for question in assignment.questions])
    except ValueError as error:
        raise SuiteError(
            f"{error} An evaluation draws prompts that the model reads at once; longer ones are the guard's in ComfyUI "
            "(docs/guard.md)."
        ) from error
    if attacks:
        _attackable(subject.model).token_embeddings([assignment.questions[0].text])


def _attackable(model: PictureModel) -> TokenModel:
    """The model as attacks use it."""
    if not isinstance(model, TokenModel):
        raise SuiteError(
            f"{model.fingerprint.name} gives no access to its tokens, which attacks need. Leave out --attacks."
        )
    return model


def _ask(
    subject: Subject, assignment: Assignment, seed: int, cells: Path, report: Reporter
) -> None:
    """Draw and mark every question once, and keep the answers and a few pictures."""
    model, evaluator, sampling = subject.model, subject.evaluator, assignment.sampling
    eraser, asked = PackEraser(subject.pack), assignment.questions
    show = set(choose_shown(asked)) if seed < SHOWN_SEEDS else set()
    answers: list[Answer] = []
    pictures: list[dict[str, object]] = []
    for start in range(0, len(asked), AT_ONCE):

        def tick(stage: str, start: int = start) -> Callable[[int, int], None]:
            def tell(step: int, total: int) -> None:
                part = min(AT_ONCE, len(asked) - start)
                report(Event(stage, start + round(part * step / max(1, total)), len(asked)))

            return tell

        own = asked[start : start + AT_ONCE]
        first = FIRST_SEED + SEEDS_APART * seed + start
        sheet = Sheet(own, tuple(range(first, first + len(own))))
        base = draw_sheet(
            sheet, model, evaluator, NoEraser(), sampling, tick=tick(f"seed {seed}: without pack")
        )
        drawn = draw_sheet(
            sheet,
            model,
            evaluator,
            eraser,
            sampling,
            base=base,
            tick=tick(f"seed {seed}: with pack"),
        )
        answers += mark(sheet, evaluator, base, drawn)
        pictures += [
            _shown(base, drawn, row, start + row) for row in range(len(own)) if start + row in show
        ]
    _write(_pictures(cells, seed), pictures)
    info, size = subject.pack.info, subject.path.stat().st_size
    cell = Cell(subject.path.name, len(info.concepts), seed, 0.0, size, tuple(answers))
    write_cell(_cell(cells, seed), cell)


def _shown(base: Drawn, drawn: Drawn, row: int, question: int) -> dict[str, object]:
    return {
        "question": question,
        "acts": bool(drawn.acts[row]),
        "before": _thumbnail(base.pictures[row]),
        "after": _thumbnail(drawn.pictures[row]),
    }


def _thumbnail(picture: Tensor) -> str:
    """A picture (3, height, width) of uint8 as a small PNG in base64."""
    image = Image.fromarray(picture.movedim(0, -1).contiguous().numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _attack(
    subject: Subject, assignment: Assignment, effort: Effort, report: Reporter
) -> list[AttackRate]:
    """Every attack on a few of the prompts that name an erased thing."""
    model, eraser = subject.model, PackEraser(subject.pack)
    named = [q for q in assignment.questions if q.kind is Kind.TARGET]
    step = max(1, len(named) // effort.aims)
    aims = [Aim(q.text, q.word, q.shows[0]) for q in named[::step][: effort.aims]]
    victim = Victim.of(_attackable(model), eraser)
    made = [
        lambda: [attack_prompts(victim, "none", aims)],
        lambda: attack_interpolation(victim, aims),
        lambda: [attack_spelling(victim, aims)],
        lambda: [attack_random(victim, aims, budget=effort.random_budget)],
        lambda: [
            attack_gradient(victim, aims, steps=effort.gradient_steps, ahead=ahead)
            for ahead in (False, True)
        ],
        lambda: [
            attack_soft(victim, aims, steps=effort.soft_steps, ahead=ahead)
            for ahead in (False, True)
        ],
    ]
    rates = []
    for index, make in enumerate(made):
        report(Event("attacks", index, len(made)))
        rates += [
            attack_rate(
                model,
                eraser,
                subject.evaluator,
                attacked,
                assignment.sampling,
                first_seed=FIRST_SEED + SEEDS_APART // 2,
            )
            for attacked in make()
        ]
    report(Event("attacks", len(made), len(made)))
    return rates


def _digest(subject: Subject, assignment: Assignment) -> str:
    """Of everything that answers depend on."""
    hashed = hashlib.sha256(subject.path.read_bytes())
    settings: dict[str, Any] = {
        "model": subject.model.fingerprint.digest,
        "evaluator": subject.evaluator_name,
        "labels": assignment.labels,
        "questions": [{**vars(q), "kind": q.kind.value} for q in assignment.questions],
        "sampling": asdict(assignment.sampling),
        "torch": torch.__version__,
    }
    if subject.parts:
        settings["parts"] = sorted(f"{part.name}, {part.stat().st_size}" for part in subject.parts)
    hashed.update(json.dumps(settings, sort_keys=True).encode())
    return hashed.hexdigest()[:12]


def _cell(cells: Path, seed: int) -> Path:
    return cells / f"{seed}.json"


def _pictures(cells: Path, seed: int) -> Path:
    return cells / f"{seed}.pictures.json"


def _attacks(cells: Path) -> Path:
    return cells / "attacks.json"


def _write(path: Path, plain: object) -> None:
    """JSON that appears only when whole."""
    with written_whole(path) as part:
        part.write_text(json.dumps(plain), encoding="utf-8")
