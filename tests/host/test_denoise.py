"""The frozen model as training sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unhype.embedding import heard, last_heard
from unhype.host.denoise import CheckpointRefusedError, Denoiser, ModelFiles, TextBatch
from unhype.lora import LoRAFactors

TEXTS = ["", "a cat", "the dogs are running over the snow", "a cat and a dog on a table " * 3]
LONG, WEIGHTED = "a quiet day " * 40, "(cat:1.3) and a dog"


@pytest.fixture(scope="module")
def denoiser(comfy: Path, checkpoint: Path) -> Denoiser:
    return Denoiser.load(ModelFiles(checkpoint), comfy)


@pytest.fixture(scope="module")
def text(denoiser: Denoiser) -> TextBatch:
    return denoiser.embed(["a cat", "a dog"])


@pytest.fixture
def factors(denoiser: Denoiser) -> LoRAFactors:
    """Two prompts' factors, of different scales."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    targets = denoiser.targets
    return LoRAFactors(
        targets,
        tuple(draw(2, 4, target.in_features) for target in targets),
        tuple(draw(2, target.out_features, 4) for target in targets),
        torch.tensor([1.0, 0.5]),
    )


def states(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy states (2, 4, 8, 8) at two levels."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([2.0, 5.0])
    return torch.randn(2, 4, 8, 8, generator=generator) * sigma.view(-1, 1, 1, 1), sigma


def test_it_finds_its_family_and_the_layers_that_change(denoiser: Denoiser) -> None:
    assert denoiser.family.host_classes == ("SD15",)
    assert (
        len(denoiser.targets) == 8
    )  # two attentions down and in the middle, two up: to_k and to_v
    assert {(t.in_features, t.out_features) for t in denoiser.targets} == {(768, 320)}


def test_the_fingerprint_tells_the_weights_apart(denoiser: Denoiser, comfy, checkpoint) -> None:
    fingerprint = denoiser.fingerprint
    assert fingerprint.name == checkpoint.name
    layer = denoiser._sites[0].layer.get_parameter("weight")
    before = layer[0, 0].item()
    try:
        layer[0, 0] += 1
        assert denoiser._digest() != fingerprint.digest
    finally:
        layer[0, 0] = before
    assert denoiser._digest() == fingerprint.digest


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, WEIGHTED], ["a cat"]])
def test_pooled_alone_equals_pooled_of_the_whole(denoiser: Denoiser, texts: list[str]) -> None:
    pooled = denoiser.embed_pooled(texts)
    torch.testing.assert_close(pooled, denoiser.embed(texts).pooled, atol=1e-4, rtol=0)
    assert pooled.shape == (len(texts), 768)


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, WEIGHTED], ["a cat"]])
def test_tokens_alone_equal_tokens_of_the_whole(denoiser: Denoiser, texts: list[str]) -> None:
    said, whole = denoiser.embed_tokens(texts), denoiser.embed(texts)
    torch.testing.assert_close(said, whole.read, atol=1e-4, rtol=0)
    torch.testing.assert_close(last_heard(said), whole.pooled, atol=1e-4, rtol=0)
    counts = [len(ids) - 1 for ids in denoiser.token_ids(texts)]
    assert heard(said).sum(1).tolist() == counts


@pytest.mark.parametrize("embed", ["embed", "embed_pooled"])
def test_a_prompt_that_would_be_cut_is_refused(denoiser: Denoiser, embed: str) -> None:
    with pytest.raises(ValueError, match="longer than the 77 tokens .*'a quiet day .*Shorten it"):
        getattr(denoiser, embed)([*TEXTS, LONG])


