"""The example workflows in both their forms."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from demo.workflow import load_workflow
from unhype.host.locate import REPOSITORY

FOLDER = REPOSITORY / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = {"MarkdownNote"}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Of one workflow."""
    return request.param


@pytest.fixture(scope="module")
def template(name: str) -> dict[str, Any]:
    """The form that the editor opens."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def node_classes(comfy: Path) -> dict[str, Any]:
    import nodes

    async def load() -> None:
        await nodes.load_custom_node(str(comfy / "comfy_extras" / "nodes_preview_any.py"))
        await nodes.load_custom_node(str(REPOSITORY))

    asyncio.run(load())
    return nodes.NODE_CLASS_MAPPINGS


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets by name; behind every seed the editor keeps one more, for what happens to it after a run."""
    values = [value for value in node["widgets_values"] if value != "fixed"]
    names = [i["name"] for i in node["inputs"] if "widget" in i]
    return dict(zip(names, values, strict=True))


def test_both_forms_are_the_same_graph(template: dict[str, Any], name: str) -> None:
    sources = {link[0]: [str(link[1]), link[2]] for link in template["links"]}
    rebuilt = {}
    for node in template["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
        rebuilt[str(node["id"])] = (node["type"], {**widget_values(node), **linked})
    api = load_workflow(name)
    assert rebuilt == {key: (node["class_type"], node["inputs"]) for key, node in api.items()}


def test_every_link_is_known_at_both_ends(template: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in template["nodes"]}
    for number, source, output, target, slot, kind in template["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")


def test_every_workflow_has_a_picture(name: str) -> None:
    assert (FOLDER / f"{name}.jpg").is_file()


def test_the_host_has_every_node_with_these_inputs(node_classes: dict[str, Any], name: str) -> None:
    for node in load_workflow(name).values():
        types = node_classes[node["class_type"]].INPUT_TYPES()
        known = types["required"].keys() | types.get("optional", {}).keys()
        assert types["required"].keys() <= node["inputs"].keys() <= known


def test_our_nodes_show_every_socket(
    template: dict[str, Any], node_classes: dict[str, Any]
) -> None:
    for node in template["nodes"]:
        schema = getattr(node_classes.get(node["type"]), "define_schema", None)
        if schema is None:
            continue
        described = schema()
        assert [i["name"] for i in node["inputs"]] == [i.id for i in described.inputs]
        assert [o["name"] for o in node["outputs"]] == [o.display_name for o in described.outputs]
