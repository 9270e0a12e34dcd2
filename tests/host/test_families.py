"""Every family of models on ComfyUI's own code: which layers change, and that sampling with a pack is exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unhype.families import FAMILIES, Branch, family_of_host_class
from unhype.host.bypass import RowTable, find_sites, find_targets
from unhype.host.generate import generate
from unhype.lora import LoRAFactors

from .tiny import FULL, TINY, Tiny, build, make_tiny

STEPS, SEED = 3, 3
META = torch.device("meta")


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def apply(comfy: Any) -> Callable:
    from unhype.host.apply import apply

    return apply


def scale_of(tiny: Tiny) -> float:
    """Classifier-free guidance where a family has it, none where all of a run carries the LoRA."""
    return 1.0 if tiny.spec.branch is Branch.ALL else 5.0


@dataclass
class Run:
    """Calls of the model in a sampling run: which conditioning each part of the batch is, and the predictions."""

    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: list[list[int]] = field(default_factory=list)
    predictions: list[tuple[Tensor, ...]] = field(default_factory=list)

    def first(self) -> list[Tensor]:
        """The first predictions for the entries of the positive conditioning, which the host batches from last to first."""
        calls = zip(reversed(self.parts[0]), reversed(self.predictions[0]), strict=True)
        return [prediction for part, prediction in calls if part == 0]


Call = Callable[..., Tensor]


def sample(
    tiny: Tiny,
    model: Any,
    positive: list,
    *,
    batch: int = 1,
    call: Callable[[Call, dict], Tensor] | None = None,
) -> Run:
    """Sample as KSampler does. ``call`` runs the model in place of the host."""
    import comfy.sample

    run = Run()

    def listen(apply_model: Call, args: dict) -> Tensor:
        if call is None:
            result = apply_model(args["input"], args["timestep"], **args["c"])
        else:
            result = call(apply_model, args)
        run.parts.append(list(args["cond_or_uncond"]))
        run.predictions.append(result.chunk(len(args["cond_or_uncond"])))
        return result

    model = model.clone()
    model.set_model_unet_function_wrapper(listen)
    latent = tiny.latent(batch)
    run.latents = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, SEED),
        STEPS,
        scale_of(tiny),
        "euler",
        "normal",
        positive,
        tiny.encode(100),
        latent,
        disable_pbar=True,
        seed=SEED,
    )
    return run


@contextmanager
def merged(network: nn.Module, factors: LoRAFactors) -> Iterator[None]:
    """The target layers' weights with dW of the first row added, inside the block."""
    before = {}
    for index, target in enumerate(factors.targets):
        weight = network.get_parameter(f"{target.name}.weight")
        before.setdefault(target.name, (weight, weight.clone()))
        weight[target.start : target.start + target.out_features] += factors.delta(index)[0]
    try:
        yield
    finally:
        for weight, value in before.values():
            weight.copy_(value)


def sample_merged(tiny: Tiny, positive: list, factors: LoRAFactors) -> Run:
    """The host's own run in which the parts of every batch are computed one by one: merged weights for the prompt, and
    for the negative where the family's whole sampling changes; plain weights else."""

    def call(apply_model: Call, args: dict) -> Tensor:
        parts = args["cond_or_uncond"]
        split = [
            {
                name: value.chunk(len(parts))[place] if isinstance(value, Tensor) else value
                for name, value in args["c"].items()
            }
            for place in range(len(parts))
        ]
        results = []
        inputs = zip(
            parts,
            args["input"].chunk(len(parts)),
            args["timestep"].chunk(len(parts)),
            split,
            strict=True,
        )
        for part, x, t, c in inputs:
            changes = part == 0 or tiny.spec.branch is Branch.ALL
            with merged(tiny.network, factors) if changes else nullcontext():
                results.append(apply_model(x, t, **c))
        return torch.cat(results)

    return sample(tiny, tiny.model, positive, call=call)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def overridden(tiny: Tiny) -> list[nn.Module]:
    return [module for module in tiny.network.modules() if "forward" in module.__dict__]


def test_every_family_has_a_tiny_model_and_a_published_one() -> None:
    for names in (TINY, [host_class for host_class, _ in FULL.values()]):
        assert {family_of_host_class(name) for name in names} == set(FAMILIES.values())


