"""Long prompts are read in windows too, on the demo world's real text model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unhype.host import tap as tapping
from unhype.host.embed import EntryEmbeddings, embed_text, read_entry
from unhype.host.generate import generate
from unhype.host.tap import CHUNKS, LONG, VECTORS, tap

CAT = "a photo of a cat"
# Words of one token each; 75 fill a chunk.
WORDS = ("river", "stone", "water", "mountain", "wood", "cloud", "grass", "sand", "hill", "field")


def words(number: int) -> str:
    return " ".join(WORDS[place % len(WORDS)] for place in range(number))


HIDDEN = f"{words(35)} {CAT} {words(35)}"


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def encode(world: Any) -> Callable[[str], list]:
    clip: Any = tap(world.clip)
    return lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture
def pack(make_pack: Callable) -> Any:
    return make_pack(fires=(CAT, words(75)))


def chunks_that_get_a_lora(pack: Any, conditioning: list) -> list[bool]:
    (generated,) = generate(pack, conditioning).entries
    assert generated.chunks is not None
    return generated.chunks.active.tolist()


def read(pack: Any, conditioning: list) -> EntryEmbeddings:
    found = read_entry(conditioning[0], pack.info.spec.embedding)
    assert found is not None
    return found


def test_a_concept_among_seventy_words_fires(world: Any, encode, pack) -> None:
    assert generate(pack, world.encode(HIDDEN)).report().startswith("nothing fired")
    assert generate(pack, encode(HIDDEN)).report() == "fired: cat (1.00)"
    assert generate(pack, encode(words(75))).report().startswith("nothing fired")


def test_the_lora_is_written_for_the_window_that_fires_most_surely(encode, pack) -> None:
    vectors = encode(HIDDEN)[0][1][VECTORS]
    surest = vectors[pack.read(vectors).probability[:, 0].argmax()]
    (generated,) = generate(pack, encode(HIDDEN)).entries
    assert torch.equal(generated.factors.delta(0), pack.generate(surest[None]).factors.delta(0))


def test_short_prompts_are_read_as_one_vector(world: Any, encode) -> None:
    for text in (CAT, words(LONG), f"{words(6)} {CAT}"):
        plain, (entry,) = world.encode(text), encode(text)
        assert torch.equal(entry[1][VECTORS], plain[0][1]["pooled_output"].float())
        assert entry[1][CHUNKS] == (0,)
    assert len(encode(words(LONG + 1))[0][1][VECTORS]) > 1


def test_a_text_connected_with_its_clip_is_read_alike(world: Any, encode, pack) -> None:
    vectors = embed_text(world.clip, HIDDEN, pack.info.spec.embedding)
    assert torch.equal(vectors, encode(HIDDEN)[0][1][VECTORS])
    lora = generate(pack, world.encode(HIDDEN), clip=world.clip, text=HIDDEN)
    assert lora.report() == "fired: cat (1.00)"


def test_vectors_stay_with_their_77_tokens(world: Any, encode, pack) -> None:
    found = read(pack, encode(f"{words(75)} {HIDDEN}"))
    assert found.chunks is not None
    own = torch.stack([chunk[0] for chunk in found.chunks])
    alone = torch.stack([world.pooled(words(75)), world.pooled(HIDDEN)])
    torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)
    assert all(len(chunk) > 1 for chunk in found.chunks)


def test_the_77_tokens_with_the_window_that_fires_get_the_lora(encode, pack) -> None:
    for text, wanted in (
        (f"{words(75)} {HIDDEN}", [False, True]),
        (f"{HIDDEN} {words(75)}", [True, False]),
        (f"{HIDDEN} {CAT}", [True, True]),
        (f"{words(150)} {words(8)} {CAT}", [False, False, True]),
        (words(150), [False, False]),
    ):
        assert chunks_that_get_a_lora(pack, encode(text)) == wanted


def test_joined_prompts_keep_their_windows(comfy: Any, encode, pack) -> None:
    nodes: Any = importlib.import_module("nodes")
    join = nodes.NODE_CLASS_MAPPINGS["ConditioningConcat"]().concat
    long, short, plain = encode(HIDDEN), encode("a hill"), encode(CAT)
    assert chunks_that_get_a_lora(pack, join(short, long)[0]) == [False, True]
    assert chunks_that_get_a_lora(pack, join(long, plain)[0]) == [True, True]
    assert chunks_that_get_a_lora(pack, join(join(long, short)[0], long)[0]) == [True, False, True]
    mixed = nodes.NODE_CLASS_MAPPINGS["ConditioningAverage"]().addWeighted(short, long, 0.5)[0]
    assert read(pack, mixed).chunks is None
    assert generate(pack, mixed).report() == "fired: cat (1.00)"


def test_windows_are_what_the_host_makes_of_them(world: Any, encode, monkeypatch) -> None:
    vectors = encode(HIDDEN)[0][1][VECTORS]
    wanted = torch.stack([world.pooled(text) for text in ("photo of a cat", "a cat river stone")])
    for vector in wanted:
        assert (vectors - vector).abs().amax(1).min() < 1e-4
    monkeypatch.setattr(tapping, "MOST_AT_ONCE", 3)
    torch.testing.assert_close(encode(HIDDEN)[0][1][VECTORS], vectors, atol=1e-4, rtol=1e-4)


def test_a_text_model_of_another_form_reads_windows_as_it_can(
    world: Any, encode, monkeypatch
) -> None:
    vectors = encode(HIDDEN)[0][1][VECTORS]
    monkeypatch.setattr(world.clip.cond_stage_model.clip_l, "enable_attention_masks", True)
    torch.testing.assert_close(encode(HIDDEN)[0][1][VECTORS], vectors, atol=1e-4, rtol=1e-4)


def test_learned_embeddings_are_read_in_windows(world: Any) -> None:
    clip: Any = tap(world.clip)
    (chunk,) = clip.tokenize(HIDDEN)["l"]
    (cat,) = [token for token, _ in clip.tokenize("cat")["l"][0][1:2]]
    table: Tensor = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    learned = [(table[cat].float() if token == cat else token, weight) for token, weight in chunk]
    (known, hidden) = (
        clip.cond_stage_model.encode_token_weights({"l": [tokens]})[2][VECTORS]
        for tokens in (chunk, learned)
    )
    torch.testing.assert_close(hidden, known, atol=1e-4, rtol=1e-4)
