"""Trials: what identifies a run, and how jobs share them."""

from miniature_study import study_of, trials_of
from PIL import Image

from recipes.core.cli import parse
from recipes.core.config import TrainConfig
from recipes.study.trials import _folder_fingerprint, config_hash, dotted_config, shard_of


def test_a_configuration_from_before_a_new_key_is_the_one_with_its_default():
    config = dotted_config(parse(["etf"]))
    old = {key: value for key, value in config.items() if key not in ("data.imbalance", "optim.ema")}
    old["loss"] = {"cross_entropy": {"weight": 1.0, "phase": "always", "args": {}}}
    assert config_hash(old) == config_hash(config)
    assert config_hash(config | {"data.imbalance": 10.0}) != config_hash(config)


def test_what_changes_no_number_changes_no_identity():
    def of(*more):
        return config_hash(dotted_config(parse(["etf", *more])))

    assert of() == of("--out=elsewhere", "--quiet=true", "--tensorboard=true", "--data.root=/there")
    assert len({of(), of("--seed=1"), of("--optim.lr=0.2"), of("--data.train_size=100")}) == 4
    folder = ["--data.name=folder", "--data.root"]
    assert of(*folder, "a") != of(*folder, "b")


def test_shards_part_the_runs_and_a_shared_run_goes_to_one_job():
    study = study_of(arms={name: {"recipe": "etf" if name == "twin" else name} for name in ("baseline", "etf", "twin")})
    trials = trials_of(study)
    # etf and twin are one run
    parts = [{trial.key for trial in shard_of(trials, (index, 3))} for index in (1, 2, 3)]
    assert set.union(*parts) == {trial.key for trial in trials} and sum(map(len, parts)) == 4
    assert shard_of(trials, (1, 1)) == [trial for trial in trials if trial.arm != "twin"]


def test_a_folder_of_images_is_known_by_its_images_and_not_by_its_place(tmp_path, monkeypatch):
    def folder(name, *shades):
        for place, shade in enumerate(shades):
            (tmp_path / name / "im" / f"c{place % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade).save(tmp_path / name / "im" / f"c{place % 2}" / f"{place}.bmp")
        monkeypatch.chdir(tmp_path / name)
        _folder_fingerprint.cache_clear()
        return config_hash(dotted_config(parse(["etf", "--data.name=folder", "--data.root=im"])))

    one = folder("here", 10, 20, 30, 40)
    assert folder("there", 10, 20, 30, 40) == one
    assert len({one, folder("other", 10, 20, 30, 41), folder("here", 10, 20, 30, 40, 50)}) == 3


def test_a_file_of_weights_is_known_by_its_bytes_and_not_by_its_place(tmp_path):
    def weights(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return config_hash(dotted_config(parse(["finetune", f"--model.weights={tmp_path / name}"])))

    one = weights("here/start.pth", b"tensors")
    assert weights("there/other.pth", b"tensors") == one
    assert len({one, weights("here/changed.pth", b"tensor"), config_hash(dotted_config(parse(["finetune"])))}) == 3


def test_the_config_of_a_study_cell_is_what_train_resolves():
    trial = trials_of(study_of())[1]
    assert trial.argv[0] == "etf" and trial.config == dotted_config(parse(list(trial.argv)))
    assert set(trial.config) == set(dotted_config(TrainConfig()))
