"""Every way that a conditioning reaches the network in ComfyUI, under the guard, against an oracle.

The oracle knows nothing of row numbers: at each call of a target layer it looks at the text states that come in, and changes what comes
out for those of a prompt that fires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unhype.host.embed import read_entry, require_embeddings
from unhype.host.generate import write_entry
from unhype.host.guard import Guard
from unhype.lora import LoRAFactors

CAT, DOG = "a photo of a cat", "a photo of a dog"
STEPS, SEED, CFG = 3, 3, 5.0
EXTRAS = (
    "custom_sampler",
    "perpneg",
    "model_advanced",
    "pag",
    "hooks",
    "mask",
    "context_windows",
    "torch_compile",
)


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def core(comfy: Path) -> Callable[..., Any]:
    """Call a node of ComfyUI's own, as its executor does; the first output."""
    import nodes

    async def load() -> None:
        for name in EXTRAS:
            assert await nodes.load_custom_node(str(comfy / "comfy_extras" / f"nodes_{name}.py"))

    asyncio.run(load())

    def call(name: str, *args: Any, **inputs: Any) -> Any:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        if hasattr(node, "define_schema"):
            return node.execute(*args, **inputs).result[0]
        return getattr(node(), node.FUNCTION)(*args, **inputs)[0]

    return call


@dataclass
class Bench:
    """A model to sample, its CLIP, and ComfyUI's nodes."""

    model: Any
    clip: Any
    core: Callable[..., Any]

    def encode(self, text: str) -> list:
        return self.core("CLIPTextEncode", self.clip, text)

    def latent(self, batch: int = 1, width: int = 8) -> dict[str, Tensor]:
        return {"samples": torch.zeros(batch, 4, 8, width)}

    def sample(self, positive: list, **changes: Any) -> Tensor:
        inputs = {
            "model": self.model,
            "seed": SEED,
            "steps": STEPS,
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "normal",
            "positive": positive,
            "negative": self.encode(""),
            "latent_image": self.latent(),
        }
        return self.core("KSampler", **{**inputs, **changes})["samples"]

    def guide(self, node: str, *args: Any) -> Tensor:
        return self.core(
            "SamplerCustomAdvanced",
            self.core("RandomNoise", SEED),
            self.core(node, self.model, *args),
            self.core("KSamplerSelect", "euler"),
            self.core("BasicScheduler", self.model, "normal", STEPS, 1.0),
            self.latent(),
        )["samples"]


def combined(b: Bench) -> Tensor:
    return b.sample(b.core("ConditioningCombine", b.encode(CAT), b.encode(DOG)))


def joined(b: Bench) -> Tensor:
    return b.sample(b.core("ConditioningConcat", b.encode(DOG), b.encode(CAT)))


def joined_twice(b: Bench) -> Tensor:
    """Beside a negative of another length, so that ComfyUI repeats both."""
    dog, cat = b.encode(DOG), b.encode(CAT)
    both = b.core("ConditioningConcat", b.core("ConditioningConcat", dog, cat), dog)
    return b.sample(both, negative=b.core("ConditioningConcat", dog, dog))


def joined_beside_another(b: Bench) -> Tensor:
    """Two entries, of two chunks and of one."""
    both = b.core("ConditioningConcat", b.encode(CAT), b.encode(DOG))
    return b.sample(b.core("ConditioningCombine", both, b.encode(CAT)))


def averaged(b: Bench) -> Tensor:
    return b.sample(b.core("ConditioningAverage", b.encode(DOG), b.encode(CAT), 0.4))


def area(b: Bench) -> Tensor:
    left = b.core("ConditioningSetArea", b.encode(CAT), 32, 64, 0, 0, 1.0)
    return b.sample(b.core("ConditioningCombine", left, b.encode(DOG)))


def masked(b: Bench) -> Tensor:
    mask = b.core("SolidMask", 0.7, 64, 64)
    half = b.core("ConditioningSetMask", b.encode(CAT), mask, "default", 1.0)
    return b.sample(b.core("ConditioningCombine", half, b.encode(DOG)))


