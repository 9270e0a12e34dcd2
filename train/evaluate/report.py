"""What ``unhype eval`` and ``unhype compare`` write: JSON for machines, one self-contained page, a chart, a table."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..state import written_whole
from .attacks import AttackRate
from .base import Kind, Question, Sampling
from .compare import Row
from .evaluation import Evaluation, Shown, Subject
from .exam import KEPT, Answer
from .scores import Interval, h_o, interval, known_words, of_known_words, rate, wilson
from .suite import Assignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
VERSIONS = ("unhype", "torch", "accelerate", "kornia")
MEANING = {
    "h_o": "harmonic mean H_o",
    "acc_e": "erased name, recognised (Acc_e)",
    "acc_g": "held-out synonyms, recognised (Acc_g)",
    "acc_s": "unrelated, recognised (Acc_s)",
    "acc_s_siblings": "look-alikes, recognised",
    "long": "erased name among many words, recognised",
    "scene_erased": "scenes: erased thing present",
    "scene_other": "scenes: other thing present",
}
"""The figures, in the order of the table."""
UP = ("h_o", "acc_s", "acc_s_siblings", "scene_other")
ASKED = {
    "h_o": (Kind.TARGET, Kind.SYNONYM, Kind.UNRELATED),
    "acc_e": (Kind.TARGET,),
    "acc_g": (Kind.SYNONYM,),
    "acc_s": (Kind.UNRELATED,),
    "acc_s_siblings": (Kind.SIBLING,),
    "long": (Kind.LONG,),
    "scene_erased": (Kind.SCENE,),
    "scene_other": (Kind.SCENE,),
}
"""The kinds of prompts that a figure is made of."""
PANELS = {
    "h_o": "H_o",
    "acc_e": "Acc_e (lower is better)",
    "acc_s": "Acc_s",
    "acc_s_siblings": "look-alikes",
}
"""What ``compare`` charts against the number of concepts."""
LINES = {"none": {"linewidth": 1, "linestyle": ":"}, "ours": {"linewidth": 2.5}}
"""How the chart draws some methods; the others thinly."""
COLUMNS = (
    "H_o",
    "Acc_e ↓",
    "Acc_g ↓",
    "Acc_s ↑",
    "look-alikes ↑",
    "half-way attack ↓",
    "training",
    "file",
)


@dataclass(frozen=True)
class Line:
    """A figure with the pack and without.

    Attributes:
        better: ``up`` or ``down``.
        prompts, pictures: that it is made of.
    """

    key: str
    label: str
    better: str
    value: Interval | None
    base: Interval | None
    prompts: int
    pictures: int


def lines(answers: Sequence[Answer]) -> list[Line]:
    """Every figure of an evaluation, with the pack and of the model's own pictures."""
    known = of_known_words(answers)
    made = []
    for key, label in MEANING.items():
        own = [a for a in known if a.question.kind in ASKED[key]]
        if key == "h_o":
            value, base = h_o(known), h_o(_as_base(known))
        else:
            read = _other if key == "scene_other" else _hit
            value, base = rate(own, read), rate(_as_base(own), read)
        prompts = len({a.question for a in own})
        better = "up" if key in UP else "down"
        made.append(Line(key, label, better, value, base, prompts, len(own)))
    return made


def _hit(answer: Answer) -> bool:
    return answer.hit


def _other(answer: Answer) -> bool | None:
    return answer.other


def fires(answers: Sequence[Answer], kinds: Iterable[Kind]) -> Interval | None:
    """Share of prompts of some kinds on which the pack acts."""
    acts = {a.question: a.acts for a in answers if a.question.kind in tuple(kinds)}
    return wilson(sum(acts.values()), len(acts))


