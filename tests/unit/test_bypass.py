"""Layers that share one product with their ``down``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unhype.host.bypass import RowTable, find_sites
from unhype.lora import LoRAFactors, TargetModule

TARGETS = (
    TargetModule("a", 6, 5),
    TargetModule("b", 6, 4, 4, 12),
    TargetModule("b", 6, 4, 8, 12),
    TargetModule("c", 6, 7),
)
"""Of the second layer two parts of three."""


class Network(nn.Module):
    """Three layers, called with whatever inputs one asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 12), nn.Linear(6, 7)

    def forward(self, calls: list[tuple[str, Tensor]]) -> list[Tensor]:
        return [self.get_submodule(name)(x) for name, x in calls]


def draw_factors() -> LoRAFactors:
    torch.manual_seed(0)
    return LoRAFactors(
        TARGETS,
        tuple(torch.randn(2, 3, target.in_features) for target in TARGETS),
        tuple(torch.randn(2, target.out_features, 3) for target in TARGETS),
        torch.tensor([1.0, 0.5]),
    )


def expected(
    network: Network, factors: LoRAFactors, rows: list[int | None], name: str, x: Tensor
) -> Tensor:
    layer = network.get_submodule(name)
    weights = layer.get_parameter("weight").expand(len(x), -1, -1).clone()
    for index, target in enumerate(factors.targets):
        if target.name == name:
            for place, row in enumerate(rows):
                if row is not None:
                    part = weights[place, target.start : target.start + target.out_features]
                    part += factors.delta(index)[row]
    return x @ weights.mT + layer.get_parameter("bias")


@pytest.mark.parametrize("kept", [None, "batch"])
@pytest.mark.parametrize("rows", [[0, None], [0, 1], [1, None, 0], [0, 0]])
def test_whatever_the_layers_are_given_each_gets_its_own_change(
    rows: list[int | None], kept: str | None
) -> None:
    network, factors = Network(), draw_factors()
    table, sites = RowTable(factors), find_sites(network, TARGETS)

    def make() -> Tensor:
        return torch.randn(len(rows), 9, 6)

    with torch.no_grad():
        text, other, state = make(), make(), make()
        calls = [
            [("a", text), ("b", text), ("c", text)],
            [("a", text), ("b", text), ("c", text)],  # what the first one taught is used
            [("a", text), ("b", other), ("c", text)],  # another node replaced an input
            [("c", other), ("a", other), ("a", text), ("b", text), ("a", text)],
            [("a", state), ("b", text), ("c", other)],  # nothing in common
            [("a", state), ("b", text), ("c", text), ("c", other)],
            [("a", text), ("b", text), ("c", text)],
            [("a", text), ("b", text), ("c", text)],
            [("a", text + 1), ("b", text), ("c", text)],
            [("b", text), ("a", text), ("b", text), ("c", text)],
        ]
        for asked in calls:
            with table.adapted(sites, rows, keep=kept):
                got = network(asked)
            for (name, x), result in zip(asked, got, strict=True):
                wanted = expected(network, factors, rows, name, x)
                torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)
            assert not any("forward" in layer.__dict__ for layer in network.modules())


def test_layers_with_one_input_make_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    import unhype.host.bypass as bypass

    network, table = Network(), RowTable(draw_factors())
    sites, text = find_sites(network, TARGETS), torch.randn(2, 9, 6)
    products: list[torch.Size] = []
    plain = bypass._per_row

    def count(x: Tensor, weight: Tensor) -> Tensor:
        products.append(weight.shape)
        return plain(x, weight)

    monkeypatch.setattr(bypass, "_per_row", count)
    with torch.no_grad():
        for _ in range(3):
            with table.adapted(sites, [0, None]):
                network([("a", text), ("b", text), ("c", text)])
    ranks = [shape[0] for shape in products]
    assert ranks == [3, 6, 3, 12, 12]
