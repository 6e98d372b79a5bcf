"""Rounding against torch's fake quantization, ternary heads against all there are."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ncreg.frames import max_cosine, simplex_etf
from ncreg.heads import FixedHead, NearestETFHead
from ncreg.models import swap_head
from ncreg.quantization import round_frame, round_weight, round_weights, rounded_names, ternary_head


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- rounding


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("channel", [0, 1, -1])
def test_rounding_is_torchs_fake_quantization(bits, channel):
    weight, largest = gaussian(5, 4, 3), 2 ** (bits - 1) - 1
    axis = channel % 3
    others = [a for a in range(3) if a != axis]
    scale = weight.abs().amax(others) / largest
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -largest, largest)
    torch.testing.assert_close(round_weight(weight, bits, channel=channel), wanted)


def test_ternary_weights_by_loops():
    weight = gaussian(6, 11, seed=1).numpy()
    wanted = np.zeros_like(weight)
    for row, out in zip(weight, wanted, strict=True):
        limit = 0.7 * np.mean(np.abs(row))
        kept = [abs(w) for w in row if abs(w) > limit]
        out[:] = [np.sign(w) * np.mean(kept) if abs(w) > limit else 0 for w in row]
    np.testing.assert_allclose(round_weight(torch.from_numpy(weight), "ternary"), wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [16, 8, 4, 3, "ternary"])
def test_rounding_again_and_zeros_change_nothing(bits):
    weight = gaussian(4, 7, seed=2).double()
    weight[1] = 0
    once = round_weight(weight, bits)
    torch.testing.assert_close(round_weight(once, bits), once)
    assert not once[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("bits", [16, 8, 4, "ternary"])
def test_weights_in_half_precision_are_rounded_in_full(bits, size, dtype):
    weight = (size * gaussian(4, 30, seed=4)).to(dtype)
    wanted = round_weight(weight.double(), bits).to(dtype)
    found = round_weight(weight, bits)
    assert found.dtype == dtype
    unit = torch.maximum(wanted.abs().double() * torch.finfo(dtype).eps, torch.tensor(2.0**-24))
    assert bool(((found.double() - wanted.double()).abs() <= unit).all())


def test_more_bits_are_nearer():
    weight = gaussian(8, 100, seed=3)
    gaps = [float((round_weight(weight, bits) - weight).norm()) for bits in (2, 3, 4, 6, 8, 12)]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("head", ["linear", "etf", "cosine"])
def test_a_model_is_rounded_in_a_copy_norms_and_biases_left_alone(head):
    torch.manual_seed(0)
    model = swap_head("test_resnet", head, num_classes=5).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = round_weights(model, 4)
    for name, value in rounded.state_dict().items():
        old = before[name]
        assert torch.equal(model.state_dict()[name], old)
        weight = name.endswith("weight") and old.ndim >= 2
        assert torch.equal(value, round_weight(old, 4) if weight else old), name
    assert torch.equal(rounded.head.weight, round_weight(model.head.weight.detach(), 4))


@pytest.mark.parametrize("bits", ["ternary", 4])
@pytest.mark.parametrize("learned", [False, True])
def test_a_frame_that_follows_the_features_stays_rounded_wherever_it_goes(bits, learned, tmp_path):
    """The head itself would take rounded vectors for an average of frames, and restore the simplex."""
    model = swap_head("test_resnet", "nearest_etf", num_classes=5).eval()
    if learned:
        model.head.scale = nn.Parameter(torch.tensor(4.0))
    rounded = round_weights(model, bits)
    wanted = round_weight(model.head.weight, bits)
    torch.save(rounded, tmp_path / "rounded.pt")
    loaded = torch.load(tmp_path / "rounded.pt", weights_only=False)
    for place in (rounded, copy.deepcopy(rounded).double().float(), loaded):
        assert torch.equal(place.head.weight, wanted) and place.head.scale == model.head.scale
        features = torch.randn(3, model.head.in_features)
        logits = model.head.scale * nn.functional.normalize(features) @ wanted.T
        torch.testing.assert_close(place.head(features), logits, rtol=1e-5, atol=1e-5)
    assert type(model.head) is NearestETFHead and type(round_weights(model.head, bits)) is FixedHead
    with pytest.raises(RuntimeError, match="head.means"):
        model.load_state_dict(rounded.state_dict())  # refused, not undone


def test_attention_and_transposed_convolutions():
    net = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "t": nn.ConvTranspose2d(3, 5, 2)})
    rounded = round_weights(net, "ternary")
    assert all(len(row.abs().unique()) <= 2 for row in rounded["a"].in_proj_weight)
    assert all(len(kernel.abs().unique()) <= 2 for kernel in rounded["t"].weight.transpose(0, 1))
    vit = timm.create_model("test_vit")
    assert torch.equal(round_weights(vit, 3).pos_embed, vit.pos_embed)


@pytest.mark.parametrize("bits", [3, 8, "ternary"])
@pytest.mark.parametrize(("kind", "size"), [(nn.ConvTranspose1d, 3), (nn.ConvTranspose2d, (2, 3))])
def test_a_transposed_convolution_by_groups_is_rounded_as_its_groups_one_by_one(kind, size, bits):
    """One scale for the same channel of every group would be that of the group with the largest weights."""
    whole, parts = kind(6, 9, size, groups=3), [kind(2, 3, size) for _ in range(3)]
    with torch.no_grad():
        for group, part in enumerate(parts):
            part.weight.mul_(10**group)
        whole.weight.copy_(torch.cat([part.weight for part in parts]))
    expected = torch.cat([round_weights(part, bits).weight for part in parts])
    torch.testing.assert_close(round_weights(whole, bits).weight, expected, rtol=0, atol=0)
    assert bool((expected.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("bits", [8, 4, "ternary"])
def test_frames_keep_their_lengths_and_say_their_largest_cosine(bits):
    frame = 3 * simplex_etf(10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = round_frame(frame, bits)
    torch.testing.assert_close(found.weight.norm(dim=1), frame.norm(dim=1))
    assert found.max_cosine_before == pytest.approx(-1 / 9)
    assert found.max_cosine == float(max_cosine(found.weight)) > -1 / 9
    levels = [len(row.abs().unique()) for row in found.weight]
    assert max(levels) <= {8: 128, 4: 8, "ternary": 2}[bits]
    FixedHead(found.weight)


def test_norms_over_several_axes_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.LayerNorm((3, 4, 4)), nn.RMSNorm((4, 4)))
    for part in model:
        part.weight.data = gaussian(*part.weight.shape)
    assert rounded_names(model) == ("0.weight",)
    rounded = round_weights(model, "ternary")
    assert not torch.equal(rounded[0].weight, model[0].weight)
    assert all(torch.equal(rounded[k].weight, model[k].weight) for k in (1, 2))


# ---- ternary heads


def small_task(classes, dim, samples=30, seed=0):
    target = torch.arange(samples) % classes
    centres = gaussian(classes, dim, seed=seed + 50)
    return (centres[target] + gaussian(samples, dim, seed=seed)).double(), target


@pytest.mark.parametrize(("classes", "dim", "restarts"), [(2, 2, 150), (2, 4, 30), (4, 2, 30), (2, 3, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_best_of_all_ternary_heads(classes, dim, restarts, seed):
    """A local search: with two weights a class most of the 81 starts end at another head."""
    features, target = small_task(classes, dim, seed=seed)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=classes * dim)), dtype=torch.float64)
    logits = torch.einsum("kcd,nd->knc", every.reshape(-1, classes, dim), features) * 0.8
    own = logits.gather(2, target.expand(len(logits), -1)[:, :, None]).squeeze(2)
    least = float((logits.logsumexp(2) - own).mean(1).min())
    found = ternary_head(features, target, scale=0.8, restarts=restarts)
    assert found.losses[-1] == pytest.approx(least, abs=1e-12)


def test_the_loss_never_rises_and_is_the_heads():
    features, target = small_task(5, 8, samples=60)
    found = ternary_head(features, target, scale=0.5)
    assert found.losses[0] == pytest.approx(np.log(5)) and found.converged
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.losses))
    head = FixedHead(found.weight.double(), normalize=False, scale=found.scale)
    assert float(F.cross_entropy(head(features), target)) == pytest.approx(found.losses[-1], abs=1e-12)
    for c, place, value in itertools.product(range(5), range(8), (-1, 0, 1)):  # no single weight lowers it
        other = found.weight.double().clone()
        other[c, place] = value
        assert float(F.cross_entropy(0.5 * features @ other.T, target)) > found.losses[-1] - 1e-10


def test_it_is_repeatable_and_more_starts_are_no_worse():
    features, target = small_task(4, 10, seed=4)
    one, same = (ternary_head(features, target, seed=7) for _ in range(2))
    assert torch.equal(one.weight, same.weight)
    assert ternary_head(features, target, seed=7, restarts=5).losses[-1] <= one.losses[-1]
    assert not ternary_head(features, target, sweeps=1).converged


X, Y = gaussian(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: round_weight(X, 1), ValueError, "bits=1 must be in 2..16"),
        (lambda: round_weight(X, "binary"), ValueError, "bits='binary' must be one of 'ternary'"),
        (lambda: round_weight(X, 2.5), TypeError, "bits=2.5 must be an integer"),
        (lambda: round_weight(X.long(), 8), TypeError, "floating-point tensor"),
        (lambda: round_weight(X / 0, 8), ValueError, "weight must be finite"),
        (lambda: round_weight(X, 8, channel=2), ValueError, "channel=2 must be in -2..1"),
        (lambda: round_weights(nn.BatchNorm1d(3), 8), ValueError, "BatchNorm1d has no weight"),
        (lambda: round_weights(X, 8), TypeError, "model must be a module"),
        (lambda: round_frame(X * 0, 8), ValueError, "length 0"),
        (lambda: ternary_head(X, Y * 0), ValueError, "class 0 alone"),
        (lambda: ternary_head(X, Y * 2), ValueError, "no sample of class 1"),
        (lambda: ternary_head(X, Y, scale=0), ValueError, "scale=0 must be finite and above 0"),
        (lambda: ternary_head(X, Y, sweeps=0), ValueError, "sweeps=0 must be at least 1"),
        (lambda: ternary_head(X / 0, Y), ValueError, "NaN or infinite"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_weights_that_are_computed_are_refused():
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="0 computes its weight from others"):
        round_weights(net, 8)


def test_a_broken_weight_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1.weight: weight must be finite"):
        round_weights(net, 8)
