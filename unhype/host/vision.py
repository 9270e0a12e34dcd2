"""Let torchvision be imported where its compiled operators cannot load.

The Linux wheels of torchvision on PyPI are linked against CUDA. Beside a CPU build of torch they load
nothing, and the import then fails on operators it describes but never declared. ComfyUI imports torchvision
for its image transforms only, so declaring the two is enough; calling one of them still raises torch's own error.

Standard library only, and no imports of the package: the server runs this file by its path, before anything else.
"""

import ctypes
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """An import hook that waits for torchvision, acts once, and finds nothing itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def declare_when_imported() -> None:
    """Declare torchvision's operators just before it is imported, so that torch is not imported early."""
    if sys.platform == "linux" and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, DeclareOperators())


def declare_missing_operators() -> None:
    """Declare the operators unless torchvision is absent or its own library loads."""
    from torch import library, ops

    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    compiled = Path(spec.submodule_search_locations[0]) / "_C.so"
    if compiled.exists():
        try:
            ctypes.CDLL(str(compiled))
        except OSError:
            pass
        else:
            return
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        if not hasattr(ops.torchvision, name):  # asked for again before anyone imported it
            library.define(f"torchvision::{name}", schema[schema.index("(") :])
