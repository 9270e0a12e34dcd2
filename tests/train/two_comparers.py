"""Run by torch.distributed.run: the command line compares in a small world, found as any other is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import train.cli

spec = importlib.util.spec_from_file_location("painter", Path(__file__).with_name("painter.py"))
assert spec is not None
assert spec.loader is not None
painter = importlib.util.module_from_spec(spec)
sys.modules["painter"] = painter  # dataclasses look their module up
spec.loader.exec_module(painter)

folder = Path(sys.argv[1])
train.cli.find_world = lambda name: painter.Studio(folder)
sys.argv[1:] = ["compare", "--world", "studio", "--concepts", "1", "--seeds", "3"]
sys.argv += ["--methods", "none,ours direct", "--out", str(folder / "out")]
train.cli.main()
