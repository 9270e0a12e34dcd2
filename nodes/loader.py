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
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    optional=True,
                    tooltip="How sure the gate must be that a prompt asks for a concept. Lower erases more and touches more. 0: as the pack was calibrated.",
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
    def fingerprint_inputs(
        cls, unhype_name: str, concepts: str = "", threshold: float = 0.0
    ) -> str:
        return f"{folders.fingerprint(unhype_name)} {concepts} {threshold}"

    @classmethod
    def execute(cls, unhype_name: str, concepts: str = "", threshold: float = 0.0) -> io.NodeOutput:
        pack = checkpoint.load(folders.checkpoint_path(unhype_name))
        names = [name.strip() for name in re.split(r"[,\n]", concepts) if name.strip()]
        if names:
            pack = pack.only(names)
        return io.NodeOutput(pack.at(threshold) if threshold else pack)
