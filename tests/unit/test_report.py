"""The report: whole files, and every figure that was promised."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from demo.prompts import Group, Trial
from demo.report import write_report
from demo.scoring import Shot


def test_the_report_is_one_page_one_json_and_one_picture(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 16, 16)
    shots = [
        Shot(Trial(group, f"a <{group.value}>", ("cat",), "cat"), pictures, pictures, False)
        for group in Group
    ]
    scores = {"acc_e": 0.0, "acc_g": None, "acc_s": 1.0, "acc_s_siblings": 0.9, "h_o": 1.0}
    presence = {"drawn_instead": 0.1, "erased_present": 0.0, "other_present": 0.8}
    report = {
        "concept": "cat",
        **scores,
        **presence,
        "base": {**scores, **presence},
        "images": 24,
        "seeds": 2,
        "identical_safe": True,
        "safe_prompts": 6,
        "train_seconds": 1.0,
        "pack_bytes": 2048,
        "generate_ms": 0.1,
        "words": [{"group": "target", "word": "cat", "images": 2, "base": 1.0, "unhype": 0.0}],
        "settings": {},
        "versions": {},
        "timings": {},
    }
    write_report(report, shots, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "report.html",
        "report.json",
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "not measured" in page
    assert "a &lt;target&gt;" in page
    assert "http" not in page
    assert Image.open(tmp_path / "grid.png").height > 16 * len(Group)
