"""CLIPToLoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..unhype.checkpoint import Pack
from ..unhype.host.generate import generate
from .types import CATEGORY, UnHype, UnHypeLoRA


class CLIPToLoRA(io.ComfyNode):
    """A conditioning to the LoRA that a pack writes for it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPToLoRA",
            display_name="CLIP to LoRA",
            category=CATEGORY,
            description="Reads what a prompt asks for and writes the LoRA that erases the pack's concepts from it; nothing if none is asked for.",
            inputs=[
                UnHype.Input("unhype", tooltip="Pack from UnHype Loader."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="Positive prompt, encoded. Each of its entries gets a LoRA of its own.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With text: reads every 77 tokens of it, so that nothing hides at the end of a long prompt.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The prompt once more, for clip. The 77 tokens that fire most strongly decide. Empty: only the conditioning counts.",
                ),
            ],
            outputs=[
                UnHypeLoRA.Output(
                    display_name="unhype_lora",
                    tooltip="LoRA of every entry, for ApplyDynamicLoRA.",
                ),
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="LoRA of the first entry, for ComfyUI's own LoRA nodes; without effect if nothing fired.",
                ),
                io.String.Output(
                    display_name="fired",
                    tooltip="Which concepts fired and how surely, a line for each entry.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        unhype: Pack,
        conditioning: io.Conditioning.Type,
        clip: io.Clip.Type | None = None,
        text: str = "",
    ) -> io.NodeOutput:
        lora = generate(unhype, conditioning, clip=clip, text=text)
        return io.NodeOutput(lora, lora.state_dict(), lora.report())
