"""Socket types of the pack, and what all its nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "unhype"

UnHype = io.Custom("UNHYPE")
"""A loaded pack."""
UnHypeLoRA = io.Custom("UNHYPE_LORA")
"""LoRA factors, one set for each entry of a conditioning."""


def effect_inputs() -> list[io.Float.Input]:
    """How strongly a LoRA acts, and in which part of sampling."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How strongly to erase: 0 not at all, exactly as without the node; 1 as trained.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of sampling after which the LoRA acts. 0: from the first step.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of sampling after which it no longer acts. 1: to the last step.",
        ),
    ]
