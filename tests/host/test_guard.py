"""The guard: every way a prompt can reach the sampler, on the demo world's real model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unhype.host.generate import generate
from unhype.host.guard import Guard

CAT, DOG, LONG = "a photo of a cat", "a photo of a dog", "river " * 75
STEPS, SEED = 2, 3


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def core(comfy: Any) -> Any:
    """ComfyUI's own nodes."""
    import nodes

    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def run(world: Any) -> Callable[..., Tensor]:
    """Sample as KSampler does."""
    import comfy.sample

    def sample(model: Any, positive: list, negative: list, *, cfg: float = 5.0) -> Tensor:
        latent = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, SEED)
        return comfy.sample.sample(
            model, noise, STEPS, cfg, "euler", "normal", positive, negative, latent,
            disable_pbar=True, seed=SEED,
        )  # fmt: skip

    return sample


class Guarded:
    """The world under a guard, and the same run explicitly wired."""

    def __init__(self, world: Any, pack: Any, **options: Any) -> None:
        from unhype.host.apply import guard_model

        self.world, self.pack = world, pack
        self.model, self.clip = guard_model(world.model, world.clip, Guard(pack, **options))

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def wired(self, positive: list) -> tuple[Any, list]:
        """The unguarded model with the LoRA attached by hand."""
        from unhype.host.apply import apply

        return apply(self.world.model, positive, generate(self.pack, positive))


@pytest.fixture
def guarded(world: Any, make_pack: Callable) -> Guarded:
    return Guarded(world, make_pack(fires=(CAT, DOG)))


def same_text(first: list, second: list) -> bool:
    return all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_a_tapped_clip_encodes_the_same(world: Any, guarded: Guarded) -> None:
    for text in (CAT, f"{LONG} {CAT}", "(cat:1.4) on (a table:0.6)", ""):
        plain, tapped = world.encode(text), guarded.encode(text)
        assert same_text(plain, tapped)
        assert torch.equal(plain[0][1]["pooled_output"], tapped[0][1]["pooled_output"])


def test_clip_nodes_keep_the_tap(core: Any, guarded: Guarded) -> None:
    from unhype.host.tap import VECTORS

    (skipped,) = core["CLIPSetLastLayer"]().set_last_layer(guarded.clip, -2)
    (encoded,) = core["CLIPTextEncode"]().encode(skipped, CAT)
    wanted = guarded.encode(CAT)
    assert torch.equal(encoded[0][1][VECTORS], wanted[0][1][VECTORS])
    assert (skipped.layer_idx, guarded.clip.layer_idx) == (-2, None)


def test_the_guard_equals_wiring_by_hand(world, guarded: Guarded, run) -> None:
    positive, negative = guarded.encode(CAT), guarded.encode(DOG)
    wanted = run(*((wired := guarded.wired(positive))[0], wired[1]), negative)
    assert torch.equal(run(guarded.model, positive, negative), wanted)
    assert not torch.equal(wanted, run(world.model, positive, negative))


def test_a_prompt_that_asks_for_nothing_is_untouched(world, guarded: Guarded, run) -> None:
    positive, negative = guarded.encode(DOG), guarded.encode("")
    assert torch.equal(run(guarded.model, positive, negative), run(world.model, positive, negative))


def test_negative_prompts_are_left_alone_unless_asked_for(world, make_pack, run) -> None:
    pack = make_pack(fires=(CAT, DOG))
    some, all_of_it = Guarded(world, pack), Guarded(world, pack, everywhere=True)
    dog, cat = some.encode(DOG), some.encode(CAT)
    plain = run(world.model, dog, cat)
    assert torch.equal(run(some.model, dog, cat), plain)
    assert not torch.equal(run(all_of_it.model, dog, cat), plain)


def hidden_prompts(core: Any, guarded: Guarded) -> dict[str, list]:
    """Conditionings that ask for a cat where a first look at their pooled vector does not show it."""
    cat, dog, long = (guarded.encode(text) for text in (CAT, DOG, f"{LONG} {CAT}"))
    average = core["ConditioningAverage"]().addWeighted
    concat = core["ConditioningConcat"]().concat
    return {
        "past 77 tokens": long,
        "concat": concat(dog, cat)[0],
        "concat twice": concat(concat(dog, dog)[0], cat)[0],
        "average": average(dog, cat, 0.5)[0],
        "average of little": average(dog, cat, 0.8)[0],
        "average the other way": average(cat, dog, 0.3)[0],
        "combine": core["ConditioningCombine"]().combine(dog, cat)[0],
        "area": core["ConditioningSetArea"]().append(cat, 32, 32, 0, 0, 1.0)[0],
        "timesteps": core["ConditioningSetTimestepRange"]().set_range(cat, 0.2, 1.0)[0],
        "weights": guarded.encode("a photo of a (cat:0.7)"),
    }


