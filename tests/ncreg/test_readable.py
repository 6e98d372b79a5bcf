"""Result objects print as tables whose numbers are those of their fields."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import ncreg
from ncreg._readable import readable
from ncreg.robustness import evaluate_calibration, evaluate_ood, pgd
from ncreg.theory import cross_entropy_optimum

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(60, 6, generator=GENERATOR)
TARGET = torch.arange(60) % 3
LOGITS = FEATURES[:, :3] + 2 * torch.eye(3)[TARGET]


def table(result):
    title, *rows = str(result).splitlines()
    return title, dict(row.split(maxsplit=1) for row in rows)


def test_every_public_dataclass_of_results_prints_as_a_table():
    names = [m.name for m in pkgutil.walk_packages(ncreg.__path__, "ncreg.") if "integrations" not in m.name]
    found = {}
    for module in map(importlib.import_module, names):
        if not module.__name__.endswith(("compile_heads", "__main__")):
            found |= {n: v for n, v in vars(module).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    parts = {"Finding", "AttackRow", "CostSummary", "Draws", "ReliabilityBins"}  # rows of a report, arguments
    lacking = {n for n, kind in found.items() if not n.startswith("_") and kind.__str__ is object.__str__} - parts
    assert not lacking and len(found) > 20


def test_an_attack_and_its_properties():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    result = pgd(model, torch.rand(9, 1, 4, 4, generator=GENERATOR), TARGET[:9], epsilon=0.1, steps=2)
    title, rows = table(result)
    assert title == "AttackResult" and rows["robust"] == f"{int(result.robust.sum())} of 9"
    assert rows["accuracy"] == f"{result.accuracy:.4g}" and rows["images"].startswith("9 x 1 x 4 x 4 values, mean 0.")
    assert rows["interval"] == ", ".join(f"{end:.4g}" for end in result.interval) and rows["expected_cost"] == "-"


def test_reports_in_reports_have_a_row_each():
    result = evaluate_calibration(LOGITS, TARGET, LOGITS, TARGET)
    _, rows = table(result)
    assert rows["temperature"] == f"{result.temperature:.4g}"
    assert rows["after.nll"] == f"{result.after.nll:.4g}" and rows["before.ece"] == f"{result.before.ece:.4g}"
    report = evaluate_ood(FEATURES, TARGET, FEATURES, LOGITS, {"far": (9 * FEATURES, LOGITS.flip(0))}, scores=["msp"])
    _, rows = table(report)
    assert rows["detections.far.msp"].startswith(f"auroc {report.detections['far']['msp'].auroc:.4g}")


def test_a_closed_form():
    found = cross_entropy_optimum(10, 100, 1e-3, 1e-4)
    _, rows = table(found)
    assert all(rows[field.name] == f"{getattr(found, field.name):.4g}" for field in dataclasses.fields(found))


@dataclasses.dataclass
class Odd:
    empty: dict = dataclasses.field(default_factory=dict)
    nan: float = float("nan")
    lost: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor([torch.nan, torch.inf]))
    none: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 3))
    long: tuple = tuple(range(30))
    short: tuple = (1, 2.5)
    flag: bool = True
    words: str = "two words"

    __str__ = readable


def test_odd_values():
    assert str(Odd()).splitlines() == [
        "Odd",
        "  empty  -",
        "  nan    nan",
        "  lost   2 values, none finite",
        "  none   0 x 3 values, none finite",
        "  long   30 values",
        "  short  1, 2.5",
        "  flag   yes",
        "  words  two words",
    ]
    assert repr(Odd()).startswith("Odd(empty={}")


def test_a_report_of_attacks_keeps_its_own_table():
    with pytest.raises(AttributeError):
        _ = Odd().as_dict
    kind = importlib.import_module("ncreg.robustness.adversarial.report").AdversarialReport
    assert kind.__str__ is not readable
