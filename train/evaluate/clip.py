"""Zero-shot classification by a CLIP model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.host import vision

from .base import Judgement
from .evaluators import EvaluatorError, import_extra, to_bytes

TEMPLATES = ("a photo of a {}",)
NEEDED = (
    "config.json",
    "*.safetensors",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "preprocessor_config.json",
)
"""What the folder of a CLIP model holds."""


class CLIPEvaluator:
    """p(label | picture) = softmax over labels of scale cos(picture, label), a label being the mean of its prompts.

    Scores sum to 1: two things in one picture have about a half each, hence ``present``.
    """

    present = 0.3

    def __init__(
        self,
        folder: Path,
        labels: Sequence[str],
        *,
        templates: Sequence[str] = TEMPLATES,
        device: torch.device | str | None = None,
        batch: int = 64,
    ) -> None:
        """Load the model and read the labels.

        Args:
            folder: with a CLIP model as transformers saves it, weights in safetensors.
            labels: what to tell apart, two or more.
            templates: prompts with ``{}`` for the label.
            device: where to compute; a GPU if there is one by default.
            batch: pictures at once.

        Raises:
            FileNotFoundError: the folder, or a file in it, is missing.
            EvaluatorError: there are too few labels, or transformers is not installed.
        """
        if len(labels) < 2:
            raise EvaluatorError(
                f"clip compares labels with one another and needs two or more, got {len(labels)}."
            )
        _check_folder(folder)
        vision.declare_when_imported()
        transformers = import_extra("transformers", "train")
        self.labels = tuple(labels)
        self._batch = batch
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self._model.to(self._device).eval().requires_grad_(False)
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True
        )
        self._named = torch.stack([self._read(label, templates) for label in labels])

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> Judgement:
        """Compare pictures (n, 3, height, width) in [0, 1] with the labels; features are CLIP's, of length 1."""
        parts = [self._judge(part) for part in pictures.split(self._batch)]
        return Judgement.cat(parts)

    def _judge(self, pictures: Tensor) -> Judgement:
        inputs = self._processor(images=list(to_bytes(pictures)), return_tensors="pt")
        seen = self._model.vision_model(inputs["pixel_values"].to(self._device)).pooler_output
        features = F.normalize(self._model.visual_projection(seen), dim=-1)
        logits = self._model.logit_scale.exp() * features @ self._named.T
        return Judgement(logits.softmax(-1).cpu(), features.cpu())

    @torch.no_grad()
    def _read(self, label: str, templates: Sequence[str]) -> Tensor:
        """Mean direction of a label's prompts, (dim,)."""
        prompts = [template.format(label) for template in templates]
        tokens = self._tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        read = self._model.text_model(**tokens.to(self._device)).pooler_output
        directions = F.normalize(self._model.text_projection(read), dim=-1)
        return F.normalize(directions.mean(0), dim=-1)


def evaluator(argument: str, labels: Sequence[str]) -> CLIPEvaluator:
    """The evaluator of ``clip:FOLDER``."""
    if not argument:
        raise EvaluatorError(
            "clip needs the folder of a CLIP model: clip:/path/to/clip-vit-large-patch14."
        )
    return CLIPEvaluator(Path(argument).expanduser(), labels)


def _check_folder(folder: Path) -> None:
    missing = [name for name in NEEDED if not any(folder.glob(name))]
    if missing:
        problem = f"has no {missing[0]}" if folder.is_dir() else "is not there"
        raise FileNotFoundError(
            f"The folder {folder} {problem}. Put a CLIP model there, with {', '.join(NEEDED)}: for example all of these from "
            "openai/clip-vit-large-patch14 on the Hugging Face hub. Weights in other formats than safetensors are not read."
        )
