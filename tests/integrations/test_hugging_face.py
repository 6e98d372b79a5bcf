"""Hugging Face: models with `.logits`, Trainer through a terminal phase and back, Accelerate's states."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from digits_cases import ROOT, SCRIPTS
from test_training_set import by_hand, classifier, data
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from ncreg import TPTScheduler, fold, param_groups, swap_head
from ncreg.functional import mse_one_hot_loss
from ncreg.integrations import EpochCloser, measure_training_set
from tests.stand_ins import ModulesToSave

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )

    from ncreg.integrations.transformers import (
        CollapseTrainerCallback,
        ModelWithLoss,
        TrainerSchedule,
        cross_entropy,
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's advice on devices and pinned memory

SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL_VIT, image_size=16, patch_size=8, num_labels=7)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**SMALL_RESNET, num_labels=7)),
}


@pytest.mark.parametrize("path", [None, "by name"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_logits_is_swapped_and_folded_back(name, path):
    model = MODELS[name]().eval()
    path = path and {"vit": "classifier", "resnet": "classifier.1"}[name]
    images = torch.rand(4, 3, 16, 16)
    swapped = swap_head(model, "etf", num_classes=5, classifier=path)
    logits, features = swapped(images, with_features=True)
    assert logits.shape == (4, 5) and features.shape == (4, {"vit": 32, "resnet": 16}[name])
    assert model(images).logits.shape == (4, 7)  # its own output, untouched
    linear = swap_head(model, "linear", num_classes=5, classifier=path).eval()
    folded = fold(linear)
    torch.testing.assert_close(folded(images).logits, linear(images), rtol=1e-4, atol=1e-5)
    assert type(folded(images)) is type(model(images)) and len(folded.config.id2label) == 5
    assert folded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("head", ["linear", "keep"])
@pytest.mark.parametrize("names", [("a", "b", "c"), None])
def test_a_folded_model_has_the_names_of_the_classes_that_it_tells_apart(names, head):
    """As many classes as before may be others; without names nothing says so, and the model's own stay."""
    model = MODELS["vit"]()
    model.num_labels = model.config.num_labels = 3
    model.config.id2label, model.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    model.classifier = torch.nn.Linear(32, 3)
    classifier = swap_head(model, head).eval()
    classifier.class_names = names
    config = fold(classifier).config
    assert config.id2label == dict(enumerate(names or "xyz"))
    assert config.label2id == {name: place for place, name in enumerate(names or "xyz")}
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


