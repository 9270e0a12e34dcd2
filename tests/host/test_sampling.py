"""What the nodes do to a sampling run, against ComfyUI's own results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unhype.host.bypass import find_spans
from unhype.host.generate import generate
from unhype.lora import LoRAFactors

CAT, DOG = "a photo of a cat", "a photo of a dog"
STEPS, CFG, SEED = 4, 5.0, 3


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def apply(comfy: Any) -> Callable:
    from unhype.host.apply import apply

    return apply


@dataclass
class Sampled:
    """A run's latents, its state before every step, and the batch size of every call of the network."""

    latents: Tensor
    states: list[Tensor]
    calls: list[int]


@pytest.fixture
def sample(world: Any) -> Callable[..., Sampled]:
    """Sample as KSampler does."""
    import comfy.sample

    def run(
        model: Any, positive: list, negative: list, *, batch: int = 1, cfg: float = CFG
    ) -> Sampled:
        states, calls = [], []
        latent = torch.zeros(batch, 4, 8, 8)
        counter = world.model.model.diffusion_model.register_forward_pre_hook(
            lambda module, args: calls.append(len(args[0]))
        )
        try:
            latents = comfy.sample.sample(
                model,
                comfy.sample.prepare_noise(latent, SEED),
                STEPS,
                cfg,
                "euler",
                "normal",
                positive,
                negative,
                latent,
                callback=lambda step, denoised, x, total: states.append(x.clone()),
                disable_pbar=True,
                seed=SEED,
            )
        finally:
            counter.remove()
        return Sampled(latents, states, calls)

    return run


def merged_weights(diffusion_model: torch.nn.Module, factors: LoRAFactors) -> dict[str, Tensor]:
    """The target layers' weights with dW of the first row added."""
    weights = {}
    for index, target in enumerate(factors.targets):
        name = f"{target.name}.weight"
        weights.setdefault(name, diffusion_model.get_parameter(name).clone())
        weights[name][target.start : target.start + target.out_features] += factors.delta(index)[0]
    return weights


def reference(world: Any, positive: list, negative: list, factors: LoRAFactors) -> Tensor:
    """Euler with guidance, two calls of the network a step: merged weights for the prompt, plain ones for the negative."""
    import comfy.samplers

    base = world.model.model
    network, sampling = base.diffusion_model, base.model_sampling
    merged = merged_weights(network, factors)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = sigma[None]
        inputs = (sampling.calculate_input(level, x), sampling.timestep(level).float())
        cond = torch.func.functional_call(network, merged, inputs, {"context": positive[0][0]})
        uncond = network(*inputs, context=negative[0][0])
        cond, uncond = (sampling.calculate_denoised(level, raw, x) for raw in (cond, uncond))
        denoised = uncond + CFG * (cond - uncond)
        x = x + (x - denoised) / sigma * (following - sigma)
    return base.process_latent_out(x)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def overridden(world: Any) -> list:
    modules = world.model.model.diffusion_model.modules()
    return [module for module in modules if "forward" in module.__dict__]


def test_sampling_equals_merged_weights_on_the_positive_branch(
    world, make_pack, apply, sample
) -> None:
    pack, positive, negative = make_pack(), world.encode(CAT), world.encode("")
    lora = generate(pack, positive)
    model, conditioning = apply(world.model, positive, lora)
    got = sample(model, conditioning, negative)
    wanted = reference(world, positive, negative, lora.entries[0].factors)
    assert relative(got.latents, wanted) <= 1e-5
    plain = sample(world.model, positive, negative)
    assert relative(got.latents, plain.latents) > 0.01, "the LoRA must matter for the test to"


