"""Low-rank changes of Linear layers for the length of one call of the model.

y_i = W x_i + scale_i up_i (down_i x_i), row i of the batch with factors of its own.

Training and serving both come through here: ``adapted`` carries the gradient, ``RowTable.adapted`` is the same sum done in
place on the rows that have factors. What is trained is what is served. Weights are never written, and read only of ordinary layers
in half precision whose results are kept (``kept.py``), so quantised and offloaded layers, and layers that other LoRAs patch, work
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import TargetPattern
from ..lora import LoRAFactors, TargetModule
from .kept import KeptResults, Record

Forward = Callable[..., Tensor]
Indices = tuple[int, ...]
"""Of the targets of one layer in the list of all."""
Products = list[dict[Indices, Tensor]]
"""``down x`` of some layers, for the rows of each stretch."""
COMPILED = "_orig_mod"
PLAIN = ("torch.nn.modules.linear", "comfy.ops")
"""Where the ``forward`` of ordinary layers is defined."""
PAIR = 2
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
        self._prepared: dict[tuple[torch.device, torch.dtype, tuple[int, ...]], Prepared] = {}
        self._companions: dict[Indices, list[Indices]] = {}
        self._kept = KeptResults()

    @contextmanager
    def adapted(
        self,
        sites: Sequence[Site],
        rows: Sequence[int | None],
        *,
        chunks: int = 1,
        keep: Hashable | None = None,
    ) -> Iterator[None]:
        """Change the layers inside the block; row i of the batch gets row ``rows[i]`` of the table, or nothing.

        Args:
            chunks: 1, or into how many parts of 77 tokens each row of the batch falls; ``rows`` then holds one number for
                each of them, row by row, and longer inputs repeat them.
            keep: the batch's name, if what layers make of a text may be kept for the next batch of that name; none if
                weights may change between the two.
        """
        if all(row is None for row in rows):
            yield
            return
        numbers = tuple(
            tuple(rows[start : start + chunks]) for start in range(0, len(rows), chunks)
        )
        call = _Call(self, numbers, None if keep is None else (keep, numbers), self._kept)

        def make(site: Site, inner: Forward) -> Forward:
            own = tuple(index for index, _ in site.parts)
            # What another node makes of a layer may change from step to step.
            keeps = "forward" not in site.layer.__dict__

            def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
                # A compiler joins products itself, and would start again after the first step.
                if torch.compiler.is_compiling():
                    layout = call.lay_out(x, site)
                    products = call.project(x, (own,), layout)
                    y = inner(x, *args, **kwargs)
                    _add(y, products, own, layout)
                    return y
                given = call.receive(x, own, keeps=keeps)
                record = given.record if keeps else None
                if record is not None and (known := record.get(site.layer)) is not None:
                    return known
                layout = call.lay_out(x, site)
                # down x comes before W x: some quantised layers change their input in place.
                products = call.products(given, own, layout)
                y = inner(x, *args, **kwargs)
                if record is not None and _is_plain(site.layer, x):
                    call.sum_in_single_precision(y, x, own, site)
                else:
                    _add(y, products, own, layout)
                if record is not None:
                    (record.check if own == given.first else record.add)(site.layer, y)
                return y

            return forward

        with _overridden(sites, make):
            yield
        self._companions = call.companions

    def companions(self, site: Indices) -> tuple[Indices, ...] | None:
        """Layers that were given the same input in the last call as this one, which was the first of them."""
        found = self._companions.get(site)
        return None if found is None else tuple(found)

    def forget(self) -> None:
        """Give back the memory of what layers made of a text."""
        self._kept = KeptResults()

    def prepare(
        self, device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], repeats: int
    ) -> Prepared:
        """Factors of some rows of the table, each for as many rows of the input."""
        wanted = rows[:1] if len(set(rows)) == 1 else tuple(r for r in rows for _ in range(repeats))
        key = (device, dtype, wanted)
        if key not in self._prepared:
            chosen = self.factors.rows(list(wanted))
            scale = chosen.scale.view(-1, 1, 1)
            down = [d[0] if len(wanted) == 1 else d for d in chosen.down]
            up = [(u * scale).mT for u in chosen.up]
            self._prepared[key] = Prepared(
                chosen.targets,
                [d.to(device, dtype) for d in down],
                [u.to(device, dtype) for u in up],
            )
        return self._prepared[key]


class Prepared:
    """Factors of every target in a model's precision: ``down`` (rank, in) and ``scale up`` transposed, (1, rank, out), for rows
    that are all the same; else both with the batch before them."""

    def __init__(
        self, targets: Sequence[TargetModule], down: list[Tensor], up: list[Tensor]
    ) -> None:
        self._targets, self._down, self._up = targets, down, up
        self._stacked: dict[tuple[Indices, ...], tuple[Tensor, list[int]]] = {}
        self._joined: dict[Indices, tuple[Tensor, int, int]] = {}

    def down(self, sites: tuple[Indices, ...]) -> tuple[Tensor, list[int]]:
        """``down`` of some layers below each other, and the rank of each layer."""
        if sites not in self._stacked:
            parts = [self._down[index] for site in sites for index in site]
            down = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
            ranks = [sum(self._down[index].shape[-2] for index in site) for site in sites]
            self._stacked[sites] = down, ranks
        return self._stacked[sites]

    def up(self, site: Indices) -> tuple[Tensor, int, int]:
        """``scale up`` of a layer for the stretch of its outputs that change, with its start and length.

        Of several parts of a fused layer it is one matrix with a block for each, so that they are added at once.
        """
        if site not in self._joined:
            targets = [self._targets[index] for index in site]
            parts = [self._up[index] for index in site]
            start = min(target.start for target in targets)
            length = max(target.start + target.out_features for target in targets) - start
            up = parts[0]
            if len(parts) > 1:
                up = up.new_zeros(len(up), sum(part.shape[1] for part in parts), length)
                row = 0
                for target, part in zip(targets, parts, strict=True):
                    columns = slice(target.start - start, target.start - start + part.shape[2])
                    up[:, row : row + part.shape[1], columns] = part
                    row += part.shape[1]
            self._joined[site] = up, start, length
        return self._joined[site]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring rows of a layer's input that have factors."""

    start: int
    length: int
    factors: Prepared


