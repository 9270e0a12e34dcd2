"""What training costs: ``python -m benchmarks.training [PART ...]``.

``race``: how long until one concept is gone and the rest still there, by our defaults and by the authors' loop. ``cost``: how long
more concepts take. ``step``: one training step of Stable Diffusion 1.5. ``docs/benchmarks.md`` says what is measured and how.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from demo.world.bench import DemoWorld
from demo.world.concepts import load_held_out
from train.config import TrainConfig, in_closed_form
from train.denoiser import DenoiserLike
from train.evaluate.base import Evaluator, Kind, PictureModel, Question, Sampling, Task
from train.evaluate.compare import FIRST_SEED, read_cell
from train.evaluate.erasers import Eraser, NoEraser, PackEraser
from train.evaluate.exam import Drawn, Sheet, draw_sheet, mark
from train.evaluate.scores import score
from train.loop import Setting, Step, run_loop
from train.objectives import Material, make_objective
from train.processes import share_work
from train.run import train
from train.trajectories import Pool
from unhype import checkpoint
from unhype.host.denoise import Denoiser
from unhype.host.text import TextEncoder
from unhype.hypernetwork import make_hypernetwork

from . import machine, models
from .authors import RECIPES, AuthorsLoop
from .packs import default_sizes

MOST_ERASED_LEFT, MOST_KEPT_LOST = 0.05, 0.03
PROBE_SHARE = 0.1
"""Of the limit; after it the authors' recipe nearest to the goal goes on alone."""
EARLY = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
OURS, DIRECT = "ours", "ours direct"
DEFAULT_PARTS = ("race", "cost")
PARTS = (*DEFAULT_PARTS, "step")
STEP_SIZE, WARMUP = 512, 5
HASTY_GATE = {"steps": 200, "num_positives": 300, "num_negatives": 900}
POOL = 16
"""States that the steps of ``step`` draw from."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        limit: seconds of training that the authors' loop has.
        every: seconds between its exams; before the first of them are more, at ``EARLY`` shares of it.
        targets, unrelated: pictures of an exam.
        lengths: steps of our runs on trajectories.
        counts: numbers of concepts whose cost is measured.
        steps: training steps timed.
    """

    limit: float = 900.0
    every: float = 60.0
    targets: int = 40
    unrelated: int = 60
    lengths: tuple[int, ...] = (40, 80, 150)
    counts: tuple[int, ...] = (1, 4, 16, 64)
    steps: int = 40


QUICK = Plan(4.0, 4.0, targets=3, unrelated=3, lengths=(2,), counts=(1, 4), steps=2)


@dataclass(frozen=True)
class Checkpoint:
    """An exam of what was trained until then.

    Attributes:
        seconds: of processor time that training took.
        acc_e: share of pictures of the erased concept that show it.
        acc_s: share of pictures of unrelated concepts that show theirs.
    """

    seconds: float
    steps: int
    acc_e: float
    acc_s: float


@dataclass(frozen=True)
class Goal:
    """When a concept counts as erased and the rest as kept."""

    acc_e: float
    acc_s: float

    def shortfall(self, checkpoint: Checkpoint) -> float:
        """How far away it is; 0 when reached."""
        return max(0.0, checkpoint.acc_e - self.acc_e) + max(0.0, self.acc_s - checkpoint.acc_s)


Curves = dict[str, list[Checkpoint]]


@dataclass(frozen=True)
class Exam:
    """The pictures of a checkpoint, and the model's own."""

    sheet: Sheet
    model: PictureModel
    evaluator: Evaluator
    sampling: Sampling
    base: Drawn

    def grade(self, eraser: Eraser, seconds: float, steps: int) -> Checkpoint:
        """Draw and judge what is left."""
        drawn = draw_sheet(
            self.sheet, self.model, self.evaluator, eraser, self.sampling, base=self.base
        )
        scores = score(mark(self.sheet, self.evaluator, self.base, drawn))
        return Checkpoint(seconds, steps, scores.acc_e, scores.acc_s)


