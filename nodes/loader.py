"""UnHypeLoader."""

from __future__ import annotations

import re

from comfy_api.latest import io

from ..unhype import checkpoint
from ..unhype.host import folders
from .types import CATEGORY, UnHype


class UnHypeLoader(io.ComfyNode):
    """A file of models/unhype to a pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnHypeLoader",
            display_name="UnHype Loader",
            category=CATEGORY,
            description="Loads an UnHype pack: which concepts it erases, and the hypernetwork that writes LoRA against them.",
            inputs=[
                io.Combo.Input(
                    "unhype_name",
                    options=folders.list_checkpoints(),
                    tooltip="Pack in models/unhype. It works on models of the family it was trained on.",
                ),
                io.String.Input(
                    "concepts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Concepts of the pack to erase, separated by commas or lines; the others stay. Empty: all of them.",
                ),
            ],
            outputs=[
                UnHype.Output(display_name="unhype", tooltip="The pack, for CLIPToLoRA."),
            ],
        )

    @classmethod
    def validate_inputs(cls, unhype_name: str | None) -> bool | str:
        return unhype_name is None or folders.find_problem(unhype_name) or True

    @classmethod
    def fingerprint_inputs(cls, unhype_name: str, concepts: str = "") -> str:
        return f"{folders.fingerprint(unhype_name)} {concepts}"

    @classmethod
    def execute(cls, unhype_name: str, concepts: str = "") -> io.NodeOutput:
        pack = checkpoint.load(folders.checkpoint_path(unhype_name))
        names = [name.strip() for name in re.split(r"[,\n]", concepts) if name.strip()]
        return io.NodeOutput(pack.only(names) if names else pack)
