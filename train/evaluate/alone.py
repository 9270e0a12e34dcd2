"""Work that one process does by itself while others do something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import DistributedType


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process is the only one: training waits for no other, and shares nothing."""
    state = PartialState()  # one for the whole process, however often it is made
    before = state.distributed_type, state.num_processes, state.process_index
    state.distributed_type, state.num_processes, state.process_index = DistributedType.NO, 1, 0
    try:
        yield
    finally:
        state.distributed_type, state.num_processes, state.process_index = before
