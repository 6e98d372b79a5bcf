"""timm's train.py: names, hooks, resume. `timm_train.py` stands in for the script, which timm's package lacks.

TIMM_TRAIN=/path/to/train.py (and TIMM_VALIDATE) has the slow test run the real ones.
"""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from digits_cases import ROOT, SCRIPTS, digits
from timm.data import create_dataset
from torch import nn

import ncreg.integrations.timm as integration
from ncreg import ETFHead, TPTScheduler, param_groups
from ncreg.functional import intra_class_cosine_loss, supcon_loss
from ncreg.integrations.timm import REQUESTS, LossTerms, TerminalPhaseEnded, _hooks
from tests import warm_start

UNCLOSED = ("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # by timm
STAND_IN = ROOT / "tests" / "integrations" / "timm_train.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PHASE = "terminal_phase={'max_epochs': 9, 'min_terminal': 2, 'threshold': 0.9}"
TERMS = "loss_terms={'IntraClassCosineLoss': {'weight': 0.1, 'phase': 'terminal'}, 'CenterLoss': 0.01}"


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    yield
    integration.uninstall()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return digits.write_folder(tmp_path_factory.mktemp("digits"), 300)


def train(images, output, *more, launcher=(), check=True):
    command = [*launcher, str(STAND_IN), "--device-modules", "ncreg.integrations.timm"]
    command += ["--data-dir", str(images), "--model", "ncreg_etf.test_resnet", "--num-classes", "10", "--device", "cpu"]
    command += ["--input-size", "3", "32", "32", "--batch-size", "30", "--epochs", "6", "--scale", "1", "1"]
    done = warm_start.run([*command, "--output", output, *more], environment=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def measured(done):
    return re.findall(r"after epoch (\d+): accuracy (\S+), nc1 (\S+), nc3 (\S+) \((\w+)\)", done.stdout + done.stderr)


def rates(done):
    return re.findall(r"^epoch (\d+) .*rates \[(\S+),", done.stdout, re.MULTILINE)


def listed(done):
    return [result["epoch"] for result in json.loads(re.findall(r"^--result (.*)$", done.stdout, re.MULTILINE)[-1])]


def test_a_killed_run_finds_the_same_end(images, tmp_path):
    arguments = ("--model-kwargs", PHASE, TERMS)
    whole = train(images, tmp_path / "whole", *arguments)
    epochs = measured(whole)
    phases = [phase for *_, phase in epochs]
    onset = phases.index("terminal") + 1
    assert phases[-1] == "finished" and "the terminal phase ended" in whole.stdout and len(epochs) < 9
    assert listed(whole) == list(range(len(epochs)))  # those of the last epoch too
    killed = train(images, tmp_path / "cut", *arguments, "--kill-after", str(onset + 1), check=False)
    assert killed.returncode == 9 and measured(killed) == epochs[:onset]  # the last epoch was saved, not closed
    last = tmp_path / "cut" / "last.pth.tar"
    resumed = train(images, tmp_path / "cut", *arguments, "--resume", str(last))
    assert measured(resumed)[0] == epochs[onset]  # closed from the checkpoint: the same numbers
    assert [row[-1] for row in measured(resumed)] == phases[onset:]
    assert rates(resumed) == rates(whole)[onset + 1 :]
    again = train(images, tmp_path / "cut", *arguments, "--resume", str(last))
    assert not rates(again) and measured(again)[-1][-1] == "finished"  # nothing is left to train


def test_resuming_without_the_optimizer_or_at_an_epoch_that_was_closed_is_refused(images, tmp_path):
    arguments = ("--model-kwargs", PHASE, "--stop-epoch", "2")
    train(images, tmp_path, *arguments)
    resumed = train(
        images, tmp_path, *arguments, "--resume", f"{tmp_path}/last.pth.tar", "--no-resume-opt", check=False
    )
    assert resumed.returncode == 1 and "resume with the optimizer's state" in resumed.stderr
    last = tmp_path / "last.pth.tar"
    back = train(images, tmp_path, *arguments, "--resume", str(last), "--start-epoch", "0", check=False)
    assert back.returncode == 1 and "leave out --start-epoch" in back.stderr
    assert torch.load(last, weights_only=False)["epoch"] == 1  # found with the first update, before anything is saved


def test_the_run_ends_with_an_epoch_that_is_saved(images, tmp_path):
    phase = "terminal_phase={'max_epochs': 20, 'threshold': 0.01, 'min_terminal': 1, 'max_terminal': 1}"
    done = train(images, tmp_path, "--model-kwargs", phase, "--val-interval", "3")
    assert [row[-1] for row in measured(done)] == ["terminal", "finished", "finished"]
    assert listed(done) == [2] and torch.load(tmp_path / "last.pth.tar", weights_only=False)["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "step", "plateau", "none", "on updates"])
def test_every_schedule_can_be_inside(schedule, images, tmp_path):
    flags = ["--sched-on-updates"] if schedule == "on updates" else ["--sched", schedule]
    arguments = ("--model-kwargs", PHASE, *flags)
    whole = train(images, tmp_path, *arguments)
    train(images, tmp_path / "cut", *arguments, "--stop-epoch", "2")
    resumed = train(images, tmp_path / "cut", *arguments, "--resume", f"{tmp_path}/cut/last.pth.tar")
    assert rates(resumed)[0] == rates(whole)[2]


@pytest.mark.slow
def test_two_processes_train_as_the_script_does(images, tmp_path, free_port):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}")
    done = train(images, tmp_path, "--model-kwargs", PHASE, TERMS, "--model-ema", launcher=launcher)
    by_epoch = {}
    for epoch, *row in measured(done):
        by_epoch.setdefault(epoch, []).append(row)
    assert all(len(rows) == 2 and rows[0] == rows[1] for rows in by_epoch.values())
    assert "finished" in {rows[0][-1] for rows in by_epoch.values()}


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_the_example_runs_stops_and_resumes(real, tmp_path):
    scripts = [os.environ.get("TIMM_TRAIN"), os.environ.get("TIMM_VALIDATE")] if real else [str(STAND_IN)]
    if not scripts[0]:
        pytest.skip("TIMM_TRAIN is the path of timm's train.py")
    command = [
        sys.executable,
        str(SCRIPTS / "timm_digits.py"),
        *filter(None, scripts),
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert measured(done)[-1][-1] == "finished"


def test_scripts_without_the_flag_run_by_the_module(tmp_path):
    checkpoint = tmp_path / "last.pth.tar"
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=10)
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys\n"
        "from timm.models import create_model, load_checkpoint, resolve_model_input_args\n"
        "arguments = resolve_model_input_args(sys.argv[1], {'input_size': [3, 32, 32]}, num_classes=10)\n"
        "model = create_model(**arguments)\n"
        "load_checkpoint(model, sys.argv[2])\n"
        "print(type(model.head).__name__, model.pretrained_cfg['input_size'])\n"
    )
    command = ["-m", "ncreg.integrations.timm", str(script), "ncreg_etf.test_resnet", str(checkpoint)]
    done = warm_start.run(command, environment=ENVIRONMENT)
    assert done.stdout == "ETFHead (3, 160, 160)\n", done.stderr
    missing = warm_start.run([*command[:2], "no.py"], environment=ENVIRONMENT)
    assert missing.returncode == 1 and "no script at" in missing.stderr


# names


def test_a_name_builds_what_swap_head_builds():
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=7, in_chans=1, project=12, head_args={"scale": 3.0})
    assert isinstance(model.head, ETFHead) and model.head.scale == 3.0
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7) and model.head_hidden_size == 12
    assert isinstance(timm.create_model("ncreg_linear", backbone="test_vit", num_classes=3).head, nn.Module)


