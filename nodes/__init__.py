"""The nodes, for ComfyUI's V3 interface."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyDynamicLoRA
from .clip_to_lora import CLIPToLoRA
from .guard import UnHypeGuard
from .inspect import UnHypeInspect
from .loader import UnHypeLoader


class UnHypeExtension(ComfyExtension):
    """What the pack adds to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [UnHypeLoader, CLIPToLoRA, ApplyDynamicLoRA, UnHypeGuard, UnHypeInspect]