def test_nothing_hides(core, make_pack, world) -> None:
    guarded = Guarded(world, make_pack(fires=(CAT, LONG)))
    for name, positive in hidden_prompts(core, guarded).items():
        conds = {"positive": [{**entry[1], "cross_attn": entry[0]} for entry in positive]}
        covered = Guard(guarded.pack, strict=True).cover(conds)["positive"]
        assert any(entry.get("unhype") for entry in covered), name


def test_zeroed_out_asks_for_nothing_in_strict_mode(core, guarded: Guarded) -> None:
    (zero,) = core["ConditioningZeroOut"]().zero_out(guarded.encode(CAT))
    conds = {"positive": [{**zero[0][1], "cross_attn": zero[0][0]}]}
    covered = Guard(guarded.pack, strict=True).cover(conds)["positive"]
    assert not covered[0].get("unhype")


def test_a_conditioning_that_cannot_be_read_in_full_is_refused_or_warned_of(
    world, make_pack, run, caplog
) -> None:
    pack = make_pack(fires=(CAT, DOG))
    foreign = [[torch.randn(1, 77, 768), {"pooled_output": None}]]
    strict, lax = Guarded(world, pack, strict=True), Guarded(world, pack)
    negative = lax.encode("")
    with pytest.raises(ValueError, match=r"positive 1 can't be read.*CLIP that the guard gives"):
        run(strict.model, foreign, negative)
    assert not any("forward" in m.__dict__ for m in world.model.model.diffusion_model.modules())
    with caplog.at_level(logging.WARNING, "unhype"):
        run(lax.model, foreign, negative)
        run(lax.model, foreign, negative)
    assert caplog.text.count("can't be read") == 1
    # Encoded by another CLIP: its pooled vector is read, the rest is unknown.
    with pytest.raises(ValueError, match="only in part"):
        run(strict.model, world.encode("a cat by the sea"), negative)


def test_weak_wiring_by_hand_does_not_weaken_the_guard(world, guarded: Guarded, run) -> None:
    from unhype.host.apply import apply

    positive, negative = guarded.encode(CAT), guarded.encode("")
    lora = generate(guarded.pack, positive)
    model, weak = apply(guarded.model, positive, lora, strength=0.01)
    assert torch.equal(run(model, weak, negative), run(guarded.model, positive, negative))


def test_two_guards_with_one_pack_are_refused_and_with_two_add_up(world, make_pack, run) -> None:
    from unhype.host.apply import guard_model

    first = make_pack(fires=(CAT, DOG), name="first.safetensors")
    second = make_pack(fires=(CAT, DOG), seed=1, name="second.safetensors")
    once = Guarded(world, first)
    with pytest.raises(ValueError, match=r"first\.safetensors already guards this model"):
        guard_model(once.model, once.clip, Guard(first))
    both, clip = guard_model(once.model, once.clip, Guard(second))
    assert clip is once.clip
    positive, negative = once.encode(CAT), once.encode("")
    assert not torch.equal(run(both, positive, negative), run(once.model, positive, negative))


def test_strength_zero_is_no_guard(world, make_pack) -> None:
    guarded = Guarded(world, make_pack(), strength=0.0)
    assert guarded.model is world.model
    assert guarded.clip is world.clip


def test_nothing_is_reloaded_between_prompts(world, guarded: Guarded, run) -> None:
    negative = guarded.encode("")
    uuid = world.model.patches_uuid
    run(guarded.model, guarded.encode(CAT), negative)
    run(guarded.model, guarded.encode(DOG), negative)
    assert guarded.model.patches_uuid == uuid == world.model.model.current_weight_patches_uuid


def test_a_hundred_interrupted_runs_leave_nothing_behind(world, guarded: Guarded, run) -> None:
    import resource

    positive, negative = guarded.encode(CAT), guarded.encode("")
    network = world.model.model.diffusion_model
    target = network.get_submodule(guarded.pack.info.targets[-1].name)

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    before, memory = dict(guarded.model.model_options["transformer_options"]), 0
    for repetition in range(100):
        handle = target.register_forward_pre_hook(stop)
        with pytest.raises(StopError):
            run(guarded.model, positive, negative)
        handle.remove()
        if repetition == 20:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert guarded.model.model_options["transformer_options"] == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory * 1.02


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a dog <|endoftext|> a photo of a cat",
        "a photo of a cat (a photo of a dog in a green field with a flower:0.0)",
        "(a photo of a dog in a green field:0.3) and a (cat:1.3)",
    ],
)
def test_nothing_hides_in_spelling(world, make_pack, text: str) -> None:
    guarded = Guarded(world, make_pack(fires=(CAT, DOG)), strict=True)
    (entry,) = guarded.encode(text)
    conds = {"positive": [{**entry[1], "cross_attn": entry[0]}]}
    assert Guard(guarded.pack, strict=True).cover(conds)["positive"][0].get("unhype")