def test_the_backbones_tag_and_fixed_size_come_through():
    arguments = timm.models.resolve_model_input_args("ncreg_etf.test_vit.r160_in1k", {"input_size": [3, 32, 32]})
    model = timm.create_model(**arguments, num_classes=3)
    assert arguments["img_size"] == (32, 32) and model.backbone.pretrained_cfg["tag"] == "r160_in1k"
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("ncreg_etf", {}, ValueError, "needs a backbone: ncreg_etf.resnet18"),
        ("ncreg_etf.test_resnet", {"backbone": "test_vit"}, ValueError, "named twice"),
        ("ncreg_etf.rasnet18", {}, ValueError, "close: resnet18"),
        ("ncreg_etf.test_resnet", {"loss_terms": "SupConLoss"}, TypeError, "must be a dict; on the command line"),
        ("ncreg_etf.test_resnet", {"head_args": 3}, TypeError, "head_args=3 must be a dict"),
    ],
)
def test_a_wrong_name_or_argument_is_refused(name, arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        timm.create_model(name, num_classes=10, **arguments)


# hooks


def test_gamma_decays_as_in_param_groups_and_other_models_are_left_alone():
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=10)
    made = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    expected = param_groups(model, 5e-4)
    assert [{id(p) for p in g["params"]} for g in made.param_groups] == [{id(p) for p in g["params"]} for g in expected]
    assert any(model.norm.weight is p for p in made.param_groups[0]["params"])
    plain = timm.create_model("test_resnet")
    groups = timm.optim.create_optimizer_v2(plain, "sgd", lr=0.1, weight_decay=5e-4).param_groups
    assert [len(g["params"]) for g in groups] == [
        len(g["params"])
        for g in _hooks._ORIGINAL["create_optimizer_v2"](plain, "sgd", lr=0.1, weight_decay=5e-4).param_groups
    ]
    with pytest.raises(ValueError, match="layer_decay_min_scale"):
        timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.5, layer_decay_min_scale=0.1)
    for fallback in ({"fallback_list": ["head*"]}, {"fallback_no_weight_decay": True}):
        with pytest.raises(ValueError, match=f"{next(iter(fallback))}: "):
            timm.optim.create_optimizer_v2(model, "muon", lr=0.1, **fallback)


