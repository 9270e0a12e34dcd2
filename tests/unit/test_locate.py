"""Where ComfyUI is looked for, and what is said when it is not there."""

from pathlib import Path

import pytest

from unhype.host import locate


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("UNHYPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "REPOSITORY", tmp_path / "repository")


def comfyui_at(path: Path) -> Path:
    for marker in locate.MARKERS:
        (path / marker).parent.mkdir(parents=True, exist_ok=True)
        (path / marker).touch()
    return path


def test_each_place_wins_over_those_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = comfyui_at(tmp_path / "cache" / "comfyui" / "ComfyUI")
    assert locate.find_comfyui() == cached

    around = comfyui_at(tmp_path / "around")
    monkeypatch.setattr(locate, "REPOSITORY", around / "custom_nodes" / "unhype")
    assert locate.find_comfyui() == around

    named = comfyui_at(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert locate.find_comfyui() == named

    explicit = comfyui_at(tmp_path / "explicit")
    assert locate.find_comfyui(explicit) == explicit


def test_nowhere_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(locate.ComfyUINotFoundError) as caught:
        locate.find_comfyui()
    message = str(caught.value)
    assert str(tmp_path / "cache" / "comfyui" / "ComfyUI") in message
    assert "Set COMFYUI_PATH" in message
    assert "make host" in message


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_wrong_folder_is_refused_even_where_another_would_be_found(
    by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    comfyui_at(tmp_path / "cache" / "comfyui" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "typo") if by == "environment" else "")
    with pytest.raises(locate.NotComfyUIError, match=r"typo, which has no main\.py"):
        locate.find_comfyui(tmp_path / "typo" if by == "argument" else None)


def test_a_half_copied_cache_is_not_a_comfyui(tmp_path: Path) -> None:
    cached = comfyui_at(tmp_path / "cache" / "comfyui" / "ComfyUI")
    (cached / "comfy" / "sd.py").unlink()
    with pytest.raises(locate.ComfyUINotFoundError):
        locate.find_comfyui()


def test_a_folder_called_custom_nodes_elsewhere_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(locate, "REPOSITORY", tmp_path / "base" / "custom_nodes" / "unhype")
    with pytest.raises(locate.ComfyUINotFoundError):
        locate.find_comfyui()
