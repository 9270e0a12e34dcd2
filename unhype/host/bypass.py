"""Low-rank changes of Linear layers for the length of one call of the model.

y_i = W x_i + scale_i up_i (down_i x_i), row i of the batch with factors of its own.

Training and serving both come through here: ``adapted`` carries the gradient, ``RowTable.adapted`` is the same sum done in
place on the rows that have factors. What is trained is what is served. Weights are never read or written, so quantised and
offloaded layers, and layers that other LoRAs patch, work as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import TargetPattern
from ..lora import LoRAFactors, TargetModule

Forward = Callable[..., Tensor]
COMPILED = "_orig_mod"
CHUNK = 77
"""Tokens that a CLIP encodes at a time."""


@dataclass(frozen=True)
class Site:
    """One layer of a model.

    Attributes:
        parts: positions in a list of target modules, with the target; several where a fused layer has several parts.
    """

    layer: nn.Module
    parts: tuple[tuple[int, TargetModule], ...]


@dataclass(frozen=True)
class Span:
    """Neighbouring rows of a batch that have factors, and which row of the table each one has."""

    start: int
    rows: tuple[int, ...]


def find_targets(
    diffusion_model: nn.Module, patterns: Sequence[TargetPattern]
) -> tuple[TargetModule, ...]:
    """The target modules of a family in a model, with their sizes.

    Raises:
        ValueError: a pattern matches no Linear layer, or a layer does not divide into its parts.
    """
    layers, targets = _linear_layers(diffusion_model), []
    for pattern in patterns:
        names = pattern.matches(layers)
        if not names:
            raise ValueError(
                f"None of the model's {len(layers)} Linear layers matches {pattern.pattern!r}. "
                "Its layers are not those of its family; use an ordinary checkpoint."
            )
        for name in names:
            inputs, outputs = _size(layers[name])
            parts = 1 if pattern.rows is None else pattern.rows.parts
            index = 0 if pattern.rows is None else pattern.rows.index
            if outputs % parts:
                raise ValueError(
                    f"{name} has {outputs} outputs, which do not divide into {parts} parts."
                )
            size = outputs // parts
            targets.append(TargetModule(name, inputs, size, index * size, outputs))
    return tuple(targets)


def find_sites(
    diffusion_model: nn.Module, targets: Sequence[TargetModule], owner: str = "The LoRA"
) -> tuple[Site, ...]:
    """The layers of a model that the targets name.

    Args:
        owner: what the targets belong to, for messages.

    Raises:
        ValueError: a target is missing or has another size.
    """
    layers = _linear_layers(diffusion_model)
    missing = [target.name for target in targets if target.name not in layers]
    if missing:
        raise ValueError(
            f"{owner} does not fit this model: only {len(targets) - len(missing)} of {len(targets)} target modules "
            f"exist in it; missing for example {missing[0]}. Connect the kind of model it was trained on."
        )
    parts: dict[str, list[tuple[int, TargetModule]]] = {}
    for index, target in enumerate(targets):
        got, wanted = _size(layers[target.name]), (target.in_features, target.full_out_features)
        if got != wanted:
            raise ValueError(
                f"{owner} does not fit this model: {target.name} has {got[0]} inputs and {got[1]} outputs, "
                f"expected {wanted[0]} and {wanted[1]}. Connect the kind of model it was trained on."
            )
        parts.setdefault(target.name, []).append((index, target))
    return tuple(Site(layers[name], tuple(found)) for name, found in parts.items())


@contextmanager
def adapted(sites: Sequence[Site], factors: LoRAFactors) -> Iterator[None]:
    """Change the layers inside the block, differentiably in ``factors``; row i of the batch gets row i of the factors."""

    def make(site: Site, inner: Forward) -> Forward:
        def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            repeats = _repeats(x, len(factors), site)
            y = inner(x, *args, **kwargs)
            for index, target in site.parts:
                down, up = factors.down[index].to(x), factors.up[index].to(x)
                scale = factors.scale.to(x).view(-1, 1, 1)
                if repeats > 1:
                    down, up, scale = (t.repeat_interleave(repeats, 0) for t in (down, up, scale))
                # (batch, positions, in) -> (batch, positions, out)
                change = _per_row(_per_row(x, down), up) * scale
                if target.is_slice:
                    after = target.full_out_features - target.start - target.out_features
                    change = F.pad(change, (target.start, after))
                y = y + change.reshape(y.shape)
            return y

        return forward

    with _overridden(sites, make):
        yield


class RowTable:
    """Factors by row number, cast to the model's precision and gathered once; keep it for one sampling run."""

    def __init__(self, factors: LoRAFactors) -> None:
        self.factors = factors
        self._prepared: dict[
            tuple[torch.device, torch.dtype, tuple[int, ...]], list[tuple[Tensor, Tensor]]
        ] = {}

    @contextmanager
    def adapted(
        self, sites: Sequence[Site], rows: Sequence[int | None], *, chunks: int = 1
    ) -> Iterator[None]:
        """Change the layers inside the block; row i of the batch gets row ``rows[i]`` of the table, or nothing.

        Args:
            chunks: 1, or into how many parts of 77 tokens each row of the batch falls; ``rows`` then holds one number for
                each of them, row by row, and longer inputs repeat them.
        """
        if all(row is None for row in rows):
            yield
            return
        table = [rows[start : start + chunks] for start in range(0, len(rows), chunks)]
        alike = all(len(set(row)) == 1 for row in table)
        whole = find_spans([row[0] for row in table])

        @cache
        def split_spans(repeats: int, parts: int) -> tuple[Span, ...]:
            """Spans over a layer's input each of whose rows is taken in so many parts."""
            return find_spans(
                [
                    row[part % chunks]
                    for row in table
                    for _ in range(repeats)
                    for part in range(parts)
                ]
            )

        def lay_out(x: Tensor, site: Site) -> tuple[tuple[Span, ...], int, int]:
            """Spans, rows of the input for one of theirs, and the parts of each row of the input."""
            repeats = _repeats(x, len(table), site)
            if alike:
                return whole, repeats, 1
            parts = _parts(x, site)
            return split_spans(repeats, parts), 1, parts

        def make(site: Site, inner: Forward) -> Forward:
            def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
                spans, repeats, parts = lay_out(x, site)
                # down x comes before W x: some quantised layers change their input in place.
                inside, split = [], _split(x, parts)
                for span in spans:
                    factors = self._prepare(x, span.rows, repeats)
                    part = split.narrow(0, span.start * repeats, len(span.rows) * repeats)
                    for index, target in site.parts:
                        down, up = factors[index]
                        inside.append((span, target, _per_row(part, down), up))
                y = inner(x, *args, **kwargs)
                split = _split(y, parts)
                for span, target, hidden, up in inside:
                    part = split.narrow(0, span.start * repeats, len(span.rows) * repeats)
                    part = part.narrow(-1, target.start, target.out_features)
                    _add_per_row(part, hidden, up)
                return y

            return forward

        with _overridden(sites, make):
            yield

    def _prepare(
        self, x: Tensor, rows: tuple[int, ...], repeats: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Factors (down, scale * up) of every target: one matrix where the rows are all the same, else one a row."""
        wanted = rows[:1] if len(set(rows)) == 1 else tuple(r for r in rows for _ in range(repeats))
        key = (x.device, x.dtype, wanted)
        if key not in self._prepared:
            chosen = self.factors.rows(list(wanted))
            scale = chosen.scale.view(-1, 1, 1)
            pairs = [(d, u * scale) for d, u in zip(chosen.down, chosen.up, strict=True)]
            if len(wanted) == 1:
                pairs = [(down[0], up[0]) for down, up in pairs]
            self._prepared[key] = [
                (d.to(x.device, x.dtype), u.to(x.device, x.dtype)) for d, u in pairs
            ]
        return self._prepared[key]


def find_spans(rows: Sequence[int | None]) -> tuple[Span, ...]:
    """The stretches of a batch that have factors."""
    spans: list[Span] = []
    for position, row in enumerate(rows):
        if row is None:
            continue
        if spans and spans[-1].start + len(spans[-1].rows) == position:
            spans[-1] = Span(spans[-1].start, (*spans[-1].rows, row))
        else:
            spans.append(Span(position, (row,)))
    return tuple(spans)


def _per_row(x: Tensor, weight: Tensor) -> Tensor:
    """weight x for (batch, ..., in) with one matrix (out, in), or with (batch, out, in): then (batch, positions, out)."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return torch.bmm(x.reshape(len(x), -1, x.shape[-1]), weight.mT)


def _add_per_row(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add ``_per_row(x, weight)`` to y (batch, ..., out) in place: in one pass over memory, and in half precision rounded once."""
    if y.dim() == 3:
        y.baddbmm_(x.to(y.dtype), weight.to(y.dtype).mT.expand(len(x), -1, -1))
    else:
        y.add_(_per_row(x, weight).view(y.shape))


def _parts(x: Tensor, site: Site) -> int:
    """How many times 77 tokens a layer's input (batch, tokens, features) holds."""
    if x.dim() != 3 or x.shape[1] % CHUNK:
        raise RuntimeError(
            f"{site.parts[0][1].name} was called with an input of shape {tuple(x.shape)}, which does not fall into parts of "
            f"{CHUNK} tokens, so it cannot be told which LoRA of a long prompt belongs where. Another node changes the text "
            "inside the model; bypass it."
        )
    return x.shape[1] // CHUNK


def _split(x: Tensor, parts: int) -> Tensor:
    """(batch, parts * tokens, features) as (batch * parts, tokens, features), without a copy."""
    return x if parts == 1 else x.view(len(x) * parts, -1, x.shape[-1])


def _repeats(x: Tensor, num_rows: int, site: Site) -> int:
    """How many neighbouring rows of a layer's input belong to one row of the batch (frames of a clip, for example)."""
    if len(x) % num_rows:
        raise RuntimeError(
            f"{site.parts[0][1].name} was called with {len(x)} rows for a batch of {num_rows}, so it cannot be told "
            "which LoRA belongs to which row. Another node rearranges the batch inside the model; bypass it."
        )
    return len(x) // num_rows


@contextmanager
def _overridden(sites: Sequence[Site], make: Callable[[Site, Forward], Forward]) -> Iterator[None]:
    """Give each layer another ``forward`` in its own ``__dict__``, and take it back however the block ends."""
    before: list[tuple[nn.Module, Forward | None]] = []
    try:
        for site in sites:
            own = site.layer.__dict__.get("forward")
            forward = make(site, site.layer.forward)
            before.append((site.layer, own))
            site.layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, own in reversed(before):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def _linear_layers(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by path, with the names that they have before compilation."""
    layers = {}
    for name, module in diffusion_model.named_modules():
        # By what they have: the host's quantised layers are no nn.Linear.
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            layers[".".join(part for part in name.split(".") if part != COMPILED)] = module
    return layers


def _size(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a Linear layer."""
    inputs, outputs = layer.in_features, layer.out_features
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise TypeError(f"Expected a Linear layer with whole sizes, got {type(layer).__name__}.")
    return inputs, outputs
