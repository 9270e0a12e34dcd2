"""Prompts encoded from the embeddings of their tokens, for attacks on an eraser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unhype.host.denoise import Denoiser, ModelFiles
from unhype.host.text import TextEncoder

from .tiny import Tiny, make_clip, make_tiny

TEXTS = ["", "a cat", "the dogs are running over the snow, a photo"]


@pytest.fixture(scope="module")
def denoiser(comfy: Path, checkpoint: Path) -> Denoiser:
    return Denoiser.load(ModelFiles(checkpoint), comfy)


@pytest.fixture(scope="module")
def encoder(comfy: Path) -> TextEncoder:
    """Three random layers, all of which matter."""
    return TextEncoder(make_clip(make_tiny("SD15")))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_unchanged_embeddings_give_what_embed_gives(denoiser: Denoiser) -> None:
    tokens = denoiser.token_embeddings(TEXTS)
    got = denoiser.encode_embeddings(tokens.embeddings, tokens.ends)
    expected = denoiser.embed(TEXTS)
    assert got.cross.shape == (3, 77, 768)
    assert relative_error(got.cross, expected.cross) <= 1e-5
    assert relative_error(got.pooled, expected.pooled) <= 1e-5
    assert relative_error(got.read, expected.read) <= 1e-5
    assert torch.equal(got.pooled, got.host_pooled)


@pytest.mark.parametrize("layer", ["last", "hidden"])
def test_every_layer_counts_and_the_hosts_choice_of_layer_too(
    encoder: TextEncoder, layer: str
) -> None:
    reader = encoder.reader
    before = reader.options_default
    reader.options_default = (layer, None if layer == "last" else -2, *before[2:])
    try:
        expected, tokens = encoder.embed(TEXTS), encoder.token_embeddings(TEXTS)
        got = encoder.encode_embeddings(tokens.embeddings, tokens.ends)
    finally:
        reader.options_default = before
        reader.reset_clip_options()
    assert relative_error(got.cross, expected.cross) <= 1e-5
    assert relative_error(got.pooled, expected.pooled) <= 1e-5


def test_fewer_tokens_give_the_same_vectors(encoder: TextEncoder) -> None:
    tokens = encoder.token_embeddings(TEXTS)
    longest = int(tokens.ends.max()) + 1
    short = encoder.encode_embeddings(tokens.embeddings[:, :longest], tokens.ends)
    whole = encoder.encode_embeddings(tokens.embeddings, tokens.ends)
    assert relative_error(short.pooled, whole.pooled) <= 1e-5
    assert relative_error(short.cross, whole.cross[:, :longest]) <= 1e-5


def test_the_gradient_agrees_with_finite_differences(encoder: TextEncoder) -> None:
    tokens = encoder.token_embeddings(["a cat on a table"])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tokens.embeddings.shape, generator=generator)
    reading = torch.randn(768, generator=generator)

    def read(share: float) -> Tensor:
        text = encoder.encode_embeddings(tokens.embeddings + share * direction, tokens.ends)
        return (text.pooled @ reading + text.cross[:, 3] @ reading).sum()

    moved = tokens.embeddings.clone().requires_grad_()
    text = encoder.encode_embeddings(moved, tokens.ends)
    (text.pooled @ reading + text.cross[:, 3] @ reading).sum().backward()
    assert moved.grad is not None
    slope = float((moved.grad * direction).sum())
    with torch.no_grad():
        wanted = float(read(0.02) - read(-0.02)) / 0.04
    assert slope == pytest.approx(wanted, rel=0.01)
    assert all(p.grad is None for p in encoder.reader.parameters())


def test_tokens_are_rows_of_the_vocabulary_and_spell_their_text(denoiser: Denoiser) -> None:
    tokens = denoiser.token_embeddings(TEXTS)
    torch.testing.assert_close(denoiser.vocabulary()[tokens.ids], tokens.embeddings)
    spelled = [" ".join(text.replace(",", " ,").split()) for text in TEXTS]
    assert [" ".join(s.replace(",", " ,").split()) for s in denoiser.spell(tokens.ids)] == spelled
    assert tokens.ends.tolist() == [1, 3, 11]


def test_weights_are_refused(denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match="carry no weights, but '\\(cat:1.3\\)' has some"):
        denoiser.token_embeddings(["a dog", "(cat:1.3)"])


def test_a_model_that_reads_with_more_than_clip_l_is_refused(tiny: Tiny) -> None:
    encoder = TextEncoder(make_clip(tiny))
    if tiny.host_class == "SD15":
        assert len(encoder.token_embeddings(TEXTS)) == len(TEXTS)
        return
    with pytest.raises(ValueError, match="only where CLIP-L is the only one"):
        encoder.token_embeddings(TEXTS)
    with pytest.raises(ValueError, match="only where CLIP-L is the only one"):
        encoder.encode_embeddings(torch.zeros(1, 3, 768), torch.tensor([2]))
