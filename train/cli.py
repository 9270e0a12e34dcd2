"""Train UnHype packs: ``python -m train.cli --help`` (also installed as ``unhype``)."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file: Python has put this folder first, where the repository must be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
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

from train import calibrate as calibration
from train import export as exporting
from train import extend as extending
from train.config import ConfigError, TrainConfig, load_config
from train.denoiser import DenoiserLike, check_family, files_of, reader
from train.evaluate.base import Evaluator, PictureModel, World
from train.evaluate.evaluators import EvaluatorError, find_evaluator
from train.evaluate.suite import Assignment, ask_world, load_suite
from train.evaluate.worlds import WorldError, find_world
from train.loop import Event, Report
from train.memory import TooLittleMemoryError
from train.plan import Plan, estimate
from train.processes import share_work
from train.run import EMBEDDED_AT_ONCE, TrainingDivergedError, TrainingInterrupted
from train.run import train as run
from train.shorthand import Shorthand, write_settings
from unhype import checkpoint
from unhype.checkpoint import CheckpointError, PackInfo
from unhype.host.denoise import CheckpointRefusedError, Denoiser, ModelFiles
from unhype.host.generate import describe
from unhype.host.locate import ComfyUINotFoundError, NotComfyUIError
from unhype.lora import Spelling

log = logging.getLogger("unhype")
Rows = Iterable[tuple[str, str]]

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
    EvaluatorError,
    FileNotFoundError,
    NotComfyUIError,
    WorldError,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
MaybeConfigPath = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="YAML file of the run, in place of the options below."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value, e.g. train.lr=1e-3; repeatable."
    ),
]
ComfyUIPath = Annotated[
    Path | None,
    typer.Option(
        help="Folder of ComfyUI; by default COMFYUI_PATH, the one around this pack, or the cached copy."
    ),
]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="FILE", help="The model file ComfyUI loads.")
]
TextEncoderOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text-encoder",
        metavar="FILE",
        help="A text encoder in a file of its own, if --checkpoint holds none; repeatable.",
    ),
]
VAEOption = Annotated[
    Path | None,
    typer.Option("--vae", metavar="FILE", help="The VAE, if --checkpoint holds none."),
]
EraseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--erase",
        metavar="PHRASES",
        help='What a concept is called, e.g. "cat, kitty"; the first names it. Repeatable: a concept each.',
    ),
]
AnchorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--anchor",
        metavar="PHRASE",
        help="What is drawn instead; one for all concepts, or one for each.",
    ),
]
RetainOption = Annotated[
    str | None,
    typer.Option(
        "--retain",
        metavar="FILE|WORDS",
        help='What stays: a text file, or "dog, bus"; by default ordinary things.',
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", help="The pack to write; by default named after the concepts."
    ),
]
PackPath = Annotated[Path, typer.Argument(metavar="PACK", help="A pack (.safetensors).")]
ModelPath = Annotated[
    Path,
    typer.Option("--checkpoint", metavar="FILE", help="The model file the pack was trained on."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
WORLD_SEEDS = 3
LONGEST_WAIT = timedelta(days=30)
"""Of a process for one that has more to do."""


@app.command()
def train(
    config: MaybeConfigPath = None,
    model: CheckpointOption = None,
    text_encoder: TextEncoderOption = None,
    erase: EraseOption = None,
    anchor: AnchorOption = None,
    retain: RetainOption = None,
    output: OutputOption = None,
    overrides: Overrides = None,
    comfyui: ComfyUIPath = None,
) -> None:
    """Train a pack. Interrupted with Ctrl-C, the same command goes on where it stopped.

    unhype train CONFIG

    unhype train --checkpoint model.safetensors --erase "cat, kitty" --anchor "an empty meadow"

    On several devices: accelerate launch -m train.cli train CONFIG
    """
    with _errors_as_sentences():
        words = _words(model, erase, anchor, retain, output, text_encoder)
        settings = _settings(config, words, overrides)
        is_main = share_work().is_main_process
        if is_main:
            _warn_of_words(settings)
        if config is None and is_main:
            file = write_settings(settings)
            print(
                f"The settings are in {file}: look through its retain list; `unhype train {file}` repeats the run.",
                file=sys.stderr,
            )
        with _progress(Console(stderr=True)) as report:
            result = run(settings, progress=report, comfyui=comfyui)
        if is_main:
            size = result.path.stat().st_size / 1024
            print(f"{result.path} ({size:.0f} KiB) after {result.seconds:.0f} s")


@app.command()
def plan(
    config: MaybeConfigPath = None,
    model: CheckpointOption = None,
    text_encoder: TextEncoderOption = None,
    erase: EraseOption = None,
    anchor: AnchorOption = None,
    retain: RetainOption = None,
    output: OutputOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    comfyui: ComfyUIPath = None,
) -> None:
    """Say what a run would cost: load the model, time a few real steps, write nothing.

    Takes what `train` takes.
    """
    with _errors_as_sentences():
        words = _words(model, erase, anchor, retain, output, text_encoder)
        settings = _settings(config, words, overrides)
        with _progress(Console(stderr=True)) as report:
            begin = time.monotonic()
            denoiser = _load_model(files_of(settings), comfyui, report)
            seconds = time.monotonic() - begin
            found = estimate(settings, denoiser, load_seconds=seconds, progress=report)
        if as_json:
            print(json.dumps({"total_seconds": found.total_seconds, **asdict(found)}, indent=2))
        else:
            _show(f"Plan for {settings.output.name}", _describe_plan(found))


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config without training: every mistake, each with its line."""
    with _errors_as_sentences():
        settings = _load(config, overrides)
        _warn_of_words(settings)
        names = ", ".join(concept.name for concept in settings.concepts)
        print(
            f"{config} is fine: erases {names}; keeps {len(settings.retain)} phrases; writes {settings.output}"
        )