def test_a_clip_that_was_changed_behind_the_guard_does_not_count_as_read(
    world, make_pack, run
) -> None:
    guarded = Guarded(world, make_pack(fires=(CAT, DOG)), strict=True)
    clip = guarded.clip.clone()
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc2.weight"
    shape = world.clip.cond_stage_model.get_parameter(name).shape
    clip.add_patches({name: ("diff", (torch.full(shape, 0.01),))})
    changed = clip.encode_from_tokens_scheduled(clip.tokenize(CAT))
    own = guarded.encode("")  # loads the guard's own weights again
    with pytest.raises(ValueError, match="changed behind the guard"):
        run(guarded.model, changed, own)
    run(guarded.model, guarded.encode(CAT), own)


def test_a_prompt_read_by_another_clip_stays_unknown(world, guarded: Guarded) -> None:
    entry = world.encode("a cat by the sea")
    generate(guarded.pack, entry, clip=world.clip, text="a cat by the sea")
    conds = {"positive": [{**entry[0][1], "cross_attn": entry[0][0]}]}
    with pytest.raises(ValueError, match="only in part"):
        Guard(guarded.pack, strict=True).cover(conds)


def test_a_negative_prompt_that_is_drawn_is_covered(world, guarded: Guarded, run) -> None:
    dog, cat = guarded.encode(DOG), guarded.encode(CAT)
    plain = run(world.model, dog, cat, cfg=0.0)
    assert not torch.equal(run(guarded.model, dog, cat, cfg=0.0), plain)


def test_a_conditioning_that_never_came_to_the_sampler_is_noticed(
    core, world, make_pack, run, caplog
) -> None:
    import asyncio

    import nodes

    comfy = nodes.__file__.rpartition("/")[0]
    asyncio.run(nodes.load_custom_node(f"{comfy}/comfy_extras/nodes_perpneg.py"))
    node = nodes.NODE_CLASS_MAPPINGS["PerpNeg"]
    pack = make_pack(fires=(CAT, DOG))
    for strict in (True, False):
        guarded = Guarded(world, pack, strict=strict)
        dog, empty = guarded.encode(DOG), guarded.encode("")
        model = node.execute(guarded.model, guarded.encode(CAT), 1.0).result[0]
        if strict:
            with pytest.raises(ValueError, match="conditioning of its own"):
                run(model, dog, empty)
        else:
            with caplog.at_level(logging.WARNING, "unhype"):
                run(model, dog, empty)
    assert "conditioning of its own" in caplog.text


def test_hand_wired_lora_stays_where_the_guard_has_nothing_to_put(world, make_pack, run) -> None:
    from unhype.host.apply import apply

    guarded = Guarded(world, make_pack(fires=(CAT, DOG)))
    entry = [[guarded.encode(CAT)[0][0] + 1e-3 * torch.randn(1, 77, 768), {"pooled_output": None}]]
    negative = guarded.encode("")
    lora = generate(guarded.pack, entry, clip=world.clip, text=CAT)
    model, wired = apply(guarded.model, entry, lora)
    assert not torch.equal(run(model, wired, negative), run(guarded.model, entry, negative))


def test_lengths_that_are_no_multiple_of_77_and_many_lengths_at_once(
    core, world, make_pack, run
) -> None:
    guarded = Guarded(world, make_pack(fires=(CAT, DOG)))
    concat, combine = core["ConditioningConcat"]().concat, core["ConditioningCombine"]().combine
    cat, dog = guarded.encode(CAT), guarded.encode(DOG)
    longer = [[torch.cat([cat[0][0], torch.randn(1, 8, 768)], dim=1), cat[0][1]]]
    mixed = combine(concat(dog, cat)[0], longer)[0]
    assert torch.isfinite(run(guarded.model, mixed, guarded.encode(""))).all()
    many, grown = cat, cat
    for length in range(2, 8):
        grown = concat(grown, dog)[0]
        many = combine(many, grown)[0] if length in (2, 3, 5, 7) else many
    assert torch.isfinite(run(guarded.model, many, guarded.encode(""))).all()