def train(folder, *, stop=None, resume=None, epochs=40, give=None, **saving):
    model = ModelWithLoss(classifier())
    optimizer = torch.optim.SGD(param_groups(model, 5e-4), lr=0.1, momentum=0.9)
    inner = CosineAnnealingLR(optimizer, 5 * 30)
    limits = {"max_epochs": 40, "min_terminal": 3, "threshold": 0.6}
    scheduler = TPTScheduler(optimizer, inner, interval="update", **limits)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop |= stop is not None and state.epoch >= stop

    def collate(rows):
        return {"pixel_values": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}

    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **saving,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data(30),
        data_collator=collate,
        optimizers=(optimizer, TrainerSchedule(scheduler)),
        callbacks=[CollapseTrainerCallback(DataLoader(data(30), 10)), Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    if give == "trainer":
        return scheduler, trainer
    history = [row for row in trainer.state.log_history if "collapse_nc1" in row]
    return model.state_dict(), scheduler, history


SAVING = [{"save_strategy": "epoch"}, *({"save_strategy": "steps", "save_steps": steps} for steps in (5, 6))]


@pytest.mark.parametrize("saving", SAVING)  # an epoch has 5 steps: 6 saves within one
def test_a_resumed_trainer_is_the_same_to_the_bit(saving, tmp_path):
    weights, scheduler, history = train(tmp_path / "whole", **saving)
    assert scheduler.finished and scheduler.onset_epoch and len(history) == scheduler.last_epoch < 40
    train(tmp_path / "cut", stop=scheduler.onset_epoch + 1, **saving)
    again, resumed, rows = train(tmp_path / "cut", resume=True, **saving)
    assert rows == history and resumed.state_dict() == scheduler.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    if saving["save_strategy"] == "epoch":
        with pytest.raises(
            ValueError, match=r"the run ended with epoch .*: nothing is left to train; .*resume_from_checkpoint=FOLDER"
        ):
            train(tmp_path / "cut", resume=True, **saving)


def test_a_run_resumed_from_its_last_step_closes_the_last_epoch(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5, "epochs": 3}
    weights, scheduler, history = train(tmp_path, **saving)
    assert scheduler.epoch == len(history) == 3
    again, resumed, rows = train(tmp_path, resume=str(tmp_path / "checkpoint-15"), **saving)
    assert rows == history and resumed.state_dict() == scheduler.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_second_training_beside_a_scheduler_that_goes_on_is_refused(tmp_path):
    """Its epochs had been neither measured nor counted, up to the number of those before."""
    scheduler, trainer = train(tmp_path, epochs=2, save_strategy="no", give="trainer")
    assert scheduler.epoch == 2 and not scheduler.finished
    with pytest.raises(ValueError, match="begins at epoch 0, the TPTScheduler stands at epoch 2.*resume_from_check"):
        trainer.train()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("by_the_loss", [False, True])
def test_a_nearest_head_is_handed_each_training_batch_once(by_the_loss, wrapped):
    """Running means by a plain loop over unit features, of the batches in training mode alone; PEFT may wrap it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).double()
    inner = swap_head(network, "nearest_etf", num_classes=3, input_size=(8,), head_args={"every": 2, "momentum": 0.5})
    head = copy.deepcopy(inner.head)
    inner.head = ModulesToSave(inner.head, head) if wrapped else head

    def loss(logits, features, labels):
        if by_the_loss:
            head.update(features.detach(), labels)
        return torch.nn.functional.cross_entropy(logits, labels)

    model = ModelWithLoss(inner, loss)
    means, seen, labels = head.weight.clone(), set(), torch.tensor([0, 0, 1, 1])
    for step in range(3):
        images = torch.randn(4, 8, dtype=torch.float64)
        model.train()(images, labels)["loss"].backward()
        assert int(head.updates) == step + 1
        if not by_the_loss:  # neither an evaluation nor a pass without gradients is a training batch
            model.eval()(images, labels)
            with torch.no_grad():
                model.train()(images, labels)
        with torch.no_grad():
            encoded = inner.backbone(images)
            rows = (encoded - encoded.mean(0)) / (encoded.var(0, correction=0) + inner.norm.eps).sqrt()
        units = rows / rows.norm(dim=1, keepdim=True)
        for c in (0, 1):
            means[c] += (0.5 if c in seen else 1.0) * (units[labels == c].mean(0) - means[c])
            seen.add(c)
    torch.testing.assert_close(head.means, means, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="NearestETFHead never updated"):
        model.train()(images)


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = ModelWithLoss(swap_head("test_resnet", "etf", num_classes=4))
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    found = []
    for enable in (lambda: None, model.activation_checkpointing_enable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(images, labels)["loss"].backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
        assert model.classifier.backbone.grad_checkpointing == (len(found) > 1)
    for plain, *again in zip(*found, strict=True):
        assert all(torch.allclose(gradient, plain, atol=1e-6) for gradient in again)
    model.gradient_checkpointing_disable()
    assert not model.classifier.backbone.grad_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="every_n_layers=2.*take no such settings"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_a_bare_scheduler_and_another_model_are_refused(tmp_path, unchecked):
    model = ModelWithLoss(classifier())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bare = TPTScheduler(optimizer, max_epochs=3)
    callback = CollapseTrainerCallback(DataLoader(data(), 5))
    with pytest.raises(ValueError, match=r"hand in TrainerSchedule\(TPTScheduler\)"):
        callback.on_train_begin(None, None, None, model=model, lr_scheduler=bare)
    with pytest.raises(TypeError, match="holds no ncreg.Classifier"):
        callback.on_train_begin(None, None, None, model=torch.nn.Linear(2, 2), lr_scheduler=None)
    with pytest.raises(TypeError, match="must be what ncreg.swap_head gives"):
        ModelWithLoss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be an ncreg.TPTScheduler"):
        TrainerSchedule(CosineAnnealingLR(optimizer, 3))


class Distilled(torch.nn.Module):
    """A loss that holds its teacher, as a second Classifier inside Trainer's model."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, logits, features, labels):
        return cross_entropy(logits, features, labels)


def test_of_two_classifiers_the_callback_measures_the_one_it_is_told(tmp_path):
    model = ModelWithLoss(classifier(), Distilled(classifier()))
    with torch.no_grad():  # a teacher that the clean set tells from the student
        model.loss.teacher.backbone[1].weight.neg_()
    images, target = data().tensors
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, target, strict=True)]

    def trained(**told):
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=1, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no"
        )
        callback = CollapseTrainerCallback(DataLoader(data(), 5), **told)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        return next(row["collapse_nc1"] for row in trainer.state.log_history if "collapse_nc1" in row)

    with pytest.raises(ValueError, match=r"holds 2 ncreg.Classifiers \('classifier', 'loss.teacher'\)") as told:
        trained()
    way_out = eval(str(told.value).partition("classifier=")[2])
    assert trained(classifier=way_out) == measure_training_set(model.classifier, DataLoader(data(), 5))["nc1"]
    teacher = measure_training_set(model.loss.teacher, DataLoader(data(), 5))["nc1"]
    assert trained(classifier=lambda module: module.loss.teacher) == teacher


