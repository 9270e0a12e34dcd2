"""Attach generated LoRA to a conditioning and a model, for ComfyUI's samplers.

The factors travel in the conditioning entry. When sampling starts, every conditioning of the run gets a row number in the host's own
``model_conds``, which the host batches, repeats and reorders with the latents (row 0 is no LoRA). At each call of the model the numbers
come back with the batch, and the target layers add each row's own change for the length of that call: ``bypass.RowTable``, the same
sum that training differentiates. Conditional and unconditional rows stay in one batch, no weight is touched, and a run in which
nothing fired is the host's own, untouched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from comfy.conds import CONDRegular
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..checkpoint import Pack
from ..families import Branch, FamilySpec, family_of_host_class
from ..lora import combine
from .bypass import RowTable, Site, find_sites
from .embed import Entry
from .generate import DynamicLoRA
from .guard import GUARDS, Conds, Guard, warn_once
from .payload import KEY, NEGATIVE_ROLES, Payload
from .tap import tap

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

log = logging.getLogger("unhype")

ROW = "unhype_row"
"""Of the row number in ``model_conds``."""
WIDEST = 60
"""Common multiple of the lengths of long prompts, in times 77 tokens, up to which each part has its own LoRA."""


def apply(
    model: ModelPatcher,
    conditioning: Sequence[Entry],
    lora: DynamicLoRA,
    *,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> tuple[ModelPatcher, Sequence[Entry]]:
    """Attach a LoRA to the conditioning that it was written for; both results belong together.

    Neither argument is changed. Where nothing fired, or ``strength`` is 0, they are returned as they are.

    Raises:
        ValueError: the model is of another family or other sizes, the conditioning is another one, or the percents are
            in the wrong order.
    """
    if strength == 0:
        return model, conditioning
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}.")
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent must not be larger than end_percent, got {start_percent} and {end_percent}."
        )
    if len(conditioning) != len(lora.entries):
        raise ValueError(
            f"The conditioning has {len(conditioning)} entries, but the LoRA was written for {len(lora.entries)}. "
            "Connect the same conditioning to ApplyDynamicLoRA as to CLIPToLoRA."
        )
    _check_model(model, lora.pack)
    if not any(generated.factors.active.any() for generated in lora.entries):
        return model, conditioning
    result: list[Entry] = []
    for entry, generated in zip(conditioning, lora.entries, strict=True):
        payload = Payload.of(
            lora.pack.name,
            lora.pack.info.spec.branch,
            generated,
            strength,
            start_percent,
            end_percent,
        )
        result.append(_with_payload(entry, payload))
    return _with_wrappers(model), result


def guard_model(model: ModelPatcher, clip: CLIP, guard: Guard) -> tuple[ModelPatcher, CLIP]:
    """A model that the guard covers, and a CLIP whose prompts it can read in full; neither argument is changed.

    Strength 0 returns them as they are.

    Raises:
        ValueError: the model is of another family or other sizes or has a guard with this pack already, or the CLIP
            can't be read.
    """
    if guard.strength == 0:
        return model, clip
    _check_model(model, guard.pack)
    tapped = tap(clip, windows=not guard.pack.gate.config.tokens)
    present = _guards(model.model_options)
    if any(other.pack.name == guard.pack.name for other in present):
        raise ValueError(
            f"{guard.pack.name} already guards this model. Remove one of the two UnHype Guard nodes, or give each another pack."
        )
    model = _with_wrappers(model)
    model.model_options["transformer_options"][GUARDS] = (*present, guard)
    return model, tapped


def _guards(model_options: Mapping[str, Any]) -> tuple[Guard, ...]:
    return model_options.get("transformer_options", {}).get(GUARDS, ())


def _with_payload(entry: Entry, payload: Payload) -> Entry:
    """A copy of the entry that carries the payload too, unless it has no effect or is already there."""
    present: tuple[Payload, ...] = entry[1].get(KEY, ())
    if not payload.factors.active.any() or any(payload.same_as(other) for other in present):
        return entry
    return [entry[0], {**entry[1], KEY: (*present, payload)}]


def _with_wrappers(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model with our two wrappers, once however often this is done."""
    model = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.APPLY_MODEL, _apply_model),
    ):
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def _check_model(model: ModelPatcher, pack: Pack) -> None:
    """Refuse a model that the pack was not made for, with a ``ValueError``."""
    info, name = pack.info, pack.name
    host_class = type(model.model.model_config).__name__
    found: FamilySpec | None = family_of_host_class(host_class)
    if found is not info.spec:
        raise ValueError(
            f"{name} was trained for {info.spec.title}, but the connected model is "
            f"{found.title if found else host_class}. Load a {info.spec.title} checkpoint."
        )
    find_sites(model.get_model_object("diffusion_model"), info.targets, name)


