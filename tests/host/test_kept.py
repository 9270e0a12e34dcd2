"""What layers make of a text is kept from step to step: nothing else about a run may change by it, whatever other nodes do."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unhype.host.bypass as bypass
from unhype.host.generate import generate
from unhype.host.kept import KeptResults, Record
from unhype.lora import LoRAFactors, TargetModule

from .tiny import Tiny, make_tiny

STEPS, SEED, SCALE = 6, 3, 5.0


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["SD15", "SDXL"])
def tiny(comfy: Any, request: pytest.FixtureRequest) -> Tiny:
    return make_tiny(request.param)


class Calls:
    """Calls of the product that a layer with a LoRA makes, and of the copies that spare it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added = self.recalled = 0
        add, get = bypass._add_per_row, Record.get

        def count_add(y: Tensor, x: Tensor, weight: Tensor) -> None:
            self.added += 1
            add(y, x, weight)

        def count_get(record: Record, layer: nn.Module) -> Tensor | None:
            result = get(record, layer)
            self.recalled += result is not None
            return result

        monkeypatch.setattr(bypass, "_add_per_row", count_add)
        monkeypatch.setattr(Record, "get", count_get)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def sample(
    model: Any,
    tiny: Tiny,
    positive: list,
    *,
    batch: int = 1,
    sampler: str = "euler",
    after: Callable[[int], None] = lambda step: None,
) -> Tensor:
    import comfy.sample

    latent = tiny.latent(batch)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, SEED),
        STEPS,
        SCALE,
        sampler,
        "normal",
        positive,
        tiny.encode(100),
        latent,
        callback=lambda step, *_: after(step),
        disable_pbar=True,
        seed=SEED,
    )


def with_lora(tiny: Tiny, positive: list) -> tuple[Any, list]:
    from unhype.host.apply import apply

    model, conditioning = apply(tiny.model, positive, generate(tiny.pack(), positive))
    return model, list(conditioning)


