"""Two feature spaces: a loss on the encoder's features, the rest behind a fixed projector, and where each is read."""

import pytest
import torch
import torch.nn.functional as F

from ncreg import robustness
from ncreg.checkpoint import load_classifier
from ncreg.models import FixedProjector
from recipes.core.cli import parse
from recipes.core.config import TermConfig
from recipes.core.distributed import Ranks
from recipes.data.augment import Batch
from recipes.data.load import load
from recipes.evaluation.console_table import BLOCKS
from recipes.evaluation.evaluations import transfer, turned
from recipes.evaluation.presets import PRESETS, Settings
from recipes.evaluation.run_under_test import RunUnderTest
from recipes.study.trials import config_hash, dotted_config
from recipes.train import main, train
from recipes.training.loss_terms import build_terms
from recipes.training.prepare import build_state
from recipes.training.step import forward_backward

SMALL = ["--data.train_size", "192", "--data.batch_size", "48", "--tpt.max_epochs", "2", "--quiet", "true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(parse(["two_spaces", *SMALL, "--out", str(tmp_path_factory.mktemp("runs"))]))


def by_hand(model, images, target):
    """Cross-entropy behind the projector and 0.1 times KoLeo of the encoder, from the whole matrix of distances."""
    encoder = model.backbone(model.preprocess(images))
    logits = model.head(model.norm(model.project(encoder)))
    unit = F.normalize(encoder, dim=1)
    apart = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") + torch.eye(len(unit)) * 9
    return F.cross_entropy(logits, target) - 0.1 * (apart.min(1).values + 1e-8).log().mean()


def test_a_step_is_the_gradient_of_both_losses_each_in_its_space():
    config = parse(["two_spaces", *SMALL, "--device", "cpu"])
    data = load(config.data, seed=0, image_size=lambda native: 32)
    state = build_state(config, data, torch.device("cpu"), Ranks())
    images, target = next(data.train.in_batches(16))
    state.model.train()
    expected = by_hand(state.model, images, target)
    wanted = torch.autograd.grad(expected, list(state.model.parameters()))
    weights = {"cross_entropy": 1.0, "koleo": 0.1}
    forward_backward(Batch(images, target, target), state.model, state, weights, chunks=1, precision="float32")
    torch.testing.assert_close(state.losses[-1], expected.detach(), rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(state.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_transfer_reads_the_encoder_and_the_measures_what_is_behind_the_projector(run):
    settings = Settings(PRESETS["quick"], sets=())
    tested = RunUnderTest.open(run, device="cpu")
    outcome, _ = transfer(tested, settings)
    train_rows, test_rows = turned(tested.draw("train", 2000), 0), turned(tested.draw("test", 2000), 1)
    model = load_classifier(run)
    with torch.no_grad():
        rows = [
            model.backbone(model.preprocess(part.read().float() / 255)).double() for part in (train_rows, test_rows)
        ]
    expected = robustness.linear_probe(rows[0], train_rows.target, rows[1], test_rows.target)
    assert outcome["tasks"]["quarter_turns"]["linear"].accuracy == expected.accuracy
    assert outcome["features"] == "encoder"
    seen = {"tasks": {}, "features": "encoder"}
    assert BLOCKS["transfer"](seen, "test")[0].startswith("transfer of the encoder's frozen features")
    assert BLOCKS["transfer"]({"tasks": {}}, "test")[0].startswith("transfer of frozen features")
    features = tested.outputs(tested.draw("test", 32)).features
    with torch.no_grad():
        behind = model.norm(model.project(model.backbone(model.preprocess(tested.images(tested.draw("test", 32))[0]))))
    torch.testing.assert_close(features, behind.double(), rtol=1e-4, atol=1e-4)
    assert isinstance(model.project, FixedProjector)


def test_other_runs_transfer_their_last_features(tmp_path):
    run = train(parse(["etf", *SMALL, "--tpt.max_epochs", "1", "--out", str(tmp_path)]))
    outcome, _ = transfer(RunUnderTest.open(run, device="cpu"), Settings(PRESETS["quick"], sets=()))
    assert outcome["features"] == "last"


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, run):
    part = train(parse(["two_spaces", *SMALL, "--tpt.max_epochs", "2", "--out", str(tmp_path)]))
    (part / "summary.json").unlink()
    (part / "checkpoints" / "last.pt").unlink()  # previous.pt is of the epoch before
    assert main(["--resume", str(part)]) == 0
    first, again = (load_classifier(folder).state_dict() for folder in (run, part))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_center_loss_of_the_encoder_has_centres_of_its_width():
    terms = build_terms(
        {"center": TermConfig(features="encoder")}, class_counts=torch.ones(3), num_features=2, num_encoder_features=7
    )
    assert terms[0].consumes[0] == "encoder" and terms[0].loss.centers.shape == (3, 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--loss", "{cross_entropy: {features: encoder}}"], "loss.cross_entropy.features=encoder: it reads logits"),
        (["--loss", "{cross_entropy: {features: middle}}"], "middle"),
        (["--model.project", "fixd"], "fixd"),
    ],
)
def test_what_cannot_be_read_there_is_refused_in_a_line(words, said, capsys, tmp_path):
    assert main(["two_spaces", *SMALL, "--out", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and said in error[0]


def test_older_runs_keep_their_identity():
    config = dotted_config(parse(["etf"]))
    assert config["loss"] == {"cross_entropy": {"weight": 1.0, "phase": "always", "class_weights": "none", "args": {}}}
    asked = dotted_config(parse(["etf", "--loss", "{koleo: {features: encoder}, cross_entropy: {}}"]))
    plain = dotted_config(parse(["etf", "--loss", "{koleo: {features: last}, cross_entropy: {}}"]))
    unsaid = dotted_config(parse(["etf", "--loss", "{koleo: {}, cross_entropy: {}}"]))
    assert config_hash(plain) == config_hash(unsaid) != config_hash(asked)