def choose_pictures(questions: Sequence[Question], plan: Plan) -> Sheet:
    """Names of the target in templates that no training sees, and unrelated concepts; each as often as needed, every time from another seed."""
    unseen = load_held_out().templates
    targets = [
        question
        for question in questions
        if question.kind is Kind.TARGET
        and question.text in {template.format(question.word) for template in unseen}
    ]
    unrelated = [question for question in questions if question.kind is Kind.UNRELATED]
    asked = (
        *islice(cycle(targets), plan.targets),
        *islice(cycle(unrelated), plan.unrelated),
    )
    return Sheet(asked, tuple(range(FIRST_SEED, FIRST_SEED + len(asked))))


def race(
    world: DemoWorld, model: PictureModel, plan: Plan, console: Console, *, quick: bool = False
) -> dict[str, Any]:
    """Seconds to the goal, by the authors' loop, by ours in closed form and by ours on trajectories, on one concept."""
    task = world.task(1, 0)
    evaluator, sheet = world.evaluator(), choose_pictures(task.questions, plan)
    base = draw_sheet(sheet, model, evaluator, NoEraser(), world.sampling)
    exam = Exam(sheet, model, evaluator, world.sampling, base)
    start = exam.grade(NoEraser(), 0.0, 0)
    goal = Goal(MOST_ERASED_LEFT, start.acc_s - MOST_KEPT_LOST)
    console.print(f"race: {task.config.concepts[0].name}, at first {_percent(start)}")
    config, solved = (
        _shorten(c, quick) for c in (task.config, in_closed_form(task.config, own_length=True))
    )
    ours = [
        _run_ours(exam, way, steps, console)
        for way, steps in ((hasty(solved), 0), (solved, solved.train.steps))
    ]
    direct = [_run_ours(exam, config, steps, console) for steps in plan.lengths]
    authors = run_authors(exam, task, goal, plan, console)
    by_direct = compare(direct, authors, goal, plan.limit)
    return {
        "concept": task.config.concepts[0].name,
        "plan": asdict(plan),
        "base": {"acc_e": start.acc_e, "acc_s": start.acc_s},
        "goal": asdict(goal),
        **compare(ours, authors, goal, plan.limit),
        "authors_over_direct_time": by_direct["authors_over_ours_time"],
        "direct_seconds": by_direct["ours_seconds"],
        "direct_steps": by_direct["ours_steps"],
        "curves": {
            OURS: [asdict(point) for point in ours],
            DIRECT: [asdict(point) for point in direct],
            **{name: [asdict(point) for point in curve] for name, curve in authors.items()},
        },
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
    }


def run_authors(exam: Exam, task: Task, goal: Goal, plan: Plan, console: Console) -> Curves:
    """Train by every recipe, then by the nearest to the goal, until that is reached or the limit."""
    loops = {name: AuthorsLoop(task.config, exam.model, r) for name, r in RECIPES.items()}
    curves: Curves = {name: [] for name in loops}
    running = list(loops)
    for until in exam_times(plan):
        for name in running:
            loop = loops[name]
            loop.run(until)
            curves[name].append(exam.grade(loop.eraser, loop.seconds, loop.steps))
            console.print(f"race: authors, {name}: {_describe(curves[name][-1])}")
        best = nearest({name: curves[name] for name in running}, goal)
        if goal.shortfall(curves[best][-1]) == 0:
            break
        if until >= PROBE_SHARE * plan.limit:
            running = [best]
    return curves


def exam_times(plan: Plan) -> list[float]:
    """Seconds of training at which the authors' loop is looked at; the last is the limit."""
    early = [plan.every * share for share in EARLY]
    regular = [plan.every * (number + 1) for number in range(math.ceil(plan.limit / plan.every))]
    return [*(seconds for seconds in (*early, *regular) if seconds < plan.limit), plan.limit]


def nearest(curves: Curves, goal: Goal) -> str:
    """Whose last checkpoint is nearest to the goal; the first of equals."""
    return min(curves, key=lambda name: goal.shortfall(curves[name][-1]))