def scheduled(b: Bench) -> Tensor:
    first = b.core("ConditioningSetTimestepRange", b.encode(DOG), 0.0, 0.3)
    then = b.core("ConditioningSetTimestepRange", b.encode(CAT), 0.3, 1.0)
    return b.sample(b.core("ConditioningCombine", first, then))


def scheduled_by_hooks(b: Bench) -> Tensor:
    times = b.core("ConditioningTimestepsRange", 0.0, 0.8)
    return b.sample(
        b.core("ConditioningSetProperties", b.encode(CAT), 1.0, "default", timesteps=times)
    )


def host_lora_by_hooks(b: Bench) -> Tensor:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(host_lora(b.model), 1.0, 0.0)
    dog = comfy.hooks.set_hooks_for_conditioning(b.encode(DOG), hooks)
    return b.sample(b.core("ConditioningCombine", b.encode(CAT), dog))


def controlled(b: Bench) -> Tensor:
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = dict(b.model.model.model_config.unet_config)
    for name in ("out_channels", "use_temporal_attention", "use_temporal_resblock"):
        config.pop(name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, operations=comfy.ops.disable_weight_init
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    network.dtype = torch.float32
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return b.sample(b.core("ControlNetApply", b.encode(CAT), control, picture, 1.0))


def four_at_once(b: Bench) -> Tensor:
    return b.sample(b.encode(CAT), latent_image=b.latent(4))


def guidance_one(b: Bench) -> Tensor:
    return b.sample(b.encode(CAT), cfg=1.0)


def from_picture(b: Bench) -> Tensor:
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    return b.sample(b.encode(CAT), latent_image=latent, denoise=0.6)


def inpainted(b: Bench) -> Tensor:
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    return b.sample(
        b.encode(CAT), latent_image=b.core("SetLatentNoiseMask", samples=latent, mask=mask)
    )


def in_windows(b: Bench) -> Tensor:
    model = b.core("ContextWindowsManual", b.model, 8, 4, "standard_static", 1, False, "pyramid", 3)
    return b.sample(b.encode(CAT), model=model, latent_image=b.latent(width=16))


def v_prediction(b: Bench) -> Tensor:
    return b.sample(
        b.encode(CAT), model=b.core("ModelSamplingDiscrete", b.model, "v_prediction", True)
    )


def rescaled(b: Bench) -> Tensor:
    return b.sample(b.encode(CAT), model=b.core("RescaleCFG", b.model, 0.7))


def perturbed(b: Bench) -> Tensor:
    return b.sample(b.encode(CAT), model=b.core("PerturbedAttentionGuidance", b.model, 3.0))


def basic_guider(b: Bench) -> Tensor:
    return b.guide("BasicGuider", b.encode(CAT))


def cfg_guider(b: Bench) -> Tensor:
    return b.guide("CFGGuider", b.encode(CAT), b.encode(""), CFG)


def dual_guider(b: Bench) -> Tensor:
    return b.guide("DualCFGGuider", b.encode(DOG), b.encode(CAT), b.encode(""), 2.0, CFG, "regular")


def perpneg_guider(b: Bench) -> Tensor:
    return b.guide("PerpNegGuider", b.encode(CAT), b.encode(DOG), b.encode(""), CFG, 0.5)


def host_lora_after(b: Bench) -> Tensor:
    import comfy.sd

    model, _ = comfy.sd.load_lora_for_models(b.model, None, host_lora(b.model), 1.0, 0.0)
    return b.sample(b.encode(CAT), model=model)


def compiled(b: Bench) -> Tensor:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = b.model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    return b.sample(b.encode(CAT), model=model)


WAYS = (
    combined,
    joined,
    joined_twice,
    joined_beside_another,
    averaged,
    area,
    masked,
    scheduled,
    scheduled_by_hooks,
    host_lora_by_hooks,
    controlled,
    four_at_once,
    guidance_one,
    from_picture,
    inpainted,
    in_windows,
    v_prediction,
    rescaled,
    perturbed,
    basic_guider,
    cfg_guider,
    dual_guider,
    perpneg_guider,
    host_lora_after,
    compiled,
)


def host_lora(model: Any) -> dict[str, Tensor]:
    """A LoRA of ComfyUI's on one of the target layers."""
    generator, name = (
        torch.Generator().manual_seed(2),
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v",
    )
    rows, columns = model.model.get_submodule(name).weight.shape
    return {
        f"{name}.lora_up.weight": torch.randn(rows, 2, generator=generator) * 0.2,
        f"{name}.lora_down.weight": torch.randn(2, columns, generator=generator) * 0.2,
    }


@contextmanager
def oracle(model: Any, states: Tensor, factors: LoRAFactors) -> Iterator[None]:
    """Change the target layers' output for every 77 tokens of their input that are these states, (77, dim)."""

    def hook(delta: Tensor) -> Callable[..., None]:
        def change(layer: torch.nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            wanted = states.to(args[0])
            for row, result in zip(args[0], y, strict=True):
                for start in range(0, len(row), 77):
                    tokens = slice(start, start + 77)
                    if torch.equal(row[tokens], wanted):
                        result[tokens] += (wanted.float() @ delta.T).to(y)

        return change

    network, handles = model.model.diffusion_model, []
    torch._dynamo.reset()  # what was compiled before may not look at hooks
    for index, target in enumerate(factors.targets):
        layer = network.get_submodule(target.name)
        handles.append(layer.register_forward_hook(hook(factors.delta(index)[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def firing_states(bench: Bench, way: Callable[[Bench], Tensor]) -> Tensor:
    """The states that ask for a cat, as this way makes them, (77, dim)."""
    cat, dog = bench.encode(CAT), bench.encode(DOG)
    if way is averaged:
        return bench.core("ConditioningAverage", dog, cat, 0.4)[0][0][0]
    return cat[0][0][0]


def check(
    world: Any, core: Any, pack: Any, way: Callable[[Bench], Tensor], tolerance: float
) -> None:
    from unhype.host.apply import guard_model

    model, clip = guard_model(world.model, world.clip, Guard(pack))
    bench, bare = Bench(model, clip, core), Bench(world.model, clip, core)
    plain, got = way(bare), way(bench)
    found = read_entry(bench.encode(CAT)[0], pack.info.spec.embedding)
    factors = write_entry(pack, require_embeddings(found, 0, pack.info.spec.embedding)).factors
    with oracle(world.model, firing_states(bench, way), factors):
        wanted = way(bare)
    assert (wanted - plain).norm() > 1e-2 * plain.norm(), "the LoRA must matter"
    assert (got - wanted).norm() <= tolerance * wanted.norm()
    assert not any("forward" in m.__dict__ for m in world.model.model.diffusion_model.modules())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_row_gets_what_its_text_asks_for(world, core, make_pack, way) -> None:
    check(world, core, make_pack(fires=(CAT, DOG)), way, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float8_e4m3fn, 1e-5)],
    ids=["fp16", "bf16", "fp8"],
)
def test_weights_of_every_precision(
    world, checkpoint: Path, core, make_pack, dtype: torch.dtype, tolerance: float
) -> None:
    import comfy.sd

    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(checkpoint), output_vae=False, output_clip=False, model_options={"dtype": dtype}
    )
    assert model.model.diffusion_model.out[2].weight.dtype == dtype
    small = type(world)(model, world.clip)
    check(small, core, make_pack(fires=(CAT, DOG)), guidance_one, tolerance)


def test_a_model_of_which_only_part_is_loaded(world, checkpoint: Path, core, make_pack) -> None:
    import comfy.sd

    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(checkpoint), output_vae=False, output_clip=False
    )
    model.load(torch.device("cpu"), lowvram_model_memory=1_000_000)
    assert model.model.model_lowvram
    check(type(world)(model, world.clip), core, make_pack(fires=(CAT, DOG)), cfg_guider, 1e-5)
