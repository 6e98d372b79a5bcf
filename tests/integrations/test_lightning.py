"""Lightning: the callback measures, drives, stops and resumes to the bit; averaging callbacks work with heads."""

import subprocess
import sys
import warnings

import pytest
import torch
from digits_cases import ROOT, SCRIPTS
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from ncreg import TPTScheduler, param_groups, swap_head

pytest.importorskip("lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

    from ncreg.integrations.lightning import CollapseCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers, devices


def rows():
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(60) % 3
    return TensorDataset(torch.randn(60, 8, generator=generator) + 2 * nn.functional.one_hot(target, 8), target)


def make_scheduler(optimizer):
    return TPTScheduler(optimizer, CosineAnnealingLR(optimizer, 6), max_epochs=14, threshold=0.9, min_terminal=3)


class Module(LightningModule):
    returns_scheduler = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.model = swap_head(net, "etf", num_classes=3, input_size=(8,))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(param_groups(self.model, 5e-4), lr=0.05, momentum=0.9)
        return ([optimizer], [make_scheduler(optimizer)]) if self.returns_scheduler else optimizer


class WithScheduler(Module):
    returns_scheduler = True

    def lr_scheduler_step(self, scheduler, metric):
        """The callback steps it."""


def fit(kind, folder, *, epochs=-1, resume=False, at_end=True, more=(), **saving):
    module = kind()
    collapse = CollapseCallback(DataLoader(rows(), 20), None if kind.returns_scheduler else make_scheduler)
    saver = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=at_end, **saving)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[saver, collapse, *more], default_root_dir=folder, **quiet)
    last = folder / "last.ckpt" if resume else None
    trainer.fit(module, DataLoader(rows(), 12), DataLoader(rows(), 60), ckpt_path=last)
    return module, collapse, trainer


@pytest.mark.parametrize("at_end", [True, False], ids=["saved at the end", "saved at validation"])
@pytest.mark.parametrize("kind", [Module, WithScheduler])
def test_a_resumed_run_is_the_same_to_the_bit(kind, at_end, tmp_path):
    module, whole, trainer = fit(kind, tmp_path / "whole", at_end=at_end)
    assert whole.scheduler.finished and trainer.current_epoch == len(whole.history) == whole.scheduler.last_epoch < 14
    fit(kind, tmp_path / "cut", epochs=whole.scheduler.onset_epoch + 1, at_end=at_end)
    again, resumed, _ = fit(kind, tmp_path / "cut", resume=True, at_end=at_end)
    assert resumed.history == whole.history
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    if at_end:  # nothing is left to train
        assert fit(kind, tmp_path / "cut", resume=True)[1].history == whole.history


@pytest.mark.parametrize("kind", [Module, WithScheduler])
def test_a_run_goes_on_from_the_last_step_of_an_epoch(kind, tmp_path):
    """Such a checkpoint was written before the epoch was closed, and Trainer begins the next one without a hook."""
    module, whole, _ = fit(kind, tmp_path / "whole")
    steps = {"at_end": False, "every_n_train_steps": 5}  # an epoch has five
    fit(kind, tmp_path / "cut", epochs=whole.scheduler.onset_epoch + 1, **steps)
    again, resumed, _ = fit(kind, tmp_path / "cut", resume=True, **steps)
    assert resumed.history == whole.history
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_run_that_began_without_the_callback_is_measured_from_there_on(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    before = Trainer(max_epochs=3, default_root_dir=tmp_path, **quiet)
    before.fit(Module(), DataLoader(rows(), 12))
    before.save_checkpoint(tmp_path / "three.ckpt")
    collapse, closed = CollapseCallback(DataLoader(rows(), 20)), []
    close = collapse.closer.close
    collapse.closer.close = lambda scheduler, classifier, epoch: (
        closed.append(epoch) or close(scheduler, classifier, epoch)
    )
    after = Trainer(max_epochs=5, callbacks=[collapse], default_root_dir=tmp_path, **quiet)
    after.fit(Module(), DataLoader(rows(), 12), ckpt_path=tmp_path / "three.ckpt")
    assert closed == [4, 5] and len(collapse.history) == 2


@pytest.mark.parametrize("kind", [Module, WithScheduler])
def test_a_second_fit_of_the_same_trainer_goes_on(kind, tmp_path):
    """Lightning makes optimizer and scheduler anew, and counts epochs on."""
    module, collapse, trainer = fit(kind, tmp_path, epochs=2)
    first = collapse.scheduler
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, DataLoader(rows(), 12))
    assert collapse.scheduler.epoch == len(collapse.history) == 4 and first.epoch == 2
    assert collapse.scheduler is not first and collapse.scheduler.optimizer is trainer.optimizers[0]
    other = make_scheduler(torch.optim.SGD(module.parameters(), lr=0.05))
    for epoch, row in enumerate(collapse.history, start=1):
        other.step(epoch, row["accuracy"])
    assert collapse.scheduler.get_last_lr()[0] == pytest.approx(other.get_last_lr()[0], rel=1e-12)
    assert (collapse.scheduler.onset_epoch, collapse.scheduler.last_epoch) == (other.onset_epoch, other.last_epoch)