class Run:
    """The LoRA of one sampling run, by row number; 0 is none.

    Args:
        steady: whether no conditioning of the run changes the weights of the model.
    """

    def __init__(
        self,
        percent_to_sigma: Callable[[float], float],
        guards: Sequence[Guard] = (),
        *,
        steady: bool = False,
    ) -> None:
        self.guards, self._steady = guards, steady
        self._percent_to_sigma = percent_to_sigma
        self._numbers: dict[tuple[tuple[Payload, int], ...], int] = {(): 0}
        self._windows: dict[Payload, tuple[float, float]] = {}
        self._tables: dict[frozenset[Payload], tuple[RowTable, list[int | None]]] = {}
        self._last: RowTable | None = None
        self._sites: dict[nn.Module, tuple[Site, ...]] = {}

    def numbers(self, payloads: Sequence[Payload], width: int = 1) -> list[list[int]]:
        """Row numbers of a conditioning entry with these payloads: a row for each embedding it carries, a column for each
        77 tokens; of longer texts the columns repeat."""
        for payload in payloads:
            self._windows[payload] = (
                self._percent_to_sigma(payload.start_percent),
                self._percent_to_sigma(payload.end_percent),
            )
        count = max((len(p.factors) for p in payloads if not p.per_chunk), default=1)
        return [
            [self._number(payloads, row, column) for column in range(width)] for row in range(count)
        ]

    def _number(self, payloads: Sequence[Payload], row: int, column: int) -> int:
        parts = []
        for payload in payloads:
            index = (column if payload.per_chunk else row) % len(payload.factors)
            if payload.factors.active[index]:
                parts.append((payload, index))
        return self._numbers.setdefault(tuple(parts), len(self._numbers))

    def __bool__(self) -> bool:
        return len(self._numbers) > 1

    @contextmanager
    def adapted(
        self,
        diffusion_model: nn.Module,
        rows: Sequence[Sequence[int]],
        sigma: Tensor,
        batch: Hashable | None = None,
    ) -> Iterator[None]:
        """Change the model inside the block as the rows of the batch ask for at this noise level, (batch,).

        Args:
            batch: names the conditionings in it, if what layers make of them may be kept for the next step.
        """
        if not self:
            yield
            return
        table, places = self._table(self._active(sigma))
        if diffusion_model not in self._sites:
            self._sites[diffusion_model] = find_sites(diffusion_model, table.factors.targets)
        if self._last is not None and self._last is not table:
            self._last.forget()
        self._last = table
        flat = [places[number] for row in rows for number in row]
        keep = (diffusion_model, batch) if self._steady and batch is not None else None
        with table.adapted(self._sites[diffusion_model], flat, chunks=len(rows[0]), keep=keep):
            yield

    def forget(self) -> None:
        """Give back the device's memory at the end of the run, whoever still holds this."""
        for table, _ in self._tables.values():
            table.forget()

    def _active(self, sigma: Tensor) -> frozenset[Payload]:
        """The payloads in whose part of sampling the noise level lies."""
        whole = (self._percent_to_sigma(0.0), self._percent_to_sigma(1.0))
        if all(window == whole for window in self._windows.values()):
            return frozenset(self._windows)  # without waiting for the device to tell sigma
        level = float(sigma.flatten()[0])
        return frozenset(p for p, (start, end) in self._windows.items() if end < level <= start)

    def _table(self, active: frozenset[Payload]) -> tuple[RowTable, list[int | None]]:
        """Factors while these payloads act, and each row number's place among them."""
        if active not in self._tables:
            chosen, places = [], []
            for parts in self._numbers:
                acting = [p.factors.rows([row]) for p, row in parts if p in active]
                places.append(len(chosen) if acting else None)
                chosen += [acting] if acting else []
            targets = tuple(dict.fromkeys(t for p in self._windows for t in p.factors.targets))
            self._tables[active] = RowTable(combine(chosen, targets)), places
        return self._tables[active]


