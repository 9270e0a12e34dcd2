"""The processes that accelerate started, each with a device of its own."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState

from unhype.host.locate import has_accelerator

from .config import ConfigError

STARTED = "LOCAL_WORLD_SIZE"
"""Of the environment: how many processes run on this machine."""


def share_work(**options: Any) -> PartialState:
    """This process among all that share the work; options are those of ``PartialState``.

    Raises:
        ConfigError: there are more of them than GPUs.
    """
    started = int(os.environ.get(STARTED, "1"))
    if torch.cuda.is_available() and started > (there := torch.cuda.device_count()):
        raise ConfigError(
            f"{started} processes were started for {there} GPU{'s' if there > 1 else ''}. Give accelerate launch --num_processes {there}; "
            "one process fills its GPU."
        )
    return PartialState(cpu=not has_accelerator(), **options)
