"""What a LoRA for the prompt costs while ComfyUI samples: ``python -m benchmarks.sampling [MODEL ...]``.

Every way of applying it runs in turn, again and again, through ComfyUI's own sampler; a ratio compares runs of the same round.
``docs/benchmarks.md`` says what is measured and how.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unhype.checkpoint import Pack
from unhype.host.bypass import find_targets
from unhype.host.embed import Entry
from unhype.host.generate import generate
from unhype.host.guard import Guard

from . import machine, models
from .models import Subject
from .packs import default_sizes, make_pack

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PROMPTS = ("a photo of a cat", "a drawing of two dogs", "a boat on a lake at night", "an apple")
SAMPLER, SCHEDULER, SEED = "euler", "normal", 0

Conditioning = Sequence[Entry]
Attached = tuple["ModelPatcher", Conditioning]


@dataclass(frozen=True)
class Plan:
    """How much a model is sampled.

    Attributes:
        size: side of the pictures in pixels.
        seconds: for rounds of all variants, one picture at a time; at least two rounds are run.
        batch_seconds: the same, four pictures at a time.
        batch_variants: names of what runs four pictures at a time; nothing does if there are none.
        variants: names of what runs one picture at a time; all by default.
    """

    size: int
    steps: int
    seconds: float
    batch_seconds: float
    batch_variants: tuple[str, ...] = ("plain", "active")
    variants: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Case:
    """What a variant is made from.

    Attributes:
        positive: one entry; a row of it for every picture of the batch, each of another prompt.
        fires: a pack that writes a LoRA for every prompt.
        silent: the same pack, whose gate never opens.
    """

    subject: Subject
    positive: Conditioning
    negative: Conditioning
    fires: Pack
    silent: Pack


@dataclass(frozen=True)
class Run:
    """One sampling run.

    Attributes:
        step_seconds: of one step, the first left out.
        setup_seconds: from encoded prompts to the first call of the network, and from the last step to the latents.
        calls: of the network.
    """

    step_seconds: float
    setup_seconds: float
    calls: int
    latents: Tensor


def plain(case: Case) -> Attached:
    """ComfyUI alone."""
    return case.subject.patcher, case.positive


def active(case: Case) -> Attached:
    """CLIPToLoRA and ApplyDynamicLoRA; in a batch of several prompts each has a LoRA of its own."""
    from unhype.host.apply import apply

    return apply(case.subject.patcher, case.positive, generate(case.fires, case.positive))


def guarded(case: Case) -> Attached:
    """UnHype Guard, which fires."""
    return _guard(case, case.fires)


def safe(case: Case) -> Attached:
    """UnHype Guard, which does not fire."""
    return _guard(case, case.silent)


def hook_lora(case: Case) -> Attached:
    """ComfyUI's own hook LoRA on the positive conditioning, with the factors of ``active``."""
    import comfy.hooks

    state = generate(case.fires, case.positive).state_dict()
    hooks = comfy.hooks.create_hook_lora(state, strength_model=1.0, strength_clip=0.0)
    # A clone: the host marks the model that it hooks as another one.
    return case.subject.patcher.clone(), comfy.hooks.set_hooks_for_conditioning(
        case.positive, hooks
    )


def two_forwards(case: Case) -> Attached:
    """The authors' way: one call of the network with the LoRA for the prompt, another without for the negative."""
    from comfy.samplers import calc_cond_batch

    def one_by_one(args: dict[str, Any]) -> list[Tensor]:
        return [
            calc_cond_batch(
                args["model"], [cond], args["input"], args["sigma"], args["model_options"]
            )[0]
            for cond in args["conds"]
        ]

    model, positive = active(case)
    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(one_by_one)
    return model, positive


VARIANTS = {
    variant.__name__: variant for variant in (plain, active, guarded, safe, hook_lora, two_forwards)
}
UNGUIDED = tuple(name for name in VARIANTS if name != two_forwards.__name__)
"""Without guidance there is one call of the network a step anyway."""
SUBJECTS = {
    build.__name__: build for build in (models.demo, models.sd15_full, models.sd3, models.flux)
}
ON_CPU = {
    models.demo: Plan(64, steps=8, seconds=25, batch_seconds=15),
    models.sd15_full: Plan(256, steps=3, seconds=165, batch_seconds=95),
    models.sd3: Plan(256, steps=3, seconds=50, batch_seconds=30),
    models.flux: Plan(256, 3, 40, 0, batch_variants=(), variants=UNGUIDED),
}
ON_ACCELERATOR = {
    models.demo: Plan(64, 20, 30, 30, tuple(VARIANTS)),
    models.sd15_full: Plan(512, 20, 90, 90, tuple(VARIANTS)),
    models.sd3: Plan(1024, 10, 90, 90, tuple(VARIANTS)),
    models.flux: Plan(1024, 10, 60, 60, UNGUIDED, UNGUIDED),
}
QUICK = {models.demo: Plan(32, steps=2, seconds=0, batch_seconds=0)}
LEAST_ROUNDS = 2