COUNTS = {
    "Stable Diffusion 1.5": {r"attn2\.to_k": 16, r"attn2\.to_v": 16},
    "SDXL": {r"attn2\.to_k": 70, r"attn2\.to_v": 70},
    "SD3 medium": {r"context_block\.attn\.qkv": 48},
    "SD3.5 large": {r"context_block\.attn\.qkv": 76},
    "Flux dev": {r"img_attn\.qkv": 19, r"txt_attn\.qkv": 19, r"img_attn\.proj": 19, "linear1": 38},
    "Flux schnell": {
        r"img_attn\.qkv": 19,
        r"txt_attn\.qkv": 19,
        r"img_attn\.proj": 19,
        "linear1": 38,
    },
}


@pytest.mark.parametrize("name", FULL)
def test_the_layers_of_published_models_are_found(comfy: Any, name: str) -> None:
    from comfy.model_detection import model_config_from_unet

    host_class, config = FULL[name]
    network = build(host_class, config, device=META).diffusion_model
    state = {f"model.diffusion_model.{key}": value for key, value in network.state_dict().items()}
    detected = model_config_from_unet(state, "model.diffusion_model.")
    assert type(detected).__name__ == host_class, "the host would load such a file as that class"
    spec = family_of_host_class(host_class)
    assert spec is not None
    targets = find_targets(network, spec.targets)
    found = {
        pattern: sum(bool(re.search(rf"\.{pattern}$", target.name)) for target in targets)
        for pattern in COUNTS[name]
    }
    assert found == COUNTS[name]
    assert len(targets) == sum(found.values())


PARTS = {
    "SD15": {("attn2.to_k", 0, 64, 64), ("attn2.to_v", 0, 64, 64)},
    "SDXL": {("attn2.to_k", 0, 64, 64), ("attn2.to_v", 0, 64, 64)},
    "SD3": {("attn.qkv", 128, 128, 384), ("attn.qkv", 256, 128, 384)},
    "Flux": {
        ("img_attn.qkv", 512, 256, 768),
        ("txt_attn.qkv", 512, 256, 768),
        ("img_attn.proj", 0, 256, 256),
        ("0.linear1", 512, 256, 1792),
    },
}
PARTS["FluxSchnell"] = PARTS["Flux"]


def test_the_rows_of_fused_layers_that_change(tiny: Tiny) -> None:
    """Keys follow queries, and values follow keys; what else is fused comes after them."""
    targets = find_targets(tiny.network, tiny.spec.targets)
    found = {
        (".".join(t.name.split(".")[-2:]), t.start, t.out_features, t.full_out_features)
        for t in targets
    }
    assert found == PARTS[tiny.host_class]


def test_sampling_equals_merged_weights(tiny: Tiny, apply) -> None:
    positive = tiny.encode(1)
    lora = generate(tiny.pack(), positive)
    got = sample(tiny, *apply(tiny.model, positive, lora))
    wanted = sample_merged(tiny, positive, lora.entries[0].factors)
    assert relative(got.latents, wanted.latents) <= 1e-5
    plain = sample(tiny, tiny.model, positive)
    assert relative(got.latents, plain.latents) > 0.01, "the LoRA must matter for the test to"


def test_both_branches_stay_in_one_batch(tiny: Tiny, apply) -> None:
    positive = tiny.encode(1)
    run = sample(tiny, *apply(tiny.model, positive, generate(tiny.pack(), positive)), batch=2)
    assert run.parts == [[0] if tiny.spec.branch is Branch.ALL else [1, 0]] * STEPS


def test_two_prompts_in_one_batch_each_keep_their_own_lora(tiny: Tiny, apply) -> None:
    pack, prompts = tiny.pack(), (tiny.encode(1), tiny.encode(2))

    def first_run(positive: list) -> Run:
        return sample(tiny, *apply(tiny.model, positive, generate(pack, positive)))

    together = first_run(prompts[0] + prompts[1])
    assert len(together.parts) == STEPS, "one call of the model a step"
    for prompt, other, got in zip(prompts, reversed(prompts), together.first(), strict=True):
        (alone,) = first_run(prompt).first()
        assert relative(got, alone) <= 1e-5
        (swapped,) = sample_merged(tiny, prompt, generate(pack, other).entries[0].factors).first()
        assert relative(swapped, alone) > 1e-4, "the two LoRA must differ for the test to matter"


def test_a_closed_gate_equals_no_node(tiny: Tiny, apply) -> None:
    positive = tiny.encode(1)
    got = sample(tiny, *apply(tiny.model, positive, generate(tiny.pack(fires=False), positive)))
    assert torch.equal(got.latents, sample(tiny, tiny.model, positive).latents)