@app.command()
def calibrate(
    file: PackPath,
    model: ModelPath,
    captions: Annotated[Path, typer.Option(metavar="FILE", help="Ordinary captions, one a line.")],
    text_encoder: TextEncoderOption = None,
    budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the captions that may fire.")
    ] = 0.001,
    as_json: AsJson = False,
    comfyui: ComfyUIPath = None,
) -> None:
    """Choose the pack's threshold anew, so that at most a share of ordinary captions fires.

    Of the thresholds that keep the budget, the one that misses least; the pack is written again with it.
    """
    with _errors_as_sentences():
        pack = checkpoint.load(file)
        lines = calibration.read_captions(captions, pack.info)
        _warn_of_few(len(lines.texts), budget)
        with _progress(Console(stderr=True)) as report:
            files = ModelFiles(model, tuple(text_encoder or ()))
            denoiser = _load_model(files, comfyui, report)
            check_family(pack, denoiser)
            embed = calibration.in_batches(
                reader(denoiser, pack),
                EMBEDDED_AT_ONCE,
                lambda step, total: report(Event("reading captions and prompts", step, total)),
            )
            found = calibration.recalibrate(pack, embed, lines.texts, budget)
        calibration.write(file, pack, found, lines, captions.name)
        if as_json:
            left_out = {
                "num_mentioning": lines.num_mentioning,
                "num_trained": lines.num_trained,
            }
            print(json.dumps({"pack": str(file), **left_out, **asdict(found)}, indent=2))
        else:
            _show(file.name, _describe_calibration(found, lines))


@app.command()
def export(
    file: PackPath,
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="The prompt whose LoRA is written.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The LoRA file to write.")
    ],
    text_encoder: TextEncoderOption = None,
    spelling: Annotated[
        Spelling, typer.Option(help="How its tensors are named; ComfyUI reads all three.")
    ] = Spelling.HOST,
    force: Annotated[
        bool, typer.Option("--force", help="Write it even if nothing fires for the prompt.")
    ] = False,
    comfyui: ComfyUIPath = None,
) -> None:
    """Write the LoRA that a pack makes of one prompt, as an ordinary LoRA file without a gate."""
    with _errors_as_sentences():
        pack = checkpoint.load(file)
        files = ModelFiles(model, tuple(text_encoder or ()))
        if output.resolve() in {path.resolve() for path in (file, model, *files.text_encoders)}:
            raise ConfigError(
                f"--output is {output}, which the LoRA would overwrite. Give another."
            )
        with _progress(Console(stderr=True)) as report:
            denoiser = _load_model(files, comfyui, report)
            check_family(pack, denoiser)
            embedding = reader(denoiser, pack)([prompt]).cpu()
        written = exporting.export(pack, prompt, embedding, output, spelling, force=force)
        print(f"{output} ({output.stat().st_size / 1024:.0f} KiB): {describe(pack, written)}")


