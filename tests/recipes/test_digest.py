"""Tables in the documents are made from committed results alone, and are what those say."""

import json
import statistics

import pytest
from scipy import stats

from benchmarks.studies import digest
from recipes.core.errors import UserError

STUDIES = digest.ROOT / "benchmarks" / "studies"
ASKED = "<!-- study: terminal_phase; measures: at_end.test.accuracy, at_end.test.loss; arms: known, short -->\n"
END = "<!-- end of study -->"


def test_no_table_of_a_document_is_stale(capsys):
    assert digest.main(["--check"]) == 0, capsys.readouterr().out


def test_a_cell_is_what_the_runs_give():
    content = json.loads((STUDIES / "terminal_phase" / "results.json").read_text())
    values = {
        arm: [
            content["runs"][cell["key"]]["summary"]["at_end"]["test"]["accuracy"] * 100
            for cell in content["cells"]
            if cell["arm"] == arm
        ]
        for arm in ("known", "short")
    }
    differences = [ours - theirs for ours, theirs in zip(values["short"], values["known"], strict=True)]
    mean = statistics.mean(differences)
    half = stats.t.ppf(0.975, 4) * statistics.stdev(differences) / 5**0.5
    low, high = mean - half, mean + half
    cell = (
        f"| short | {statistics.mean(values['short']):.2f} ± {statistics.stdev(values['short']):.2f}; "
        f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] |".replace("-", "−")
    )
    assert cell in digest.filled(f"a\n{ASKED}old{END}\nb", STUDIES)


def test_a_row_of_contrasts_is_what_the_runs_give():
    content = json.loads((STUDIES / "last_bn" / "results.json").read_text())
    values = {
        arm: {cell["seed"]: content["runs"][cell["key"]]["summary"]["at_end"]["train"]["intra_cosine"]}
        for arm in ("bn_5e-3", "plain_5e-3")
        for cell in content["cells"]
        if cell["arm"] == arm and cell["seed"] == 0
    }
    text = digest.filled(
        f"<!-- study: last_bn; rows: contrasts; measures: at_end.train.intra_cosine -->\n{END}", STUDIES
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| bn_5e-3 − plain_5e-3 |")]
    low, high = (float(number.replace("−", "-")) for number in row.partition("[")[2].partition("]")[0].split(", "))
    assert low < values["bn_5e-3"][0] - values["plain_5e-3"][0] < high and row.endswith("] ↑ |")


def test_differences_can_be_left_to_the_report():
    text = digest.filled(ASKED.replace("; arms", "; differences: no; arms") + END, STUDIES)
    full = digest.filled(ASKED + END, STUDIES)
    (row,) = [line for line in text.splitlines() if line.startswith("| short |")]
    (whole,) = [line for line in full.splitlines() if line.startswith("| short |")]
    assert "[" not in row and row.endswith(" ▲ |") and whole.endswith(" ▲ |")
    assert [cell.split(";")[0].strip(" ▲") for cell in whole.split("|")] == [
        cell.strip(" ▲") for cell in row.split("|")
    ]


def test_the_text_around_a_table_stays_and_a_second_time_changes_nothing():
    once = digest.filled(f"a\n{ASKED}{END}\nb\n{ASKED}stale\n{END}c", STUDIES, up="../")
    assert once.startswith(f"a\n{ASKED}\n| arm |") and once.endswith(f"{END}c") and "stale" not in once
    assert once.count("| known |") == 2 and "(../benchmarks/studies/terminal_phase/report.md)" in once
    assert digest.filled(once, STUDIES, up="../") == once


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("nowhere; measures: a", "cannot be read"),
        ("terminal_phase; measures: at_end.test", "measures='at_end.test' is not there: one of at_end.test.accuracy"),
        ("terminal_phase; measures: onset_epoch; arms: nobody", "arms='nobody' is not there: one of known"),
        ("terminal_phase; measures: onset_epoch; data: mars", "data='mars' is not there: one of fashion_mnist"),
        ("terminal_phase; measure: onset_epoch", "study, measures, and if wanted data, arms"),
        ("terminal_phase", "study, measures, and if wanted data, arms"),
        ("terminal_phase; measures: onset_epoch; rows: arms", "rows can only be contrasts"),
        ("terminal_phase; measures: onset_epoch; differences: yes", "differences can only be no"),
    ],
)
def test_what_is_not_there_is_named(asked, said):
    with pytest.raises(UserError, match=said):
        digest.filled(f"<!-- study: {asked} -->\n{END}", STUDIES)


