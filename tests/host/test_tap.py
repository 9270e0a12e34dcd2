"""What a tapped CLIP says of prompts, on every family's real text models; CLIP-G and T5 have few layers of random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unhype.families import family
from unhype.host.embed import embed_text, read_entry
from unhype.host.tap import (
    CHUNKS,
    DIGEST,
    LEDGER,
    TOKEN_CHUNKS,
    TOKENS,
    VECTORS,
    WHOLE,
    WINDOWED,
    Heard,
    Ledger,
    Placed,
    tap,
)

SMALL_G = {"num_hidden_layers": 3, "intermediate_size": 64}
SMALL_T5 = {"d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1}
SMALL_L = {"num_hidden_layers": 3, "intermediate_size": 64}
CAT, DOG = "a photo of a cat", "a photo of a dog"


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


def text_models(name: str) -> tuple[Any, Any]:
    """The host's text model class and tokenizer of a family."""
    import comfy.sdxl_clip
    from comfy.text_encoders import flux, sd3_clip

    return {
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "sd3": (sd3_clip.sd3_clip(), sd3_clip.SD3Tokenizer),
        "flux": (flux.flux_clip(), flux.FluxTokenizer),
    }[name]


@pytest.fixture(scope="module", params=["sdxl", "sd3", "flux"])
def loaded(request: pytest.FixtureRequest, comfy: Any) -> tuple[str, Any]:
    """A family's name and a CLIP of it."""
    import comfy.sd

    class Target:
        params: dict[str, Any] = {}  # noqa: RUF012
        clip, tokenizer = text_models(request.param)

    options = {"clip_g_model_config": SMALL_G, "t5xxl_model_config": SMALL_T5}
    clip = comfy.sd.CLIP(
        Target, model_options={**options, "clip_l_model_config": SMALL_L, "dtype": torch.float32}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in clip.cond_stage_model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return request.param, clip


@pytest.fixture
def clip(loaded: tuple[str, Any]) -> Any:
    return tap(loaded[1])


def vector(clip: Any, text: str) -> Tensor:
    """CLIP-L's state at the end of a short text, (768,), asked of CLIP-L itself."""
    reader = clip.cond_stage_model.clip_l
    chunk = clip.tokenize(text)["l"][0]
    reader.set_clip_options({"projected_pooled": False})
    pooled = reader.encode([[token for token, _ in chunk]])[1]
    reader.reset_clip_options()
    return pooled[0].float()


def tokens(clip: Any, text: str) -> Tensor:
    """CLIP-L's final states behind the start and up to the first end of a short text, (n, 768), asked of CLIP-L itself."""
    reader = clip.cond_stage_model.clip_l
    ids = [token for token, *_ in clip.tokenize(text)["l"][0]]
    reader.set_clip_options({"layer": None})
    states = reader.encode([ids])[0]
    reader.reset_clip_options()
    return states[0, 1 : ids.index(clip.tokenizer.clip_l.end_token) + 1].float()


def encode(clip: Any, **texts: str) -> list:
    """Encode with separate texts for the text models, as CLIPTextEncodeSDXL, -SD3 and -Flux do; ``rest`` is for those unnamed."""
    rest = clip.tokenize(texts.pop("rest", ""))
    tokens = {**rest, **{name: clip.tokenize(text)[name] for name, text in texts.items()}}
    return clip.encode_from_tokens_scheduled(tokens)


def holds(entry: list, wanted: Tensor) -> bool:
    return any(torch.allclose(row, wanted, atol=1e-4) for row in entry[1][VECTORS])


def holds_tokens(entry: list, wanted: Tensor) -> bool:
    apart = (wanted[:, None] - entry[1][TOKENS]).abs().amax(2)
    return bool((apart.amin(1) < 1e-4).all())


def test_encoding_is_unchanged(loaded: tuple[str, Any], clip: Any) -> None:
    plain, tapped = (c.encode_from_tokens_scheduled(c.tokenize(CAT))[0] for c in (loaded[1], clip))
    assert torch.equal(plain[0], tapped[0])
    assert torch.equal(plain[1]["pooled_output"], tapped[1]["pooled_output"])
    told = {VECTORS, CHUNKS, TOKENS, TOKEN_CHUNKS, WINDOWED, DIGEST}
    assert plain[1].keys() | told == tapped[1].keys()


def test_one_text_for_all_gives_one_vector(clip: Any) -> None:
    entry = encode(clip, rest=CAT)[0]
    assert entry[1][VECTORS].shape == (1, 768)
    assert holds(entry, vector(clip, CAT))


def test_what_only_another_text_model_was_given_is_read(clip: Any) -> None:
    for name in clip.tokenize(CAT):
        for other in ("", DOG):
            entry = encode(clip, rest=other, **{name: CAT})[0]
            assert holds(entry, vector(clip, CAT)), name
            assert holds(entry, vector(clip, other)), name


def test_what_stands_behind_a_typed_end_is_read(loaded: tuple[str, Any], clip: Any) -> None:
    ends = {"l": "<|endoftext|>", "g": "<|endoftext|>", "t5xxl": "</s>"}
    for name in clip.tokenize(CAT):
        entry = encode(clip, **{name: f"{DOG} {ends[name]} {CAT}"})[0]
        joined = f"{DOG} {CAT}"
        assert holds(entry, vector(clip, CAT)) or holds(entry, vector(clip, joined)), name


def test_all_of_a_long_text_is_read(clip: Any) -> None:
    long = "river " * 75
    for name in clip.tokenize(CAT):
        entry = encode(clip, **{name: long + CAT})[0]
        assert holds(entry, vector(clip, CAT)), name


def test_every_token_of_a_text_is_told(clip: Any) -> None:
    (entry,) = encode(clip, rest=CAT)
    torch.testing.assert_close(entry[1][TOKENS], tokens(clip, CAT), atol=1e-4, rtol=1e-4)
    assert entry[1][TOKEN_CHUNKS] == (0,) * 6  # five words and the end
    assert torch.equal(entry[1][TOKENS][-1:], entry[1][VECTORS])
    assert not holds_tokens(entry, tokens(clip, DOG))


def test_every_token_of_what_else_is_read_is_told(clip: Any) -> None:
    long = "river " * 75
    for name in clip.tokenize(CAT):
        for text, parts in ((CAT, (CAT,)), (long + CAT, (long, CAT))):
            (entry,) = encode(clip, rest=DOG, **{name: text})
            for part in (*parts, *(() if name == "l" else (DOG,))):
                assert holds_tokens(entry, tokens(clip, part)), (name, part)


def test_windows_add_no_tokens_and_can_be_left_out(loaded: tuple[str, Any], clip: Any) -> None:
    light = tap(loaded[1], windows=False)
    long = "river stone water mountain wood cloud grass sand " * 12
    for name in clip.tokenize(CAT):
        (full,), (short,) = (encode(c, rest=DOG, **{name: long}) for c in (clip, light))
        assert torch.equal(short[0], full[0])
        assert torch.equal(short[1][TOKENS], full[1][TOKENS])
        assert len(short[1][VECTORS]) < len(full[1][VECTORS])
        assert (short[1][WINDOWED], full[1][WINDOWED]) == (False, True)


def test_windows_are_read_as_soon_as_one_asks_for_them(loaded: tuple[str, Any]) -> None:
    light = tap(loaded[1], windows=False)
    both = tap(light)
    assert tap(light, windows=False) is light
    assert tap(both, windows=False) is both
    (entry,) = encode(both, rest="river stone water mountain " * 5)
    assert entry[1][WINDOWED]
    (entry,) = encode(light, rest=CAT)
    assert entry[1][WINDOWED]


def test_windows_of_a_long_text_are_read(clip: Any) -> None:
    words = ("river", "stone", "water", "mountain", "wood", "cloud", "grass", "sand")
    for name in clip.tokenize(CAT):
        entry = encode(clip, **{name: " ".join(words * 5)})[0]
        assert holds(entry, vector(clip, "water mountain wood cloud")), name
        assert holds(entry, vector(clip, " ".join(words[4:] + words[:4]))), name


def test_the_family_reads_it_from_the_conditioning(loaded: tuple[str, Any], clip: Any) -> None:
    spec = family(loaded[0]).embedding
    found = read_entry(encode(clip, rest=CAT)[0], spec)
    assert found is not None
    assert found.complete
    assert torch.allclose(found.rows[0], vector(clip, CAT), atol=1e-4)
    (plain,) = loaded[1].encode_from_tokens_scheduled(loaded[1].tokenize(DOG))
    without = read_entry(plain, spec)
    assert (without is None) == (spec.pooled_width is None)
    assert without is None or not without.complete


def test_a_text_is_read_through_a_clip_that_is_not_tapped(loaded: tuple[str, Any]) -> None:
    name, clip = loaded
    vectors = embed_text(clip, CAT, family(name).embedding)
    assert torch.allclose(vectors[0], vector(clip, CAT), atol=1e-4)


def test_hook_schedules_are_found_by_content(clip: Any) -> None:
    # That path of the host keeps the pooled output alone.
    states, extras = encode(clip, rest=CAT)[0]
    LEDGER.remember(states, Heard.told(extras))
    found = LEDGER.find(states.clone())
    assert found is not None
    assert torch.equal(found.ends.vectors, extras[VECTORS])
    assert torch.equal(found.tokens.vectors, extras[TOKENS])


def test_a_clip_without_clip_l_is_refused(comfy: Any) -> None:
    class Stage:
        clip_l = None

    class Clip:
        cond_stage_model = Stage()

    with pytest.raises(ValueError, match=r"\(Stage\) has no CLIP-L"):
        tap(Clip())  # pyright: ignore[reportArgumentType]


def heard(vector: Tensor) -> Heard:
    """Of one end (1, 768), and of three tokens."""
    return Heard(Placed(vector, (0,)), Placed(vector.repeat(3, 1), (0,) * 3))


def known(*texts: str) -> tuple[Ledger, dict[str, Tensor], Callable[[str], Tensor]]:
    """A ledger that remembers random states for some texts, the states, and a text's one vector."""
    ledger, generator = Ledger(size=8), torch.Generator().manual_seed(0)
    states = {text: torch.randn(1, 77, 16, generator=generator) for text in texts}

    def mark(text: str) -> Tensor:
        return torch.full((1, 768), float(list(states).index(text)))

    for text in texts:
        ledger.remember(states[text], heard(mark(text)))
    return ledger, states, mark


def test_joined_states_are_cut_back_into_prompts() -> None:
    ledger, states, mark = known("a", "b", "c")
    found = ledger.find(torch.cat([states["c"], states["a"], states["a"]], dim=1))
    assert found is not None
    assert found.ends.vectors.tolist() == torch.cat([mark("c"), mark("a"), mark("a")]).tolist()
    assert found.ends.chunks == (0, 1, 2)
    assert found.tokens.vectors.tolist() == found.ends.vectors.repeat_interleave(3, 0).tolist()
    assert found.tokens.chunks == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    foreign = torch.cat([states["c"], torch.ones(1, 77, 16)], dim=1)
    assert ledger.find(foreign) is None


def test_a_text_read_again_without_windows_keeps_those_it_has() -> None:
    _, states, mark = known("a")
    ledger, vector, text = Ledger(), mark("a"), Placed(mark("a").repeat(3, 1), (0,) * 3)
    windows = Placed(torch.cat([vector, vector + 1]), (0, 0))
    for ends, windowed, wanted in (
        (Placed(vector, (0,)), False, 1),
        (windows, True, 2),
        (Placed(vector, (0,)), False, 2),
    ):
        ledger.remember(states["a"], Heard(ends, text, windowed))
        found = ledger.find(states["a"])
        assert found is not None
        assert len(found.ends.vectors) == wanted


def test_mixed_states_are_taken_apart() -> None:
    ledger, states, mark = known("a", "b", "c", "d")
    found = ledger.find(0.7 * states["b"] + 0.29 * states["d"] + 0.01 * states["a"])
    assert found is not None
    assert found.ends.vectors.tolist() == torch.cat([mark("b"), mark("d")]).tolist()
    assert set(found.ends.chunks) == set(found.tokens.chunks) == {WHOLE}
    assert ledger.find(0.5 * states["b"] + 0.5 * torch.randn(1, 77, 16)) is None


def test_many_small_shares_count_together() -> None:
    ledger, states, _ = known(*"abcdefgh")
    ledger.remember(torch.full((1, 77, 16), torch.inf), heard(torch.zeros(1, 768)))
    small = sum(0.04 * states[name] for name in "bcdefgh")
    found = ledger.find(0.72 * states["a"] + small)
    assert found is not None
    assert len(found.ends.vectors) == 7


def test_states_that_are_not_finite_are_no_mixture() -> None:
    ledger, _, _ = known("a", "b")
    assert ledger.find(torch.full((1, 77, 16), torch.nan)) is None


def test_the_oldest_prompts_are_forgotten() -> None:
    ledger, states, _ = known(*"abcdefghij")
    assert ledger.find(states["a"]) is None
    assert ledger.find(states["j"]) is not None