def computing_all(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(bypass, "KeptResults", lambda: KeptResults(0))
        return run()


@pytest.mark.parametrize(("sampler", "batch"), [("euler", 1), ("euler", 3), ("heun", 1)])
def test_a_run_is_the_same_to_the_last_bit(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch, sampler: str, batch: int
) -> None:
    model, positive = with_lora(tiny, tiny.encode(1))
    sites = {target.name for target in bypass.find_targets(tiny.network, tiny.spec.targets)}

    def run() -> Tensor:
        return sample(model, tiny, positive, batch=batch, sampler=sampler)

    kept, number = run(), STEPS if sampler == "euler" else 2 * STEPS - 1
    # The first call shows which layers share an input, the second computes what is kept, others only the first layer.
    assert calls.added == 2 * len(sites) + (number - 2)
    assert calls.recalled == (number - 2) * (len(sites) - 1)
    assert torch.equal(computing_all(monkeypatch, run), kept)
    assert not torch.equal(
        sample(tiny.model, tiny, tiny.encode(1), batch=batch, sampler=sampler), kept
    )


def test_several_prompts_each_keep_their_own(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    positive = [entry for number in (1, 2) for entry in tiny.encode(number)]
    positive[0] = [positive[0][0], {**positive[0][1], "area": (4, 4, 0, 0), "strength": 1.0}]
    model, conditioning = with_lora(tiny, positive)
    kept = sample(model, tiny, conditioning)
    assert calls.recalled
    assert torch.equal(computing_all(monkeypatch, lambda: sample(model, tiny, conditioning)), kept)


def test_another_node_may_change_the_text_at_every_step(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, positive = with_lora(tiny, tiny.encode(1))
    model = model.clone()

    def change(apply_model: Callable[..., Tensor], args: dict) -> Tensor:
        level = args["timestep"].flatten()[0] / 1000
        states = args["c"]["c_crossattn"] * (1 + level)
        return apply_model(args["input"], args["timestep"], **{**args["c"], "c_crossattn": states})

    model.set_model_unet_function_wrapper(change)
    kept = sample(model, tiny, positive)
    assert not calls.recalled
    assert torch.equal(computing_all(monkeypatch, lambda: sample(model, tiny, positive)), kept)


def test_another_node_may_change_the_text_now_and_then(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, positive = with_lora(tiny, tiny.encode(1))
    model = model.clone()
    states = positive[0][0]
    step = 0

    def change(apply_model: Callable[..., Tensor], args: dict) -> Tensor:
        text = args["c"]["c_crossattn"]
        # In place, in the very tensor that was kept from.
        text.mul_(2 if step == 3 else 1)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def count(done: int) -> None:
        nonlocal step
        step = done + 1

    model.set_model_unet_function_wrapper(change)

    def run() -> Tensor:
        nonlocal step
        step = 0
        fresh = [[states.clone(), positive[0][1]]]
        return sample(model, tiny, fresh, after=count)

    kept = run()
    assert calls.recalled
    assert torch.equal(computing_all(monkeypatch, run), kept)


def test_another_node_may_change_keys_in_place(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    model, positive = with_lora(tiny, tiny.encode(1))
    model = model.clone()

    def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        return optimized_attention(q, k.mul_(0.5), v.add_(1), extra_options["n_heads"])

    for block in range(12):
        model.set_model_attn2_replace(attend, "input", block)
        model.set_model_attn2_replace(attend, "output", block)
    model.set_model_attn2_replace(attend, "middle", 0)
    kept = sample(model, tiny, positive)
    assert calls.recalled
    assert torch.equal(computing_all(monkeypatch, lambda: sample(model, tiny, positive)), kept)


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_become_others_are_seen(
    tiny: Tiny, calls: Calls, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """Of all layers however it is done, of one alone if it gets another parameter, as when the host merges a LoRA."""
    model, positive = with_lora(tiny, tiny.encode(1))
    targets = bypass.find_targets(tiny.network, tiny.spec.targets)
    layers: list[Any] = [tiny.network.get_submodule(target.name) for target in targets]
    originals = [layer.weight for layer in layers]

    def change(done: int) -> None:
        if done == 3:
            if in_place:
                for layer in layers:
                    layer.weight.mul_(2)
            else:
                layers[-1].weight = torch.nn.Parameter(originals[-1] * 2, requires_grad=False)

    def run() -> Tensor:
        before = [weight.clone() for weight in originals]
        try:
            return sample(model, tiny, positive, after=change)
        finally:
            for layer, weight, value in zip(layers, originals, before, strict=True):
                layer.weight = weight
                weight.copy_(value)

    kept = run()
    assert calls.recalled
    assert not torch.equal(sample(model, tiny, positive), kept), "the change must matter"
    assert torch.equal(computing_all(monkeypatch, run), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_that_the_host_patches_as_it_loads_them(
    comfy: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As where a model does not fit into memory: such layers are asked themselves, in half precision too."""
    tiny = make_tiny("SD15", dtype)
    model, positive = with_lora(tiny, tiny.encode(1))

    def run() -> Tensor:
        return sample(model, tiny, positive)

    without = run()
    for target in bypass.find_targets(tiny.network, tiny.spec.targets):
        layer: Any = tiny.network.get_submodule(target.name)
        layer.weight_function = [lambda weight: weight * 2]
    calls.recalled = 0
    kept = run()
    assert calls.recalled
    assert not torch.equal(kept, without)
    assert torch.equal(computing_all(monkeypatch, run), kept)


def test_nothing_is_kept_beside_hooks_which_change_weights(tiny: Tiny, calls: Calls) -> None:
    import comfy.hooks

    positive = tiny.encode(1)
    state = generate(tiny.pack(seed=5), positive).state_dict()
    hooks = comfy.hooks.create_hook_lora(state, strength_model=1.0, strength_clip=0.0)
    model, conditioning = with_lora(tiny, positive)
    sample(model.clone(), tiny, comfy.hooks.set_hooks_for_conditioning(conditioning, hooks))
    assert calls.added
    assert not calls.recalled


def test_a_layer_that_another_node_took_over_computes(tiny: Tiny, calls: Calls) -> None:
    model, positive = with_lora(tiny, tiny.encode(1))
    targets = bypass.find_targets(tiny.network, tiny.spec.targets)
    sample(model, tiny, positive)
    recalled, calls.recalled = calls.recalled, 0
    for which, fewer in ((-1, STEPS - 2), (0, recalled)):
        layer = tiny.network.get_submodule(targets[which].name)
        layer.__dict__["forward"] = layer.forward
        calls.recalled = 0
        try:
            sample(model, tiny, positive)
        finally:
            del layer.__dict__["forward"]
        assert calls.recalled == recalled - fewer


def test_nothing_is_kept_where_a_node_is_given_the_text_between_layers(
    tiny: Tiny, calls: Calls
) -> None:
    model, positive = with_lora(tiny, tiny.encode(1))
    model = model.clone()
    model.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    sample(model, tiny, positive)
    assert calls.added
    assert not calls.recalled


def test_nothing_is_kept_where_gradients_are_wanted(tiny: Tiny, calls: Calls) -> None:
    factors = generate(tiny.pack(), tiny.encode(1)).entries[0].factors
    sites, table = bypass.find_sites(tiny.network, factors.targets), bypass.RowTable(factors)
    text = torch.randn(2, 77, factors.targets[0].in_features)

    def step() -> None:
        states = text.clone()
        with table.adapted(sites, [0, None], keep="same"):
            for site in sites:
                site.layer(states)

    for _ in range(3):
        step()
    assert calls.recalled
    calls.recalled = 0
    with torch.inference_mode(False), torch.enable_grad():
        text = text.clone()
        with suppress(RuntimeError):  # the weights were made in inference mode
            step()
    assert not calls.recalled


def factors_for(layers: nn.ModuleList) -> LoRAFactors:
    """A random LoRA of rank 2 for layers of 4 inputs and 4 outputs."""
    targets = tuple(TargetModule(str(index), 4, 4) for index in range(len(layers)))
    return LoRAFactors(
        targets,
        tuple(torch.randn(1, 2, 4) for _ in targets),
        tuple(torch.randn(1, 4, 2) for _ in targets),
        torch.ones(1),
    )


class Twice(nn.Linear):
    """A layer of another node, which computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_that_computes_something_else_is_asked_in_half_precision_too() -> None:
    layers = nn.ModuleList(Twice(4, 4, dtype=torch.float16) for _ in range(4))
    factors = factors_for(layers)
    table, sites = bypass.RowTable(factors), bypass.find_sites(layers, factors.targets)
    text = torch.randn(1, 3, 4).half()
    for _ in range(3):
        states = text.clone()
        with table.adapted(sites, [0], keep="same"):
            results = [layer(states) for layer in layers]
    for index, (layer, result) in enumerate(zip(layers, results, strict=True)):
        wanted = layer(text) + text @ factors.delta(index)[0].half().mT
        torch.testing.assert_close(result, wanted, atol=1e-2, rtol=1e-2)


def test_layers_may_be_compiled_one_by_one() -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    factors = factors_for(layers)
    table, sites = bypass.RowTable(factors), bypass.find_sites(layers, factors.targets)
    compiled = [torch.compile(layers[0], backend="eager"), *layers[1:3]]
    compiled.append(torch.compile(layers[3], backend="eager"))
    texts = [torch.randn(1, 3, 4), torch.randn(1, 3, 4)]
    for step in range(8):
        text, other = texts[0].clone(), texts[1].clone()
        inputs = [text, text, text, other if step < 5 else text]
        with table.adapted(sites, [0], keep="same"):
            results = [layer(x) for layer, x in zip(compiled, inputs, strict=True)]
        for index, (layer, x, result) in enumerate(zip(layers, inputs, results, strict=True)):
            wanted = layer(x) + x @ factors.delta(index)[0].mT
            torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_after_the_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[KeptResults]] = []

    def make() -> KeptResults:
        results = KeptResults()
        made.append(weakref.ref(results))
        return results

    monkeypatch.setattr(bypass, "KeptResults", make)
    model, positive = with_lora(tiny, tiny.encode(1))
    gc.disable()  # it does not see how full a GPU is
    try:
        sample(model, tiny, positive)
        assert made
        assert sum(len(results()._records) for results in made if results() is not None) == 0
    finally:
        gc.enable()


def test_what_is_given_back_is_free_at_once() -> None:
    kept, layer, text = KeptResults(), nn.Linear(2, 2), torch.ones(1, 3, 2)
    record = kept.open("key", text, 100)
    assert record is not None
    record.check(layer, text)
    alive = weakref.ref(record)
    gc.disable()
    try:
        del kept, record
        assert alive() is None
    finally:
        gc.enable()


class Operations(TorchDispatchMode):
    """How many operations of each kind are started; views of a tensor are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.counted[func.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_step_starts_hardly_more_operations_than_without(tiny: Tiny) -> None:
    """What a GPU with one picture waits for: the comparison, the first layer's LoRA, the rows' numbers."""

    def count(model: Any, positive: list) -> Counter[str]:
        seen = []
        with Operations() as operations:
            sample(model, tiny, positive, after=lambda _: seen.append(operations.counted.copy()))
        last, before = seen[-1], seen[-2]
        return Counter({name: last[name] - before[name] for name in last})

    plain, active = count(tiny.model, tiny.encode(1)), count(*with_lora(tiny, tiny.encode(1)))
    more = active.total() - plain.total()
    assert 0 < more <= 10, active - plain


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2e-3), (torch.float16, 2.5e-4)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("host_class", ["SD15", "SDXL"])
def test_in_half_precision_a_kept_result_is_rounded_once(
    comfy: Any, host_class: str, dtype: torch.dtype, bound: float
) -> None:
    """A merged layer rounds its weights, too: 2.4e-3 in bf16 (``test_families.py``)."""
    tiny = make_tiny(host_class, dtype)
    factors = generate(tiny.pack(), tiny.encode(1)).entries[0].factors
    sites = bypass.find_sites(tiny.network, factors.targets)
    width = factors.targets[0].in_features
    text = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = [site.layer(text) for site in sites]
    table = bypass.RowTable(factors)
    for _ in range(3):
        states = text.clone()
        with table.adapted(sites, [0, None], keep="same"):
            results = [site.layer(states) for site in sites]
    for site, result, without in zip(sites, results, plain, strict=True):
        assert torch.equal(result[1], without[1]), "a row without LoRA is the host's own"
        weight = site.layer.get_parameter("weight").double()
        for index, _ in site.parts:
            weight = weight + factors.delta(index)[0].double()
        assert relative(result[0].double(), text[0].double() @ weight.mT) <= bound


def test_in_half_precision_a_run_is_as_near_to_single_precision(
    comfy: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, exact = make_tiny("SD15", torch.bfloat16), make_tiny("SD15")
    exact.network.load_state_dict(tiny.network.state_dict())
    model, positive = with_lora(exact, exact.encode(1))
    wanted = sample(model, exact, positive)
    model, positive = with_lora(tiny, tiny.encode(1))
    calls.recalled = 0
    kept = sample(model, tiny, positive)
    assert calls.recalled
    computed = computing_all(monkeypatch, lambda: sample(model, tiny, positive))
    assert not torch.equal(kept, computed)
    assert relative(kept, wanted) <= 1.3 * relative(computed, wanted)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
