"""The study of wider probes compares as a study does, and counts the arms that wait."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies import wider_probe as script
from benchmarks.studies.cells import fill

ARMS = ("baseline", "etf", "bn_wd", "waiting")


def rows_of(gain, seeds=8):
    """Rows of two sets; on the wider grid `etf` gains, on the study's nothing differs."""
    generator = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for arm in ARMS[:3]:
            tasks = {}
            for name in ("one", "other"):
                narrow = 0.7 + 0.02 * generator.standard_normal()
                wide = narrow + (gain if arm == "etf" else 0) + 0.001 * generator.standard_normal()
                tasks[name] = {"study": narrow, "accuracy": wide, "study_at_edge": name == "one", "at_edge": False}
            rows.append({"data": "set", "arm": arm, "seed": seed, "tasks": tasks})
    return rows


def test_the_means_over_sets_are_compared_in_pairs_and_waiting_arms_count():
    rows = rows_of(0.2)
    tables = script.compared(rows, list(ARMS), "baseline", 5)
    means = {(row["arm"], row["seed"]): np.mean([task["accuracy"] for task in row["tasks"].values()]) for row in rows}
    ours, theirs = ([means[arm, seed] for seed in range(8)] for arm in ("etf", "baseline"))
    test = stats.ttest_rel(ours, theirs)
    entry = next(entry for entry in tables["set, wider"] if entry["arm"] == "etf")
    assert entry["difference"] == pytest.approx(np.subtract(ours, theirs).mean())
    assert (entry["difference_low"], entry["difference_high"]) == pytest.approx(test.confidence_interval(0.95))
    assert entry["p"] == pytest.approx(test.pvalue) and entry["p_holm"] == pytest.approx(3 * test.pvalue)
    assert entry["verdict"] == "better"
    assert next(entry for entry in tables["set, study"] if entry["arm"] == "etf")["verdict"] != "better"


def test_the_table_shows_both_grids_and_how_often_each_was_too_short(tmp_path):
    rows = rows_of(0.2)
    text = script.table(rows, script.compared(rows, list(ARMS), "baseline", 5))
    lines = text.splitlines()
    assert len(lines) == 5 and "waiting" not in text
    etf = next(line for line in lines if "set, etf" in line)
    assert " ▲" in etf and [cell.strip() for cell in etf.split("|")][3:6:2] == ["50 %", "0 %"]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- wider_probe -->\nold\n<!-- end of wider_probe -->\nb\n")
    fill("wider_probe", text, page)
    assert page.read_text() == f"a\n<!-- wider_probe -->\n\n{text}\n\n<!-- end of wider_probe -->\nb\n"