def test_the_list_of_studies_adds_up_what_their_runs_took():
    asked = "<!-- all studies -->\n{}<!-- end of studies -->\n"
    text = digest.filled(asked.format("stale"), STUDIES, up="../")
    assert digest.filled(text, STUDIES, up="../") == text and "stale" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[0][1:].partition("]")[0] for row in rows[:-1]] == sorted(path.stem for path in STUDIES.glob("*.yaml"))
    assert all((STUDIES.parent / row[0].partition("(../benchmarks/")[2][:-1]).exists() for row in rows[:-1])
    once = {}
    for row in reversed(rows[:-1]):
        timing = STUDIES / row[0][1:].partition("]")[0] / "timing.json"
        runs = json.loads(timing.read_text()) if timing.exists() else {}
        took = {name: sum(run[key] for key in run if key.endswith("_seconds")) for name, run in runs.items()}
        assert row[4] == (f"{sum(took.values()) / 3600:.1f}" if took else "")
        once.update(took)
    assert rows[-1][4] == f"{sum(once.values()) / 3600:.1f}"
    shared = sum(len(json.loads(path.read_text())) for path in STUDIES.glob("*/timing.json")) - len(once)
    assert shared > 0  # runs that two studies have count once
    scale = next(row for row in rows if row[0].startswith("[scale]"))
    assert scale[2:4] == ["45", ""]  # a finished study without a search


ACCURACY, AFTER = "at_end.test.accuracy", "robustness.calibration.after.nll"
ATTACKED = "robustness.adversarial.headline.accuracy"
FEW = "robustness.long_tail.test.groups.few.accuracy"
README, EVIDENCE = "README.md", "docs/evidence.md"
CARDS = {name: f"recipes/configs/{name}.yaml" for name in ("default", "bn_wd", "etf", "normface", "supcon", "tpt")}
DEFAULT, BN_WD, ETF, NORMFACE, SUPCON, TPT = CARDS.values()