def test_the_hooks_are_where_scripts_look():
    for module, name in (
        (timm.data, "create_loader"),
        (timm.scheduler, "create_scheduler_v2"),
        (timm.task, "ClassificationTask"),
        (timm.models, "get_pretrained_cfg"),
    ):
        assert getattr(module, name).__module__.startswith("ncreg.integrations.timm"), name
    before = timm.data.create_loader
    integration.install()
    assert timm.data.create_loader is before


def test_uninstalling_gives_timm_its_own_back():
    model, _ = task_of(loss_terms={"SupConLoss": 1.0})
    integration.uninstall()
    assert (REQUESTS.loss_terms, REQUESTS.terms, REQUESTS.classifier) == ({}, None, None)
    places = (timm.data, timm.data.loader, timm.optim, timm.scheduler, timm.task, timm.models, timm.models._factory)
    for place in places:
        for name, original in _hooks._ORIGINAL.items():
            assert getattr(place, name, original) is original
            assert original.__module__.startswith("timm.")
    assert timm.scheduler.create_scheduler_v2(torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=5)[1] == 5


def task_of(**arguments):
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=10, **arguments)
    return model, timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def test_the_loss_is_timms_and_the_weighed_terms():
    model, task = task_of(loss_terms={"IntraClassCosineLoss": 0.5, "SupConLoss": {"weight": 2.0, "temperature": 0.2}})
    images, target = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    model.eval()
    found = task(images, target)
    logits, features = model(images, with_features=True)
    expected = nn.functional.cross_entropy(logits, target) + 0.5 * intra_class_cosine_loss(features, target)
    expected = expected + 2.0 * supcon_loss(features, target, temperature=0.2)
    torch.testing.assert_close(found["loss"], expected)
    with pytest.raises(ValueError, match="need one class a sample"):
        task(images, torch.full((8, 10), 0.1))


def test_terms_fade_in_with_the_terminal_phase_and_keep_their_state():
    model, task = task_of(loss_terms={"CenterLoss": {"weight": 1.0, "phase": "terminal"}})
    images, target = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    assert set(task(images, target)) == {"loss", "output"}  # not yet
    task.terms.ramp = 0.5
    assert "CenterLoss" in task(images, target)
    state = task.get_checkpoint_state()
    _, other = task_of(loss_terms={"CenterLoss": {"weight": 1.0, "phase": "terminal"}})
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert all(map(torch.equal, other.terms.state_dict().values(), task.terms.state_dict().values()))


def test_a_term_that_makes_its_own_logits_reads_the_head():
    model = timm.create_model("ncreg_linear.test_resnet", num_classes=10, loss_terms={"ChunkedCrossEntropyLoss": 0.5})
    task = timm.task.ClassificationTask(model.eval(), nn.CrossEntropyLoss(), verbose=False)
    images, target = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    expected = 1.5 * nn.functional.cross_entropy(model(images), target)
    torch.testing.assert_close(task(images, target)["loss"], expected)


def test_a_nearest_head_is_handed_the_training_batches():
    arguments = {"num_classes": 3, "head_args": {"every": 1, "momentum": 1.0}}
    model = timm.create_model("ncreg_nearest_etf.test_resnet", **arguments)
    task = timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    images, target = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    with torch.no_grad():
        features = nn.functional.normalize(model(images, with_features=True).features, dim=1)
    first = model.head.weight.clone()
    expected = nn.functional.cross_entropy(model(images), target)
    found = task(images, target)
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()  # after the head has moved
    means = torch.stack([features[target == c].mean(0) for c in range(3)])
    torch.testing.assert_close(model.head.means, means)
    assert not torch.allclose(model.head.weight, first) and set(found) == {"loss", "output"}
    model.eval()
    task(images, target)
    with torch.no_grad():
        task(images, target)
    assert int(model.head.updates) == 1
    with pytest.raises(ValueError, match="nearest_etf needs one class a sample"):
        task(images, torch.full((6, 3), 0.3))


