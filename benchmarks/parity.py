"""How exactly a LoRA for the prompt equals merged weights: ``python -m benchmarks.parity [MODEL ...]``.

Full-size models of every family with random weights, in every precision that is asked for, on ComfyUI's device.
``docs/benchmarks.md`` says what is compared.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from unhype.families import family_of_host_class
from unhype.host.bypass import RowTable, find_sites, find_targets
from unhype.hypernetwork import make_hypernetwork
from unhype.lora import LoRAFactors

from . import machine, models
from .packs import default_sizes

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

MODELS: Mapping[str, tuple[str, Mapping[str, Any], int, int]] = {
    "sd15_full": ("SD15", models.STABLE_DIFFUSION_15, 64, 77),
    "sdxl_full": ("SDXL", models.STABLE_DIFFUSION_XL, 64, 77),
    "sd3_medium": ("SD3", models.STABLE_DIFFUSION_3_MEDIUM, 64, 154),
    "flux_dev": ("Flux", models.FLUX_DEV, 64, 256),
}
"""The host's class, its configuration, the side of the latents, and tokens of the text."""
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
CONTEXT_WIDTHS = ("context_dim", "context_in_dim")
WHOLE = ""

Outputs = dict[str, tuple[Tensor, Tensor]]


def measure(
    names: Sequence[str], precisions: Sequence[str], console: Console
) -> dict[str, dict[str, Any]]:
    """Errors by model and precision; ComfyUI must be importable."""
    results: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name in names:
            for precision in precisions:
                host_class, config, side, tokens = MODELS[name]
                found = compare(
                    partial(models.build_random, host_class, dict(config)),
                    PRECISIONS[precision],
                    side=side,
                    tokens=tokens,
                )
                results.setdefault(name, {})[precision] = found
                console.print(
                    f"{name}, {precision}: a layer {found['layer']:.1e} (merged {found['layer_merged']:.1e})"
                )
                _free()
    return results


def compare(
    build: Callable[[torch.dtype], BaseModel], dtype: torch.dtype, *, side: int, tokens: int
) -> dict[str, Any]:
    """A model with a LoRA beside its weights, against the same with the LoRA in them.

    Args:
        build: gives a model in the precision it is called with.
        side: of the latents.
        tokens: of the prompt.

    Returns:
        Relative errors |got - exact| / |exact|: of the layer that is furthest off (``layer``, ``layer_merged``), against sums in
        double precision on the layer's own input; and of the network's result (``whole``, ``whole_merged``), against merged
        weights in single precision. In single precision itself ``whole`` is against merged weights, and ``whole_merged`` 0.
    """
    with _exact_convolutions():
        return _compare(build, dtype, side=side, tokens=tokens)


