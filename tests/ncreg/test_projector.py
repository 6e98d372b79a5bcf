"""The fixed projector against its matrices, in a classifier, folded and saved; the encoder's features beside it."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.autograd import gradcheck

from ncreg import losses
from ncreg.models import EncoderOutput, FixedProjector, fold, swap_head

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def by_matrices(rows, out, hidden):
    """As the paper's code writes it: both matrices in full, c the width of the output."""

    def fixed(shape):
        return np.sqrt(out / (out - 1)) * (np.eye(*shape) - np.ones(shape) / out)

    z = np.maximum(rows @ fixed((hidden, rows.shape[1])).T, 0) @ fixed((out, hidden)).T
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.parametrize(("dim", "out", "hidden"), [(6, 6, 20), (6, 4, 20), (6, 9, 5), (4, 9, 12), (512, 512, 2048)])
@pytest.mark.parametrize("positive", [True, False], ids=["behind a ReLU", "any sign"])
def test_it_is_the_product_of_its_matrices(dim, out, hidden, positive):
    rows = torch.randn(7, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = rows.abs() if positive else rows
    projector = FixedProjector(dim, out, hidden_features=hidden)
    np.testing.assert_allclose(projector(rows), by_matrices(rows.numpy(), out, hidden), atol=1e-12)
    assert not list(projector.parameters()) and not projector.state_dict()


def test_gradients_and_a_zero_row():
    projector = FixedProjector(5, 4, hidden_features=8)
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert gradcheck(projector, rows)
    zero = torch.zeros(2, 5, requires_grad=True)
    projector(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("name", ["in_features", "out_features", "hidden_features"])
def test_widths_are_at_least_two(name):
    with pytest.raises(ValueError, match=f"{name}=1 must be at least 2"):
        FixedProjector(**{"in_features": 3, name: 1})


@pytest.mark.usefixtures("unchecked")
def test_features_of_another_width_are_refused():
    with pytest.raises(
        ValueError, match=r"features of shape \(2, 5\): the projector takes pooled features \(batch, 4\)"
    ):
        FixedProjector(4)(torch.zeros(2, 5))


@torch.no_grad()
@pytest.mark.usefixtures("unchecked")
def test_torch_fx_keeps_it_and_its_flag():
    classifier = swap_head("test_resnet", "etf", num_classes=5, project="fixed").eval()
    traced = torch.fx.symbolic_trace(classifier)
    torch.testing.assert_close(traced(IMAGES), classifier(IMAGES))
    torch.testing.assert_close(traced(IMAGES, with_features="encoder"), classifier(IMAGES, with_features="encoder"))


def test_one_pass_gives_logits_features_and_what_enters_the_projector():
    classifier = swap_head("test_resnet", "linear", num_classes=5, project="fixed", norm="none").eval()
    found = classifier(IMAGES, with_features="encoder")
    assert isinstance(found, EncoderOutput) and classifier.backbone_width == classifier.head_hidden_size == 96
    assert torch.equal(found.encoder, classifier.backbone(IMAGES))
    assert torch.equal(found.features, FixedProjector(96)(found.encoder))
    assert torch.equal(found.logits, classifier.head(found.features))
    assert torch.equal(classifier(IMAGES), found.logits)
    plain = swap_head(timm.create_model("test_resnet", num_classes=5), "keep").eval()(IMAGES, with_features="encoder")
    assert torch.equal(plain.encoder, plain.features)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("flag", ["backbone", ""])
def test_another_word_is_refused(flag):
    with pytest.raises(TypeError, match="with_features=.* must be True or False, 'encoder' or 'alone'"):
        swap_head("test_resnet", num_classes=5).eval()(IMAGES, with_features=flag)


def test_a_whole_model_has_one_space_of_features():
    whole = swap_head(_squeezed(), "keep", input_size=(3, 32, 32)).eval()
    found = whole(IMAGES, with_features="encoder")
    assert torch.equal(found.encoder, found.features) and torch.equal(found.logits, whole(IMAGES))


def _squeezed():
    """A model whose classifier is followed by a ReLU: `swap_head` keeps it whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())


@torch.no_grad()
def test_fold_refuses_what_no_linear_layer_can_and_keeps_it_on_request():
    torch.manual_seed(0)
    classifier = swap_head("test_resnet", "etf", num_classes=5, project="fixed").eval()
    with pytest.raises(ValueError, match="FixedProjector is not linear .*normalize='keep'"):
        fold(classifier)
    kept = fold(classifier, normalize="keep")
    torch.testing.assert_close(kept(IMAGES), classifier(IMAGES), rtol=0, atol=1e-6)


def test_a_new_head_on_an_old_classifier_starts_from_the_encoder():
    first = swap_head("test_resnet", "linear", num_classes=5, project="fixed")
    again = swap_head(first, "etf", num_classes=3)
    assert isinstance(again.project, nn.Identity) and again.backbone_width == 96


def test_it_collapses_behind_it_while_koleo_spreads_what_is_before_it():
    """Free features of three classes: the share of the variance within classes, before and behind the projector."""
    generator = torch.Generator().manual_seed(3)
    target, projector, shares = torch.arange(30) % 3, FixedProjector(12, hidden_features=24), {}
    start = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    for weight in (0.0, 0.1):
        free, head = start.clone().requires_grad_(), nn.Linear(12, 3, bias=False).double()
        nn.init.eye_(head.weight)
        optimizer, spread = torch.optim.Adam([free, *head.parameters()], lr=0.05), losses.KoLeoLoss()
        for _ in range(300):
            loss = nn.functional.cross_entropy(10 * head(projector(free)), target) + weight * spread(free)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shares[weight] = [_within_share(rows.detach(), target) for rows in (free, projector(free))]
    (encoder, behind), (spread_encoder, spread_behind) = shares[0.0], shares[0.1]
    assert behind < encoder and spread_behind < spread_encoder and spread_encoder > encoder


def _within_share(rows, target):
    rows = nn.functional.normalize(rows, dim=1)
    within = sum(float((rows[target == c] - rows[target == c].mean(0)).square().sum()) for c in range(3))
    return within / float((rows - rows.mean(0)).square().sum())