def measure(
    names: Sequence[str],
    console: Console,
    *,
    quick: bool = False,
    variants: Sequence[str] = (),
    seconds: float | None = None,
) -> dict[str, Any]:
    """Ratios of every model named, by the model's name; ComfyUI must be importable.

    Args:
        quick: a few steps of the demo world alone, whatever is named.
        variants: the only ones to measure, beside ``plain`` and one picture at a time; all by default.
        seconds: for their rounds, in place of the plan's.
    """
    chosen = tuple(name for name in VARIANTS if name in {plain.__name__, *variants})
    from comfy.model_management import get_torch_device, unload_all_models

    plans = ON_CPU if get_torch_device().type == "cpu" else ON_ACCELERATOR
    if quick:
        plans, names = QUICK, [models.demo.__name__]
    results = {}
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        world = models.load_demo(Path(folder))
        for name in names:
            build = SUBJECTS[name]
            console.print(f"{name}: building")
            subject, plan = build(world), plans[build]
            if seconds is not None:
                plan = replace(plan, seconds=seconds, batch_seconds=seconds)
            if variants:
                plan = replace(plan, variants=chosen, batch_variants=())
            results[name] = _measure_subject(name, subject, plan, Path(folder), console)
            del subject
            unload_all_models()
            gc.collect()
    return results


def _measure_subject(
    name: str, subject: Subject, plan: Plan, folder: Path, console: Console
) -> dict[str, Any]:
    targets = find_targets(subject.network, subject.family.targets)
    sizes = default_sizes(subject.family)
    fires, silent = (
        make_pack(
            folder / f"{name}-{fires}.safetensors", subject.family, targets, sizes, fires=fires
        )
        for fires in (True, False)
    )
    negative = _encode(subject, [""])
    batches = {}
    for prompts, variants, seconds in (
        (PROMPTS[:1], plan.variants or tuple(VARIANTS), plan.seconds),
        (PROMPTS, plan.batch_variants, plan.batch_seconds),
    ):
        if not variants:
            continue
        case = Case(subject, _encode(subject, prompts), negative, fires, silent)
        if not batches:
            _sample(case, plain, plan)  # what is done once in a process is not measured
        runs = _run_rounds(case, plan, variants, seconds, f"{name}, batch {len(prompts)}", console)
        batches[len(prompts)] = _compare(runs, plan.steps)
    one, several = batches[1], batches.get(len(PROMPTS))
    mixed = {"mixed_over_plain": several[active.__name__]["over_plain"]} if several else {}
    return {
        **{f"{v}_over_plain": one[v]["over_plain"] for v in one if v != plain.__name__},
        **mixed,
        "parameters": sum(parameter.numel() for parameter in subject.network.parameters()),
        "dtype": str(subject.patcher.model_dtype()).removeprefix("torch."),
        "target_modules": len(targets),
        "plan": asdict(plan),
        **{f"batch_{batch}": result for batch, result in batches.items()},
    }