@app.command()
def extend(
    file: PackPath,
    config: MaybeConfigPath = None,
    model: CheckpointOption = None,
    text_encoder: TextEncoderOption = None,
    erase: EraseOption = None,
    anchor: AnchorOption = None,
    retain: RetainOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The pack to write.")
    ] = None,
    overrides: Overrides = None,
    atoms: Annotated[
        int, typer.Option(min=0, help="Atoms appended to each layer, if the pack has atoms.")
    ] = extending.Growth.atoms,
    keep_weight: Annotated[
        float, typer.Option(min=0, help="How firmly the old concepts' LoRA is held.")
    ] = extending.Growth.keep_weight,
    force: Annotated[
        bool, typer.Option("--force", help="Write it even if an old concept's LoRA has moved.")
    ] = False,
    comfyui: ComfyUIPath = None,
) -> None:
    """Teach a trained pack further concepts; the old ones stay. Interrupted, the same command goes on.

    unhype extend PACK --checkpoint model.safetensors --erase "dog, puppy" --anchor "an empty meadow" --output new.safetensors

    unhype extend PACK CONFIG
    """
    with _errors_as_sentences():
        pack = checkpoint.load(file)
        if config is None:
            if output is None:
                raise ConfigError("--output is missing: give the pack to write, another than PACK.")
            words = _words(model, erase, anchor, retain, output, text_encoder)
            settings = _settings(None, words, overrides)
        else:
            given = {
                "checkpoint": model and str(model),
                "text_encoders": [str(path) for path in text_encoder or ()],
                "output": output and str(output),
            }
            paths = [f"{name}={json.dumps(value)}" for name, value in given.items() if value]
            words = _words(None, erase, anchor, retain)
            settings = _settings(config, words, [*(overrides or []), *paths])
        settings = extending.fitting(pack, settings)
        is_main = share_work().is_main_process
        if is_main:
            _warn_of_words(settings)
        with _progress(Console(stderr=True)) as report:
            found = extending.extend(
                file,
                settings,
                growth=extending.Growth(atoms, keep_weight, force),
                progress=report,
                comfyui=comfyui,
            )
        if is_main:
            _show(found.path.name, _describe_extension(found))


@app.command()
def remove(
    file: PackPath,
    names: Annotated[list[str], typer.Argument(metavar="NAMES", help="Concepts to take out.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The pack to write.")],
) -> None:
    """Write a pack again without some of its concepts; the others stay as they are."""
    with _errors_as_sentences():
        info = extending.remove(file, names, output)
        print(f"{output} erases {', '.join(info.concept_names)}")


@app.command("eval")
def evaluate(
    file: PackPath,
    model: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            help="The model file the pack was trained on; for packs of `compare` leave it to the world.",
        ),
    ] = None,
    text_encoder: TextEncoderOption = None,
    vae: VAEOption = None,
    suite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of what to ask.")
    ] = None,
    world: Annotated[
        str | None, typer.Option(metavar="NAME", help="A world that knows what to ask: demo.")
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="What judges pictures: clip:FOLDER, demo-world."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="How often each prompt is drawn; by default as the suite says."),
    ] = None,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Attack the pack as well; takes longer.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For the reports; by default beside the pack."),
    ] = None,
    as_json: AsJson = False,
    comfyui: ComfyUIPath = None,
) -> None:
    """Draw held-out prompts without and with a pack, judge the pictures, and write a report.

    unhype eval PACK --checkpoint model.safetensors --suite SUITE.yaml --evaluator clip:FOLDER

    unhype eval PACK --checkpoint model.safetensors --world demo

    Interrupted, the same command goes on. On several devices: accelerate launch -m train.cli eval ...
    """
    from train.evaluate import evaluation
    from train.evaluate import report as reports

    with _errors_as_sentences():
        if model is None and (text_encoder or vae):
            raise ConfigError("--text-encoder and --vae go with --checkpoint: give it, too.")
        files = model and ModelFiles(model, tuple(text_encoder or ()), vae)
        place = None if world is None else find_world(world)
        asked = _what_to_ask(checkpoint.read_info(file), suite, place, seeds)
        processes = share_work(timeout=LONGEST_WAIT)
        is_main = processes.is_main_process
        folder = out or file.with_suffix(".eval")
        with _progress(Console(stderr=True, quiet=not is_main)) as report:
            judge = _judge(evaluator, place, asked.labels)
            drawing = _drawing_model(files, place, comfyui, report)
            subject = evaluation.Subject(
                file,
                checkpoint.load(file, drawing.device),
                drawing,
                judge,
                evaluator or f"the world {asked.suite}",
                files.parts if files else (),
            )
            effort = evaluation.Effort() if attacks else None
            found = evaluation.evaluate(subject, asked, folder, attacks=effort, report=report)
        if is_main:
            described = reports.describe(subject, asked, found)
            reports.write_evaluation(folder, described, found)
            if as_json:
                print(json.dumps(described, indent=2))
            else:
                _show(file.name, reports.summary(described))
                print(f"report\t{folder / 'report.html'}")


