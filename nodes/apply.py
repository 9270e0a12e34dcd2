"""ApplyDynamicLoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..unhype.host.apply import apply
from ..unhype.host.generate import DynamicLoRA
from .types import CATEGORY, UnHypeLoRA, effect_inputs


class ApplyDynamicLoRA(io.ComfyNode):
    """A LoRA onto the conditioning that it was written for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyDynamicLoRA",
            display_name="Apply Dynamic LoRA",
            category=CATEGORY,
            description="Attaches the LoRA to its own conditioning: other prompts, the negative prompt and the model's weights stay as they are.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model of the family that the pack was trained on. Other LoRA on it keep working.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The same conditioning that CLIPToLoRA read.",
                ),
                UnHypeLoRA.Input("unhype_lora", tooltip="LoRA from CLIPToLoRA."),
                *effect_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For the sampler, together with the conditioning.",
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="For the sampler's positive input, together with the model.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        conditioning: io.Conditioning.Type,
        unhype_lora: DynamicLoRA,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        result = apply(
            model,
            conditioning,
            unhype_lora,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
        )
        return io.NodeOutput(*result)
