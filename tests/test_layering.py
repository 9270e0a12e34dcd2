"""The import directions, and that what differs between families stays in one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = "unhype/families.py"

HOST = {
    "comfy",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "server",
}
API = {"comfy_api"}
OUTSIDE = {"train", "demo", "benchmarks", "tests"}
LEAVES = {"unhype.hypernetwork", "unhype.gate", "unhype.checkpoint"}


@dataclass(frozen=True)
class Layer:
    """What files under a folder may not import, and whether their own pack must be imported relatively."""

    folder: str
    forbidden: frozenset[str]
    relative: bool = False


# A file belongs to the first layer whose folder it is in.
LAYERS = (
    Layer("unhype/host", frozenset(API | OUTSIDE | {"nodes"}), relative=True),
    Layer(
        "unhype",
        frozenset(HOST | API | OUTSIDE | {"nodes", "transformers", "unhype.host"}),
        relative=True,
    ),
    Layer("nodes", frozenset(HOST | OUTSIDE), relative=True),
    Layer("train", frozenset(HOST | API | {"nodes", "demo", "benchmarks", "tests"})),
    Layer("demo", frozenset(HOST | API | {"nodes", "benchmarks", "tests"})),
    Layer("benchmarks", frozenset(API | {"nodes", "tests"})),  # they time the host itself
)
# Within unhype/: what each file may not import of its siblings, so that the leaves stay leaves.
SIBLINGS = {
    "unhype/families.py": frozenset(LEAVES | {"unhype.lora"}),
    "unhype/lora.py": frozenset(LEAVES),
    "unhype/hypernetwork.py": frozenset({"unhype.gate", "unhype.checkpoint"}),
    "unhype/gate.py": frozenset({"unhype.hypernetwork", "unhype.checkpoint"}),
}


def sources() -> list[str]:
    folders = {layer.folder.split("/")[0] for layer in LAYERS}
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    names = sorted(path.relative_to(REPOSITORY).as_posix() for path in paths)
    return [name for name in names if not name.startswith("demo/out/")]


def layer_of(name: str) -> Layer:
    return next(layer for layer in LAYERS if name.startswith(layer.folder + "/"))


def imports(source: str, name: str) -> Iterator[tuple[str, bool]]:
    """Yield each module that a file imports, in full, and whether it was written relatively.

    ``from a import b`` yields a.b, since b may be a module; its prefixes are checked with it.
    """
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.level > 0) for alias in node.names)


def faults(source: str, name: str) -> list[str]:
    layer = layer_of(name)
    forbidden = layer.forbidden | SIBLINGS.get(name, frozenset())
    found = []
    for module, relative in imports(source, name):
        parts = module.split(".")
        prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
        if prefixes & forbidden:
            found.append(f"{name} imports {module}, which {layer.folder}/ must not")
        if layer.relative and not relative and parts[0] in {"nodes", "unhype"}:
            found.append(f"{name} imports {module} absolutely; inside ComfyUI only relative works")
    return found


def family_literals(source: str, families: set[str]) -> list[str]:
    """Return the family names that a file has as string literals, apart from docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in families
        and id(node) not in docstrings
    ]


def family_names() -> set[str]:
    from unhype.families import FAMILIES

    return {spec.name for spec in FAMILIES.values()}


@pytest.mark.parametrize("name", sources())
def test_imports_go_the_allowed_way(name: str) -> None:
    assert not faults((REPOSITORY / name).read_text(encoding="utf-8"), name)


@pytest.mark.parametrize("name", sources())
def test_no_family_name_outside_the_table(name: str) -> None:
    if name != FAMILIES:
        source = (REPOSITORY / name).read_text(encoding="utf-8")
        assert not family_literals(source, family_names())


def test_every_layer_is_there() -> None:
    found = {layer_of(name).folder for name in sources()}
    assert found == {layer.folder for layer in LAYERS}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import comfy.sd", "unhype/lora.py"),
        ("def f():\n    from comfy import sd", "train/loop.py"),
        ("from . import host", "unhype/checkpoint.py"),
        ("from .host.locate import find_comfyui", "unhype/gate.py"),
        ("from unhype.lora import LoRAFactors", "unhype/host/apply.py"),
        ("from ..train import loop", "nodes/loader.py"),
        ("import folder_paths", "nodes/loader.py"),
        ("from unhype import checkpoint", "nodes/loader.py"),
        ("from comfy_api.latest import io", "unhype/host/apply.py"),
        ("import nodes", "demo/run.py"),
        ("from .checkpoint import load", "unhype/lora.py"),
    ],
)
def test_the_rule_notices(source: str, name: str) -> None:
    assert faults(source, name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import comfy.sd", "unhype/host/apply.py"),
        ("from ..unhype.host import apply", "nodes/loader.py"),
        ("from comfy_api.latest import io", "nodes/loader.py"),
        ("from unhype.host.locate import find_comfyui", "train/cli.py"),
        ("import comfyui_version", "train/cli.py"),
        ("import comfy.sample", "benchmarks/sampling.py"),
    ],
)
def test_the_rule_allows(source: str, name: str) -> None:
    assert not faults(source, name)


def test_a_family_name_in_code_is_noticed_and_in_a_docstring_is_not() -> None:
    assert family_literals('if spec.name == "sd1": pass', {"sd1"}) == ["sd1"]
    assert not family_literals('def f():\n    "sd1"', {"sd1"})