@app.command()
def compare(
    world: Annotated[str, typer.Option(metavar="NAME", help="Where to compare: demo.")],
    methods: Annotated[
        str | None, typer.Option(metavar="NAMES", help="With commas; all by default.")
    ] = None,
    concepts: Annotated[
        str, typer.Option(metavar="NUMBERS", help="How many concepts tasks erase, with commas.")
    ] = "1,4,16,64",
    seeds: Annotated[int, typer.Option(min=1, help="Tasks of each size.")] = 3,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For the reports and all that is kept.")
    ] = Path("runs/compare"),
    as_json: AsJson = False,
) -> None:
    """Train several methods on the same tasks, ask them the same questions, and write a table and a chart.

    Interrupted, the same command goes on. Shared by several processes: accelerate launch -m train.cli compare ...
    """
    from train.evaluate import report as reports
    from train.evaluate.compare import compare as fill_in
    from train.evaluate.methods import METHODS

    with _errors_as_sentences():
        chosen = [name.strip() for name in methods.split(",")] if methods else list(METHODS)
        sizes = _numbers("--concepts", concepts)
        is_main = PartialState(cpu=True, timeout=LONGEST_WAIT).is_main_process
        place = find_world(world)
        with _progress(Console(stderr=True, quiet=not is_main)) as report:
            rows = fill_in(
                place, methods=chosen, sizes=sizes, seeds=range(seeds), folder=out, report=report
            )
        if is_main:
            reports.write_comparison(out, rows, world=place.name, sampling=place.sampling)
            if as_json:
                print(json.dumps([row.plain() for row in rows], indent=2))
            else:
                print((out / "compare.md").read_text(encoding="utf-8"))
                print(f"Also in {out}: compare.html, chart.png, compare.json")


@app.command()
def inspect(file: PackPath, as_json: AsJson = False) -> None:
    """Show what a pack says of itself."""
    with _errors_as_sentences():
        info = checkpoint.read_info(file)
        if as_json:
            print(json.dumps({"bytes": file.stat().st_size, **checkpoint.to_plain(info)}, indent=2))
        else:
            _show(file.name, _describe(file, info))


def _words(
    model: Path | None,
    erase: list[str] | None,
    anchor: list[str] | None,
    retain: str | None,
    output: Path | None = None,
    text_encoder: list[Path] | None = None,
) -> Shorthand:
    """What the options say of a run."""
    encoders = tuple(text_encoder or ())
    return Shorthand(model, tuple(erase or ()), tuple(anchor or ()), retain, output, encoders)


def _settings(config: Path | None, words: Shorthand, overrides: list[str] | None) -> TrainConfig:
    """The config of a file, or of the options that stand for one."""
    if config is None and not words.options:
        raise ConfigError(
            "Nothing says what to train. Give a config file, or --checkpoint, --erase and --anchor."
        )
    if config is None:
        return _with_checkpoint(words.config(overrides or []))
    if words.options:
        raise ConfigError(
            f"Give the config file {config} or {', '.join(words.options)}, not both. To change a value of the file for one "
            "run use --set, for example --set output=other.safetensors."
        )
    return _load(config, overrides)


def _load(config: Path, overrides: list[str] | None) -> TrainConfig:
    """A config whose model files are there."""
    return _with_checkpoint(load_config(config, overrides or []), f"{config}: ")


def _with_checkpoint(settings: TrainConfig, source: str = "") -> TrainConfig:
    try:
        files_of(settings).check_there()
    except FileNotFoundError as error:
        message = str(error)
        raise ConfigError(source + message[0].lower() + message[1:]) from error
    return settings