def test_one_call_equals_merged_weights(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    lora = generate(make_pack(), positive)
    model, conditioning = apply(world.model, positive, lora)
    base, predicted = world.model.model, []
    model.set_model_sampler_post_cfg_function(
        lambda args: predicted.append(args["cond_denoised"]) or args["denoised"]
    )
    state = sample(model, conditioning, negative, cfg=1.0).states[0]
    sampling = base.model_sampling
    level = sampling.sigma_max[None]
    raw = torch.func.functional_call(
        base.diffusion_model,
        merged_weights(base.diffusion_model, lora.entries[0].factors),
        (sampling.calculate_input(level, state), sampling.timestep(level).float()),
        {"context": positive[0][0]},
    )
    assert relative(predicted[0], sampling.calculate_denoised(level, raw, state)) <= 1e-5


def test_both_branches_stay_in_one_batch(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    model, conditioning = apply(world.model, positive, generate(make_pack(), positive))
    assert sample(model, conditioning, negative, batch=2).calls == [4] * STEPS


def test_strength_zero_equals_no_node(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    model, conditioning = apply(
        world.model, positive, generate(make_pack(), positive), strength=0.0
    )
    got, plain = sample(model, conditioning, negative), sample(world.model, positive, negative)
    assert torch.equal(got.latents, plain.latents)


def test_a_closed_gate_equals_no_node(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(DOG), world.encode("")
    lora = generate(make_pack(fires=False), positive)
    model, conditioning = apply(world.model, positive, lora)
    got, plain = sample(model, conditioning, negative), sample(world.model, positive, negative)
    assert torch.equal(got.latents, plain.latents)


def test_a_safe_entry_beside_a_firing_one_is_not_touched(world, make_pack, apply, sample) -> None:
    pack = make_pack(fires=(CAT, DOG))
    both = world.encode(CAT) + world.encode(DOG)
    _, conditioning = apply(world.model, both, generate(pack, both))
    assert conditioning[0] is not both[0]
    assert conditioning[1] is both[1]


def test_strength_scales_the_factors(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    lora = generate(make_pack(), positive)
    model, conditioning = apply(world.model, positive, lora, strength=0.5)
    wanted = reference(world, positive, negative, lora.entries[0].factors.scaled(0.5))
    assert relative(sample(model, conditioning, negative).latents, wanted) <= 1e-5


def test_nothing_of_the_original_changes(world, make_pack, apply, sample) -> None:
    network = world.model.model.diffusion_model
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    positive, negative = world.encode(CAT), world.encode("")
    keys, wrappers = set(positive[0][1]), {k: dict(v) for k, v in world.model.wrappers.items()}
    identity = world.model.patches_uuid
    model, conditioning = apply(world.model, positive, generate(make_pack(), positive))
    sample(model, conditioning, negative)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert set(positive[0][1]) == keys
    assert world.model.wrappers == wrappers
    assert model.patches_uuid == world.model.patches_uuid == identity, "a reload would follow"
    assert not model.patches
    assert not any("hooks" in entry[1] for entry in conditioning)
    assert "unhype" not in model.model_options["transformer_options"]
    assert not overridden(world)


def test_two_prompts_in_one_batch_each_keep_their_own_lora(world, make_pack, apply, sample) -> None:
    pack, negative = make_pack(), world.encode("")
    cat, dog = world.encode(CAT), world.encode(DOG)

    def first_prediction(positive: list) -> tuple[Tensor, list[int]]:
        model, conditioning = apply(world.model, positive, generate(pack, positive))
        seen = []
        model.set_model_sampler_post_cfg_function(
            lambda args: seen.append(args["cond_denoised"]) or args["denoised"]
        )
        run = sample(model, conditioning, negative)
        return seen[0], run.calls

    both, calls = first_prediction(cat + dog)
    alone = (first_prediction(cat)[0] + first_prediction(dog)[0]) / 2  # the host averages entries
    assert calls == [3] * STEPS
    assert relative(both, alone) <= 1e-5


def test_two_packs_on_one_conditioning_add_up(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    first, second = (generate(make_pack(seed=seed), positive) for seed in (1, 2))
    model, conditioning = apply(*apply(world.model, positive, first), second)
    assert [len(model.get_wrappers(kind, "unhype")) for kind in model.wrappers] == [1, 1]
    a, b = first.entries[0].factors, second.entries[0].factors
    summed = replace(
        a,
        down=tuple(torch.cat(pair, 1) for pair in zip(a.down, b.down, strict=True)),
        up=tuple(torch.cat(pair, 2) for pair in zip(a.up, b.up, strict=True)),
    )
    wanted = reference(world, positive, negative, summed)
    assert relative(sample(model, conditioning, negative).latents, wanted) <= 1e-5


def test_the_same_lora_applied_twice_counts_once(world, make_pack, apply, sample) -> None:
    pack, positive, negative = make_pack(), world.encode(CAT), world.encode("")
    once = apply(world.model, positive, generate(pack, positive))
    twice = apply(*once, generate(pack, positive))
    got, wanted = sample(*twice, negative), sample(*once, negative)
    assert torch.equal(got.latents, wanted.latents)


def test_the_negative_is_not_touched_where_the_prompt_has_an_area(
    world, make_pack, apply, sample
) -> None:
    pack, negative = make_pack(), world.encode("")
    positive = [[entry[0], {**entry[1], "area": (8, 4, 0, 0)}] for entry in world.encode(CAT)]
    positive += world.encode("a photo")

    def first_predictions(model: Any, conditioning: list) -> tuple[Tensor, Tensor]:
        model, seen = model.clone(), []
        model.set_model_sampler_post_cfg_function(
            lambda args: (
                seen.append((args["cond_denoised"], args["uncond_denoised"])) or args["denoised"]
            )
        )
        sample(model, conditioning, negative)
        return seen[0]

    lora = generate(pack, positive)
    cond, uncond = first_predictions(*apply(world.model, positive, lora))
    plain_cond, plain_uncond = first_predictions(world.model, positive)
    assert relative(uncond, plain_uncond) <= 1e-6
    assert relative(cond, plain_cond) > 1e-3


def test_lora_on_the_negative_is_ignored_with_a_warning(
    world, make_pack, apply, sample, caplog: pytest.LogCaptureFixture
) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    model, conditioning = apply(world.model, positive, generate(make_pack(), positive))
    with caplog.at_level(logging.WARNING, "unhype"):
        got = sample(model, negative, conditioning)
    assert torch.equal(got.latents, sample(world.model, negative, positive).latents)
    assert "negative" in caplog.text


def test_it_acts_only_in_its_part_of_sampling(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    lora = generate(make_pack(), positive)
    plain = sample(world.model, positive, negative).states

    late = sample(*apply(world.model, positive, lora, start_percent=0.5), negative).states
    same = [torch.equal(a, b) for a, b in zip(late, plain, strict=True)]
    assert same == [True, True, True, False]

    early = sample(*apply(world.model, positive, lora, end_percent=0.1), negative).states
    always = sample(*apply(world.model, positive, lora), negative).states
    same = [torch.equal(a, b) for a, b in zip(early, always, strict=True)]
    assert same == [True, True, False, False]


def test_an_error_inside_the_model_leaves_nothing_behind(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    before = sample(world.model, positive, negative)
    model, conditioning = apply(world.model, positive, generate(make_pack(), positive))
    inside = []

    def interrupt(*_: object) -> None:
        inside.extend(overridden(world))
        raise InterruptedError

    last = world.model.model.diffusion_model.get_submodule("out")
    hook = last.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(InterruptedError):
            sample(model, conditioning, negative)
    finally:
        hook.remove()
    assert inside, "the error must come while the layers are changed"
    assert not overridden(world)
    assert torch.equal(sample(world.model, positive, negative).latents, before.latents)


def test_a_batch_of_pooled_vectors_gives_each_latent_its_own_lora(
    world, make_pack, apply, sample
) -> None:
    pack, negative = make_pack(), world.encode("")
    cat, dog = world.encode(CAT)[0], world.encode(DOG)[0]
    pooled = torch.cat([cat[1]["pooled_output"], dog[1]["pooled_output"]])
    both = [[torch.cat([cat[0], dog[0]]), {"pooled_output": pooled}]]
    got = sample(*apply(world.model, both, generate(pack, both)), negative, batch=2)
    assert got.calls == [4] * STEPS
    for row, entry in enumerate((cat, dog)):
        alone = sample(*apply(world.model, [entry], generate(pack, [entry])), negative, batch=2)
        assert relative(got.latents[row], alone.latents[row]) <= 1e-5


def test_a_lora_of_the_host_on_the_same_layers_adds_up(world, make_pack, apply, sample) -> None:
    import comfy.sd

    positive, negative = world.encode(CAT), world.encode("")
    first, second = (generate(make_pack(seed=seed), positive) for seed in (1, 2))
    patched, _ = comfy.sd.load_lora_for_models(world.model, None, second.state_dict(), 1.0, 0)
    host, _ = comfy.sd.load_lora_for_models(patched, None, first.state_dict(), 1.0, 0)
    # cfg 1 has no negative branch, where the host's LoRA acts and ours does not.
    ours = sample(*apply(patched, positive, first), negative, cfg=1.0)
    both = sample(host, positive, negative, cfg=1.0)
    sample(world.model, positive, negative)  # the host takes its patches off again
    assert relative(ours.latents, both.latents) <= 1e-5


def test_the_exported_lora_is_the_same_change_to_the_host(world, make_pack) -> None:
    import comfy.lora

    lora = generate(make_pack(), world.encode(CAT))
    network = world.model.model.diffusion_model
    key_map = comfy.lora.model_lora_keys_unet(world.model.model, {})
    loaded = comfy.lora.load_lora(lora.state_dict(), key_map)
    wanted = merged_weights(network, lora.entries[0].factors)
    assert {key.removeprefix("diffusion_model.") for key in loaded} == set(wanted)
    for key, adapter in loaded.items():
        name = key.removeprefix("diffusion_model.")
        weight = network.get_parameter(name).clone()
        got = comfy.lora.calculate_weight([(1.0, adapter, 1.0, None, None)], weight, key)
        torch.testing.assert_close(got, wanted[name])


def test_the_exported_lora_has_no_effect_when_nothing_fired(world, make_pack) -> None:
    state = generate(make_pack(fires=False), world.encode(CAT)).state_dict()
    assert all(float(value) == 0 for name, value in state.items() if name.endswith(".alpha"))


def test_a_compiled_model_is_found_under_its_own_names(world, make_pack, apply, sample) -> None:
    positive, negative = world.encode(CAT), world.encode("")
    lora = generate(make_pack(), positive)
    wanted = sample(*apply(world.model, positive, lora), negative)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = world.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"])
    got = sample(*apply(compiled, positive, lora), negative)
    assert relative(got.latents, wanted.latents) <= 1e-5


def test_another_family_is_refused_by_name(world, make_pack, apply) -> None:
    positive = world.encode(CAT)
    lora = generate(make_pack(name="cats.safetensors"), positive)
    other = narrow_model("SD20", context_dim=1024)
    with pytest.raises(ValueError, match=r"cats.*Stable Diffusion 1.*SD20.*checkpoint"):
        apply(other, positive, lora)


def test_other_sizes_are_refused_by_layer(world, make_pack, apply) -> None:
    positive = world.encode(CAT)
    lora = generate(make_pack(), positive)
    with pytest.raises(
        ValueError, match=r"attn2\.to_k has 768 inputs and 64 outputs, expected 768 and 320"
    ):
        apply(narrow_model("SD15", model_channels=64), positive, lora)


def test_missing_layers_are_refused_by_count(world, make_pack, apply) -> None:
    positive = world.encode(CAT)
    lora = generate(make_pack(), positive)
    shallow = narrow_model("SD15", transformer_depth_middle=-1)
    with pytest.raises(ValueError, match=r"only 6 of 8 target modules.*middle_block"):
        apply(shallow, positive, lora)


def test_another_conditioning_is_refused(world, make_pack, apply) -> None:
    positive = world.encode(CAT)
    lora = generate(make_pack(), positive)
    with pytest.raises(ValueError, match="2 entries.*written for 1"):
        apply(world.model, positive + world.encode(DOG), lora)


def test_percents_in_the_wrong_order_are_refused(world, make_pack, apply) -> None:
    positive = world.encode(CAT)
    lora = generate(make_pack(), positive)
    with pytest.raises(ValueError, match="start_percent must not be larger"):
        apply(world.model, positive, lora, start_percent=0.6, end_percent=0.4)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(world, make_pack, apply, strength: float) -> None:
    positive = world.encode(CAT)
    with pytest.raises(ValueError, match="finite number"):
        apply(world.model, positive, generate(make_pack(), positive), strength=strength)


def test_spans_are_the_neighbours_that_have_factors() -> None:
    spans = find_spans([None, 0, 0, None, 1, 2])
    assert [(span.start, span.rows) for span in spans] == [(1, (0, 0)), (4, (1, 2))]


def narrow_model(host_class: str, **changes: Any) -> Any:
    """A model of one of the host's classes with the demo world's layers, its weights unset."""
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1,
        "num_heads": 8,
        "context_dim": 768,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "dtype": torch.float32,
        **changes,
    }
    model = getattr(comfy.supported_models, host_class)(config).get_model({}, "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)