def test_measuring_changes_nothing_in_the_training(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    weights = []
    for callbacks in ([], [CollapseCallback(DataLoader(rows(), 20, shuffle=True))]):
        module = Module()
        torch.manual_seed(1)
        trainer = Trainer(max_epochs=2, callbacks=callbacks, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(rows(), 12, shuffle=True))
        weights.append(module.state_dict())
    assert all(map(torch.equal, *(state.values() for state in weights)))
    assert trainer.callback_metrics["collapse/nc1"] == pytest.approx(callbacks[0].history[-1]["nc1"], rel=1e-6)


def test_the_modules_own_step_works_without_the_callback(tmp_path):
    class Monitored(WithScheduler):
        def configure_optimizers(self):
            (optimizer,), (scheduler,) = super().configure_optimizers()
            return [optimizer], [{"scheduler": scheduler, "monitor": "accuracy", "reduce_on_plateau": True}]

        def on_train_epoch_end(self):
            self.log("accuracy", 1.0)

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch + 1, float(metric))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=3, default_root_dir=tmp_path, **quiet)
    trainer.fit(Monitored(), DataLoader(rows(), 12))
    assert trainer.lr_scheduler_configs[0].scheduler.onset_epoch == 1


@pytest.mark.parametrize("average", [lambda: StochasticWeightAveraging(0.01, 0.5), EMAWeightAveraging])
def test_averages_of_weights_keep_the_head_a_simplex(average, tmp_path):
    module, collapse, _ = fit(Module, tmp_path, epochs=6, more=[average()])
    weight = module.model.head.weight
    expected = 1.5 * torch.eye(3) - 0.5
    torch.testing.assert_close(weight @ weight.T, expected, rtol=1e-5, atol=1e-5)
    assert module.model.eval()(rows().tensors[0]).isfinite().all() and collapse.history


def test_what_cannot_be_driven_is_refused(tmp_path, unchecked):
    class Plain(Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(8, 3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="Plain holds no ncreg.Classifier"):
        fit(Plain, tmp_path, epochs=1)

    class Both(WithScheduler):
        @property
        def returns_scheduler(self):
            return True

    class Several(WithScheduler):
        automatic_optimization = False

        def configure_optimizers(self):
            parts = (self.model.backbone, self.model.norm)
            optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            return optimizers, [make_scheduler(optimizer) for optimizer in optimizers]

    with pytest.raises(ValueError, match="returns 2 TPTSchedulers, and the callback steps one"):
        fit(Several, tmp_path, epochs=1)

    module, callback = Both(), CollapseCallback(DataLoader(rows(), 20), make_scheduler)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **quiet)
    with pytest.raises(ValueError, match="returns a schedule and the callback makes another"):
        trainer.fit(module, DataLoader(rows(), 12))


@pytest.mark.filterwarnings("default")
def test_a_trainer_that_ends_too_early_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"max_epochs=1\) ends before TPTScheduler\(max_epochs=14\)"):
        fit(Module, tmp_path, epochs=1)


@pytest.mark.slow
def test_the_example_goes_on_where_it_stopped(tmp_path):
    compare_example("lightning_digits", tmp_path)


@pytest.mark.slow
def test_two_processes(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests/integrations']\n"
        "import test_lightning as t\n"
        "quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)\n"
        "c = t.CollapseCallback(t.DataLoader(t.rows(), 20), t.make_scheduler)\n"
        "r = t.Trainer(max_epochs=-1, accelerator='cpu', devices=2, strategy='ddp', callbacks=[c], **quiet)\n"
        "r.fit(t.Module(), t.DataLoader(t.rows(), 12))\n"
        "print('end', c.scheduler.onset_epoch, r.current_epoch, c.history[-1], flush=True)\n"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("end")]
    assert len(ends) == 2 and ends[0] == ends[1], done.stderr[-2000:]


def compare_example(name, folder):
    """Run an example whole, and stopped and resumed: the same lines."""

    def run(*arguments):
        command = [sys.executable, "-W", "ignore", str(SCRIPTS / f"{name}.py"), "--quick", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [line for line in done.stdout.splitlines() if "accuracy" in line or "trained to" in line]

    whole = run("--out", str(folder / "whole"))
    run("--out", str(folder / "cut"), "--stop-after", "4")
    assert run("--out", str(folder / "cut"), "--resume") == whole and "epoch None" not in whole[0]