def test_nothing_is_left_on_the_model(tiny: Tiny, apply) -> None:
    weights = {name: value.clone() for name, value in tiny.network.state_dict().items()}
    positive = tiny.encode(1)
    model, conditioning = apply(tiny.model, positive, generate(tiny.pack(), positive))
    sample(tiny, model, conditioning)
    assert not overridden(tiny)
    assert all(torch.equal(weights[name], v) for name, v in tiny.network.state_dict().items())
    assert model.patches_uuid == tiny.model.patches_uuid, "a reload would follow"


def test_the_exported_lora_is_the_same_change_to_the_host(tiny: Tiny) -> None:
    import comfy.lora

    lora = generate(tiny.pack(), tiny.encode(1))
    factors = lora.entries[0].factors
    key_map = comfy.lora.model_lora_keys_unet(tiny.model.model, {})
    loaded = comfy.lora.load_lora(lora.state_dict(), key_map)
    names = {f"diffusion_model.{target.name}.weight" for target in factors.targets}
    assert set(loaded) == names
    plain = {key: tiny.model.model.get_parameter(key).clone() for key in loaded}
    with merged(tiny.network, factors):
        for key, adapter in loaded.items():
            patch = [(1.0, adapter, 1.0, None, None)]
            got = comfy.lora.calculate_weight(patch, plain[key].clone(), key)
            torch.testing.assert_close(got, tiny.model.model.get_parameter(key))


def test_a_pack_of_another_family_is_refused(tiny: Tiny, apply) -> None:
    for host_class in TINY:
        other = make_tiny(host_class)
        if other.spec is tiny.spec:
            continue
        positive = other.encode(1)
        lora = generate(other.pack(), positive)
        found, expected = re.escape(tiny.spec.title), re.escape(other.spec.title)
        match = f"was trained for {expected}, but the connected model is {found}. Load a {expected}"
        with pytest.raises(ValueError, match=match):
            apply(tiny.model, positive, lora)


WHOLE = ""
"""The path of the network itself among its layers."""


def outputs(tiny: Tiny, names: Sequence[str], positive: list) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of some layers, and of the network, in one call of the model."""
    base = tiny.model.model
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def listen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0], output.float()

        return tiny.network.get_submodule(name).register_forward_hook(listen)

    handles = [hook(name) for name in (*names, WHOLE)]
    x = torch.randn(tiny.latent().shape, generator=torch.Generator().manual_seed(0))
    ((cross, extras),) = positive
    conds = base.extra_conds(cross_attn=cross, noise=x, device=x.device, **extras)
    try:
        base.apply_model(x, torch.tensor([0.5]), **{name: c.cond for name, c in conds.items()})
    finally:
        for handle in handles:
            handle.remove()
    return seen


# Without Flux's guidance, whose embedding half precision turns into another one; FluxSchnell has the same layers.
@pytest.mark.parametrize(
    "host_class", [name for name, config in TINY.items() if not config.get("guidance_embed")]
)
def test_half_precision_costs_no_more_than_merging_does(comfy: Any, host_class: str) -> None:
    """With 8 bits, rounding a result once is off by 1.7e-3. A merged layer rounds its weights and its result (2.4e-3), the
    bypass rounds W x, down x, and the sum (2.7e-3 if all are as large); what comes out of the whole model, where all
    layers round, must not be further from single precision than the model with merged weights is."""
    tiny, exact = make_tiny(host_class, torch.bfloat16), make_tiny(host_class)
    exact.network.load_state_dict(tiny.network.state_dict())
    positive = tiny.encode(1)
    factors = generate(tiny.pack(), positive).entries[0].factors
    names = sorted({target.name for target in factors.targets})
    with RowTable(factors).adapted(find_sites(tiny.network, factors.targets), [0]):
        bypass = outputs(tiny, names, positive)
    with merged(tiny.network, factors):
        rounded = outputs(tiny, names, positive)
    with merged(exact.network, factors):
        wanted = outputs(exact, names, positive)[WHOLE][1]
        for name in names:
            inputs, result = bypass[name]
            layer = exact.network.get_submodule(name)
            assert relative(result, layer(inputs.float())) <= 2.75e-3
    error, merged_error = (relative(run[WHOLE][1], wanted) for run in (bypass, rounded))
    assert error <= 1.3 * merged_error