def _run_rounds(
    case: Case, plan: Plan, names: Sequence[str], seconds: float, title: str, console: Console
) -> dict[str, list[Run]]:
    """Runs of every variant, one a round, for about so many seconds."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    spent, number = 0.0, 0
    while number < LEAST_ROUNDS or spent + spent / number <= seconds:
        started = time.perf_counter()
        # Every other round backwards, so that a drift of the machine's speed favours none.
        for name in names if number % 2 == 0 else reversed(names):
            runs[name].append(_sample(case, VARIANTS[name], plan))
        took = time.perf_counter() - started
        spent, number = spent + took, number + 1
        console.print(f"{title}: round {number} ({took:.1f} s)")
    return runs


def _compare(runs: dict[str, list[Run]], steps: int) -> dict[str, Any]:
    """Steps, set-up and ratios of every variant: medians over its runs.

    What disturbs a machine only ever slows it down, so the fastest runs are compared, too.
    """
    base, changed = runs[plain.__name__], runs.get(active.__name__)
    results = {}
    for name, own in runs.items():
        ratios = [
            run.step_seconds / other.step_seconds for run, other in zip(own, base, strict=True)
        ]
        results[name] = {
            "over_plain": statistics.median(ratios),
            "over_plain_range": [min(ratios), max(ratios)],
            "fastest_over_plain": min(run.step_seconds for run in own)
            / min(run.step_seconds for run in base),
            "step_seconds": statistics.median(run.step_seconds for run in own),
            "setup_seconds": statistics.median(run.setup_seconds for run in own),
            "rounds": len(own),
            "calls_per_step": own[0].calls / steps,
            "difference_from_plain": _difference(own[-1].latents, base[-1].latents),
        }
        if changed:
            difference = _difference(own[-1].latents, changed[-1].latents)
            results[name]["difference_from_active"] = difference
    return results


@torch.inference_mode()
def _sample(case: Case, variant: Callable[[Case], Attached], plan: Plan) -> Run:
    """Sample once, as KSampler does, and look at the clock."""
    import comfy.model_management
    import comfy.sample

    patcher = case.subject.patcher
    # A hook leaves the model in need of loading; the next run shall not pay for it.
    comfy.model_management.load_models_gpu([patcher])
    states: Any = case.positive[0][0]
    latent_format: Any = patcher.get_model_object("latent_format")
    side = plan.size // 8
    latent = torch.zeros(len(states), latent_format.latent_channels, side, side)
    noise = comfy.sample.prepare_noise(latent, SEED)
    calls: list[float] = []
    steps: list[float] = []

    def called(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(_now(args[0]) if not calls else 0.0)

    def stepped(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if step in (0, total - 1):
            steps.append(_now(denoised))

    counter = case.subject.network.register_forward_pre_hook(called)
    try:
        started = time.perf_counter()
        model, positive = variant(case)
        latents = comfy.sample.sample(
            model,
            noise,
            plan.steps,
            case.subject.guidance,
            SAMPLER,
            SCHEDULER,
            positive,
            case.negative,
            latent,
            callback=stepped,
            disable_pbar=True,
            seed=SEED,
        )
        ended = _now(latents)
    finally:
        counter.remove()
    first, last = steps
    return Run(
        step_seconds=(last - first) / (plan.steps - 1),
        setup_seconds=(calls[0] - started) + (ended - last),
        calls=len(calls),
        latents=latents,
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Let the guard not say at every run that it can't vouch for several prompts in one entry."""
    log = logging.getLogger("unhype")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _guard(case: Case, pack: Pack) -> Attached:
    from unhype.host.apply import guard_model

    model, _ = guard_model(case.subject.patcher, case.subject.clip, Guard(pack))
    return model, case.positive


@torch.inference_mode()
def _encode(subject: Subject, prompts: Sequence[str]) -> Conditioning:
    """One conditioning entry with a row for every prompt."""
    encoded = [
        subject.clip.encode_from_tokens_scheduled(subject.clip.tokenize(prompt))[0]
        for prompt in prompts
    ]
    if len(encoded) == 1 and not subject.states_width:
        return encoded
    states = torch.cat([entry[0] for entry in encoded])
    pooled = torch.cat([entry[1]["pooled_output"] for entry in encoded])
    missing = max(0, subject.states_width - states.shape[-1])
    return [[F.pad(states, (0, missing)), {"pooled_output": pooled}]]


def _now(result: Tensor) -> float:
    """The time at which a result is there, whichever device computes it."""
    if not torch.isfinite(result.flatten()[0]).item():  # waits for the device
        raise RuntimeError(
            "The model computed values that are not finite; these timings mean nothing."
        )
    return time.perf_counter()


def _difference(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; 0 only if they are identical."""
    return float((got - wanted).norm() / wanted.norm())


def show(results: dict[str, Any], console: Console) -> None:
    """A table of the ratios."""
    table = Table("model", "batch", title="A step, over plain", title_justify="left", box=SIMPLE)
    table.add_column("variant", no_wrap=True)
    for heading in ("ratio", "range", "fastest", "step", "set-up", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        for batch in (key for key in result if key.startswith("batch_")):
            for variant, row in result[batch].items():
                low, high = row["over_plain_range"]
                table.add_row(
                    name,
                    batch.removeprefix("batch_"),
                    variant,
                    f"{row['over_plain']:.3f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{row['fastest_over_plain']:.3f}",
                    f"{row['step_seconds']:.3f} s",
                    f"{row['setup_seconds']:.3f} s",
                    f"{row['calls_per_step']:g}",
                )
            table.add_section()
    console.print(table)


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=f"Any of {', '.join(SUBJECTS)}; all by default."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few steps of the demo world alone.")] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Measure only this beside plain, one picture at a time; repeatable.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="For the rounds of each model; by default 25 to 165."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "sampling.json",
) -> None:
    """Time sampling with a LoRA for the prompt against sampling without."""
    if unknown := set(names or ()) - SUBJECTS.keys():
        raise typer.BadParameter(f"Unknown model {min(unknown)!r}. Known: {', '.join(SUBJECTS)}.")
    if unknown := set(variant or ()) - VARIANTS.keys():
        raise typer.BadParameter(f"Unknown variant {min(unknown)!r}. Known: {', '.join(VARIANTS)}.")
    console = Console()
    described = machine.start(console)
    results = measure(
        names or list(SUBJECTS), console, quick=quick, variants=variant or (), seconds=seconds
    )
    show(results, console)
    machine.write(output, {"machine": described, "quick": quick, "sampling": results}, console)


if __name__ == "__main__":
    typer.run(main)
