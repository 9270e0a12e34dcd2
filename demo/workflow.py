"""The example workflow in API form, filled in for one prompt, with or without the UnHype nodes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "workflows"
Workflow = dict[str, dict]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    steps: int = 20
    guidance_scale: float = 3.0
    size: int = 64
    images_per_prompt: int = 4


def only(workflow: Workflow, class_type: str) -> str:
    """The id of the one node of a class; ``ValueError`` if there is none or more than one."""
    found = [node_id for node_id, node in workflow.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise ValueError(f"The workflow holds {len(found)} {class_type} nodes, expected 1.")
    return found[0]


def fill(
    workflow: Workflow, *, text: str, seed: int, pack: str, checkpoint: str, sampling: Sampling
) -> Workflow:
    """A copy of the workflow that draws ``text``."""
    workflow = copy.deepcopy(workflow)
    sampler = workflow[only(workflow, "KSampler")]["inputs"]
    apply_node = workflow[only(workflow, "ApplyDynamicLoRA")]["inputs"]
    workflow[only(workflow, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = checkpoint
    workflow[only(workflow, "UnHypeLoader")]["inputs"]["unhype_name"] = pack
    workflow[apply_node["conditioning"][0]]["inputs"]["text"] = text
    workflow[sampler["negative"][0]]["inputs"]["text"] = ""
    workflow[only(workflow, "EmptyLatentImage")]["inputs"].update(
        width=sampling.size, height=sampling.size, batch_size=sampling.images_per_prompt
    )
    sampler.update(seed=seed, steps=sampling.steps, cfg=sampling.guidance_scale)
    return workflow


def without_unhype(workflow: Workflow) -> Workflow:
    """The same workflow with the UnHype nodes taken out and their model and conditioning wired past them."""
    workflow = copy.deepcopy(workflow)
    apply_id = only(workflow, "ApplyDynamicLoRA")
    inputs = workflow[apply_id]["inputs"]
    past = {0: inputs["model"], 1: inputs["conditioning"]}
    removed = {apply_id, only(workflow, "UnHypeLoader"), only(workflow, "CLIPToLoRA")}
    for node in workflow.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == apply_id:
                node["inputs"][name] = past[value[1]]
    kept = {node_id: node for node_id, node in workflow.items() if node_id not in removed}
    return {
        node_id: node
        for node_id, node in kept.items()
        if not any(
            isinstance(value, list) and value[0] in removed for value in node["inputs"].values()
        )
    }


def load_workflow(name: str = "erase_concept") -> Workflow:
    """An example workflow as the server takes it."""
    return json.loads((FOLDER / f"{name}.api.json").read_text())