def _compare(
    build: Callable[[torch.dtype], BaseModel], dtype: torch.dtype, *, side: int, tokens: int
) -> dict[str, Any]:
    model = build(dtype)
    network = model.diffusion_model
    factors = _factors(model)
    arguments = _arguments(model, side, tokens)
    names = sorted({target.name for target in factors.targets})
    exactly = factors.to(dtype=torch.float64)
    table, sites = RowTable(factors), find_sites(network, factors.targets)
    # The third step of a run: the first sees which layers have an input in common, from the second on that is used.
    seen: Outputs = {}
    for _ in range(3):
        with table.adapted(sites, [0], keep=WHOLE):
            seen = _outputs(model, names, arguments)
    result = seen.pop(WHOLE)[1]
    layers, merged_layers = zip(
        *(_layer_errors(network.get_submodule(name), exactly, name, *seen[name]) for name in names),
        strict=True,
    )
    seen.clear()
    if dtype == torch.float32:
        _merge(network, exactly)
        exact = merged = _outputs(model, [], arguments)[WHOLE][1]
    else:
        twin = build(torch.float32)
        twin.diffusion_model.load_state_dict(network.state_dict())
        _merge(twin.diffusion_model, exactly)
        exact = _outputs(twin, [], arguments)[WHOLE][1]
        del twin
        _free()
        _merge(network, exactly)
        merged = _outputs(model, [], arguments)[WHOLE][1]
    return {
        "layer": max(layers),
        "layer_merged": max(merged_layers),
        "whole": _relative(result, exact),
        "whole_merged": _relative(merged, exact),
        "targets": len(factors.targets),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _factors(model: BaseModel) -> LoRAFactors:
    """What a hypernetwork of the default size writes, made as large as the weights: |scale up down| = |W|."""
    network = model.diffusion_model
    family = family_of_host_class(type(model.model_config).__name__)
    assert family is not None
    targets = find_targets(network, family.targets)
    sizes = default_sizes(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernetwork = make_hypernetwork(sizes, targets)
        for parameter in hypernetwork.get_submodule("up").parameters():
            nn.init.normal_(parameter)
        written = hypernetwork.generate(torch.randn(1, sizes.embedding_dim))
    device = next(network.parameters()).device
    written = written.to(device)
    ups = []
    for index, target in enumerate(targets):
        weight = network.get_submodule(target.name).get_parameter("weight").float()
        norm = weight.narrow(0, target.start, target.out_features).norm()
        ups.append(written.up[index] * (norm / written.delta(index)[0].norm()))
    return replace(written, up=tuple(ups))


def _arguments(model: BaseModel, side: int, tokens: int) -> dict[str, Any]:
    """What a sampler would call the model with: noise, a noise level and a random prompt."""
    device = next(model.diffusion_model.parameters()).device
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    config: Mapping[str, Any] = model.model_config.unet_config
    width = next((config[key] for key in CONTEXT_WIDTHS if key in config), 4096)
    x = draw(1, model.latent_format.latent_channels, side, side)
    pooled = draw(1, model.adm_channels or 768)
    if config.get("num_classes") == "sequential":
        pooled = pooled[:, :1280]  # the host adds the picture's size
    conds = model.extra_conds(
        cross_attn=draw(1, tokens, width),
        pooled_output=pooled,
        noise=x,
        device=device,
        width=8 * side,
        height=8 * side,
    )
    given = {name: cond.process_cond(batch_size=1, area=None).cond for name, cond in conds.items()}
    return {"x": x, "t": torch.full((1,), 0.5, device=device), **given}


def _outputs(model: BaseModel, names: Sequence[str], arguments: Mapping[str, Any]) -> Outputs:
    """Input and output of some layers and of the network, in one call of the model."""
    seen: Outputs = {}

    def listen(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0].clone(), output.clone()

        return model.diffusion_model.get_submodule(name).register_forward_hook(keep)

    handles = [listen(name) for name in (*names, WHOLE)]
    try:
        model.apply_model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layer_errors(
    layer: nn.Module, factors: LoRAFactors, name: str, x: Tensor, y: Tensor
) -> tuple[float, float]:
    """Of what a layer gave beside its LoRA, and of what it gives with the LoRA in its weights."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    merged = _merged(weight.double(), factors, name)
    double = None if bias is None else bias.double()
    exact = F.linear(x.double(), merged, double)
    rounded = F.linear(x, merged.to(weight.dtype), bias)
    return _relative(y, exact), _relative(rounded, exact)


def _merged(weight: Tensor, factors: LoRAFactors, name: str) -> Tensor:
    """A layer's weight with the LoRA of its targets in it, all in double precision; the weight is changed."""
    for index, target in enumerate(factors.targets):
        if target.name == name:
            rows = weight.narrow(0, target.start, target.out_features)
            rows += factors.delta(index)[0]
    return weight


def _merge(network: nn.Module, factors: LoRAFactors) -> None:
    for name in {target.name for target in factors.targets}:
        weight = network.get_submodule(name).get_parameter("weight")
        weight.copy_(_merged(weight.double(), factors, name))


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """No TF32, whose 11 bits would drown what is measured."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(results: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console) -> None:
    """A table of the errors."""
    table = Table("model", "precision", title="Relative error", title_justify="left", box=SIMPLE)
    for heading in ("a layer", "merged", "the whole", "merged", "targets", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, precisions in results.items():
        for precision, row in precisions.items():
            errors = (row[key] for key in ("layer", "layer_merged", "whole", "whole_merged"))
            table.add_row(
                name,
                precision,
                *(f"{error:.1e}" for error in errors),
                str(row["targets"]),
                f"{row['parameters'] / 1e6:,.0f} M",
            )
    console.print(table)


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=f"Any of {', '.join(MODELS)}; all by default."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"Any of {', '.join(PRECISIONS)}; repeatable; fp32 and bf16."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "parity.json",
) -> None:
    """Compare a LoRA beside the weights with the same LoRA in them."""
    for known, given in ((MODELS, names), (PRECISIONS, precision)):
        if unknown := set(given or ()) - known.keys():
            raise typer.BadParameter(f"Unknown {min(unknown)!r}. Known: {', '.join(known)}.")
    console = Console()
    described = machine.start(console)
    results = measure(names or list(MODELS), precision or ["fp32", "bf16"], console)
    show(results, console)
    machine.write(output, {"machine": described, "parity": results}, console)


if __name__ == "__main__":
    typer.run(main)