def _tag(conds: Conds, run: Run) -> Conds:
    """The conditionings of a run with their row numbers; every one gets one, or the host would not batch them."""
    carried, ignored = {}, set()
    for role, entries in conds.items():
        carried[role] = [tuple(cond.get(KEY, ())) for cond in entries]
        if role in NEGATIVE_ROLES:
            ignored |= {p.owner for ps in carried[role] for p in ps if p.branch is not Branch.ALL}
            carried[role] = [tuple(p for p in ps if p.branch is Branch.ALL) for ps in carried[role]]
    payloads = [p for entries in carried.values() for ps in entries for p in ps]
    width = math.lcm(*(len(p.factors) for p in payloads if p.per_chunk))
    if width > WIDEST:
        carried = {
            role: [tuple(p.as_whole() for p in ps) for ps in carried[role]] for role in carried
        }
        width = 1
    tagged = {}
    for role, entries in conds.items():
        tagged[role] = []
        for cond, own in zip(entries, carried[role], strict=True):
            row = CONDRegular(torch.tensor(run.numbers(own, width)))
            tagged[role].append({**cond, "model_conds": {**cond.get("model_conds", {}), ROW: row}})
    if ignored:
        log.warning(
            "%s: the LoRA on the negative conditioning is ignored; it belongs to positive prompts of this family.",
            ", ".join(sorted(ignored)),
        )
    return tagged


def _smallest_guidance_scale(guider: Any) -> float:
    """Of all that the host's guiders have; 1 if a guider has none of them."""
    names = ("cfg", "cfg1", "cfg2")
    return min(
        (float(getattr(guider, name)) for name in names if hasattr(guider, name)), default=1.0
    )


def _outer_sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
    """Let the guards read the conditionings of a sampling run, and number these, for its length."""
    guider: Any = executor.class_obj
    sampling = guider.model_patcher.get_model_object("model_sampling")
    conds: Conds = guider.conds
    guards = _guards(guider.model_options)
    for guard in guards:
        conds = guard.cover(conds, guidance_scale=_smallest_guidance_scale(guider))
    steady = not any(cond.get("hooks") for entries in conds.values() for cond in entries)
    run = Run(sampling.percent_to_sigma, guards, steady=steady)
    tagged = _tag(conds, run)
    if not run and not guards:
        return executor(*args, **kwargs)
    guider.conds = tagged
    # A copy that the host made for this run alone.
    options: dict[str, Any] = guider.model_options["transformer_options"]
    options[KEY] = run
    try:
        return executor(*args, **kwargs)
    finally:
        options.pop(KEY, None)
        run.forget()


def _apply_model(
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Let the rows of one batch have their LoRA."""
    options = transformer_options or {}
    tags: Tensor | None = kwargs.pop(ROW, None)
    arguments = (x, t, c_concat, c_crossattn, control, options)
    run: Run | None = options.get(KEY)
    if tags is None:
        if run is not None and run.guards:
            _unguarded(run.guards)
        return executor(*arguments, **kwargs)
    rows: list[list[int]] = tags.tolist()
    if run is None or (len(rows) != len(x) and any(row != rows[0] for row in rows)):
        raise RuntimeError(
            f"The model was called with {len(x)} rows and {len(rows)} LoRA row numbers"
            f"{' outside the sampling run that they belong to' if run is None else ''}, so UnHype cannot tell which "
            "LoRA belongs to which row. Another node rearranges the batch; bypass it."
        )
    if len(rows) != len(x):
        rows = rows[:1] * len(x)
    base: Any = executor.class_obj
    # A node that is given the text between two layers may change it in place, differently at every step.
    changing = options.get("patches", {}).get("attn2_patch")
    batch = None if changing else tuple(options.get("uuids", ()))
    with run.adapted(base.diffusion_model, rows, t, batch):
        return executor(*arguments, **kwargs)


def _unguarded(guards: Sequence[Guard]) -> None:
    """The model was called with a conditioning that never came to the sampler."""
    problem = (
        f"UnHype Guard, {', '.join(guard.pack.name for guard in guards)}: a node calls the model with a conditioning of its "
        "own, which the guard has not seen (the deprecated Perp-Neg does). Use its successor, for example PerpNegGuider."
    )
    if any(guard.strict for guard in guards):
        raise ValueError(f"{problem} The run was stopped, because the guard is strict.")
    warn_once(problem)
