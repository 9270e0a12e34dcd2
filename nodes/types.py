"""Socket types of the pack, and what all its nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "unhype"

UnHype = io.Custom("UNHYPE")
"""A loaded pack."""
UnHypeLoRA = io.Custom("UNHYPE_LORA")
"""LoRA factors, one set for each entry of a conditioning."""