@dataclass(frozen=True)
class Layout:
    """How a layer's input falls into rows.

    Attributes:
        parts: of 77 tokens in each of its rows, if they have factors of their own; else 1.
    """

    parts: int
    stretches: tuple[Stretch, ...]


@dataclass
class _Given:
    """An input that layers are given.

    Attributes:
        first: the layer that was given it first in this call.
        together: that and the layers that were given one with it in the last call.
        record: what layers made of such an input; none if nothing is kept.
        products: of ``together``, once they are needed.
    """

    x: Tensor
    first: Indices
    together: tuple[Indices, ...]
    record: Record | None
    products: Products | None = None


class _Call:
    """One call of the model, in which layers that are given the very same input share one product with all their ``down``.

    Attention to a text asks every layer about the same states. Which layers do is seen in one call and used in the next; a
    layer that then gets another input computes its own. What is the same tensor is taken to hold the same numbers: a node that
    changed it in place between two layers would not be seen (torch counts no versions while sampling).

    Args:
        numbers: for each row of the batch, its row of the table for each of its chunks.
        keep: what names the batch, if results are kept.
        kept: where they go.

    Attributes:
        companions: for the first layer given an input, all that were given it.
    """

    def __init__(
        self,
        table: RowTable,
        numbers: Sequence[Sequence[int | None]],
        keep: Hashable | None,
        kept: KeptResults,
    ) -> None:
        self._table, self._numbers, self._keep, self._kept = table, numbers, keep, kept
        self._alike = all(len(set(row)) == 1 for row in numbers)
        self._layouts: dict[tuple[torch.Size, torch.dtype, torch.device], Layout] = {}
        self._given: _Given | None = None
        self.companions: dict[Indices, list[Indices]] = {}

    def lay_out(self, x: Tensor, site: Site) -> Layout:
        """Where in a layer's input the rows are that have factors."""
        key = (x.shape, x.dtype, x.device)
        if key not in self._layouts:
            self._layouts[key] = self._lay_out(x, site)
        return self._layouts[key]

    def _lay_out(self, x: Tensor, site: Site) -> Layout:
        repeats, parts = _repeats(x, len(self._numbers), site), 1
        spans = [row[0] for row in self._numbers]
        if not self._alike:
            parts = _parts(x, site)
            spans = [
                row[part % len(row)]
                for row in self._numbers
                for _ in range(repeats)
                for part in range(parts)
            ]
            repeats = 1
        stretches = [
            Stretch(
                span.start * repeats,
                len(span.rows) * repeats,
                self._table.prepare(x.device, x.dtype, span.rows, repeats),
            )
            for span in find_spans(spans)
        ]
        return Layout(parts, tuple(stretches))

    def receive(self, x: Tensor, own: Indices, *, keeps: bool) -> _Given:
        """What is known of a layer's input; ``keeps`` is whether the layer's results may be kept."""
        if self._given is not None and x is self._given.x:
            self.companions[self._given.first].append(own)
            return self._given
        self.companions[own] = [own]
        together = self._table.companions(own)
        record = self._open(x, own, together) if keeps and together else None
        given = _Given(x, own, together or (own,), record)
        # An input that no other layer had in the last call need not be held.
        self._given = None if together == (own,) else given
        return given

    def _open(self, x: Tensor, own: Indices, together: tuple[Indices, ...]) -> Record | None:
        # Keys and values of a single block are not worth a comparison, which waits for the device.
        if self._keep is None or len(together) <= PAIR or torch.is_grad_enabled():
            return None
        targets = self._table.factors.targets
        outputs = sum(targets[site[0]].full_out_features for site in together)
        size = x.shape[:-1].numel() * outputs * x.element_size()
        return self._kept.open((self._keep, own), x, size)

    def products(self, given: _Given, own: Indices, layout: Layout) -> Products:
        """``down x`` for the rows of every stretch, by layer; at least of the layer that asks."""
        if given.products is None:
            given.products = self.project(given.x, given.together, layout)
        if own in given.products[0]:
            return given.products
        return self.project(given.x, (own,), layout)

    def project(self, x: Tensor, sites: tuple[Indices, ...], layout: Layout) -> Products:
        """``down x`` of some layers, in one product for each stretch."""
        split, products = _split(x, layout.parts), []
        for stretch in layout.stretches:
            down, ranks = stretch.factors.down(sites)
            product = _per_row(split.narrow(0, stretch.start, stretch.length), down)
            shares = product.split(ranks, -1) if len(sites) > 1 else (product,)
            products.append(dict(zip(sites, shares, strict=True)))
        return products

    def sum_in_single_precision(self, y: Tensor, x: Tensor, own: Indices, site: Site) -> None:
        """Replace the rows of y that have factors by W x + scale up (down x), rounded once; slow, for what is kept."""
        wide, weight = x.float(), site.layer.get_parameter("weight").float()
        bias = getattr(site.layer, "bias", None)
        layout = self.lay_out(wide, site)
        result = F.linear(wide, weight, None if bias is None else bias.float())
        _add(result, self.project(wide, (own,), layout), own, layout)
        rounded, exact = _split(y, layout.parts), _split(result, layout.parts)
        for stretch in layout.stretches:
            changed = exact.narrow(0, stretch.start, stretch.length)
            rounded.narrow(0, stretch.start, stretch.length).copy_(changed)


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
    """Add x (batch, ..., in) weight (1 or batch, in, out) to y (batch, ..., out) in place: in one pass over memory, and in half
    precision rounded once."""
    if x.dtype != y.dtype:
        x, weight = x.to(y.dtype), weight.to(y.dtype)
    if y.dim() == 3:
        y.baddbmm_(x, weight if len(weight) == len(x) else weight.expand(len(x), -1, -1))
    else:
        y.add_((x.reshape(len(x), -1, x.shape[-1]) @ weight).view(y.shape))


def _add(y: Tensor, products: Products, site: Indices, layout: Layout) -> None:
    """Add the change of a layer to the rows of its result that have factors, in place."""
    split = _split(y, layout.parts)
    for stretch, product in zip(layout.stretches, products, strict=True):
        up, start, length = stretch.factors.up(site)
        changed = split.narrow(0, stretch.start, stretch.length)
        if length < changed.shape[-1]:
            changed = changed.narrow(-1, start, length)
        _add_per_row(changed, product[site], up)


def _is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer in half precision computes W x + b and nothing else, by torch's or the host's own code."""
    weight = getattr(layer, "weight", None)
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and type(layer).forward.__module__ in PLAIN
        and type(weight) is nn.Parameter
        and (weight.dtype, weight.device) == (x.dtype, x.device)
        and not getattr(layer, "weight_function", ())
        and not getattr(layer, "bias_function", ())
    )


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
