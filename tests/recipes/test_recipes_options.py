"""The options of the engine: augmentation, soft labels, label noise, accumulation, moving average, freezing, plan."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.mixup import Mixup

import recipes.train as training
from ncreg.checkpoint import load_checkpoint, load_classifier
from recipes.core.cli import parse
from recipes.core.config import AugmentConfig, OptimConfig, TermConfig, TPTConfig, as_yaml
from recipes.core.distributed import Ranks
from recipes.data.augment import batches, epoch_order, moved
from recipes.data.load import load
from recipes.data.split import Split
from recipes.train import main, train
from recipes.training.build import build_model, build_optimizer, build_scheduler, freeze
from recipes.training.loss_terms import WEIGHABLE, Term, build_terms
from recipes.training.metrics import measure_names
from recipes.training.plan import planned_rates, plans
from recipes.training.run_dir import RunDir

SHORT = [
    *("--data.train_size", "192", "--data.batch_size", "64", "--quiet", "true", "--tpt.threshold", "0.1"),
    *("--tpt.min_terminal", "2", "--tpt.extend", "0.5"),
]


def run(out, *more, recipe="tpt", epochs=2):
    return train(parse([recipe, *SHORT, "--tpt.max_epochs", str(epochs), "--out", str(out), *more]))


def last(path):
    return load_checkpoint(path / "checkpoints" / "last.pt")


def split_of(count, side=6, channels=2, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % classes)


def test_moved_is_mirroring_then_a_cut_out_of_the_padded_image():
    images = split_of(40).images
    shift = torch.randint(-3, 4, (40, 2), generator=torch.Generator().manual_seed(1))
    mirrored = torch.arange(40) % 3 == 0
    found = moved(images, shift, mirrored)
    for image, (down, right), flip, result in zip(images.numpy(), shift.tolist(), mirrored, found, strict=True):
        padded = np.pad(image[:, :, ::-1] if flip else image, ((0, 0), (3, 3), (3, 3)))
        np.testing.assert_array_equal(
            result.numpy(), padded[:, 3 + down : 9 + down, 3 + right : 9 + right], strict=True
        )


def draw(split, asked, *, seed=0, epoch=1, done=0, ranks=None):
    turn = epoch_order(seed, epoch, len(split)).view(-1, 8)
    return list(batches(split, turn, asked, num_classes=4, seed=seed, epoch=epoch, done=done, ranks=ranks or Ranks()))


@pytest.mark.parametrize(
    "asked",
    [
        AugmentConfig(),
        AugmentConfig(crop=2, flip=True),
        AugmentConfig(crop=1, mixup=0.4, cutmix=1.0, smoothing=0.1),
        AugmentConfig(smoothing=0.2),
    ],
)
def test_ranks_and_a_late_start_see_the_same_batches(asked):
    split = split_of(32)
    whole = draw(split, asked)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    halves = [draw(split, asked, ranks=Ranks(rank, 2)) for rank in range(2)]
    late = draw(split, asked, done=2)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
    for number, batch in enumerate(whole):
        for name in ("images", "target", "labels"):
            value = getattr(batch, name)
            assert torch.equal(torch.cat([getattr(half[number], name) for half in halves]), value)
            assert number < 2 or torch.equal(getattr(late[number - 2], name), value)
    other = draw(split, asked, epoch=2)
    assert any(not torch.equal(one.images, two.images) for one, two in zip(whole, other, strict=True))


def test_without_augmentation_a_batch_is_the_images_themselves():
    split = split_of(32)
    for batch, index in zip(draw(split, AugmentConfig()), epoch_order(0, 1, 32).view(-1, 8), strict=True):
        assert torch.equal(batch.images, split.images[index].float() / 255)
        assert torch.equal(batch.target, split.target[index]) and batch.labels is batch.target


def test_shifts_and_mirrors_are_even():
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 1] = 255
    split = Split(images, torch.zeros(4000, dtype=torch.long))
    turn = torch.arange(4000)[None]
    (batch,) = batches(split, turn, AugmentConfig(crop=1, flip=True), num_classes=1, seed=3, epoch=1, ranks=Ranks())
    places = batch.images.flatten(1).argmax(1)
    share = torch.bincount(places, minlength=25).view(5, 5) / 4000
    expected = torch.zeros(5, 5)
    expected[1:4] = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]) / 18  # columns 0-2, mirrored 2-4, three rows each
    assert (share - expected).abs().max() < 0.02


def test_soft_labels_are_timms():
    split = split_of(8)
    (batch,) = draw(split, AugmentConfig(mixup=0.7, smoothing=0.1))
    drawn = np.random.SeedSequence([0, 1, 0, 1]).generate_state(2, np.uint64)
    np.random.seed(int(drawn[1]) >> 32)
    index = epoch_order(0, 1, 8)
    images, labels = split.images[index].float() / 255, split.target[index]
    mixed, target = Mixup(mixup_alpha=0.7, label_smoothing=0.1, num_classes=4)(images, labels)
    torch.testing.assert_close(batch.images, mixed)
    torch.testing.assert_close(batch.target, target)
    smoothed = draw(split, AugmentConfig(smoothing=0.2))[0]
    torch.testing.assert_close(smoothed.target, F.one_hot(smoothed.labels, 4) * 0.8 + 0.05)


def test_with_mixing_the_clean_accuracy_finds_the_onset(tmp_path):
    path = run(tmp_path, "--augment.mixup", "0.4", "--augment.crop", "2", "--precision", "float64")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["onset_epoch"] is not None
    model, data = load_classifier(path), load(parse(["tpt", *SHORT]).data, seed=0, image_size=lambda native: 28)
    with torch.no_grad():
        hits = model(data.train.images.double() / 255).argmax(1) == data.train.target
    assert summary["at_end"]["train"]["accuracy"] == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize("name", ["supcon", "center", "intra_class_cosine"])
def test_losses_that_need_classes_refuse_soft_labels_in_a_line(tmp_path, capsys, name):
    args = ["tpt", *SHORT, "--out", str(tmp_path), f"--loss.{name}.weight", "0.1", "--augment.smoothing", "0.1"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"loss.{name} with augment" in said and not list(tmp_path.iterdir())


def test_label_noise_moves_a_share_of_the_training_labels_and_nothing_else():
    plain, noisy, again = (
        load(parse(["tpt", "--data.label_noise", share]).data, seed=4, image_size=lambda native: 8)
        for share in ("0", "0.3", "0.3")
    )
    assert torch.equal(plain.train.images, noisy.train.images) and torch.equal(noisy.train.target, again.train.target)
    for part in ("val", "test"):
        assert torch.equal(getattr(plain, part).target, getattr(noisy, part).target)
    changed = plain.train.target != noisy.train.target
    assert changed.sum() == round(0.3 * len(changed)) and torch.equal(noisy.clean, ~changed) and plain.clean is None
    moves = (noisy.train.target - plain.train.target)[changed] % 10
    assert torch.bincount(moves, minlength=10)[1:].min() > 0.05 * changed.sum()
    assert torch.equal(noisy.correctly_labelled().target, plain.train.target[~changed])


@pytest.mark.parametrize("target", ["train", "clean_subset"])
def test_the_onset_is_looked_for_where_it_is_asked(tmp_path, target):
    path = run(tmp_path, "--data.label_noise", "0.4", "--tpt.target", target)
    config = parse(["--config", str(path / "config.yaml")])
    data = load(config.data, seed=0, image_size=lambda native: 28)
    state = last(path)
    with torch.no_grad():
        hits = load_classifier(path)(data.train.images.float() / 255).argmax(1) == data.train.target
    expected = (hits if target == "train" else hits[data.clean]).float().mean().item()
    assert state["history"][-1]["train_accuracy"] == pytest.approx(expected)


def test_accumulated_parts_give_the_same_step(tmp_path):
    """A backbone without batch statistics, in float64: one batch, in one piece or in four."""
    vit = ["--model.backbone", "test_vit", "--model.model_args", "{img_size: 32, patch_size: 16}"]
    shared = [*vit, "--data.image_size", "32", "--precision", "float64", "--optim.clip", "1.0"]
    shared += ["--data.imbalance", "4", "--loss.cross_entropy.class_weights", "inverse"]
    one, four = (run(tmp_path, *shared, "--optim.accumulate", parts) for parts in ("1", "4"))
    assert last(one)["scheduler"]["epoch"] == 2
    for name, value in last(one)["model"].items():
        torch.testing.assert_close(last(four)["model"][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["cross_entropy", "supcon", "MultiMarginLoss"])
def test_a_sum_over_samples_is_one_over_the_whole_batch_whatever_its_parts_and_ranks(loss, monkeypatch):
    """Parts are averaged by the step, ranks by DDP; the loss that they stand for is the sum over the global batch."""
    taken = torch.nn.MultiMarginLoss(reduction="sum")
    if loss != "MultiMarginLoss":
        config = {loss: TermConfig(args={"reduction": "sum"})}
        (term,) = build_terms(config, class_counts=torch.ones(3), num_features=3)
        taken = term.loss
    term = Term(loss, taken, ("logits", "target"), 1.0, "always")
    logits = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0])
    own = torch.arange(8).view(4, 2) if loss != "supcon" else torch.tensor([[0, 3], [1, 5], [2, 6], [4, 7]])
    summed = [taken(logits[rows], target[rows]) for rows in own]
    found = [value * term.share(target[rows], target, 4) for value, rows in zip(summed, own, strict=True)]
    assert float(sum(found) / 4) == pytest.approx(float(sum(summed)), rel=1e-12)
    monkeypatch.setattr("recipes.training.loss_terms.world_size", lambda: 2)
    over_all_ranks = loss == "supcon"  # whose features are gathered
    assert term.share(target, target, 1) == (1 if over_all_ranks else 2)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", [name for name in WEIGHABLE if name not in ("ntce", "nonl")])  # these compare images
def test_parts_of_a_batch_add_up_to_the_weighted_mean_over_it(name, soft):
    """Each part's own mean is divided by the weights of its own samples."""
    if soft and name == "chunked_cross_entropy":
        pytest.skip("takes no soft labels")
    config = {name: TermConfig(class_weights="inverse")}
    (term,) = build_terms(config, class_counts=torch.tensor([9.0, 3.0, 1.0]), num_features=5)
    generator = torch.Generator().manual_seed(0)
    features, head = torch.randn(12, 5, generator=generator), torch.nn.Linear(5, 3).requires_grad_(False)
    head.weight.normal_(generator=generator)
    target = torch.tensor([0, 0, 1, 0, 2, 0, 0, 1, 1, 2, 0, 0])
    if soft:
        target = 0.8 * F.one_hot(target, 3) + 0.2 * torch.rand(12, 3, generator=generator).softmax(1)

    def value(part):
        rows = {"features": features[part], "logits": head(features[part]), "target": target[part]}
        return term(rows | {"weight": head.weight, "head": head})

    parts, whole = torch.arange(12).chunk(3), torch.arange(12)
    shares = [term.share(target[part], target, 3) for part in parts]
    mean = sum(value(part) * share for part, share in zip(parts, shares, strict=True)) / 3
    torch.testing.assert_close(mean, value(whole))
    assert term.share(target, target, 1) == 1
    if not (soft and name == "cross_entropy"):  # torch divides by the number of soft labels
        assert abs(float(sum(value(part) for part in parts)) / 3 - float(value(whole))) > 1e-3


