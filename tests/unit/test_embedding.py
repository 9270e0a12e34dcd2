"""Batches of prompts of different lengths."""

from __future__ import annotations

import torch

from unhype.embedding import cat_prompts, heard, last_heard, until_end

STATES = torch.arange(1.0, 25).view(2, 4, 3)


def test_states_up_to_the_end_leave_out_the_start_and_what_is_behind() -> None:
    read = until_end(STATES, torch.tensor([1, 2]))
    assert read.shape == (2, 2, 3)
    assert torch.equal(read[0, 0], STATES[0, 1])
    assert not read[0, 1].any()
    assert torch.equal(read[1], STATES[1, 1:3])
    assert heard(read).tolist() == [[True, False], [True, True]]


def test_the_last_that_is_heard_is_the_end() -> None:
    ends = torch.tensor([1, 3])
    assert torch.equal(last_heard(until_end(STATES, ends)), STATES[torch.arange(2), ends])


def test_shorter_batches_are_filled_up_with_silence() -> None:
    both = cat_prompts([torch.ones(1, 2, 3), torch.ones(2, 4, 3)])
    assert heard(both).sum(1).tolist() == [2, 4, 4]
    assert cat_prompts([torch.ones(1, 3), torch.ones(2, 3)]).shape == (3, 3)