def compare(
    ours: Sequence[Checkpoint], authors: Curves, goal: Goal, limit: float
) -> dict[str, Any]:
    """Seconds of both, and their ratio: at least that if the authors' loop did not get there, none if ours did not."""
    reached = [point for point in ours if goal.shortfall(point) == 0]
    first = min(reached, key=lambda point: point.seconds, default=None)
    arrived = {name: curve[-1] for name, curve in authors.items() if goal.shortfall(curve[-1]) == 0}
    recipe = min(arrived, key=lambda name: arrived[name].seconds, default=None)
    longest = max(authors, key=lambda name: authors[name][-1].seconds)
    seconds = limit if recipe is None else arrived[recipe].seconds
    return {
        "authors_over_ours_time": None if first is None else seconds / first.seconds,
        "is_lower_bound": recipe is None,
        "authors_reached": recipe is not None,
        "authors_seconds": seconds,
        "authors_recipe": recipe or longest,
        "ours_reached": first is not None,
        "ours_seconds": None if first is None else first.seconds,
        "ours_steps": None if first is None else first.steps,
    }


def hasty(config: TrainConfig) -> TrainConfig:
    """The least that erases: edits as they are solved for, behind a gate of few prompts and steps."""
    update = {
        "objective": config.objective.model_copy(update={"refine": False}),
        "gate": config.gate.model_copy(update=HASTY_GATE),
    }
    return config.model_copy(update=update)


