"""A run goes on where its images have moved to, if they are the same, and on no others."""

import json
import shutil

import pytest
import yaml
from miniature_study import run as run_study
from miniature_study import write_study
from test_faults_files import killed
from test_unreadable import STREAMED, arguments, broken, make, same_run, split_file

from recipes import evaluate, plot_collapse, robustness
from recipes.core.cli import parse
from recipes.core.config import as_yaml
from recipes.train import main, train
from recipes.training.run_dir import RunDir


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def args(folder, tmp_path):
    return [*arguments(folder, tmp_path), *STREAMED]


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_goes_on_to_the_last_bit_where_its_images_are_now(args, folder, tmp_path, capsys):
    whole = train(parse([*args, "--out", str(tmp_path / "whole")]))
    run = killed(args, tmp_path / "killed", 6)
    there = folder.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"data.root={folder} is not a folder: --data.root FOLDER" in said and said.count("\n") == 1
    assert main(["--resume", str(run), "--data.root", str(there)]) == 0
    same_run(whole, run)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == str(there)
    assert json.loads((run / "images.json").read_text())["root"] == str(there)
    assert evaluate.main([str(run)]) == 0  # on its own test images, which no one has to point to
    (result,) = run.glob("evaluation-*.json")
    summary = json.loads((run / "summary.json").read_text())["at_end"]["test"]
    assert json.loads(result.read_text())["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-9)


@pytest.mark.parametrize("change", ["is gone", "is new", "has changed"])
def test_other_images_are_refused_and_the_run_stays_as_it_was(args, folder, tmp_path, capsys, change):
    run = killed(args, tmp_path / "killed", 6)
    other = shutil.copytree(folder, tmp_path / "other")
    image = other / "b" / "03.png"
    if change == "is new":
        image = shutil.copy(image, other / "b" / "20.png")
    elif change == "is gone":
        image.unlink()
    else:
        shutil.copy(other / "a" / "03.png", image)
    before = contents(run)
    capsys.readouterr()
    assert main(["--resume", str(run), "--data.root", str(other)]) == 2
    assert f"image {image} {change} since it began" in capsys.readouterr().err
    assert contents(run) == before


def test_images_that_were_unreadable_are_known_in_their_new_place(args, folder, tmp_path, capsys):
    image = split_file(folder, "test")
    broken(image, header=True)
    assert main(args) == 2
    (run,) = (tmp_path / "runs").iterdir()
    there = folder.rename(tmp_path / "elsewhere")
    moved = there / image.relative_to(folder)
    moved.unlink()
    capsys.readouterr()
    assert main(["--resume", str(run), "--data.root", str(there)]) == 0
    assert f"left out, as they are gone: {moved}" in capsys.readouterr().err
    assert json.loads((run / "unreadable.json").read_text()) == {"images": [str(moved)]}
    assert evaluate.main([str(run)]) == 0


def test_a_finished_run_is_evaluated_and_plotted_on_its_images_elsewhere_and_on_no_others(
    args, folder, tmp_path, capsys
):
    run = train(parse([*args, "--tpt.threshold", "0.1"]))
    scripts = [(robustness, ["--quick", "--parts", "calibration,terminal_phase,label_noise"]), (plot_collapse, [])]
    results = []
    for place in (folder, tmp_path / "elsewhere"):
        if place != folder:
            folder.rename(place)
        for script, words in scripts:
            assert script.main([str(run), *words, *(["--data.root", str(place)] if place != folder else [])]) == 0
        parts = json.loads((run / "robustness" / "results.json").read_text())["parts"]
        results.append((parts, (run / "collapse" / "view-train.json").read_bytes()))
        shutil.rmtree(run / "robustness")
        shutil.rmtree(run / "collapse")
    assert results[0] == results[1]
    (place / "a" / "00.png").write_bytes((place / "b" / "00.png").read_bytes())
    for script, words in scripts:
        capsys.readouterr()
        assert script.main([str(run), *words, "--data.root", str(place)]) == 2
        assert f"image {place / 'a' / '00.png'} has changed since it began" in capsys.readouterr().err


def test_auto_looks_for_no_run_on_other_images(args, tmp_path):
    run = killed(args, tmp_path / "runs", 6)
    found = [
        RunDir.unfinished(tmp_path / "runs", as_yaml(parse([*args, *words]))) for words in ([], ["--data.root", "x"])
    ]
    assert found[0].path == run and found[1] is None


def test_a_study_goes_on_where_its_images_are_now(folder, tmp_path, capsys):
    """Its runs are known by the images: one that ended is evaluated, one that was killed is trained on."""
    words = {"data.name": "folder", "data.image_size": 28, "data.batch_size": 8, "device": "cpu"}
    words |= {"tpt.max_epochs": 2, "tpt.threshold": 1}
    evaluations = {"preset": "quick", "parts": ["calibration"]}
    study = {"arms": {"baseline": {"recipe": "baseline"}}, "contrasts": [], "seeds": [0], "collapse": True}
    path = write_study(tmp_path / "study", **study, overrides=words | {"data.root": str(folder)})
    assert run_study(path) == 0
    (run,) = path.parent.glob("runs/*/*/summary.json")
    (run.parent / "collapse" / "view-train.json").unlink()
    run.unlink()
    there = folder.rename(tmp_path / "elsewhere")
    write_study(tmp_path / "study", **study, overrides=words | {"data.root": str(there)}, evaluations=evaluations)
    (path.parent / path.stem / "results.json").unlink()
    assert run_study(path) == 0, capsys.readouterr()
    assert run.is_file() and (run.parent / "robustness" / "results.json").is_file()
    assert (run.parent / "collapse" / "view-train.json").is_file()
    assert len(list(path.parent.glob("runs/*/*/config.yaml"))) == 1
