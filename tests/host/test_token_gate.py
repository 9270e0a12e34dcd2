"""Packs whose gate reads every token of a prompt, on the demo world's real text model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unhype.checkpoint import Pack
from unhype.host.embed import EntryEmbeddings, embed_text, read_entry
from unhype.host.generate import generate
from unhype.host.guard import Guard
from unhype.host.tap import DIGEST, TOKENS, VECTORS, tap

from .tiny import make_clip, make_tiny

CAT, DOG = "a photo of a cat", "a photo of a dog"
# Words of one token each; 75 fill a chunk.
WORDS = ("river", "stone", "water", "mountain", "wood", "cloud", "grass", "sand", "hill", "field")
FIRED, SILENT = "fired: cat (1.00)", "nothing fired (nearest: cat 0.00)"


def words(number: int) -> str:
    return " ".join(WORDS[place % len(WORDS)] for place in range(number))


HIDDEN = f"{words(35)} cat {words(35)}"


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


def states(world: Any, text: str) -> Tensor:
    """CLIP-L's states behind the start and up to the first end of a short text, (n, 768), as the host gives them."""
    ids = [token for token, *_ in world.clip.tokenize(text)["l"][0]]
    return world.encode(text)[0][0][0, 1 : ids.index(world.clip.tokenizer.clip_l.end_token) + 1]


@pytest.fixture
def encode(world: Any) -> Callable[[str], list]:
    clip: Any = tap(world.clip, windows=False)
    return lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture
def pack(world: Any, make_pack: Callable) -> Pack:
    """A pack that fires at the token “cat” and at no other, not even the end of a text about cats."""
    pack = make_pack(tokens=True, name="tokens.safetensors")
    yes, no = [states(world, CAT)[4]], [states(world, CAT)[:4], states(world, CAT)[5:]]
    for place in (0, 2, 17, 35, 60):
        text = states(world, f"{words(place)} cat {words(70 - place)}")
        yes.append(text[place])
        no += [text[:place], text[place + 1 :]]
    no += [states(world, DOG), states(world, words(75))]
    teach(pack.gate.layers, torch.stack(yes), torch.cat(no))
    return pack


