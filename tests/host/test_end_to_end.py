"""The whole path, small: train an eraser, load it in the server, run the example workflow without and with the nodes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from demo.host import make_base
from demo.run import draw, fired_words, make_config
from demo.server import ComfyServer, WorkflowError
from demo.workflow import Sampling, fill, load_workflow, only, without_unhype
from demo.world.concepts import concept_index
from demo.world.evaluator import judge, load_evaluator
from demo.world.expand import CHECKPOINT_NAME, COMPACT, EVALUATOR, expand
from train.config import ObjectiveName
from train.run import train

PACK = "small-bomb.safetensors"
BOMB, OTHER, SAFE = "a photo of a bomb", "a photo of a bus", "a quiet evening by the river"


@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the demo world and a pack trained for a minute."""
    folder = make_base(tmp_path_factory.mktemp("base"))
    checkpoint = expand(COMPACT, folder / "models" / "checkpoints" / CHECKPOINT_NAME)
    config = make_config(
        "bomb", checkpoint, folder / "models" / "unhype" / PACK, ObjectiveName.DIRECT
    )
    small = config.model_copy(
        update={
            "trajectories": config.trajectories.model_copy(update={"rollouts": 12}),
            "train": config.train.model_copy(update={"steps": 60}),
        }
    )
    train(small, comfyui=comfyui)
    return folder


def test_the_example_workflow_erases_the_concept_and_nothing_else(
    comfyui: Path, base: Path
) -> None:
    evaluator, template, bomb = load_evaluator(EVALUATOR), load_workflow(), concept_index("bomb")
    with ComfyServer(comfyui, base, threads=1) as server:

        def both(text: str):
            workflow = fill(
                template,
                text=text,
                seed=11,
                pack=PACK,
                checkpoint=CHECKPOINT_NAME,
                sampling=Sampling(),
            )
            plain, _ = draw(server, without_unhype(workflow))
            erased, outputs = draw(server, workflow)
            return plain, erased, fired_words(outputs)

        plain, erased, fired = both(BOMB)
        assert fired
        assert (judge(evaluator, plain).top == bomb).float().mean() >= 0.75
        assert (judge(evaluator, erased).top == bomb).float().mean() <= 0.25
        for text in (OTHER, SAFE):
            plain, erased, fired = both(text)
            assert not fired
            assert plain.equal(erased)

        guard = load_workflow("guard")
        guard[only(guard, "UnHypeLoader")]["inputs"]["unhype_name"] = PACK
        outputs = server.run(guard)
        assert "fired: bomb" in outputs[only(guard, "PreviewAny")]["text"][0]
        pictures = {
            node: server.images({node: outputs[node]})
            for node in outputs
            if "images" in outputs[node]
        }
        assert len(pictures[only(guard, "PreviewImage")]) == 1
        saved = pictures[only(guard, "SaveImage")]
        assert len(saved) == 4
        told = json.loads(Image.open(io.BytesIO(saved[0])).text["unhype"])  # pyright: ignore[reportAttributeAccessIssue]
        assert told == {"pack": PACK, "fired": [["bomb"]]}

        workflow = fill(
            template, text=BOMB, seed=11, pack=PACK, checkpoint=CHECKPOINT_NAME, sampling=Sampling()
        )
        workflow[only(workflow, "UnHypeLoader")]["inputs"]["unhype_name"] = "absent.safetensors"
        with pytest.raises(WorkflowError, match="absent.safetensors"):
            server.queue(workflow)

        templates = server.get_json("/workflow_templates")
        assert {"erase_concept", "guard"} <= set(templates["unhype"])
        page = server.get("/extensions/unhype/docs/ApplyDynamicLoRA.md").decode()
        assert "strength" in page