def _run_ours(exam: Exam, config: TrainConfig, steps: int, console: Console) -> Checkpoint:
    """A run of so many steps, 0 of them if it does not train, with all that belongs to it, and its exam."""
    settings = config.train.model_copy(update={"steps": steps} if steps else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack.safetensors"
        seconds, _ = _train(config.model_copy(update={"train": settings}), exam.model, path)
        eraser = PackEraser(checkpoint.load(path))
    point = exam.grade(eraser, seconds, steps)
    console.print(f"race: ours, {config.objective.name.value}: {_describe(point)}")
    return point


def _train(config: TrainConfig, model: DenoiserLike, path: Path) -> tuple[float, int]:
    """Write a pack; the processor time of it in seconds, and its bytes."""
    began = time.process_time()
    train(config.model_copy(update={"output": path}), denoiser=model)
    return time.process_time() - began, path.stat().st_size


def cost(
    world: DemoWorld, model: DenoiserLike, plan: Plan, console: Console, *, quick: bool = False
) -> dict[str, Any]:
    """Seconds of training and bytes of the pack by the number of concepts."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in plan.counts:
            config = _shorten(in_closed_form(world.task(count, 0).config, own_length=True), quick)
            measured[count] = _train(config, model, Path(folder) / f"{count}.safetensors")
            console.print(f"cost: {count} concepts took {measured[count][0]:.0f} s")
    return relate(measured)


def read_cost(folder: Path) -> dict[str, Any]:
    """The same of a finished ``unhype compare``, means over its seeds; there seconds are those of the clock.

    Raises:
        FileNotFoundError: the folder holds no result of ours.
    """
    cells = [read_cell(path) for path in sorted((folder / "cells").glob(f"{OURS}.*.json"))]
    if not cells:
        raise FileNotFoundError(
            f"{folder} holds no cells/{OURS}.*.json. Give the folder that `unhype compare` wrote, with the method {OURS}."
        )
    return relate(
        {
            count: (
                statistics.fmean(c.train_seconds for c in cells if c.concepts == count),
                round(statistics.fmean(c.pack_bytes for c in cells if c.concepts == count)),
            )
            for count in sorted({cell.concepts for cell in cells})
        }
    )


def relate(measured: Mapping[int, tuple[float, int]]) -> dict[str, Any]:
    """Seconds and bytes by the number of concepts, and seconds over those of one."""
    one = measured.get(1)
    return {
        str(count): {
            "seconds": seconds,
            "bytes": size,
            "over_one": None if one is None else seconds / one[0],
        }
        for count, (seconds, size) in measured.items()
    }


class Clock:
    """Notes when each step of a run ended, as its recorder."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []

    def begin(self, done: int) -> None:
        """Nothing is kept from before."""

    def record(self, step: Step) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ends.append(time.perf_counter())


def full_step(plan: Plan, console: Console, device: str) -> dict[str, Any]:
    """A training step of Stable Diffusion 1.5 at full size, random weights, 512 px; ComfyUI must be importable.

    Raises:
        RuntimeError: ComfyUI runs elsewhere than on ``device``.
    """
    from comfy.model_management import get_torch_device

    found = get_torch_device().type
    if found != device:
        raise RuntimeError(
            f"ComfyUI computes on {found} here, not on {device}. Give --device {found}, or install a torch for {device}."
        )
    with tempfile.TemporaryDirectory() as folder:
        subject = models.sd15_full(models.load_demo(Path(folder)))
        denoiser = Denoiser(
            subject.patcher, TextEncoder(subject.clip), subject.family, "random weights"
        )
        console.print("step: timing")
        return time_steps(denoiser, Path(folder), steps=plan.steps, size=STEP_SIZE)


def time_steps(
    denoiser: DenoiserLike, folder: Path, *, steps: int, size: int
) -> dict[str, float | int | None]:
    """Steps a second of the default run's loop on states of noise, and the most memory it took.

    Args:
        size: side of the pictures in pixels.
    """
    config = DemoWorld().task(1, 0).config
    settings = config.train.model_copy(update={"steps": WARMUP + steps})
    config = config.model_copy(
        update={"train": settings, "output": folder / "step.safetensors"}, deep=True
    )
    device = denoiser.device
    # A family's channels and width show in any rollout; nothing of a state is read but its size.
    text = denoiser.embed([config.concepts[0].name])
    states, _ = denoiser.rollout(
        text, steps=2, guidance_scale=5.0, seed=0, size=size, stop_indices=[0]
    )
    latents = states[0].expand(POOL, -1, -1, -1).contiguous()
    sigmas = torch.ones(POOL, device=device)
    rows = torch.zeros(POOL, dtype=torch.long)
    parts = (text.cross, text.pooled, text.host_pooled)
    pool = Pool(*parts, rows, latents, sigmas, latents, -latents)
    hypernetwork = make_hypernetwork(default_sizes(denoiser.family), denoiser.targets).to(device)
    retained = denoiser.embed_pooled(list(config.retain))
    objective = make_objective(
        config.objective,
        hypernetwork=hypernetwork,
        denoiser=denoiser,
        material=Material(pool, None, retained),
    )
    clock = Clock(device)
    processes = share_work()
    setting = Setting("step", processes, lambda _: None, threading.Event(), (clock,))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    share = run_loop(config, setting, hypernetwork, objective)
    seconds = (clock.ends[-1] - clock.ends[WARMUP - 1]) / steps
    return {
        "batch_size": config.train.batch_size,
        "at_once": share.at_once,
        "size": size,
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def measure(
    parts: Sequence[str],
    console: Console,
    *,
    plan: Plan | None = None,
    quick: bool = False,
    cells: Path | None = None,
    device: str = "cuda",
) -> dict[str, Any]:
    """The parts named; ComfyUI must be importable.

    Args:
        quick: everything so short that it means nothing.
        cells: a finished ``unhype compare`` to read ``cost`` from.
        device: on which ``step`` is wanted.
    """
    plan = QUICK if quick else plan or Plan()
    world, results = DemoWorld(), {}
    with _one_thread():
        _warm_up()
        model = world.model()
        if "race" in parts:
            results |= race(world, model, plan, console, quick=quick)
        if "cost" in parts:
            results["cost"] = (
                cost(world, model, plan, console, quick=quick)
                if cells is None
                else read_cost(cells)
            )
    if "step" in parts:
        results["step"] = full_step(plan, console, device)
    return results


def _shorten(config: TrainConfig, quick: bool) -> TrainConfig:
    """A run that only shows that it runs, if ``quick``."""
    if not quick:
        return config
    fewest = max(10, 2 * len(config.concepts))
    short = {
        "gate": {"steps": 2, "num_positives": fewest, "num_negatives": 60},
        "trajectories": {"rollouts": 2, "steps": 2, "states": 1},
        "train": {"steps": 2},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in short.items()}
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread, so that processor time is time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up() -> None:
    """Take an optimizer's first step, at which torch imports more of itself: nobody's training time."""
    number = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([number])
    number.sum().backward()
    optimizer.step()


def _percent(point: Checkpoint) -> str:
    return f"Acc_e {point.acc_e:.1%}, Acc_s {point.acc_s:.1%}"


def _describe(point: Checkpoint) -> str:
    return f"{point.steps} steps, {point.seconds:.0f} s: {_percent(point)}"


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of what was measured."""
    if curves := results.get("curves"):
        table = Table("", title=f"Erasing {results['concept']}", title_justify="left")
        for heading in ("steps", "seconds", "Acc_e", "Acc_s"):
            table.add_column(heading, justify="right")
        for name, curve in curves.items():
            for point in curve:
                table.add_row(
                    name,
                    str(point["steps"]),
                    f"{point['seconds']:.0f}",
                    f"{point['acc_e']:.1%}",
                    f"{point['acc_s']:.1%}",
                )
            table.add_section()
        console.print(table)
        console.print(_verdict(results))
    if rows := results.get("cost"):
        table = Table("concepts", title="Training and pack", title_justify="left")
        for heading in ("seconds", "over one", "pack (MiB)"):
            table.add_column(heading, justify="right")
        for count, row in rows.items():
            over = "" if row["over_one"] is None else f"{row['over_one']:.2f}"
            table.add_row(count, f"{row['seconds']:.0f}", over, f"{row['bytes'] / 2**20:.2f}")
        console.print(table)
    if step := results.get("step"):
        memory = step["memory_bytes"]
        held = "" if memory is None else f", {memory / 2**30:.1f} GiB"
        console.print(f"A training step at {step['size']} px: {step['seconds']:.3f} s{held}")


def _verdict(results: dict[str, Any]) -> str:
    ratio = results["authors_over_ours_time"]
    if ratio is None:
        return "Our runs did not reach the goal."
    least = "at least " if results["is_lower_bound"] else ""
    by_direct = results["authors_over_direct_time"]
    direct = (
        "and ours on trajectories did not reach the goal"
        if by_direct is None
        else f"and {least}{by_direct:.1f} times as long as {results['direct_steps']} steps of ours on trajectories"
    )
    return (
        f"The authors' loop ({results['authors_recipe']}) takes {least}{ratio:.1f} times as long as "
        f"ours in closed form, {direct}."
    )


def main(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PART",
            help=f"Any of {', '.join(PARTS)}; by default {', '.join(DEFAULT_PARTS)}.",
        ),
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds of training that the authors' loop has.")
    ] = Plan.limit,
    every: Annotated[float, typer.Option(help="Seconds between its exams.")] = Plan.every,
    cells: Annotated[
        Path | None, typer.Option(help="Read cost from a folder that `unhype compare` wrote.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where step is wanted.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Only see whether everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "training.json",
) -> None:
    """Time training against the authors' loop, and by the number of concepts."""
    if unknown := set(parts or ()) - set(PARTS):
        raise typer.BadParameter(f"Unknown part {min(unknown)!r}. Known: {', '.join(PARTS)}.")
    console = Console()
    described = machine.start(console)
    plan = Plan(limit=limit, every=every)
    results = measure(
        parts or DEFAULT_PARTS, console, plan=plan, quick=quick, cells=cells, device=device
    )
    show(results, console)
    machine.write(output, {"machine": described, "quick": quick, "training": results}, console)


if __name__ == "__main__":
    typer.run(main)
