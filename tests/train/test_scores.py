"""From answers to figures: which words count, what is pooled, and where the interval lies."""

from __future__ import annotations

import pytest

from train.evaluate.base import Kind, Question
from train.evaluate.exam import Answer
from train.evaluate.scores import known_words, summarise, wilson


def answer(kind: Kind, *, hit: bool, base: bool = True, text: str = "", word: str = "") -> Answer:
    question = Question(kind, text or f"{kind.value} {word}", ("cat",), word)
    return Answer(
        question,
        hit=hit,
        base_hit=base,
        acts=kind is Kind.TARGET,
        identical=not hit,
        ssim=0.5,
        psnr=20.0,
        distance=0.25,
        other=True if kind is Kind.SCENE else None,
        base_other=True if kind is Kind.SCENE else None,
    )


def test_only_words_the_model_draws_count() -> None:
    answers = [
        answer(Kind.SYNONYM, hit=True, base=True, word="feline"),
        answer(Kind.SYNONYM, hit=False, base=False, word="hare"),
    ]
    assert known_words(answers) == {("cat", "feline")}


def test_words_unknown_to_the_model_do_not_make_erasing_look_better() -> None:
    run = [
        answer(Kind.TARGET, hit=False),
        answer(Kind.UNRELATED, hit=True),
        answer(Kind.SYNONYM, hit=True, word="feline"),
        *[answer(Kind.SYNONYM, hit=False, base=False, word="hare") for _ in range(9)],
    ]
    assert summarise([run]).erased.acc_g == 1.0


def test_known_words_are_those_of_each_run() -> None:
    def run(base: bool) -> list[Answer]:
        return [
            answer(Kind.TARGET, hit=False),
            answer(Kind.UNRELATED, hit=True),
            answer(Kind.SYNONYM, hit=True, base=base, word="feline"),
        ]

    figures = summarise([run(True), run(False)])
    assert figures.base.acc_g == 1.0
    assert figures.pictures == 6


def test_interval_holds_the_value_and_narrows_with_prompts() -> None:
    def figures(prompts: int) -> tuple[float, float, float]:
        run = [answer(Kind.TARGET, hit=i % 4 == 0, text=f"target {i}") for i in range(prompts)] + [
            answer(Kind.UNRELATED, hit=i % 5 != 0, text=f"other {i}") for i in range(prompts)
        ]
        found = summarise([run]).h_o
        return found.low, found.value, found.high

    low, value, high = figures(40)
    assert low < value < high
    narrow = figures(400)
    assert narrow[2] - narrow[0] < (high - low) / 2


def test_pictures_of_one_prompt_are_drawn_together() -> None:
    many_pictures = [
        answer(Kind.TARGET, hit=text == "drawn", text=text)
        for text in ("drawn", "erased")
        for _ in range(100)
    ]
    kept = [answer(Kind.UNRELATED, hit=True, text="other")]
    found = summarise([many_pictures + kept]).acc_e
    assert (found.low, found.high) == (0.0, 1.0)


def test_nothing_asked_gives_no_figure() -> None:
    figures = summarise([[answer(Kind.TARGET, hit=False), answer(Kind.UNRELATED, hit=True)]])
    assert figures.acc_g is None
    assert figures.acc_s_siblings is None
    assert figures.scene_other is None


def test_kept_pictures_alone_tell_likeness() -> None:
    figures = summarise(
        [
            [
                answer(Kind.TARGET, hit=False),
                answer(Kind.UNRELATED, hit=True),
                answer(Kind.PLAIN, hit=False),
            ]
        ]
    )
    assert figures.identical == pytest.approx(0.5)
    assert figures.acts == {"target": 1.0, "unrelated": 0.0, "nothing erased": 0.0}


def test_shares_of_none_and_all_are_no_points() -> None:
    figures = summarise(
        [
            [answer(Kind.TARGET, hit=False, text=f"target {i}") for i in range(10)]
            + [answer(Kind.UNRELATED, hit=True, text=f"other {i}") for i in range(10)]
        ]
    )
    assert figures.acc_e == wilson(0, 10)
    assert figures.acc_s == wilson(10, 10)