def teach(layers: nn.Sequential, yes: Tensor, no: Tensor) -> None:
    """A line that is above 0.5 at (n, 768) and below at (m, 768), as a gate's layers."""
    first, last = layers[0], layers[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    vectors = torch.cat([yes, no]).double()
    wanted = torch.cat([torch.ones(len(yes)), torch.zeros(len(no))]).double()
    mean = vectors.mean(0)
    line = torch.linalg.lstsq(
        torch.cat([vectors - mean, torch.ones(len(vectors), 1)], 1), wanted[:, None], driver="gelsd"
    ).solution[:, 0]
    for layer in (first, last):
        nn.init.zeros_(layer.weight)
    first.weight[0] = 40 * line[:-1]
    first.bias[0] = 40 * (line[-1] - line[:-1] @ mean - 0.5)
    last.weight[:, 0] = 2.0
    last.bias.fill_(-8.0)


def read(pack: Pack, conditioning: list) -> EntryEmbeddings:
    found = read_entry(conditioning[0], pack.info.spec.embedding, tokens=True)
    assert found is not None
    return found


def test_every_token_of_every_chunk_is_read(world: Any, encode, pack) -> None:
    parts = [words(75), CAT]
    found = read(pack, encode(" ".join(parts)))
    assert found.complete
    assert found.chunks is not None
    for chunk, part in zip(found.chunks, parts, strict=True):
        torch.testing.assert_close(chunk, states(world, part), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.further, torch.cat(found.chunks).unique(dim=0))
    assert len(found.further) == 76 + 6


def test_a_word_among_seventy_fires_at_its_own_token(world: Any, encode, pack) -> None:
    found = read(pack, encode(HIDDEN))
    reading = pack.gate.read(states(world, HIDDEN))
    assert reading.fired[:, 0].nonzero().tolist() == [[35]]
    assert len(found.further) == 72
    assert generate(pack, encode(HIDDEN)).report() == FIRED
    assert generate(pack, encode(words(75))).report() == SILENT
    (generated,) = generate(pack, encode(HIDDEN)).entries
    wanted = pack.hypernetwork.generate(states(world, HIDDEN)[35:36])
    torch.testing.assert_close(generated.factors.delta(0), wanted.delta(0), atol=1e-5, rtol=1e-3)


def test_it_is_not_the_end_that_fires(world: Any, encode, pack) -> None:
    assert not pack.gate.read(world.pooled(CAT)[None]).open.any()
    assert generate(pack, encode(CAT)).report() == FIRED


def test_the_plain_nodes_states_are_read(world: Any, pack) -> None:
    found = read(pack, world.encode(HIDDEN))
    assert torch.equal(found.rows[0], states(world, HIDDEN))
    assert not found.complete
    assert generate(pack, world.encode(HIDDEN)).report() == FIRED
    assert generate(pack, world.encode(words(75))).report() == SILENT


def test_the_plain_nodes_later_chunks_are_read_with_their_padding(world: Any, pack) -> None:
    ((cond, extras),) = world.encode(f"{words(75)} {CAT}")
    found = read(pack, [[cond, extras]])
    wanted = torch.cat([states(world, words(75)), cond[0, 78:]])
    torch.testing.assert_close(found.rows[0], wanted, atol=1e-4, rtol=1e-4)
    assert generate(pack, [[cond, extras]]).report() == FIRED
    # A first chunk that is short is read up to its end, which the pooled vector shows.
    joined = torch.cat([world.encode(DOG)[0][0], world.encode(CAT)[0][0]], dim=1)
    found = read(pack, [[joined, world.encode(DOG)[0][1]]])
    assert torch.equal(found.rows[0], torch.cat([states(world, DOG), joined[0, 78:]]))


def test_several_rows_are_read_one_by_one(world: Any, pack) -> None:
    both = [world.encode(text)[0] for text in (DOG, f"{words(3)} cat")]
    cond = torch.cat([entry[0] for entry in both])
    pooled = torch.cat([entry[1]["pooled_output"] for entry in both])
    found = read(pack, [[cond, {"pooled_output": pooled}]])
    assert found.rows.shape == (2, 6, 768)
    assert torch.equal(found.rows[1, :5], states(world, f"{words(3)} cat"))
    assert not found.rows[1, 5:].any()
    (generated,) = generate(pack, [[cond, {"pooled_output": pooled}]]).entries
    assert generated.reading.fired[:, 0].tolist() == [False, True]
    assert generated.factors.active.tolist() == [False, True]


def test_states_that_are_not_final_are_read_through_a_tap_only(comfy: Any, pack) -> None:
    clip = make_clip(make_tiny("SD15"))  # the demo world's has one layer alone
    skipped = clip.clone()
    skipped.clip_layer(-2)
    final, plain, tapped = (
        c.encode_from_tokens_scheduled(c.tokenize(CAT)) for c in (clip, skipped, tap(skipped))
    )
    assert not torch.equal(plain[0][0], final[0][0])
    assert torch.equal(read(pack, plain).rows, plain[0][1]["pooled_output"])
    torch.testing.assert_close(tapped[0][1][TOKENS], final[0][0][0, 1:7])
    wide = [[torch.randn(1, 77, 2048), plain[0][1]]]
    assert torch.equal(read(pack, wide).rows, plain[0][1]["pooled_output"])


def test_weights_and_typed_ends_hide_no_token(world: Any, encode, pack) -> None:
    (weighted,) = encode("a photo of a (cat:0.3)")
    torch.testing.assert_close(weighted[1][TOKENS][:6], states(world, CAT))
    for text in (f"{DOG} <|endoftext|> {CAT}", f"({words(20)}:1.3) a (cat:0.5)"):
        assert generate(pack, encode(text)).report() == FIRED


@pytest.mark.parametrize("windows", [True, False])
def test_strong_words_alone_are_read_even_where_they_are_a_window(
    world: Any, windows: bool
) -> None:
    clip: Any = tap(world.clip, windows=windows)
    text = clip.tokenize(f"({words(4)}:1.4) {words(20)}")
    (entry,) = clip.encode_from_tokens_scheduled(text)
    apart = (entry[1][TOKENS] - world.pooled(words(4))).abs().amax(1)
    assert apart.min() < 1e-4


def test_joined_and_averaged_prompts(comfy: Any, encode, pack) -> None:
    import nodes

    join = nodes.NODE_CLASS_MAPPINGS["ConditioningConcat"]().concat
    average = nodes.NODE_CLASS_MAPPINGS["ConditioningAverage"]().addWeighted
    cat, dog, hidden = (encode(text) for text in (CAT, DOG, HIDDEN))
    for first, second, wanted in (
        (dog, cat, [False, True]),
        (hidden, dog, [True, False]),
        (join(dog, hidden)[0], dog, [False, True, False]),
    ):
        joined = join(first, second)[0]
        assert read(pack, joined).complete
        (generated,) = generate(pack, joined).entries
        assert generated.chunks is not None
        assert generated.chunks.active.tolist() == wanted
    mixed = average(dog, hidden, 0.5)[0]
    assert read(pack, mixed).complete
    assert read(pack, mixed).chunks is None
    assert generate(pack, mixed).report() == FIRED
    assert generate(pack, join(dog, dog)[0]).report() == SILENT


def test_a_text_connected_with_its_clip_is_read_alike(world: Any, encode, pack) -> None:
    spec = pack.info.spec.embedding
    vectors = embed_text(world.clip, HIDDEN, spec, tokens=True)
    assert torch.equal(vectors, encode(HIDDEN)[0][1][TOKENS])
    silent = [[torch.randn(1, 77, 768), {}]]
    assert generate(pack, silent, clip=world.clip, text=HIDDEN).report() == FIRED


def test_the_guard_of_such_a_pack_reads_tokens_and_no_windows(world: Any, pack) -> None:
    from unhype.host.apply import guard_model

    model, clip = guard_model(world.model, world.clip, Guard(pack, strict=True))
    (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(HIDDEN))
    assert len(entry[1][VECTORS]) == 1
    conds = {"positive": [{**entry[1], "cross_attn": entry[0]}]}
    assert Guard(pack, strict=True).cover(conds)["positive"][0].get("unhype")
    assert model is not world.model


def test_two_guards_of_which_one_needs_windows(world: Any, make_pack, pack) -> None:
    from unhype.host.apply import guard_model

    pooled = make_pack(fires=(CAT, words(75)))
    model, light = guard_model(world.model, world.clip, Guard(pack))
    _, both = guard_model(model, light, Guard(pooled, strict=True))
    conds = []
    # One at a time: the states are the same, and are found by content.
    for clip in (light, both):
        (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(HIDDEN))
        conds.append({"positive": [{**entry[1], "cross_attn": entry[0]}]})
    assert len(conds[1]["positive"][0][VECTORS]) > 1
    assert DIGEST in conds[1]["positive"][0]
    for guard in (Guard(pack, strict=True), Guard(pooled, strict=True)):
        guard.cover(conds[1])
    Guard(pack, strict=True).cover(conds[0])
    with pytest.raises(ValueError, match="only in part"):
        Guard(pooled, strict=True).cover(conds[0])
