"""UnHypeGuard."""

from __future__ import annotations

from comfy_api.latest import io

from ..unhype.checkpoint import Pack
from ..unhype.host.apply import guard_model
from ..unhype.host.guard import Guard
from .types import CATEGORY, UnHype, effect_inputs

POSITIVE, ALL = "positive", "all"


class UnHypeGuard(io.ComfyNode):
    """A pack over a whole model, whatever prompts reach it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnHypeGuard",
            display_name="UnHype Guard",
            category=CATEGORY,
            description="Erases the pack's concepts from everything that the model draws: each prompt is read when sampling starts, so nothing has to be wired prompt by prompt. Prompts that ask for none of them give the very same pictures as without.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model of the family that the pack was trained on. Other LoRA on it keep working.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="CLIP of the same checkpoint. Encode prompts with the clip that comes out here, so that they can be read in full.",
                ),
                UnHype.Input("unhype", tooltip="Pack from UnHype Loader."),
                *effect_inputs(),
                io.Combo.Input(
                    "conditionings",
                    options=[POSITIVE, ALL],
                    default=POSITIVE,
                    tooltip="positive: negative prompts stay as they are, so that concepts can be avoided with them as usual. all: negative prompts are read too.",
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip="On: a prompt that can't be read in full (not encoded by this node's clip, or changed since) stops the run. Off: a warning in the log.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                io.Clip.Output(display_name="clip", tooltip="For the nodes that encode prompts."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        unhype: Pack,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        conditionings: str = POSITIVE,
        strict: bool = False,
    ) -> io.NodeOutput:
        guard = Guard(
            unhype,
            strength,
            start_percent,
            end_percent,
            strict=strict,
            everywhere=conditionings == ALL,
        )
        return io.NodeOutput(*guard_model(model, clip, guard))