def mean_square(logits, features, labels):
    return mse_one_hot_loss(logits, labels)


@pytest.mark.parametrize("loss", [cross_entropy, mean_square])
def test_a_loss_that_trainer_would_leave_out_is_refused(loss, tmp_path):
    """label_smoothing_factor: Trainer keeps the labels and computes a cross-entropy of the logits instead."""
    model = ModelWithLoss(classifier(), loss)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    images, target = data().tensors
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, target, strict=True)]
    Trainer(model, arguments, train_dataset=rows).train()
    arguments.label_smoothing_factor = 0.1
    if loss is cross_entropy:  # which is what Trainer computes
        Trainer(model, arguments, train_dataset=rows).train()
    else:
        with pytest.raises(ValueError, match=r"label_smoothing_factor .* would be left out"):
            Trainer(model, arguments, train_dataset=rows).train()
    model.eval()(images[:2])


def test_accelerate_keeps_a_registered_scheduler(tmp_path):
    def begin():
        accelerator = accelerate.Accelerator(cpu=True)
        model = classifier()
        optimizer = torch.optim.SGD(param_groups(model, 5e-4), lr=0.1, momentum=0.9)
        scheduler = TPTScheduler(optimizer, CosineAnnealingLR(optimizer, 6), max_epochs=12, threshold=0.5)
        prepared = accelerator.prepare(model, optimizer, DataLoader(data(), 5))
        assert accelerator.prepare(scheduler) is scheduler  # and is not kept unless it is registered
        accelerator.register_for_checkpointing(scheduler)
        return accelerator, scheduler, *prepared

    def epochs(number, accelerator, scheduler, model, optimizer, loader):
        closer = EpochCloser(DataLoader(data(), 5))
        for _ in range(number):
            for images, target in loader:
                optimizer.zero_grad()
                accelerator.backward(torch.nn.functional.cross_entropy(model(images), target))
                optimizer.step()
            closer.close(scheduler, accelerator.unwrap_model(model), scheduler.epoch + 1)

    whole = begin()
    epochs(4, *whole)
    whole[0].save_state(str(tmp_path))
    epochs(3, *whole)
    again = begin()
    again[0].load_state(str(tmp_path))
    epochs(3, *again)
    assert again[1].state_dict() == whole[1].state_dict() and whole[1].onset_epoch is not None
    assert all(map(torch.equal, whole[2].state_dict().values(), again[2].state_dict().values()))


@pytest.fixture
def bfloat16():
    """An Accelerator whose `prepare` puts autocast into `forward`; its state is one for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_in_mixed_precision_is_measured_in_the_dtype_of_the_weights(bfloat16):
    model = bfloat16.prepare(classifier())
    measured = measure_training_set(bfloat16.unwrap_model(model), DataLoader(data(), 5))
    rows = TensorDataset(data().tensors[0].double(), data().tensors[1])
    assert measured == pytest.approx(by_hand(classifier().double(), rows), rel=1e-5, abs=1e-9)
    dtypes = []
    model.head.register_forward_hook(lambda head, inputs, logits: dtypes.append(logits.dtype))
    model(data().tensors[0])
    assert dtypes == [torch.bfloat16]  # training goes on in it


def lines(command, env=None):
    done = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "accuracy" in line or "trained to" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer_digits", "accelerate_digits"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_example_goes_on_where_it_stopped(name, processes, tmp_path, free_port):
    launcher = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += [] if processes == 1 else ["--main_process_port", str(free_port)]
    command = [*launcher, str(SCRIPTS / f"{name}.py"), "--quick"]
    whole = lines([*command, "--out", str(tmp_path / "whole")])
    lines([*command, "--out", str(tmp_path / "cut"), "--stop-after", "4"])
    assert lines([*command, "--out", str(tmp_path / "cut"), "--resume"]) == whole and whole
