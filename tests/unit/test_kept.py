"""What is kept of earlier steps, and when it is not given out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unhype.host.kept import STALE, TRIES, KeptResults, Record

FIRST, OTHER = nn.Linear(2, 2), nn.Linear(2, 2)
TEXT, RESULT = torch.ones(1, 3, 2), torch.full((1, 3, 2), 2.0)
SIZE = 2 * RESULT.nbytes


def step(kept: KeptResults, text: Tensor = TEXT, result: Tensor = RESULT) -> Record:
    """The first layer's part of a step."""
    record = kept.open("key", text, SIZE)
    assert record is not None
    record.check(FIRST, result)
    return record


def full_step(kept: KeptResults, text: Tensor = TEXT) -> bool:
    """A step of both layers; whether the second was spared."""
    record = step(kept, text)
    spared = record.get(OTHER) is not None
    if not spared:
        record.add(OTHER, RESULT * 3)
    return spared


def test_the_same_again_is_given_as_a_copy() -> None:
    kept = KeptResults()
    assert not full_step(kept)
    record = step(kept)
    for _ in range(2):
        result = record.get(OTHER)
        assert result is not None
        assert torch.equal(result, RESULT * 3)
        result.zero_()


def test_another_input_is_seen_even_if_the_first_layer_makes_the_same_of_it() -> None:
    kept = KeptResults()
    full_step(kept)
    assert step(kept, TEXT + 1).get(OTHER) is None
    assert step(kept).get(OTHER) is None, "what is kept is of one input"


def test_an_input_changed_in_place_is_another() -> None:
    kept, text = KeptResults(), TEXT.clone()
    full_step(kept, text)
    text.add_(1)
    assert step(kept, text).get(OTHER) is None


def test_another_result_of_the_first_layer_ends_it() -> None:
    kept = KeptResults()
    full_step(kept)
    assert step(kept, result=RESULT + 1).get(OTHER) is None


def test_a_step_that_never_came_to_the_first_layer_gives_nothing() -> None:
    kept = KeptResults()
    full_step(kept)
    record = kept.open("key", TEXT, SIZE)
    assert record is not None
    assert record.get(OTHER) is None


def test_values_that_are_no_numbers_are_never_the_same() -> None:
    kept, text = KeptResults(), torch.full_like(TEXT, float("nan"))
    for _ in range(TRIES):
        assert not full_step(kept, text)


def test_inputs_of_other_precision_or_size_have_records_of_their_own() -> None:
    kept = KeptResults()
    for text in (TEXT, TEXT.half(), TEXT[:, :1]):
        assert not full_step(kept, text)
    for text in (TEXT, TEXT.half(), TEXT[:, :1]):
        assert full_step(kept, text)


def test_there_is_room_for_so_much() -> None:
    kept = KeptResults(room=SIZE + 1)
    assert full_step(kept) is False
    assert kept.open("other", TEXT, SIZE) is None
    assert full_step(kept), "the first is still there"


def test_a_record_takes_no_more_than_it_said() -> None:
    kept, third = KeptResults(), nn.Linear(2, 2)
    full_step(kept)
    record = step(kept)
    record.add(third, RESULT)
    assert record.get(third) is None
    record.add(OTHER, RESULT)
    assert record.get(OTHER) is not None, "another result takes the place of the first"


def test_what_nobody_asks_for_any_more_makes_room() -> None:
    kept = KeptResults(room=SIZE)
    full_step(kept)
    for _ in range(STALE):
        assert kept.open("other", TEXT, SIZE) is None
    record = kept.open("other", TEXT, SIZE)
    assert record is not None


def test_after_tries_in_vain_nothing_is_kept() -> None:
    kept = KeptResults(room=SIZE)
    for number in range(TRIES + 1):
        assert not full_step(kept, TEXT + number)
    assert kept.open("key", TEXT, SIZE) is None
    assert kept.open("other", TEXT, SIZE) is not None, "all room is free"


def test_one_success_gives_new_tries() -> None:
    kept = KeptResults()
    for number in range(3 * TRIES):
        assert not full_step(kept, TEXT + number)
        assert full_step(kept, TEXT + number)
