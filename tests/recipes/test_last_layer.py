"""What the page of evaluate.py says of the last layer: right for fixed, normalising, following and learned heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ncreg.frames import simplex_etf
from ncreg.heads import HEADS, CodeHead, CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from recipes.evaluation.collapse import Collapse, Layer, collapse_of
from recipes.evaluation.findings import findings
from recipes.evaluation.last_layer import LastLayer, last_layer_of

DRAW = torch.Generator().manual_seed(7)


def collapse(means, counts=None):
    none = torch.zeros(0)
    return Collapse({}, means.double(), torch.ones(len(means)) if counts is None else counts, none, none)


def said(layer, **measures):
    """Values and sentence of each row on the last layer."""
    record = {"measures": measures, "images": 10, "classes": 4}
    rows = findings(record, None, split="test", classes=4, layer=layer)["Last layer"]
    return {row.label.split()[1]: (row.values, row.meaning) for row in rows}


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (ETFHead(8, 4), LastLayer(fixed=True, normalizes=True, has_bias=False)),
        (ETFHead(8, 4, structure="grouped", normalize=False), LastLayer(fixed=True, has_bias=False)),
        (FixedHead(torch.eye(4, 8)), LastLayer(fixed=True, normalizes=True, has_bias=False)),
        (CodeHead(8, 4), LastLayer(fixed=True, normalizes=True, has_bias=False)),
        (NearestETFHead(8, 4), LastLayer(follows=True, normalizes=True, has_bias=False)),
        (CosineHead(8, 4), LastLayer(normalizes=True, has_bias=False)),
        (LinearHead(8, 4), LastLayer()),
        (nn.Linear(8, 4, bias=False), LastLayer(has_bias=False)),
        (Layer(torch.eye(4, 8)), LastLayer(has_bias=False)),
        (None, LastLayer(has_bias=False)),
    ],
)
def test_kinds_of_heads(head, kind):
    found = last_layer_of(head, collapse(torch.randn(4, 8, generator=DRAW)))
    assert replace(found, along=None, nc3_along=None) == kind
    assert (found.along is not None) == kind.fixed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [0, 1])
def test_what_fixed_vectors_see_of_the_means_is_numpys_projection(dtype, absent):
    """The simplex's tenth singular value is 0 but for rounding: its direction must not count as seen."""
    head = FixedHead(simplex_etf(10, 64, generator=torch.Generator().manual_seed(1)).to(dtype), scale=5.0)
    means = torch.randn(10, 64, generator=torch.Generator().manual_seed(2)).double() + 3 * head.weight.double()
    counts = torch.tensor([3] * (10 - absent) + [0] * absent)
    means[counts == 0] = torch.nan
    found = last_layer_of(head, collapse(means, counts))
    exact = simplex_etf(10, 64, generator=torch.Generator().manual_seed(1)).double().numpy()
    here = means[counts > 0].numpy()
    here = here - here.mean(0)
    seen = here @ np.linalg.pinv(exact, rcond=1e-6) @ exact
    rows = exact[: 10 - absent]
    nc3 = np.linalg.norm(rows / np.linalg.norm(rows) - seen / np.linalg.norm(seen))
    loose = {"rel": 2e-2} if dtype == torch.bfloat16 else {"rel": 1e-5}
    assert found.along == pytest.approx((seen**2).sum() / (here**2).sum(), **loose)
    assert found.nc3_along == pytest.approx(nc3, **loose)


def test_a_collapse_on_the_frame_leaves_nothing_beside_it():
    """Means on the vertices: NC3 is 0 and all of them are seen; added to what no vector sees, NC3 along stays 0."""
    head, target = ETFHead(16, 4), torch.arange(40) % 4
    outside = torch.linalg.svd(head.weight.double(), full_matrices=True)[2][4:8].float()
    for more, along in ((0.0, 1.0), (1.0, 0.5)):
        # of a simplex ‖W‖² is C, of the centred added rows C − 1
        features = head.weight[target] + more * (4 / 3) ** 0.5 * outside[target]
        found = collapse_of(Blocks(features, target), 4, head)
        layer = last_layer_of(head, found)
        assert layer.along == pytest.approx(along, abs=1e-6) and layer.nc3_along == pytest.approx(0, abs=1e-3)
        assert found.measures["nc3"] == pytest.approx((2 - 2 * along**0.5) ** 0.5, abs=1e-3)


class Blocks:
    """Features as one block."""

    def __init__(self, features, target):
        self.features, self.target, self.width = features, target, features.shape[1]

    def __iter__(self):
        yield self.features, self.target


def test_more_vectors_than_dimensions_may_span_all_or_half_of_them():
    means = collapse(torch.randn(12, 8, generator=DRAW))
    assert last_layer_of(CodeHead(8, 12), means).along == pytest.approx(1)
    half = last_layer_of(HEADS["orthoplex"](8, 8), collapse(torch.randn(8, 8, generator=DRAW)))
    assert half.along is not None and half.along < 0.9  # four directions, and their opposites


def test_equal_means_and_a_million_vectors_say_nothing_of_a_part():
    equal = last_layer_of(ETFHead(8, 4), collapse(torch.ones(4, 8)))
    million = last_layer_of(CodeHead(512, 1_000_000), collapse(torch.ones(4, 8)))  # its vectors would take 2 GB
    assert (equal.along, equal.nc3_along, million.along, million.nc3_along) == (None, None, None, None)


def test_a_fixed_head_is_said_to_be_fixed():
    layer = LastLayer(fixed=True, normalizes=True, has_bias=False, along=0.75, nc3_along=0.2)
    rows = said(layer, nc3=0.8, nc3_bias=3.478)
    assert rows["means"][0] == ("0.800",)
    words = rows["means"][1]
    assert "are fixed" in words and "point elsewhere" in words and "do not agree" not in words
    assert "75 % of the variance of the means lies where class vectors point, and there NC3 is 0.200" in words
    whole = said(replace(layer, along=1.0, nc3_along=0.05), nc3=0.05)["means"][1]
    assert "point along them" in whole and "variance" not in whole


def test_the_centre_of_a_head_that_normalises_has_no_number():
    """Scaled features, W·μ_G scaled alike, the same logits: the number would say nothing."""
    head = CosineHead(8, 4)
    features = torch.randn(40, 8, generator=DRAW) + 2
    assert torch.allclose(head(features), head(100 * features), atol=1e-5)
    for layer in (last_layer_of(head, collapse(torch.eye(4, 8))), LastLayer(fixed=True, normalizes=True)):
        values, words = said(layer, nc3_bias=3.478)["bias"]
        assert values == ("–",) and "No measure of this head" in words


def test_learned_heads_as_ever_and_one_without_bias():
    rows = said(None, nc3=0.8, nc3_bias=3.478)
    assert rows["means"][1].startswith("Class vectors of the last layer and class means do not agree")
    assert rows["bias"] == (
        ("3.478",),
        "What is left of the logits at the centre of the class means; 0 where the bias cancels it.",
    )
    assert said(LastLayer(has_bias=False), nc3_bias=1.0)["bias"][1].endswith("; the head has no bias to cancel it.")
    assert "follows the running class means" in said(LastLayer(follows=True), nc3=0.3)["means"][1]