def _load_model(files: ModelFiles, comfyui: Path | None, report: Report) -> DenoiserLike:
    report(Event("loading the model", 0, 1))
    denoiser = Denoiser.load(files, comfyui)
    report(Event("loading the model", 1, 1))
    return denoiser


def _what_to_ask(
    info: PackInfo, suite: Path | None, world: World | None, seeds: int | None
) -> Assignment:
    if suite is not None and world is None:
        asked = load_suite(suite).assignment(suite.stem, info)
    elif world is not None and suite is None:
        asked = ask_world(world, info, WORLD_SEEDS)
    else:
        raise ConfigError("Give either --suite, a file of what to ask, or --world.")
    return replace(asked, seeds=seeds or asked.seeds)


def _drawing_model(
    files: ModelFiles | None, world: World | None, comfyui: Path | None, report: Report
) -> PictureModel:
    report(Event("loading the model", 0, 1))
    if files is not None:
        model: PictureModel = Denoiser.load(files, comfyui, pictures=True)
    elif world is not None:
        model = world.model()
    else:
        raise ConfigError(
            "--checkpoint is missing: give the model file that the pack was trained on."
        )
    report(Event("loading the model", 1, 1))
    return model


def _judge(spec: str | None, world: World | None, labels: Sequence[str]) -> Evaluator:
    if spec is not None:
        return find_evaluator(spec, labels)
    if world is None:
        raise ConfigError(
            "--evaluator is missing: say what judges the pictures, for example clip:FOLDER. docs/evaluators.md lists them."
        )
    return world.evaluator()


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{option} is {text!r}, expected whole numbers with commas, as 1,4,16."
        ) from error


def _warn_of_words(settings: TrainConfig) -> None:
    """Say of which words it is easy to mean something else than what is written."""
    _warn_of_retained_targets(settings)
    _warn_of_parts(settings)


def _warn_of_retained_targets(settings: TrainConfig) -> None:
    """Say which retain phrases hold a target phrase: that is allowed, but seldom meant."""
    if held := settings.retained_mentions():
        log.warning(
            "Retain phrases that hold a target phrase: %s. They are trained to stay. Remove from retain those "
            "that show the target, as 'tabby cat' shows a cat; leave those that are another thing, as 'hot dog' is no dog.",
            ", ".join(f"{kept!r} ({phrase!r})" for kept, phrase in held.items()),
        )


def _warn_of_parts(settings: TrainConfig) -> None:
    """Say which last words of target phrases nothing is trained on: the gate takes many of them for the target."""
    if parts := settings.parts_of_targets():
        log.warning(
            "Words that stand in a target phrase, neither erased nor retained: %s. The gate may hear the target in them. "
            "Put into retain those that should stay.",
            ", ".join(f"{word!r} ({phrase!r})" for word, phrase in parts.items()),
        )


def _warn_of_few(num: int, budget: float) -> None:
    """Nothing fired of n says only, with 95 % certainty, that at most 3 / n do."""
    if num * budget < 3:
        log.warning(
            "%d captions are few for a budget of %g: even if none of them fires, up to %.2g %% of others may. "
            "To be sure of the budget give %s or more.",
            num,
            budget,
            100 * min(1, 3 / num),
            f"{3 / budget:,.0f}" if budget else "as many as there are",
        )


def _describe_plan(found: Plan) -> Rows:
    seconds = found.seconds
    steps = found.step_seconds
    yield "training time", f"about {_duration(found.total_seconds)} on {found.device}"
    for part, value in seconds.items():
        yield f"  {part}", _duration(value)
    yield "measured", ", ".join(f"{name} {_short(value)}" for name, value in steps.items())
    for name, memory in (
        ("memory", found.memory),
        (f"memory of {found.device}", found.device_memory),
    ):
        if memory:
            yield (
                f"peak {name}",
                f"{_size(memory.measured)} now, at most about {_size(memory.expected)}",
            )
    yield (
        "trajectories",
        f"{_size(found.pool_bytes)} in memory, {_size(found.pool_file_bytes)} on disk while it runs",
    )
    yield "saved state", f"{_size(found.state_bytes)} on disk while it runs"
    yield "pack", f"{found.pack_bytes:,} bytes, {found.weight_bytes:,} of them weights"
    yield (
        "changes",
        f"{found.target_modules} target modules with {found.target_parameters:,} parameters",
    )
    yield (
        "trains",
        f"{found.hypernetwork_parameters:,} parameters of the hypernetwork, {found.gate_parameters:,} of the gate",
    )


