"""Run at the start of the ComfyUI server, through PYTHONPATH: see unhype/host/vision.py."""

import runpy
from pathlib import Path

VISION = Path(__file__).resolve().parents[2] / "unhype" / "host" / "vision.py"

runpy.run_path(str(VISION))["declare_when_imported"]()