def test_losses_without_weights_count_alike_in_every_part():
    config = {"supcon": TermConfig(), "mse_one_hot": TermConfig()}
    for term in build_terms(config, class_counts=torch.tensor([9.0, 3.0, 1.0]), num_features=5):
        assert term.share(torch.tensor([0, 1]), torch.tensor([0, 1, 2, 2]), 2) == 1


def test_the_moving_average_is_kept_measured_and_resumed(tmp_path, monkeypatch):
    weights, step = [], torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        step(self, *args, **kwargs)
        weights.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    more = ["--optim.ema", "0.8", "--augment.crop", "1", "--augment.cutmix", "1.0"]
    path = run(tmp_path, *more)
    state = last(path)
    config = parse(["--config", str(path / "config.yaml")])
    model = build_model(config.model, load(config.data, seed=0, image_size=lambda native: 28), seed=config.seed)
    groups = build_optimizer(config.optim, model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    ordered = [p for group in groups for p in group["params"]]
    for position, parameter in enumerate(ordered):
        average = parameter.detach().clone()
        for taken in weights:
            average = 0.8 * average + 0.2 * taken[position]
        torch.testing.assert_close(state["ema"][names[id(parameter)]], average, rtol=1e-4, atol=1e-6)
    averaged = load_classifier(path)
    averaged.load_state_dict(state["ema"])
    data = load(config.data, seed=0, image_size=lambda native: 28)
    with torch.no_grad():
        accuracy = (averaged(data.val.images.float() / 255).argmax(1) == data.val.target).float().mean().item()
    summary = json.loads((path / "summary.json").read_text())
    assert summary["at_end_ema"]["val"]["accuracy"] == pytest.approx(accuracy)
    assert state["history"][-1]["ema"]["accuracy"] == pytest.approx(accuracy)

    calls = []

    def dying(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", dying)
    config = parse(["tpt", *SHORT, "--tpt.max_epochs", "2", "--out", str(tmp_path / "killed"), *more])
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    resumed = train(config, resume=RunDir.unfinished(config.out, as_yaml(config)))
    for name in ("summary.json", "history.jsonl"):
        assert (resumed / name).read_bytes() == (path / name).read_bytes()
    again = last(resumed)
    for key in ("model", "ema"):
        assert all(torch.equal(value, again[key][name]) for name, value in state[key].items())


def test_tensorboard_holds_the_history(tmp_path):
    path = run(tmp_path, "--tensorboard", "true")
    found = EventAccumulator(str(path / "tensorboard")).Reload()
    history = [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()]
    for tag, values in {
        "val_accuracy": [entry["val_accuracy"] for entry in history],
        "measures/nc1": [entry["measures"]["nc1"] for entry in history],
    }.items():
        points = found.Scalars(tag)
        assert [point.step for point in points] == [1, 2]
        np.testing.assert_allclose([point.value for point in points], values, rtol=1e-6)


def weights_file(folder):
    torch.manual_seed(7)
    source = timm.create_model("test_resnet", num_classes=5)
    torch.save(source.state_dict(), folder / "weights.pth")
    return source


def test_finetune_starts_from_local_weights_frozen_then_free(tmp_path):
    source = weights_file(tmp_path)
    file = f"{{pretrained_cfg_overlay: {{file: {tmp_path / 'weights.pth'}}}, in_chans: 3}}"
    args = ["--model.backbone", "test_resnet", "--model.model_args", file]
    picture = torch.randint(0, 256, (12, 20, 3, 32, 32), dtype=torch.uint8)
    folder = tmp_path / "images"
    for index in range(4):
        for number in range(20):
            place = folder / "abcd"[index] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            timm_image(picture[index, number] // 8 + 50 * index, place)
    args += ["--data.name", "folder", "--data.root", str(folder), "--data.batch_size", "16", "--data.image_size", "32"]
    args += ["--quiet", "true", "--tpt.max_epochs", "3", "--tpt.min_terminal", "3", "--out", str(tmp_path / "runs")]
    seen = {}
    real = RunDir.save

    def kept(self, state, *also):
        seen[state["epoch"]] = {name: value.clone() for name, value in state["model"].items()}
        return real(self, state, *also)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "save", kept)
        path = train(parse(["finetune", *args]))
    names = [name for name in source.state_dict() if not name.startswith("fc")]
    for epoch, same in ((0, True), (2, True), (3, False)):
        for name in names:
            if name.endswith("conv1.weight") or "running_mean" in name:
                assert torch.equal(seen[epoch][f"backbone.{name}"], source.state_dict()[name]) == same, (epoch, name)
    assert not torch.equal(seen[0]["head.weight"], seen[2]["head.weight"])
    mean = timm.get_pretrained_cfg("test_resnet").mean
    torch.testing.assert_close(seen[0]["preprocess.mean"].flatten(), torch.tensor(mean))
    (tmp_path / "weights.pth").unlink()
    assert load_classifier(path).class_names == tuple("abcd")  # without the file it began with


def timm_image(tensor, path):
    from torchvision.transforms.v2.functional import to_pil_image

    to_pil_image(tensor).save(path)


def test_the_head_has_a_rate_of_its_own_and_frozen_parameters_stay():
    config = parse(["etf", "--optim.head_lr_factor", "10", "--optim.lr", "0.01", "--model.head", "linear"])
    model = build_model(config.model, load(config.data, seed=0, image_size=lambda native: 28), seed=config.seed)
    optimizer = build_optimizer(config.optim, model)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == pytest.approx(0.01 if name.startswith("backbone.") else 0.1), name
    assert decay[id(model.head.weight)] == decay[id(model.norm.weight)] == 5e-4
    assert len(rate) == sum(len(group["params"]) for group in optimizer.param_groups)
    model.train()
    freeze(model, optimizer, True)
    assert not any(module.training for module in model.backbone.modules()) and model.norm.training
    freeze(model, optimizer, False)
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.backbone.training


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_the_head_keeps_its_share_of_the_rate_while_rates_rise(factor, schedule):
    optim = OptimConfig(lr=0.02, head_lr_factor=factor, warmup_epochs=4, schedule=schedule)
    weights = [{"params": [torch.zeros(1, requires_grad=True)], "lr": 0.02 * part} for part in (1, factor)]
    scheduler = build_scheduler(TPTConfig(max_epochs=12, extend=None), optim, torch.optim.SGD(weights))
    rates = []
    while not scheduler.finished:
        rates.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step(scheduler.epoch + 1, 0.0)
    assert [head for _, head in rates] == pytest.approx([factor * backbone for backbone, _ in rates], rel=1e-9)
    assert [rate for rate, _ in rates[:4]] == pytest.approx([0.02 * part / 5 for part in (1, 2, 3, 4)])
    if schedule == "step":  # a tenth at a third and two thirds of the run, the warm-up included
        assert [rate for rate, _ in rates[4:]] == pytest.approx([0.002] * 3 + [0.0002] * 5)


def test_freezing_all_there_is_to_learn_is_refused(tmp_path, capsys):
    args = [*SHORT, "--model.norm", "none", "--model.freeze_epochs", "1", "--out", str(tmp_path)]
    assert main(["etf", *args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.freeze_epochs" in said


def test_the_plan_is_the_rates_of_a_run(tmp_path):
    path = run(tmp_path, "--optim.warmup_epochs", "2", epochs=8)
    state = last(path)
    onset = state["scheduler"]["onset_epoch"]
    config = parse(["--config", str(path / "config.yaml")])
    assert planned_rates(config.tpt, config.optim, onset) == [entry["lr"] for entry in state["history"]]
    assert len(planned_rates(config.tpt, config.optim, None)) == 8


@pytest.mark.parametrize("recipe", [pytest.param("baseline", marks=pytest.mark.slow), "etf"])
def test_the_plan_has_the_rates_of_the_parts_that_learn(recipe, tmp_path, capsys):
    """Behind the backbone, the simplex of etf without its norm learns nothing, so that no rate is the head's."""
    words = [*SHORT, "--optim.head_lr_factor", "10", "--optim.lr", "0.01", "--model.norm", "none"]
    words += ["--tpt.max_epochs", "1", "--device", "cpu"]
    config = parse([recipe, *words, "--out", str(tmp_path)])
    (epoch,) = last(train(config))["history"]
    assert epoch["lr"] == (0.01 if recipe == "etf" else 0.1)
    capsys.readouterr()
    assert main([recipe, *words, "--out", str(tmp_path), "--plan"]) == 0
    (never,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["never"])
    assert float(never[2]) == epoch["lr"]


def test_plan_prints_a_table_leaves_a_figure_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    assert main(["tpt", "--plan", "--tpt.max_epochs", "40", "--tpt.min_terminal", "5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    config = parse(["tpt", "--tpt.max_epochs", "40", "--tpt.min_terminal", "5"])
    planned = plans(config.tpt, config.optim)
    assert {onset: len(curve) for onset, curve in planned.items()} == {4: 12, 10: 30, 20: 40, None: 40}
    assert all(word in printed for word in ("epoch 4", "epoch 10", "epoch 20", "never", "plan-tpt.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["plan-tpt.png"]


@pytest.mark.parametrize("measure", ["intra_cosine_gap", "inter_cosine_gap", "etf_distance"])
def test_every_measure_of_the_history_can_end_the_terminal_phase(measure, tmp_path):
    args = ["--tpt.stop_patience", "1", "--tpt.min_terminal", "1", "--tpt.threshold", "0.01", "--tpt.stop_measure"]
    history = last(run(tmp_path, *args, measure, epochs=2))["history"]
    assert set(measure_names()) == {"accuracy", "loss", *history[0]["measures"]}
    ideal = {"intra_cosine_gap": 1.0, "inter_cosine_gap": -1 / 9}
    for record in history if measure in ideal else ():
        cosine = record["measures"][measure.removesuffix("_gap")]
        assert record["measures"][measure] == abs(cosine - ideal[measure])


def test_a_standstill_ends_the_terminal_phase(tmp_path, monkeypatch):
    real = training.measure

    def still(*args, **kwargs):
        return real(*args, **kwargs) | ({} if kwargs.get("collapse") is False else {"nc1": 0.5})

    monkeypatch.setattr(training, "measure", still)
    args = ["--tpt.stop_patience", "2", "--tpt.min_terminal", "1", "--tpt.extend", "20", "--tpt.threshold", "0.01"]
    state = last(run(tmp_path, *args, epochs=12))
    onset = state["scheduler"]["onset_epoch"]
    assert state["scheduler"]["last_epoch"] == len(state["history"]) == onset + 2


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tmp_path):
    """As a command of its own: the type checks of the test session are not to be compiled with the model."""
    script = str(Path(training.__file__))
    ends = []
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        asked = [*SHORT, "--tpt.max_epochs", "2", "--precision", "float64", "--compile", compiled, "--out", str(out)]
        done = subprocess.run([sys.executable, script, "tpt", *asked], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        ends.append(last(next(out.iterdir()))["history"])
    for first, second in zip(*ends, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-9)


@pytest.mark.parametrize("name", ["cross_entropy", "dot_regression", "mse_one_hot"])
def test_class_weights_make_the_weighted_mean_over_the_batch(name):
    counts = torch.tensor([90, 9, 1])
    plain, weighted = (
        build_terms({name: TermConfig(class_weights=kind)}, class_counts=counts, num_features=5)[0]
        for kind in ("none", "inverse")
    )
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 0, 1, 2, 0, 2])
    available = {
        "logits": torch.randn(6, 3, generator=generator),
        "features": torch.randn(6, 5, generator=generator),
        "weight": torch.randn(3, 5, generator=generator),
        "target": target,
    }
    single = [plain({k: v if k == "weight" else v[i : i + 1] for k, v in available.items()}) for i in range(6)]
    share = 1 / counts[target].double()
    expected = (torch.stack(single).double() * share).sum() / share.sum()
    assert float(weighted(available)) == pytest.approx(float(expected), rel=1e-5)


def test_class_weights_have_mean_one_over_the_training_images():
    counts = torch.tensor([500, 40, 3])
    for kind in ("inverse", "effective"):
        term = build_terms({"cross_entropy": TermConfig(class_weights=kind)}, class_counts=counts, num_features=5)[0]
        assert float((term.loss.weight * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-6)
        assert (term.loss.weight.diff() > 0).all()
