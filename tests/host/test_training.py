"""What training does with a frozen model of every family, against ComfyUI's own results."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import ConfigError, TrainConfig, make_config
from train.denoiser import WrongGradientError, check_gradient, gradient_error
from train.run import Event, train
from unhype import checkpoint as packs
from unhype.checkpoint import Pack
from unhype.families import Branch
from unhype.host.bypass import RowTable
from unhype.host.denoise import CheckpointRefusedError, Denoiser, ModelFiles
from unhype.host.generate import generate
from unhype.host.tap import VECTORS, tap
from unhype.host.text import TextBatch, TextEncoder
from unhype.lora import LoRAFactors

from .tiny import IN_FILES, Tiny, make_clip, make_tiny, set_gate, write_checkpoint

TEXTS = ["a cat", "two dogs, running"]
LONG, WEIGHTED = "a quiet day " * 40, "(cat:1.3) and a dog"


@pytest.fixture(scope="module")
def clip(tiny: Tiny) -> Any:
    return make_clip(tiny)


@pytest.fixture(scope="module")
def denoiser(tiny: Tiny, clip: Any) -> Denoiser:
    return Denoiser(tiny.model, TextEncoder(clip), tiny.spec, "tiny.safetensors")


@pytest.fixture(scope="module")
def text(denoiser: Denoiser) -> TextBatch:
    return denoiser.embed(TEXTS)


def states(tiny: Tiny) -> tuple[Tensor, Tensor]:
    """Noisy states at two levels."""
    sampling = tiny.model.model.model_sampling
    sigma = sampling.sigma(sampling.timestep(sampling.sigma_max) * torch.tensor([0.7, 0.3]))
    noise = torch.randn(tiny.latent(2).shape, generator=torch.Generator().manual_seed(1))
    return sampling.noise_scaling(sigma, noise, torch.zeros_like(noise)), sigma


def factors_of(denoiser: Denoiser) -> LoRAFactors:
    """Two prompts' factors, of different scales."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    targets = denoiser.targets
    return LoRAFactors(
        targets,
        tuple(draw(2, 4, target.in_features) for target in targets),
        tuple(draw(2, target.out_features, 4) for target in targets),
        torch.tensor([1.0, 0.5]),
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("texts", [TEXTS, ["a cat", WEIGHTED]])
def test_text_is_encoded_as_the_hosts_node_does(denoiser: Denoiser, clip: Any, texts) -> None:
    batch, tapped = denoiser.embed(texts), tap(clip)
    pooled, said = denoiser.embed_pooled(texts), denoiser.embed_tokens(texts)
    torch.testing.assert_close(said, batch.read, atol=1e-4, rtol=0)
    for row, text in enumerate(texts):
        with torch.no_grad():
            ((cross, extras),) = tapped.encode_from_tokens_scheduled(tapped.tokenize(text))
        torch.testing.assert_close(batch.cross[row], cross[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.host_pooled[row], extras["pooled_output"][0])
        for got in (batch.pooled, pooled):
            torch.testing.assert_close(got[row], extras[VECTORS][0], atol=1e-4, rtol=0)


def test_clip_l_reads_a_prompt_once(denoiser: Denoiser, clip: Any) -> None:
    runs: list[object] = []
    encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
    handle = encoder.register_forward_hook(lambda *_: runs.append(None))
    denoiser.embed(
        ["a quiet day " * 8, WEIGHTED]
    )  # a tapped CLIP reads windows of the one, and the other's weights
    handle.remove()
    assert len(runs) == 2


def test_a_prompt_that_would_be_cut_is_refused(denoiser: Denoiser) -> None:
    for embed in (denoiser.embed, denoiser.embed_pooled):
        with pytest.raises(ValueError, match="longer than the .*'a quiet day .*Shorten it"):
            embed([*TEXTS, LONG])


def test_each_row_has_its_own_factors(tiny: Tiny, denoiser: Denoiser, text: TextBatch) -> None:
    (x_t, sigma), factors = states(tiny), factors_of(denoiser)
    with torch.no_grad():
        both = denoiser.predict(x_t, sigma, text, factors)
        for row in ([0], [1]):
            alone = denoiser.predict(x_t[row], sigma[row], text.rows(row), factors.rows(row))
            assert relative(both[row], alone) <= 1e-5


def test_training_and_serving_compute_the_same(
    tiny: Tiny, denoiser: Denoiser, text: TextBatch
) -> None:
    (x_t, sigma), factors = states(tiny), factors_of(denoiser)
    with torch.no_grad():
        trained = denoiser.predict(x_t, sigma, text, factors)
        with RowTable(factors).adapted(denoiser._sites, [0, 1]):
            served = denoiser.predict(x_t, sigma, text, None)
        plain = denoiser.predict(x_t, sigma, text, None)
    assert relative(served, trained) <= 1e-6
    assert relative(served, plain) > 1e-2


def test_the_gradient_agrees_with_finite_differences(
    tiny: Tiny, denoiser: Denoiser, text: TextBatch
) -> None:
    assert gradient_error(denoiser, *states(tiny), text, step=0.02) <= 2e-3
    check_gradient(denoiser, *states(tiny), text)
    assert not any(module._forward_pre_hooks for module in tiny.network.modules())


def test_copies_are_made_only_where_the_gradient_would_be_wrong_without(
    tiny: Tiny, denoiser: Denoiser, text: TextBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = bool(denoiser._overwritten)
    monkeypatch.setattr(denoiser, "_overwritten", ())
    lost = pytest.raises(WrongGradientError, match=r"tiny\.safetensors is lost.*ComfyUI 0\.3\.75")
    with lost if copies else nullcontext():
        check_gradient(denoiser, *states(tiny), text)


def test_the_check_of_the_gradient_bears_half_precision(
    tiny: Tiny, denoiser: Denoiser, text: TextBatch
) -> None:
    half = make_tiny(tiny.host_class, torch.bfloat16)
    rounded = Denoiser(half.model, denoiser._text, tiny.spec, "half.safetensors")
    check_gradient(rounded, *states(tiny), text)


def test_half_precision_holds_gradients_as_small_as_a_mean_makes_them(
    tiny: Tiny, denoiser: Denoiser, text: TextBatch
) -> None:
    half = make_tiny(tiny.host_class, torch.float16)
    denoiser._model.diffusion_model.load_state_dict(half.network.state_dict())
    rounded = Denoiser(half.model, denoiser._text, tiny.spec, "half.safetensors")

    def gradients(model: Denoiser, share: float) -> Tensor:
        factors = factors_of(denoiser)
        for factor in (*factors.down, *factors.up, factors.scale):
            factor.requires_grad_()
        (model.predict(*states(tiny), text, factors).square().sum() * share).backward()
        found = [f.grad for f in (*factors.down, *factors.up, factors.scale)]
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    large, small = gradients(rounded, 1.0), gradients(rounded, 2.0**-30)
    torch.testing.assert_close(small * 2.0**30, large, rtol=1e-6, atol=0)
    assert relative(large, gradients(denoiser, 1.0)) <= 0.05


def test_a_rollout_passes_the_states_of_the_hosts_sampler(
    tiny: Tiny, denoiser: Denoiser, clip: Any
) -> None:
    import comfy.sample

    def encode(text: str) -> list:
        with torch.no_grad():
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    seen, latent, text = [], tiny.latent(), "a cat"
    guidance_scale = 1.0 if tiny.spec.branch is Branch.ALL else 4.0
    with torch.no_grad():
        comfy.sample.sample(
            tiny.model,
            comfy.sample.prepare_noise(latent, 7),
            5,
            guidance_scale,
            "euler",
            "normal",
            encode(text),
            encode(""),
            latent,
            callback=lambda step, denoised, x, total: seen.append(x.clone()),
            disable_pbar=True,
        )
    kept, sigmas = denoiser.rollout(
        denoiser.embed([text]), steps=5, guidance_scale=4.0, seed=7, size=64, stop_indices=[0, 2, 4]
    )
    assert sigmas.tolist() == sorted(sigmas.tolist(), reverse=True)
    for state, step in zip(kept, (0, 2, 4), strict=True):
        assert relative(state, seen[step]) <= 1e-5


def short_run(folder: Path, checkpoint: Path) -> TrainConfig:
    """A config of seconds: one rollout, since full-size text encoders take seconds a prompt."""
    return make_config(
        {
            "checkpoint": str(checkpoint),
            "output": str(folder / "pack.safetensors"),
            "concepts": [{"name": "cat", "target": ["cat"], "anchor": "an empty meadow"}],
            "retain": ["dog", "bus", "tree", "apple", "house"],
            "retain_captions": ["a calm morning", "rain over the hills", "a long road", "a room"],
            "network": {"rank": 4, "hidden_dim": 16},
            "gate": {"steps": 60, "num_positives": 10, "num_negatives": 20},
            "trajectories": {"rollouts": 1, "states": 4, "steps": 4, "size": 32},
            "objective": {"weight_retention": 1e-6, "full_strength": 1.0},
            "train": {"steps": 20, "batch_size": 2, "lr": 1e-3, "warmup": 1},
        }
    )


def run(config: TrainConfig, **arguments: Any) -> Pack:
    """Train, and make sure that it learned."""
    losses: list[float] = []

    def listen(event: Event) -> None:
        losses.extend([event.values["loss"]] if event.values else [])

    result = train(config, progress=listen, **arguments)
    assert len(losses) == config.train.steps
    assert all(math.isfinite(loss) for loss in losses)
    assert result.metrics["erase_loss"] < 0.8 * result.metrics["erase_loss_without"]
    return packs.load(result.path)


def accepts(tiny: Tiny, pack: Pack) -> bool:
    """Whether a model takes the pack's LoRA."""
    from unhype.host.apply import apply

    set_gate(pack.gate, fires=True)
    positive = tiny.encode(1)
    model, conditioning = apply(tiny.model, positive, generate(pack, positive))
    return model is not tiny.model and conditioning[0] is not positive[0]


def test_a_run_ends_in_a_pack_for_its_model(tiny: Tiny, denoiser: Denoiser, tmp_path: Path) -> None:
    pack = run(short_run(tmp_path, Path("tiny.safetensors")), denoiser=denoiser)
    assert pack.info.spec is tiny.spec
    assert accepts(tiny, pack)


def test_edits_are_solved_for_where_layers_read_the_text_alone(
    tiny: Tiny, denoiser: Denoiser, tmp_path: Path
) -> None:
    data = short_run(tmp_path, Path("tiny.safetensors")).plain()
    objective = {"name": "closed-form", "sentences": 4, "scenes": 1}
    small = {**data, "network": {}, "objective": objective}
    config = make_config({**small, "gate": {**data["gate"], "scatter_share": 0}})
    if not tiny.spec.per_chunk:
        with pytest.raises(ConfigError, match=r"no layers that read.*objective\.name direct"):
            train(config, denoiser=denoiser)
        return
    pack = packs.load(train(config, denoiser=denoiser).path)
    assert pack.info.spec is tiny.spec
    texts = ["here is a cat", "here is an empty meadow"]
    text = denoiser.embed(texts)
    last = [len(ids) - 2 for ids in denoiser.token_ids(texts)]  # before the token that ends a text
    cat, meadow = (text.cross[row, place].double() for row, place in enumerate(last))
    factors = pack.hypernetwork.generate(text.pooled[:1])
    away, left = 0.0, 0.0
    for index, weight in enumerate(denoiser.target_weights()):
        wanted, plain = meadow @ weight.T.double(), cat @ weight.T.double()
        change = cat @ factors.delta(index)[0].T.double()
        away += float((plain - wanted).norm() ** 2)
        left += float((plain + change - wanted).norm() ** 2)
    assert left < 0.5 * away
    assert accepts(tiny, pack)


@pytest.fixture(scope="module", params=IN_FILES)
def file(comfy: Path, request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, Path]:
    """A host class and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return request.param, write_checkpoint(request.param, folder / "tiny.ckpt")


def test_a_checkpoint_file_is_all_that_a_run_needs(
    file: tuple[str, Path], comfy: Path, tmp_path: Path
) -> None:
    from comfy.sd import load_checkpoint_guess_config

    host_class, path = file
    pack = run(short_run(tmp_path, path), comfyui=comfy)
    assert pack.info.base.name == path.name
    model, *_ = load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)
    assert accepts(Tiny(host_class, model), pack)


DROPPED = {
    "KOALA_700M": ("resblocks.3.mlp.c_fc.bias", r"clip_g\..*layers\.3\.mlp\.fc1\.bias"),
    "SD3": ("layers.3.mlp.fc1.bias", r"clip_l\..*layers\.3\.mlp\.fc1\.bias"),
}


def test_a_file_that_lacks_a_weight_of_a_text_encoder_is_refused(
    file: tuple[str, Path], comfy: Path, tmp_path: Path
) -> None:
    host_class, path = file
    dropped, named = DROPPED[host_class]
    state = {n: v for n, v in torch.load(path).items() if not n.endswith(dropped)}
    torch.save(state, tmp_path / "cut.ckpt")
    with pytest.raises(CheckpointRefusedError, match=f"lacks 1 of .*text encoder.*{named}"):
        Denoiser.load(ModelFiles(tmp_path / "cut.ckpt"), comfy)


def test_a_file_without_clip_l_is_refused(comfy: Path, tmp_path: Path) -> None:
    path = write_checkpoint("SD3", tmp_path / "other.ckpt", text_encoders=["clip_g"])
    with pytest.raises(CheckpointRefusedError, match=r"other\.ckpt has no CLIP-L"):
        Denoiser.load(ModelFiles(path), comfy)
