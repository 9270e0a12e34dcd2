"""UnHypeInspect."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..unhype.checkpoint import Pack
from ..unhype.host import report
from ..unhype.host.generate import generate
from .types import CATEGORY, UnHype

METADATA = "unhype"
"""Of what fired, among the texts that ComfyUI writes into a PNG."""


class UnHypeInspect(io.ComfyNode):
    """What a pack makes of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnHypeInspect",
            display_name="UnHype Inspect",
            category=CATEGORY,
            description="Shows what a pack makes of a prompt: how surely each concept is asked for, what fired, and how much every layer would change. With images on their way to Save Image, what fired is written into the files too.",
            inputs=[
                UnHype.Input("unhype", tooltip="Pack from UnHype Loader."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Prompt, encoded. Or give clip and text.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="CLIP to read the text with."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompt to read with clip, all of it.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of this prompt, on their way to Save Image: they pass through, and what fired goes into their metadata.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="Gate values and changes, as text."
                ),
                io.String.Output(display_name="json", tooltip="The same as JSON."),
                io.Image.Output(
                    display_name="chart", tooltip="The same as bars, one picture an entry."
                ),
                io.Image.Output(display_name="images", tooltip="The pictures that came in."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        unhype: Pack,
        conditioning: io.Conditioning.Type | None = None,
        clip: io.Clip.Type | None = None,
        text: str = "",
        images: io.Image.Type | None = None,
    ) -> io.NodeOutput:
        if conditioning is None and not text.strip():
            raise ValueError(
                "UnHype Inspect has nothing to read. Connect a conditioning, or a CLIP and a text."
            )
        # A prompt alone is an entry whose states carry nothing.
        lora = generate(unhype, conditioning or [[None, {}]], clip=clip, text=text)
        figures = report.to_json(lora)
        if cls.hidden.extra_pnginfo is not None:
            cls.hidden.extra_pnginfo[METADATA] = {
                "pack": figures["pack"],
                "fired": [entry["fired"] for entry in figures["entries"]],
            }
        return io.NodeOutput(
            report.to_text(lora), json.dumps(figures, indent=1), report.to_chart(lora), images
        )
