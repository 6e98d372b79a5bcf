"""The stages of a comparison: plan its trials, run the missing ones, tabulate, and write the results and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.core.interrupt import StopRequest
from recipes.study import results
from recipes.study.measures import MissingValueError, value_of
from recipes.study.paired_tests import compare_arms, compare_contrasts
from recipes.study.progress import Progress
from recipes.study.records import Records, RunRecord, collect, is_done, missing_trials, read_run
from recipes.study.report import write_report
from recipes.study.runner import Outcome, RunSettings, run_trials
from recipes.study.search import chosen_points, search_results
from recipes.study.spec import Evaluations, Measure, Study
from recipes.study.trials import Trial, comparison_trials, search_trials, shard_of


def plan_trials(study: Study, records: Records) -> list[Trial]:
    """All trials of a study: those of the search, and those of the comparison whose searched point is chosen.

    Raises:
        UserError: a trial has an unknown key or a value out of range.
    """
    return [*search_trials(study), *comparison_trials(study, chosen_points(study, records))]


def collect_all(study: Study, known: Records, runs: Path) -> dict[str, RunRecord]:
    """The known records, and those that the folder of runs adds: of the search, then of the comparison."""
    records = collect(search_trials(study), runs, study.evaluations, known)
    return collect(comparison_trials(study, chosen_points(study, records)), runs, study.evaluations, records)


def run_missing(study: Study, records: Records, settings: RunSettings) -> dict[str, RunRecord]:
    """Run this job's share of the missing trials, first the search and then the comparison; return all records."""
    records = dict(records)
    with StopRequest() as stop:
        for searching in (True, False):
            stage = search_trials(study) if searching else comparison_trials(study, chosen_points(study, records))
            trials = missing_trials(shard_of(stage, settings.shard), records, study.evaluations)
            finished = _run_stage(study, trials, settings, stop)
            records = collect(trials, settings.runs, study.evaluations, records)
            if not finished:
                break
    return records


def _run_stage(study: Study, trials: Sequence[Trial], settings: RunSettings, stop: StopRequest) -> bool:
    """Run trials and print a line as each ends; False where a stop was requested."""
    progress = Progress(len(trials), study)

    def report(trial: Trial, outcome: Outcome) -> None:
        print(progress.line(trial, outcome, read_run(trial, settings.runs, study.evaluations)), flush=True)

    return run_trials(trials, study.evaluations, settings, report=report, stop=stop)


def write_results(study: Study, records: Records, out: Path, *, name: str, command: str) -> dict[str, Any]:
    """Write results.json, the files beside it and the report; return the content of results.json as read back.

    Raises:
        UserError: no run has one of the measures.
    """
    trials = plan_trials(study, records)
    content = results.assemble(
        study,
        records,
        trials,
        name=name,
        command=command,
        search=search_results(study, records),
        statistics=tabulate(study, records, trials),
    )
    gone = len(set(records) - set(content["runs"]))
    kept = results.back_up(out) if gone else None
    results.write(out, content, records)
    write_report(out)
    if gone:
        print(f"note: {gone} runs are no part of the study any more; they are kept in {kept}")
    return results.read(out / "results.json")


def tabulate(study: Study, records: Records, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For each data setting and measure: the values by seed, every arm's difference to the baseline, the contrasts.

    Raises:
        MissingValueError: no run has the measure at all; where only some have it, the others count as missing.
    """
    compared = [trial for trial in trials if not trial.searching]
    for measure in study.measures:
        _refuse_unknown(measure, _done_results(compared, records, _required(study, measure)))
    tables = []
    for data in study.settings:
        for measure in study.measures:
            values: dict[str, dict[int, float | None]] = {arm: {} for arm in study.arms}
            for trial in compared:
                if trial.data == data and is_done(records, trial, _required(study, measure)):
                    values[trial.arm][trial.seed] = _value_or_none(records[trial.key].result, measure)
            arms = compare_arms(measure, values, base=study.base, min_seeds=study.min_seeds)
            contrasts = compare_contrasts(measure, values, study.contrasts, min_seeds=study.min_seeds)
            tables.append({"data": data, "measure": measure.name, "arms": arms, "contrasts": contrasts})
    return tables


def _required(study: Study, measure: Measure) -> Evaluations | None:
    """The evaluations that a run must have had before the measure can be taken from it."""
    return study.evaluations if measure.needs_evaluation else None


def _done_results(
    trials: Sequence[Trial], records: Records, evaluations: Evaluations | None
) -> list[Mapping[str, Any]]:
    return [records[trial.key].result for trial in trials if is_done(records, trial, evaluations)]


def _value_or_none(result: Mapping[str, Any], measure: Measure) -> float | None:
    try:
        return value_of(result, measure)
    except MissingValueError:
        return None


def _refuse_unknown(measure: Measure, done: Sequence[Mapping[str, Any]]) -> None:
    """Raise the error of the first run if every run lacks the measure."""
    errors = []
    for result in done:
        try:
            value_of(result, measure)
        except MissingValueError as error:
            errors.append(error)
    if done and len(errors) == len(done):
        raise errors[0]