def _describe_calibration(found: calibration.Recalibration, captions: calibration.Captions) -> Rows:
    before, after = found.before, found.calibration
    yield "threshold", f"{found.threshold:.4g}, was {found.old_threshold:.4g}"
    yield (
        "captions that fire",
        f"{after.false_fire_rate:.3%} of {after.num_negatives}, were {before.false_fire_rate:.3%}",
    )
    yield (
        "left out",
        f"{captions.num_mentioning} that mention an erased phrase, {captions.num_trained} retained in training",
    )
    yield (
        "prompts missed",
        f"{after.miss_rate:.1%} of {after.num_positives} that ask for a target, were {before.miss_rate:.1%}",
    )
    if len(found.missed) > 1:
        for name, rate in found.missed.items():
            yield f"  {name}", f"{rate:.1%}"
    for caption, probability in found.loudest.items():
        yield (
            f"{'fires' if probability >= found.threshold else 'nearest'} ({probability:.2f})",
            caption,
        )
    curve = found.curve
    points = zip(curve.threshold, curve.false_fire_rate, curve.miss_rate, strict=True)
    yield "threshold", "captions that fire, prompts missed"
    for threshold, fires, missed in points:
        mark = "  <" if threshold == found.threshold else ""
        yield f"  {threshold:.4f}", f"{fires:8.3%} {missed:7.1%}{mark}"


def _describe_extension(found: extending.Extended) -> Rows:
    yield (
        "pack",
        f"{found.path} ({_size(found.path.stat().st_size)}) after {_duration(found.seconds)}",
    )
    for name, change in found.changes.items():
        yield f"{name} has moved", f"{change.mean:.1%} on average, {change.worst:.1%} at worst"
    yield (
        "its gate has moved" if len(found.changes) == 1 else "their gate has moved",
        f"{found.gate_difference:.1g} at most",
    )


def _describe(file: Path, info: PackInfo) -> Rows:
    for concept in info.concepts:
        yield (
            "erases",
            f"{concept.name} ({', '.join(concept.target)}), draws {concept.anchor!r} instead",
        )
    network = info.hypernetwork
    yield "for", f"{info.spec.title}, trained on {info.base.name} [{info.base.digest}]"
    yield (
        "hypernetwork",
        f"{network.architecture.value}, rank {network.rank}, hidden {network.hidden_dim}, S = {network.num_steps}, "
        f"{len(info.targets)} target modules, {file.stat().st_size / 1024:.0f} KiB",
    )
    gate, weaker = info.gate, ""
    if gate.least_strength < 1:
        weaker = f", with {gate.least_strength:.0%} of its LoRA at 0.5 and all of it from {gate.full_strength_at:g} on"
    yield "gate", f"fires from probability {gate.threshold:g}{weaker}"
    if info.calibration:
        c = info.calibration
        yield (
            "calibration",
            f"{c.false_fire_rate:.2%} of {c.num_negatives} other prompts fire, "
            f"{c.miss_rate:.2%} of {c.num_positives} target prompts do not",
        )
    for name, value in info.metrics.items():
        if isinstance(value, dict):
            yield name, f"{', '.join(value)}: see --json"
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)
    yield "training", f"config {info.training_digest[:12]}, seed {info.training.get('seed')}"
    yield "version", info.version
    yield "license", info.license or "not stated"


def _show(title: str, rows: Rows) -> None:
    """A table on a terminal; elsewhere a line a row, its name and its value with a tab between."""
    if not sys.stdout.isatty():
        for name, value in rows:
            print(f"{name.strip()}\t{value}")
        return
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    Console().print(table)


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


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
    # ComfyUI's warnings are about what training does not use.
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    log.setLevel(logging.WARNING)
    try:
        yield
    except ComfyUINotFoundError as error:
        code, text = FAILED, str(error)
    except BAD_INPUT_ERRORS as error:
        code, text = BAD_INPUT, str(error)
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        code = INTERRUPTED
        text = str(error) or (
            "Stopped at once. The same command starts again; a training goes on from its last saved state."
        )
    except torch.OutOfMemoryError:
        code = FAILED
        text = (
            "Out of memory. Lower train.batch_size, trajectories.batch_size or trajectories.size."
        )
    except (OSError, ValueError, TooLittleMemoryError, TrainingDivergedError) as error:
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