def test_a_nearest_head_that_no_task_updates_is_said():
    model = timm.create_model("ncreg_nearest_etf.test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="nearest_etf: timm's ClassificationTask alone hands it the batches"):
        timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)
    timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)


def test_clipping_leaves_out_the_head_and_nothing_else():
    model, task = task_of()
    assert len(task.get_clip_parameters(exclude_head=True)) == len(list(model.parameters()))  # a fixed head has none
    learned = timm.create_model("ncreg_linear.test_resnet", num_classes=10)
    kept = timm.task.ClassificationTask(learned, nn.CrossEntropyLoss(), verbose=False).get_clip_parameters(True)
    assert len(kept) == len(list(learned.parameters())) - len(list(learned.head.parameters()))


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"Supcon": 1.0}, "loss_terms.*SupConLoss"),
        ({"SupConLoss": {"phase": "last"}}, "phase.*terminal"),
        ({"LogitAdjustedLoss": 1.0}, "LogitAdjustedLoss.*class_counts"),
        ({"SupConLoss": {"temp": 1.0}}, r"loss_terms\['SupConLoss'\]\['temp'\]=1.0 is unknown; known: .*temperature"),
    ],
)
def test_a_wrong_term_is_refused(requested, message, unchecked):
    with pytest.raises(ValueError, match=message):
        LossTerms(requested, timm.create_model("ncreg_etf.test_resnet", num_classes=10))


def test_what_cannot_be_honoured_is_refused(images, unchecked):
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=10, terminal_phase=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="--naflex-loader"):
        timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)
    REQUESTS.terminal_phase = {"extent": 1}
    with pytest.raises(ValueError, match="unknown extent; known: .*extend"):
        timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)
    REQUESTS.terminal_phase = {}
    whole = create_dataset("", root=str(images), split="train", is_training=True)
    whole.transform = lambda image: torch.zeros(3, 32, 32)
    part = torch.utils.data.Subset(whole, range(5))  # of the whole set, accuracy would be that of other images too
    timm.data.create_loader(part, (3, 32, 32), 5, is_training=True, device=torch.device("cpu"), use_prefetcher=False)
    with pytest.raises(ValueError, match="a Subset does not hand its transform"):
        timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)
    model = timm.create_model("ncreg_etf.test_resnet", num_classes=10, loss_terms={"SupConLoss": 1.0})
    with pytest.raises(ValueError, match="ClassificationTask alone"):
        timm.scheduler.create_scheduler_v2(torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=5)
    model, _ = task_of(loss_terms={"SupConLoss": {"phase": "terminal"}})
    with pytest.raises(ValueError, match="need terminal_phase"):
        timm.scheduler.create_scheduler_v2(torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=5)


@pytest.mark.filterwarnings(*UNCLOSED)
@pytest.mark.parametrize("of_the_teacher", [{}, {"loss_terms": {"CenterLoss": 1.0}, "terminal_phase": True}])
def test_a_teacher_of_ncreg_leaves_the_students_requests_alone(images, of_the_teacher):
    """Distillation makes its teacher after the student: phase and terms are the student's all the same."""
    create_loader_of(images)
    phase = {"max_epochs": 7, "threshold": 0.5}
    student, task = task_of(terminal_phase=phase, loss_terms={"SupConLoss": 0.5})
    teacher = timm.create_model("ncreg_linear.test_resnet", num_classes=10, **of_the_teacher)
    optimizer = timm.optim.create_optimizer_v2(student, "sgd", lr=0.1)
    driver, epochs = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5)
    assert epochs == 7 and driver.scheduler.threshold == 0.5
    assert driver.classifier is student is not teacher
    assert driver.terms is task.terms and list(task.terms.weights) == ["SupConLoss"]


def create_loader_of(images):
    dataset = create_dataset("", root=str(images), split="train", is_training=True)
    return timm.data.create_loader(
        dataset, (3, 32, 32), 50, is_training=True, num_workers=0, device=torch.device("cpu"), use_prefetcher=False
    )