@pytest.mark.parametrize(
    ("study", "data", "arm", "measure", "factor", "digits", "documents"),
    [
        ("as_good_as", "fashion_mnist", "etf", ACCURACY, 100, 2, [README, EVIDENCE]),
        ("as_good_as", "fashion_mnist", "bn_wd", ACCURACY, 100, 2, [README, EVIDENCE, BN_WD]),
        ("as_good_as", "fashion_mnist", "etf", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("as_good_as", "fashion_mnist", "normface", ACCURACY, 100, 2, [EVIDENCE, NORMFACE]),
        ("as_good_as", "fashion_mnist", "normface", AFTER, 1, 3, [EVIDENCE, NORMFACE]),
        ("as_good_as", "mnist5k", "normface", ACCURACY, 100, 2, [EVIDENCE, NORMFACE]),
        ("as_good_as", "fashion_mnist", "default", ACCURACY, 100, 2, [EVIDENCE, DEFAULT]),
        ("as_good_as", "fashion_mnist", "default", AFTER, 1, 3, [EVIDENCE, DEFAULT]),
        ("as_good_as", "fashion_mnist", "default", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("as_good_as", "fashion_mnist", "etf_grouped", ACCURACY, 100, 2, [EVIDENCE]),
        ("as_good_as", "fashion_mnist", "etf_grouped", AFTER, 1, 3, [EVIDENCE]),
        ("as_good_as", "fashion_mnist", "etf_grouped", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("as_good_as", "mnist5k", "etf_grouped", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("as_good_as", "mnist5k", "default", ACCURACY, 100, 2, [EVIDENCE, DEFAULT]),
        ("as_good_as", "mnist5k", "default", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE, DEFAULT]),
        ("as_good_as", "mnist5k", "etf", ACCURACY, 100, 2, [README, EVIDENCE, ETF]),
        ("as_good_as", "mnist5k", "bn_wd", ACCURACY, 100, 2, [EVIDENCE, BN_WD]),
        ("as_good_as", "mnist5k", "etf", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("as_good_as", "mnist5k", "bn_wd", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE]),
        ("heads_and_losses", "fashion_mnist", "etf", ACCURACY, 100, 2, [EVIDENCE]),
        ("heads_and_losses", "fashion_mnist", "default", ACCURACY, 100, 2, [EVIDENCE, DEFAULT]),
        ("heads_and_losses", "fashion_mnist", "default", AFTER, 1, 3, [EVIDENCE, DEFAULT]),
        ("heads_and_losses", "fashion_mnist", "etf", AFTER, 1, 3, [EVIDENCE]),
        ("heads_and_losses", "fashion_mnist", "etf", ATTACKED, 100, 1, [EVIDENCE]),
        ("attacks_alike", "as_cross_entropy", "etf", ATTACKED, 100, 1, [README, EVIDENCE]),
        ("attacks_alike", "as_frame", "etf", ATTACKED, 100, 1, [README, EVIDENCE]),
        ("attacks_alike", "large_decay", "etf", ATTACKED, 100, 1, [EVIDENCE]),
        ("wider_decay", "fashion_mnist", "bn_wd", ACCURACY, 100, 2, [EVIDENCE]),
        ("wider_decay", "fashion_mnist", "bn_wd", AFTER, 1, 3, [EVIDENCE, BN_WD]),
        ("long_tail", "ratio_50", "default", ACCURACY, 100, 1, [DEFAULT]),
        ("long_tail", "ratio_100", "default", ACCURACY, 100, 1, [DEFAULT]),
        ("long_tail_searched", "fashion_mnist", "logit_adjusted − baseline", ACCURACY, 100, 1, [README, DEFAULT]),
        ("long_tail_searched", "fashion_mnist", "logit_adjusted − baseline", ACCURACY, 100, 1, [EVIDENCE]),
        ("long_tail_searched", "fashion_mnist", "baseline", ACCURACY, 100, 1, [EVIDENCE]),
        ("long_tail_searched", "fashion_mnist", "baseline", FEW, 100, 1, [EVIDENCE]),
        ("long_tail_searched", "fashion_mnist", "default", ACCURACY, 100, 1, [EVIDENCE, DEFAULT]),
        ("long_tail_searched", "fashion_mnist", "default", FEW, 100, 1, [EVIDENCE, DEFAULT]),
        ("long_tail_searched", "fashion_mnist", "default", AFTER, 1, 3, [EVIDENCE, DEFAULT]),
        ("long_tail_searched", "fashion_mnist", "etf_adjusted", ACCURACY, 100, 1, [EVIDENCE, ETF]),
        ("long_tail_searched", "fashion_mnist", "etf_adjusted", FEW, 100, 1, [EVIDENCE, ETF]),
        ("long_tail_searched", "fashion_mnist", "etf_adjusted", AFTER, 1, 3, [EVIDENCE, ETF]),
        ("long_tail_searched", "fashion_mnist", "normface_adjusted", ACCURACY, 100, 1, [EVIDENCE, NORMFACE]),
        ("long_tail_searched", "fashion_mnist", "normface_adjusted", FEW, 100, 1, [EVIDENCE, NORMFACE]),
        ("long_tail_searched", "fashion_mnist", "bn_wd_adjusted", ACCURACY, 100, 1, [EVIDENCE, BN_WD]),
        ("long_tail_searched", "fashion_mnist", "bn_wd_adjusted", FEW, 100, 1, [EVIDENCE, BN_WD]),
        ("long_tail_searched", "fashion_mnist", "nearest_etf_adjusted − etf_adjusted", ACCURACY, 100, 1, [EVIDENCE]),
        ("long_tail", "ratio_50", "logit_adjusted", ACCURACY, 100, 1, [EVIDENCE]),
        ("long_tail", "ratio_100", "logit_adjusted", ACCURACY, 100, 1, [EVIDENCE]),
        ("label_noise", "noise_20", "short", ACCURACY, 100, 1, [README]),
        ("terminal_phase", "fashion_mnist", "tpt_step", ACCURACY, 100, 2, [TPT]),
        ("supcon_noise", "noise_40", "supcon", ACCURACY, 100, 1, [SUPCON]),
        ("pretrained_cells", "free", "normface", ACCURACY, 100, 1, [README, EVIDENCE]),
        ("pretrained_cells", "free", "normface", AFTER, 1, 3, [EVIDENCE]),
        ("pretrained_cells", "free", "etf", AFTER, 1, 3, [EVIDENCE]),
        ("pretrained_cells", "free", "logit_adjusted", ACCURACY, 100, 1, [EVIDENCE]),
        ("pretrained_cells", "frozen", "normface", "robustness.long_tail.test.balanced", 100, 1, [EVIDENCE]),
        ("all_images", "fashion_mnist", "mixup", ACCURACY, 100, 2, [EVIDENCE]),
        ("all_images", "fashion_mnist", "etf", ACCURACY, 100, 2, [EVIDENCE, ETF]),
        ("all_images", "fashion_mnist", "bn_wd", ACCURACY, 100, 2, [EVIDENCE, BN_WD]),
        ("all_images", "fashion_mnist", "default", ACCURACY, 100, 2, [EVIDENCE, DEFAULT]),
        ("all_images", "fashion_mnist", "default", AFTER, 1, 4, [EVIDENCE, DEFAULT]),
        ("all_images", "fashion_mnist", "etf", "robustness.transfer.mean.linear", 100, 1, [EVIDENCE, ETF]),
        ("default", "balanced", "etf", "robustness.ood.mean_auroc.near.msp", 100, 1, [EVIDENCE]),
    ],
)  # fmt: skip
def test_differences_told_in_words_are_those_of_the_runs(study, data, arm, measure, factor, digits, documents):
    """Mean and interval by scipy from the values of the runs, as the documents write them."""
    content = json.loads((STUDIES / study / "results.json").read_text())
    (table,) = (t for t in content["statistics"] if (t["data"], t["measure"]) == (data, measure))
    by_seed = {entry["arm"]: entry["by_seed"] for entry in table["arms"]}
    arm, _, other = arm.partition(" − ")
    base = other or content["study"]["baseline"] or next(iter(content["study"]["arms"]))
    test = stats.ttest_rel(*([factor * by_seed[name][seed] for seed in by_seed[base]] for name in (arm, base)))
    interval = test.confidence_interval(0.95)
    mean = factor * statistics.mean(by_seed[arm][seed] - by_seed[base][seed] for seed in by_seed[base])
    told = f"{mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    for name in documents:
        text = " ".join((digest.ROOT / name).read_text().replace("\n#", " ").split())
        assert (told if name.endswith(".yaml") else told.replace("-", "−")) in text, (name, told)


@pytest.mark.parametrize(
    ("study", "arm", "measure", "factor", "digits", "documents"),
    [
        ("heads_and_losses", "baseline", "at_end.test.loss", 1, 2, [README, EVIDENCE]),
        ("heads_and_losses", "baseline", AFTER, 1, 2, [README, EVIDENCE]),
        ("heads_and_losses", "baseline", "robustness.calibration.before.ece", 100, 1, [README, EVIDENCE]),
        ("heads_and_losses", "baseline", "robustness.calibration.after.ece", 100, 1, [README, EVIDENCE, DEFAULT]),
        ("heads_and_losses", "default", "robustness.calibration.after.ece", 100, 1, [DEFAULT]),
        ("heads_and_losses", "default", "robustness.calibration.risk_coverage.aurc", 1, 3, [DEFAULT]),
        ("wider_decay", "bn_wd", "robustness.calibration.risk_coverage.aurc", 1, 3, [EVIDENCE, BN_WD]),
        ("wider_decay", "baseline", AFTER, 1, 3, [EVIDENCE]),
        ("as_good_as", "bn_wd", "at_end.train.nc1", 1, 3, [README, EVIDENCE, BN_WD]),
        ("as_good_as", "baseline", "at_end.train.nc1", 1, 3, [README, EVIDENCE, BN_WD]),
        ("as_good_as", "bn_wd", "robustness.calibration.after.aurc", 1, 3, [README, EVIDENCE, BN_WD]),
        ("as_good_as", "baseline", "robustness.calibration.after.aurc", 1, 3, [README, EVIDENCE, BN_WD]),
        ("heads_and_losses", "spectral_decoupling", "robustness.calibration.after.ece", 100, 1, [EVIDENCE]),
        ("supcon_noise", "supcon", ACCURACY, 100, 1, [SUPCON]),
        ("supcon_noise", "etf_dr", ACCURACY, 100, 1, [SUPCON]),
        ("supcon_noise", "baseline", ACCURACY, 100, 1, [SUPCON]),
    ],
)
def test_levels_told_in_words_are_those_of_the_runs(study, arm, measure, factor, digits, documents):
    content = json.loads((STUDIES / study / "results.json").read_text())
    table = next(t for t in content["statistics"] if t["measure"] == measure)  # of the first setting
    (values,) = (entry["by_seed"].values() for entry in table["arms"] if entry["arm"] == arm)
    for name in documents:
        assert f"{factor * statistics.mean(values):.{digits}f}" in (digest.ROOT / name).read_text(), name


def method_table(recipe):
    text = digest.filled(f"<!-- method: {recipe} -->\n<!-- end of method -->", STUDIES, up="../")
    return [line for line in text.splitlines() if line.startswith("| [")]


def test_a_recipe_is_compared_with_cross_entropy_in_every_study_that_has_both():
    rows = method_table("etf")
    content = json.loads((STUDIES / "second_model" / "results.json").read_text())
    nc1 = {
        (cell["arm"], cell["seed"]): content["runs"][cell["key"]]["summary"]["at_end"]["train"]["nc1"]
        for cell in content["cells"]
        if cell["arm"] in ("baseline", "etf")
    }
    difference = statistics.mean(nc1["etf", seed] - nc1["baseline", seed] for seed in range(5))
    row, fixed_or_learned = [row for row in rows if "second_model" in row]
    assert fixed_or_learned.startswith(
        f"{row.partition(', `etf`')[0]}, `etf` − `normface`, n = 5 | +0.60 [+0.09, +1.11] ≥ |"
    )
    assert row.startswith("| [second_model](../benchmarks/studies/second_model/report.md), `etf`, n = 5 | +0.56 [")
    assert f"| {difference:.4f} [".replace("-", "−") in row
    with_both = {
        path.parent.name
        for path in STUDIES.glob("*/results.json")
        for study in [json.loads(path.read_text())["study"]]
        if any(arm["recipe"] == "etf" for arm in study["arms"].values())
        and study["arms"][study["baseline"] or next(iter(study["arms"]))]["recipe"] == "baseline"
    }
    assert {row.partition("]")[0].removeprefix("| [") for row in rows} == with_both


def test_a_row_says_what_else_its_arm_changes():
    """On the long tail of `default` the arm trains with logit adjustment, which the baseline does not."""
    against_baseline, alike = [row for row in method_table("etf") if "tail_50" in row]
    assert ", `etf` with `loss: logit_adjusted`, n = 3 | +2.59 [" in against_baseline
    assert ", `etf` − `logit_adjusted`, n = 3 | +0.08 [−1.66, +1.82] |" in alike


def test_an_arm_of_another_name_counts_where_the_recipe_is_all_that_differs_from_the_baseline():
    """Both have logit adjustment: the row names the arm that it is compared with, which is not plain cross-entropy."""
    (row,) = [row for row in method_table("bn_wd") if "long_tail_searched" in row]
    assert ", `bn_wd_adjusted` − `logit_adjusted`, n = 10 | −0.39 [−1.10, +0.33] |" in row
    (row,) = [row for row in method_table("default") if "long_tail_searched" in row]
    assert ", `default` − `logit_adjusted` against `loss: logit_adjusted`, n = 10 | +0.43 [" in row


def test_a_contrast_counts_where_the_recipe_is_all_that_differs():
    rows = [row for row in method_table("bn_wd") if "last_bn" in row]
    assert len(rows) == 6 and "`bn_1e-2` − `plain_1e-2`, n = 3 | +0.82 [−0.23, +1.87] |" in rows[-1]


def test_without_a_study_there_is_a_sentence():
    text = digest.filled("<!-- method: orthoplex -->\n<!-- end of method -->", STUDIES)
    assert "No finished study of ours compares it with the recipe `baseline`." in text


def test_a_recipe_is_shown_beside_the_baseline_of_its_study_where_no_study_has_it_beside_cross_entropy():
    rows = method_table("supcon")
    assert len(rows) == 3 and all("supcon_noise" in row and "`supcon` − `etf_dr`, n = 3" in row for row in rows)
    assert "| −30.56 [−35.39, −25.73] ▼ |" in rows[-1]


def test_forms_of_a_recipe_are_shown_where_no_study_has_it_beside_cross_entropy():
    rows = [row for row in method_table("finetune") if "free" in row]
    assert len(rows) == 4 and all("pretrained_cells" in row and " − `linear`" in row for row in rows)
    content = json.loads((STUDIES / "pretrained_cells" / "results.json").read_text())
    accuracy = {
        (cell["arm"], cell["seed"]): content["runs"][cell["key"]]["summary"]["at_end"]["test"]["accuracy"]
        for cell in content["cells"]
        if cell["data"] == "free"
    }
    difference = statistics.mean(
        100 * (accuracy["normface", seed] - accuracy["linear", seed]) for seed in range(760, 770)
    )
    (row,) = (row for row in rows if "`normface`" in row)
    assert f"with `model.head: cosine` against `model.norm: none`, n = 10 | +{difference:.2f} [" in row


def test_the_line_under_a_table_names_the_margins_that_its_signs_hang_on():
    measures = "at_end.test.accuracy, at_end.train.nc1, robustness.calibration.after.nll"
    text = digest.filled(f"<!-- study: as_good_as; measures: {measures} -->\n<!-- end of study -->", STUDIES)
    assert "Margins: 0.30, none, 0.02 (by column)." in text
    text = digest.filled("<!-- study: as_good_as; measures: at_end.train.nc1 -->\n<!-- end of study -->", STUDIES)
    assert "Margins" not in text