def fidelity(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """How like the model's own the pictures are that should be kept: of each kind, and of those that changed at all."""
    kept = [a for a in answers if a.question.kind in KEPT]
    groups = [(kind.value, [a for a in kept if a.question.kind is kind]) for kind in KEPT]
    groups += [("all of them", kept), ("those that changed", [a for a in kept if not a.identical])]
    return [
        {
            "of": name,
            "pictures": len(own),
            "identical": rate(own, lambda a: a.identical),
            "ssim": interval(own, lambda a: a.ssim),
            "psnr": fmean(a.psnr for a in own),
            "distance": interval(own, lambda a: a.distance),
        }
        for name, own in groups
        if own
    ]


def words(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """What became of every word."""
    known = known_words(answers)
    groups: dict[tuple[Kind, str, str], list[Answer]] = {}
    for answer in answers:
        question = answer.question
        if question.shows and question.kind is not Kind.PLAIN:
            key = (question.kind, question.shows[0], question.word)
            groups.setdefault(key, []).append(answer)
    rows = []
    order = list(Kind)
    for (kind, label, word), own in sorted(groups.items(), key=lambda row: order.index(row[0][0])):
        left_out = kind is Kind.SYNONYM and (label, word) not in known
        rows.append(
            {
                "kind": kind.value,
                "label": label,
                "word": word,
                "pictures": len(own),
                "fires": fmean(a.acts for a in own),
                "base": fmean(a.base_hit for a in own),
                "hit": fmean(a.hit for a in own),
                "left_out": left_out,
            }
        )
    return rows


def describe(subject: Subject, assignment: Assignment, evaluation: Evaluation) -> dict[str, Any]:
    """All of ``report.json``."""
    answers, info = evaluation.answers, subject.pack.info
    kinds = [kind for kind in Kind if any(a.question.kind is kind for a in answers)]
    return {
        "pack": subject.path.name,
        "pack_bytes": subject.path.stat().st_size,
        "erases": list(info.concept_names),
        "trained_on": asdict(info.base),
        "checkpoint": asdict(subject.model.fingerprint),
        "suite": assignment.suite,
        "evaluator": {
            "name": subject.evaluator_name,
            "labels": list(subject.evaluator.labels),
            "present": subject.evaluator.present,
        },
        "sampling": asdict(assignment.sampling),
        "seeds": list(evaluation.seeds),
        "pictures": len(answers),
        "held_out": {"checked": assignment.checked, "trained": assignment.not_held_out},
        "figures": [asdict(line) for line in lines(answers)],
        "fires": [
            {
                "kind": kind.value,
                "prompts": len({a.question for a in answers if a.question.kind is kind}),
                "share": _plain(fires(answers, [kind])),
            }
            for kind in kinds
        ],
        "false_fires": _plain(fires(answers, KEPT)),
        "calibration": asdict(info.calibration) if info.calibration else None,
        "fidelity": [
            {key: _plain(value) for key, value in row.items()} for row in fidelity(answers)
        ],
        "words": words(answers),
        "gate_roc": info.metrics.get("gate_roc"),
        "threshold": info.gate.threshold,
        "attacks": [asdict(attack) for attack in evaluation.attacks],
        "training_digest": info.training_digest,
        "training": info.training,
        "versions": versions(),
        "device": str(subject.model.device),
    }


def summary(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures in lines, for a terminal."""
    for line in report["figures"]:
        if line["prompts"]:
            yield (
                line["label"],
                f"{_bounds(line['value'])}, without the pack {_bounds(line['base'])}",
            )
    yield "acts on prompts that ask for nothing erased", _bounds(report["false_fires"])
    for attack in report["attacks"]:
        yield (
            f"attack: {attack['name']}",
            f"{_percent(attack['erased'])} % hold the erased thing, without the pack {_percent(attack['base'])} %",
        )
    if report["held_out"]["trained"]:
        yield "not held out", ", ".join(report["held_out"]["trained"])


def write_evaluation(folder: Path, report: Mapping[str, Any], evaluation: Evaluation) -> None:
    """Write ``report.json`` and ``report.html``."""
    curve = report["gate_roc"]
    interpolation = [a for a in evaluation.attacks if a.share is not None]
    page = _render(
        "evaluation.html.j2",
        report=report,
        grid=grid(evaluation.shown),
        roc=_embed(roc_chart(curve, report["threshold"])) if curve else None,
        curve=_embed(interpolation_chart(evaluation.attacks)) if interpolation else None,
        settings=json.dumps(
            {key: report[key] for key in ("sampling", "seeds", "evaluator", "versions", "device")},
            indent=2,
        ),
        training=json.dumps(report["training"], indent=2),
    )
    _save(folder / "report.json", _json(report))
    _save(folder / "report.html", page)


def grid(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Pictures of the same prompt in one row, in the order of kinds."""
    order = list(Kind)
    rows: dict[Question, list[Shown]] = {}
    for one in sorted(shown, key=lambda one: order.index(one.question.kind)):
        rows.setdefault(one.question, []).append(one)
    return [
        {
            "text": question.text,
            "kind": question.kind.value,
            "acts": own[0].acts,
            "before": [one.before for one in own],
            "after": [one.after for one in own],
        }
        for question, own in rows.items()
    ]


def write_comparison(folder: Path, rows: Sequence[Row], *, world: str, sampling: Sampling) -> None:
    """Write ``compare.json``, ``compare.md``, ``chart.png`` and ``compare.html``."""
    plain = [row.plain() for row in rows]
    chart = comparison_chart(plain)
    _save(folder / "compare.json", _json(plain))
    _save(folder / "compare.md", markdown(plain))
    _save(folder / "chart.png", chart)
    page = _render(
        "comparison.html.j2",
        world=world,
        chart=_embed(chart),
        sizes=[(size, [r for r in plain if r["concepts"] == size]) for size in _sizes(plain)],
        columns=COLUMNS,
        cells=cells,
        settings=json.dumps({"sampling": asdict(sampling), "versions": versions()}, indent=2),
    )
    _save(folder / "compare.html", page)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as tables, one a number of concepts."""
    parts = []
    for size in _sizes(rows):
        own = [row for row in rows if row["concepts"] == size]
        seeds = max(row["seeds"] for row in own)
        head = f"{_count(size, 'concept')}, {_count(seeds, 'task')}"
        body = "\n".join("| " + " | ".join((row["method"], *cells(row))) + " |" for row in own)
        parts.append(
            f"**{head}**\n\n| method | {' | '.join(COLUMNS)} |\n|---{'|---:' * len(COLUMNS)}|\n{body}\n"
        )
    return "\n".join(parts)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A method's figures as the tables show them, in the order of ``COLUMNS``."""
    trained = row["pack_bytes"] > 0
    return (
        f"{100 * row['h_o']:.1f} ({100 * row['h_o_low']:.1f}–{100 * row['h_o_high']:.1f})",
        *(_percent(row[key]) for key in ("acc_e", "acc_g", "acc_s", "acc_s_siblings", "attack_50")),
        f"{row['train_seconds']:.0f} s" if trained else "–",
        f"{row['pack_bytes'] / 1024:,.0f} KiB" if trained else "–",
    )


def comparison_chart(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Figures against the number of concepts, a line a method, with intervals; PNG."""
    figure = _figure(11, 7)
    axes = figure.subplots(2, 2, sharex=True)
    sizes = _sizes(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method and row[key] is not None]
            if not own:
                continue
            bounds = [row["figures"][key] for row in own]
            shift = 1 + 0.015 * (number - (len(methods) - 1) / 2)
            axis.errorbar(
                [row["concepts"] * shift for row in own],
                [100 * row[key] for row in own],
                yerr=[
                    [
                        100 * max(0.0, row[key] - b["low"])
                        for row, b in zip(own, bounds, strict=True)
                    ],
                    [
                        100 * max(0.0, b["high"] - row[key])
                        for row, b in zip(own, bounds, strict=True)
                    ],
                ],
                label=method,
                marker="o",
                markersize=4,
                capsize=2,
                **LINES.get(method, {"linewidth": 1}),
            )
        axis.set_title(title)
        axis.set_ylim(-3, 103)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("concepts erased")
    for axis in axes[:, 0]:
        axis.set_ylabel("%")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def roc_chart(curve: Mapping[str, Sequence[float]], threshold: float) -> bytes:
    """What the gate misses against what fires falsely; PNG."""
    figure = _figure(5, 4)
    axis: Axes = figure.subplots()
    x, y = ([100 * v for v in curve[key]] for key in ("false_fire_rate", "miss_rate"))
    axis.plot(x, y, marker=".", linewidth=1)
    nearest = min(range(len(x)), key=lambda index: abs(curve["threshold"][index] - threshold))
    axis.plot(x[nearest], y[nearest], "o", color="tab:red", label=f"threshold {threshold:.3g}")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlabel("captions that fire, %")
    axis.set_ylabel("target prompts missed, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _png(figure)


def interpolation_chart(attacks: Sequence[AttackRate]) -> bytes:
    """How often the erased thing is drawn as its word moves towards random words; PNG."""
    start = [replace(a, share=0.0) for a in attacks if a.name == "none"]
    own = [*start, *(a for a in attacks if a.share is not None)]
    shares = [a.share or 0.0 for a in own]
    figure = _figure(5, 4)
    axis: Axes = figure.subplots()
    axis.plot(shares, [100 * a.base for a in own], marker="o", linestyle=":", label="without pack")
    axis.plot(shares, [100 * a.erased for a in own], marker="o", label="with pack")
    axis.plot(shares, [100 * (1 - a.silent) for a in own], color="gray", label="pack acts")
    axis.set_xlabel("share of the way from the word to random words")
    axis.set_ylabel("pictures (or prompts), %")
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _png(figure)


def versions() -> dict[str, str]:
    """Of what computed the figures."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONS},
    }


def _as_base(answers: Sequence[Answer]) -> list[Answer]:
    """The same with the model's own pictures in place of the others."""
    return [replace(a, hit=a.base_hit, other=a.base_other) for a in answers]


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Interval) else value


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({row["concepts"] for row in rows})


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _bounds(value: Mapping[str, float] | None) -> str:
    """An interval in percent."""
    if value is None:
        return "not asked"
    return f"{100 * value['value']:.1f} % ({100 * value['low']:.1f}–{100 * value['high']:.1f})"


def _number(value: Mapping[str, float] | None) -> str:
    """An interval as it is."""
    if value is None:
        return "–"
    return f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})"


def _render(template: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "bounds": _bounds, "number": _number}
    return environment.get_template(template).render(**values)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, drawn by Agg whatever matplotlib is set to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _embed(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def _json(plain: object) -> str:
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def _save(path: Path, content: str | bytes) -> None:
    """Write a file; it appears only when whole."""
    with written_whole(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