@pytest.mark.filterwarnings(*UNCLOSED)
def test_the_clean_loader_shows_the_training_images_as_validation_is_shown(images):
    shared = {"input_size": (3, 32, 32), "batch_size": 50, "num_workers": 0, "device": torch.device("cpu")}
    dataset = create_dataset("", root=str(images), split="train", is_training=True)
    augmented = timm.data.create_loader(dataset, is_training=True, scale=(0.1, 0.2), **shared)
    timm.data.create_loader(create_dataset("", root=str(images), split="validation"), crop_pct=1.0, **shared)
    clean = _hooks.clean_loader()
    first, second = (torch.cat([batch for batch, _ in clean]) for _ in range(2))
    assert len(first) == 300 and torch.equal(first, second)
    assert "RandomResizedCrop" in str(augmented.dataset.transform)  # the training loader has kept its own


@pytest.mark.filterwarnings(*UNCLOSED)
@pytest.mark.parametrize(("training", "shown"), [("random", "bicubic"), ("nearest", "nearest")])
def test_without_a_validation_split_the_clean_images_are_as_the_model_asks_for(training, shown, images):
    model = timm.create_model("ncreg_etf.test_byobnet", num_classes=10)
    shared = {"input_size": (3, 32, 32), "batch_size": 50, "num_workers": 0, "device": torch.device("cpu")}
    dataset = create_dataset("", root=str(images), split="train", is_training=True)
    timm.data.create_loader(dataset, is_training=True, interpolation=training, **shared)
    config = timm.data.resolve_data_config({}, model=model)
    expected = timm.data.create_transform(
        (3, 32, 32),
        interpolation=shown,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        use_prefetcher=True,
    )
    assert config["interpolation"] == "bicubic" and config["crop_pct"] == 0.95
    assert str(_hooks.clean_loader().dataset.transform) == str(expected)


@pytest.mark.filterwarnings(*UNCLOSED)
def test_the_run_ends_with_the_interrupt_that_train_py_catches(images):
    model = timm.create_model(
        "ncreg_etf.test_resnet",
        num_classes=10,
        terminal_phase={"threshold": 0.01, "min_terminal": 1, "max_terminal": 1},
    )
    shared = {"input_size": (3, 32, 32), "batch_size": 100, "num_workers": 0, "device": torch.device("cpu")}
    loader = timm.data.create_loader(create_dataset("", root=str(images), split="train"), is_training=True, **shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule, epochs = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5, updates_per_epoch=3)
    assert epochs == 5 and isinstance(schedule.scheduler, TPTScheduler)
    schedule.step(1, 99.0)  # per cent of validation accuracy: of no concern
    assert schedule.scheduler.onset_epoch == 1
    assert sum(len(target) for _, target in loader) == 300
    schedule.step(2)  # not validated, hence not saved
    assert schedule.scheduler.finished and len(list(loader)) == 3
    schedule.step(3, 99.0)
    with pytest.raises(TerminalPhaseEnded, match="epoch 3 of at most 5"):
        iter(loader)


@pytest.mark.filterwarnings(*UNCLOSED)
def test_a_schedule_that_ends_at_rate_zero_before_the_onset_is_said_once(images):
    timm.create_model("ncreg_etf.test_resnet", num_classes=10, terminal_phase={"max_epochs": 6})
    shared = {"input_size": (3, 32, 32), "batch_size": 300, "num_workers": 0, "device": torch.device("cpu")}
    timm.data.create_loader(create_dataset("", root=str(images), split="train"), is_training=True, **shared)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=1)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(1, 5):
            schedule.step(epoch, 50.0)
            told.append(sum("come to rate 0" in str(warning.message) for warning in caught))
    assert told == [0, 1, 1, 1]


@pytest.mark.filterwarnings(*UNCLOSED)
def test_an_epoch_that_was_closed_is_not_trained_again(images):
    timm.create_model("ncreg_etf.test_resnet", num_classes=10, terminal_phase=True)
    shared = {"input_size": (3, 32, 32), "batch_size": 300, "num_workers": 0, "device": torch.device("cpu")}
    timm.data.create_loader(create_dataset("", root=str(images), split="train"), is_training=True, **shared)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=5, updates_per_epoch=1)
    schedule.step(1, 50.0)
    schedule.step(1)  # as train.py does after loading a checkpoint
    schedule.step_update(1)  # and this with --sched-on-updates; of a single update, an epoch shows it at its end alone
    with pytest.raises(ValueError, match="stands at epoch 1: leave out --start-epoch"):
        schedule.step(1, 50.0)