@pytest.mark.parametrize("texts", [["a cat", "a dog"], ["a cat", WEIGHTED]])
def test_text_is_encoded_as_the_hosts_node_does(denoiser: Denoiser, world: Any, texts) -> None:
    batch = denoiser.embed(texts)
    for row, text in enumerate(texts):
        ((cross, extra),) = world.encode(text)
        torch.testing.assert_close(batch.cross[row], cross[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.pooled[row], extra["pooled_output"][0], atol=1e-4, rtol=0)


def test_the_prediction_is_what_the_hosts_model_gives(denoiser, world, text) -> None:
    x_t, sigma = states()
    base = world.model.model
    with torch.no_grad():
        denoised = base.apply_model(x_t, sigma, c_crossattn=text.cross)
        raw = denoiser.predict(x_t, sigma, text, None)
    got = base.model_sampling.calculate_denoised(sigma, raw, x_t)
    torch.testing.assert_close(got, denoised, atol=1e-4, rtol=1e-5)


def test_each_row_has_its_own_factors(denoiser, text, factors) -> None:
    x_t, sigma = states()
    with torch.no_grad():
        both = denoiser.predict(x_t, sigma, text, factors)
        for row in range(2):
            alone = denoiser.predict(
                x_t[row : row + 1], sigma[row : row + 1], text.rows([row]), factors.rows([row])
            )
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_training_and_serving_compute_the_same(denoiser, text, factors) -> None:
    from unhype.host.bypass import RowTable

    x_t, sigma = states()
    with torch.no_grad():
        trained = denoiser.predict(x_t, sigma, text, factors)
        with RowTable(factors).adapted(denoiser._sites, [0, 1]):
            served = denoiser.predict(x_t, sigma, text, None)
        plain = denoiser.predict(x_t, sigma, text, None)
    assert (served - trained).norm() / trained.norm() <= 1e-6
    assert (served - plain).norm() / plain.norm() > 1e-2


@pytest.mark.parametrize("part", ["down", "up", "scale"])
def test_the_gradient_agrees_with_finite_differences(denoiser, text, factors, part: str) -> None:
    x_t, sigma = states()
    generator = torch.Generator().manual_seed(5)
    weigh = torch.randn(x_t.shape, generator=generator)

    def objective(changed: LoRAFactors) -> Tensor:
        return (denoiser.predict(x_t, sigma, text, changed) * weigh).double().sum()

    value = getattr(factors, part)
    values = [value] if isinstance(value, Tensor) else list(value)
    directions = [torch.randn(v.shape, generator=generator) * v.std() for v in values]

    def moved(step: float) -> LoRAFactors:
        there = [v + step * d for v, d in zip(values, directions, strict=True)]
        return replace(factors, **{part: there[0] if isinstance(value, Tensor) else tuple(there)})

    for v in values:
        v.requires_grad_()
    objective(factors).backward()
    pairs = zip(values, directions, strict=True)
    slope = sum(float((v.grad * d).sum()) for v, d in pairs if v.grad is not None)
    step = 1e-2
    with torch.no_grad():
        difference = float(objective(moved(step)) - objective(moved(-step))) / (2 * step)
    assert slope == pytest.approx(difference, rel=2e-2)
    assert abs(slope) > 1e-3


def test_nothing_is_left_on_the_layers_after_an_error(denoiser, text, factors) -> None:
    x_t, sigma = states()
    with pytest.raises(ValueError, match="as many as one another, got 2, 2, 2, 1"):
        denoiser.predict(x_t, sigma, text, factors.rows([0]))
    with pytest.raises(RuntimeError):
        denoiser.predict(x_t[:, :3], sigma, text, factors)
    assert not any("forward" in site.layer.__dict__ for site in denoiser._sites)


def roll(denoiser: Denoiser, text: TextBatch, stops: list[int]) -> tuple[Tensor, Tensor]:
    return denoiser.rollout(text, steps=6, guidance_scale=4.0, seed=7, size=64, stop_indices=stops)


def test_a_rollout_passes_the_states_of_the_hosts_sampler(denoiser, world, text) -> None:
    import comfy.sample

    seen = []
    latent = torch.zeros(2, 4, 8, 8)
    positive = [[text.cross, {"pooled_output": text.pooled}]]
    with torch.no_grad():
        comfy.sample.sample(
            world.model,
            comfy.sample.prepare_noise(latent, 7),
            6,
            4.0,
            "euler",
            "normal",
            positive,
            world.encode(""),
            latent,
            callback=lambda step, denoised, x, total: seen.append(x.clone()),
            disable_pbar=True,
        )
    kept, sigmas = roll(denoiser, text, [4, 0, 2])
    assert kept.shape == (3, 2, 4, 8, 8)
    assert sigmas.tolist() == sorted(sigmas.tolist(), reverse=True)
    for state, step in zip(kept, (0, 2, 4), strict=True):
        torch.testing.assert_close(state, seen[step], atol=1e-3, rtol=1e-4)


def test_a_rollout_is_reproducible(denoiser, text) -> None:
    assert torch.equal(roll(denoiser, text, [3])[0], roll(denoiser, text, [1, 3])[0][1:])


def test_a_rollout_refuses_steps_that_it_does_not_have(denoiser, text) -> None:
    with pytest.raises(ValueError, match="from 0 to 5"):
        roll(denoiser, text, [6])


Rewrite = Callable[[Callable[[str, Tensor], Tensor | None]], Path]


@pytest.fixture
def rewritten(checkpoint: Path, tmp_path: Path) -> Rewrite:
    """Write the checkpoint again with some weights changed, or left out where the function gives none."""

    def write(change: Callable[[str, Tensor], Tensor | None]) -> Path:
        with safe_open(checkpoint, "pt") as file:
            state = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        path = tmp_path / "other.safetensors"
        save_file({name: value for name, value in state.items() if value is not None}, path)
        return path

    return write


def refused(comfy: Path, path: Path, match: str) -> None:
    with pytest.raises(CheckpointRefusedError, match=match):
        Denoiser.load(ModelFiles(path), comfy)


def test_a_missing_file_is_named(comfy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing\.safetensors"):
        Denoiser.load(ModelFiles(tmp_path / "nothing.safetensors"), comfy)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_file_of_something_else_is_refused(comfy: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not a model at all, but long enough to have a header")
    refused(comfy, path, "cannot be read")


def test_a_truncated_file_is_refused(comfy: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    with checkpoint.open("rb") as file:
        path.write_bytes(file.read(2_000_000))
    refused(comfy, path, "cannot be read.*copy it again")


def test_a_lora_is_refused(comfy: Path, tmp_path: Path, factors: LoRAFactors) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(factors.state_dict(), path)
    refused(comfy, path, "no diffusion model.*Stable Diffusion 1")


def test_a_checkpoint_without_clip_is_refused(comfy: Path, rewritten: Rewrite) -> None:
    path = rewritten(lambda name, value: None if name.startswith("cond_stage") else value)
    refused(comfy, path, "no text encoder")


def test_another_class_is_refused_with_the_families_that_are_known(
    comfy: Path, rewritten: Rewrite
) -> None:
    def as_sd2(name: str, value: Tensor) -> Tensor | None:
        if name.startswith("cond_stage"):
            return None
        if "attn2.to_k" in name or "attn2.to_v" in name:
            return torch.nn.functional.pad(value, (0, 256))
        if name.endswith(("proj_in.weight", "proj_out.weight")):
            return value[:, :, 0, 0].contiguous()
        return value

    refused(comfy, rewritten(as_sd2), "class SD20.*trains on Stable Diffusion 1")


@pytest.mark.parametrize(
    ("dropped", "what"),
    [("middle_block.0.in_layers.2.weight", "diffusion model"), ("layers.3.mlp.fc1.bias", "text")],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(
    comfy: Path, rewritten: Rewrite, dropped: str, what: str
) -> None:
    path = rewritten(lambda name, value: None if name.endswith(dropped) else value)
    refused(comfy, path, f"lacks 1 of .*{what}.*{dropped}")
