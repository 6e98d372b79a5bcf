"""Heads against their own dense product, torch's modules and closed forms."""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ncreg.frames import etf_distance, max_cosine, nearest_simplex_etf, orthoplex, simplex_etf, softmax_code
from ncreg.functional import chunked_cross_entropy
from ncreg.heads import HEADS, CodeHead, CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from ncreg.heads._cosine import cosine_logits, plain_cosine_logits
from ncreg.heads._grouped import GroupedCosine, grouped_cosine
from ncreg.models import swap_head
from tests import nccl_rules, warm_start

F64 = {"dtype": torch.float64}
STRUCTURES = [("dense", 9), ("dense", 14), ("grouped", 10), ("grouped", 14), ("grouped", 30)]
STRUCTURES += [("householder", 9), ("centre", 10)]  # for ten classes


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_default_scale_reaches_one_hundredth(num_classes):
    """At a feature on its class vector the cross-entropy is 0.01, and no unit feature does better."""
    head = ETFHead(num_classes - 1, num_classes, **F64)
    target = torch.arange(num_classes)
    assert F.cross_entropy(head(3 * head.weight), target).item() == pytest.approx(0.01, rel=1e-9)
    nearby = head.weight + 0.01 * gaussian(*head.weight.shape)
    assert F.cross_entropy(head(nearby), target).item() >= 0.01 - 1e-12
    assert FixedHead(head.weight).scale == pytest.approx(head.scale, rel=1e-5)
    assert NearestETFHead(num_classes, num_classes).scale == CosineHead(4, num_classes).scale == head.scale


def test_default_scale_of_any_frame_bounds_the_loss():
    head = FixedHead(2 * softmax_code(9, 3, **F64))
    losses = F.cross_entropy(head(head.weight), torch.arange(9), reduction="none")
    assert 0.001 < losses.max() <= 0.01 + 1e-6


@pytest.mark.parametrize("structure, dim", STRUCTURES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_structures_are_their_own_dense_weight(structure, dim, normalize, permuted, dtype, tolerance):
    seats = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7] if permuted else None
    head = ETFHead(dim, 10, structure=structure, normalize=normalize, permutation=seats, scale=1.0, dtype=dtype)
    gram = head.weight.double() @ head.weight.double().T
    assert (gram - (torch.eye(10, **F64) - 0.1) / 0.9).abs().max() < tolerance
    features = gaussian(7, dim, dtype=dtype).requires_grad_()
    other = features.detach().clone().requires_grad_()
    unit = F.normalize(other, dim=1) if normalize else other
    logits, expected = head(features), unit @ head.weight.T
    assert (logits - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    upstream = gaussian(7, 10, seed=1, dtype=dtype)
    logits.backward(upstream)
    expected.backward(upstream)
    assert (features.grad - other.grad).abs().max() <= tolerance * max(1, other.grad.abs().max())


@pytest.mark.parametrize("structure, dim", STRUCTURES)
def test_permutation_seats_classes(structure, dim):
    seats = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    plain, seated = (ETFHead(dim, 10, structure=structure, permutation=p, **F64) for p in (None, seats))
    assert torch.equal(seated.weight, plain.weight[seats])
    features = gaussian(4, dim)
    assert torch.allclose(seated(features), plain(features)[:, seats], atol=1e-13)
    fresh = ETFHead(dim, 10, structure=structure, permutation=list(range(10)), **F64)
    fresh.load_state_dict(seated.state_dict())
    assert torch.equal(fresh(features), seated(features))


def test_grouped_weight_is_the_written_formula():
    """g_c = m_c^(−1/2) Σ_{j ≡ c mod C} h_j, then √(C/(C−1))·(g − mean g), by loops."""
    head, features = ETFHead(7, 3, structure="grouped", normalize=False, **F64), gaussian(2, 7)
    for row, logits in zip(features, head(features), strict=True):
        groups = [sum(row[c::3]) / math.sqrt(len(row[c::3])) for c in range(3)]
        mean = sum(groups) / 3
        expected = [math.sqrt(1.5) * (g - mean) for g in groups]
        assert torch.allclose(logits, torch.stack(expected), atol=1e-13)


def test_centre_head_under_cross_entropy_is_the_identity_head():
    head, features, target = ETFHead(6, 6, structure="centre", normalize=False), gaussian(8, 6), torch.arange(8) % 6
    expected = F.cross_entropy((6 / 5) ** 0.5 * features, target)
    assert torch.allclose(F.cross_entropy(head(features), target), expected, atol=1e-13)


def test_relu_features_reach_grouped_vertices_better_than_dense():
    """Best cosine of a non-negative feature: ‖W₊‖ a row, ≈ 0.707 dense, √((C−1)/C) grouped."""
    dense, grouped = ETFHead(512, 10, **F64), ETFHead(500, 10, structure="grouped", **F64)
    best = [head.weight.clamp_min(0).norm(dim=1).mean().item() for head in (dense, grouped)]
    assert best == pytest.approx([0.5**0.5, 0.9**0.5], abs=0.02)


@pytest.mark.parametrize("structure, extra", [("grouped", 5), ("householder", -1), ("centre", 0)])
def test_structures_hold_no_frame(structure, extra):
    num_classes = 4000
    head = ETFHead(num_classes + extra, num_classes, structure=structure)
    assert sum(buffer.numel() for buffer in head.buffers()) == 0
    features = gaussian(2, num_classes + extra, dtype=torch.float32).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        head(features).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 60 * 4 * 2 * num_classes  # a few batches of logits; the frame would be 64 MB


@pytest.mark.parametrize("size", [1.0, 1e-9, 0.0])
def test_fast_cosine_logits_equal_the_plain_formula(size):
    features, weight = (size * gaussian(5, 4)).requires_grad_(), gaussian(3, 4, seed=1).requires_grad_()
    upstream = gaussian(5, 3, seed=2)
    fast, plain = cosine_logits(features, weight, 3.0), plain_cosine_logits(features, weight, 3.0)
    assert torch.allclose(fast, plain, rtol=1e-12, atol=1e-15)
    ours, theirs = (torch.autograd.grad(out, (features, weight), upstream) for out in (fast, plain))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)
    if size == 1.0:
        call = lambda x, w: cosine_logits(x, w, 3.0)  # noqa: E731
        assert torch.autograd.gradcheck(call, (features, weight), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, (features, weight))


@pytest.mark.parametrize("name", [name for name in HEADS if name != "linear"])
def test_logits_may_be_changed_in_place(name):
    """A margin on the label's logit, as CosFace has it: the gradient is that of a change of a copy."""
    head, target = HEADS[name](6, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    found = []
    for in_place in (True, False):
        features = gaussian(5, 6).requires_grad_()
        logits = head(features) if in_place else head(features).clone()
        logits[torch.arange(5), target] -= 0.35
        logits *= 2
        found += torch.autograd.grad(F.cross_entropy(logits, target), features)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)


def test_per_sample_gradients_through_vmap():
    head, features = ETFHead(6, 4, **F64), gaussian(5, 6)
    single = torch.func.vmap(torch.func.jacrev(lambda x: head(x[None])[0]))(features)
    full = torch.autograd.functional.jacobian(head, features)
    assert torch.allclose(single, torch.stack([full[i, :, i] for i in range(5)]), atol=1e-12)


def every_head():
    for name, build in HEADS.items():
        yield pytest.param(lambda build=build: build(12, 6), id=name)
    for structure, dim in [("grouped", 13), ("householder", 5), ("centre", 6)]:
        yield pytest.param(lambda s=structure, d=dim: ETFHead(d, 6, structure=s), id=structure)
    yield pytest.param(lambda: ETFHead(12, 6, normalize=False, scale=2.0), id="unnormalised")


@pytest.mark.parametrize("build", list(every_head()))
def test_every_head_has_gradients_and_the_same_contract(build):
    head = build().double()
    assert head.weight.shape == (head.num_classes, head.in_features) and head.scale > 0
    weight = F.normalize(head.weight, dim=1) if isinstance(head, CosineHead) else head.weight
    features = gaussian(4, head.in_features).requires_grad_()
    unit = F.normalize(features, dim=1) if head.normalize else features
    expected = head.scale * unit @ weight.T + (0 if head.bias is None else head.bias)
    assert torch.allclose(head(features), expected, atol=1e-6)  # structured frames round to the dtype
    assert torch.autograd.gradcheck(head, features)


@pytest.mark.parametrize("build", list(every_head()))
def test_every_head_converts_copies_and_reloads(build):
    head = build()
    features = gaussian(4, head.in_features, dtype=torch.float32)
    logits = head(features)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), build()):
        twin.load_state_dict(head.state_dict())
        assert torch.equal(twin(features), logits)
    assert repr(head).startswith(type(head).__name__ + "(in_features=")
    double = copy.deepcopy(head).double()
    assert double(features.double()).dtype == double.weight.dtype == torch.float64
    assert torch.allclose(double(features.double()).float(), logits, atol=1e-4)
    half = copy.deepcopy(head).to(torch.bfloat16)
    low = features.to(torch.bfloat16).requires_grad_()
    assert half.weight.dtype == half(low).dtype == torch.bfloat16
    assert (half(low).float() - logits).abs().max() < 0.02 * head.scale * max(1, features.norm(dim=1).max())
    half(low).sum().backward()
    assert low.grad.isfinite().all()
    assert copy.deepcopy(head).to("meta").weight.is_meta


@pytest.mark.parametrize("build", list(every_head()))
def test_every_head_under_bf16_autocast(build):
    head = build()
    features = gaussian(4, head.in_features, dtype=torch.float32).requires_grad_()
    plain = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features)
    assert (logits.float() - plain).abs().max() < 0.02 * head.scale * (1 if head.normalize else features.norm())
    upstream = gaussian(4, head.num_classes, dtype=torch.float32)
    grad = torch.autograd.grad(logits, features, upstream.to(logits.dtype))[0]
    exact = torch.autograd.grad(plain, features, upstream)[0]
    assert (grad - exact).norm() < 0.03 * exact.norm()


def test_dense_frame_is_drawn_in_float64_and_rounded_once():
    assert torch.equal(ETFHead(12, 5, dtype=torch.bfloat16).weight, ETFHead(12, 5, **F64).weight.bfloat16())
    assert torch.equal(ETFHead(12, 5, seed=3).weight, ETFHead(12, 5, seed=3, **F64).weight.float())


def test_frame_is_a_buffer():
    head = ETFHead(12, 5)
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["weight"]
    given = gaussian(5, 12)
    fixed = FixedHead(given, scale=1.0)
    given.zero_()
    assert fixed.weight.norm() > 1 and not list(fixed.parameters())


def test_zero_feature_has_a_bounded_gradient():
    features = torch.zeros(2, 12, requires_grad=True)
    ETFHead(12, 5)(features).logsumexp(1).sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 1e8


@pytest.mark.parametrize("structure", ["dense", "grouped", "centre", "householder"])
def test_a_zero_feature_in_float16_has_a_finite_gradient_whatever_comes_from_above(structure):
    """The sum of the logits of a simplex is 0 for every feature, and so is its gradient."""
    dim = {"dense": 40, "grouped": 40, "centre": 40, "householder": 39}[structure]
    head = ETFHead(dim, 40, structure=structure).half()
    features = torch.zeros(2, dim, dtype=torch.float16, requires_grad=True)
    logits = head(features)
    logits.float().sum().backward()
    assert logits.dtype == torch.float16 and features.grad.isfinite().all()
    if structure != "dense":
        assert features.grad.abs().max() < 0.1 * head.scale / 2**-14


@pytest.mark.parametrize("build", [ETFHead, partial(ETFHead, structure="grouped"), CosineHead, NearestETFHead])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e19), (torch.bfloat16, 1e19), (torch.float64, 1e155)])
def test_features_whose_length_overflows_give_nan_and_never_a_number(build, dtype, size):
    head, features = build(8, 8).to(dtype), gaussian(4, 8, dtype=dtype)
    for rows in (features * size, (features * size).requires_grad_()):
        assert rows.isfinite().all() and head(rows).isnan().all()
    assert head(features * size / 100).isfinite().all()


@pytest.mark.parametrize("frame", [simplex_etf(10, 20, dtype=torch.float64), orthoplex(10, 5, dtype=torch.float64)])
def test_the_default_scale_is_exact_for_a_frame_of_any_size(frame):
    scale = FixedHead(frame).scale
    if len(frame) < frame.shape[1]:
        assert scale == pytest.approx(ETFHead(20, 10).scale, rel=1e-14)
    for size in (1e-200, 1e-7, 1e39, 1e200):
        assert FixedHead(frame * size).scale == pytest.approx(scale / size, rel=1e-13)


def test_running_means_in_float64_are_float64s():
    head = NearestETFHead(5, 3, momentum=0.1, every=100, normalize=False, dtype=torch.float64)
    batches = [gaussian(3, 5, seed=seed, dtype=torch.float64) for seed in range(4)]
    wanted = batches[0]
    for rows in batches[1:]:
        wanted = wanted + 0.1 * (rows - wanted)
    for rows in batches:
        head.update(rows, torch.arange(3))
    torch.testing.assert_close(head.means, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "build",
    [ETFHead, NearestETFHead, CosineHead, *(partial(ETFHead, structure=kind) for kind in ("grouped", "centre"))],
)
def test_long_features_along_their_class_vectors_keep_their_logits_in_float16(build, autocast):
    """A product with them is beyond float16's largest number, 65504; the logits are not."""
    head = build(32, 32, scale=20.0)
    vectors = F.normalize(head.weight.detach().double(), dim=1)
    rows = vectors / vectors.abs().amax(1, keepdim=True) * 60000
    features = rows.half().requires_grad_()
    head = head if autocast else head.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        logits = head(features)
    assert (logits.double() - 20 * F.normalize(features.detach().double(), dim=1) @ vectors.T).abs().max() < 0.05
    (1024 * F.cross_entropy(logits.float(), torch.arange(32).roll(1))).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "classes"), [(2048, 2), (768, 10), (33, 10)])
def test_what_all_features_share_costs_a_grouped_head_no_digits(dim, classes, dtype):
    """Group sums of features behind a ReLU are large, and what is left of them once their mean is off is small."""
    head = ETFHead(dim, classes, structure="grouped", scale=20.0)
    features = (gaussian(64, dim, dtype=torch.float32) + 3).mul_(300 if dtype == torch.float16 else 1).to(dtype)
    exact = 20 * F.normalize(features.double(), dim=1) @ head.weight.double().T
    assert exact.abs().max() < 5
    for rows in (features, features.clone().requires_grad_()):
        assert (head(rows).double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("length", [0.0, 2e-4, 0.1])
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize(
    "build",
    [ETFHead, NearestETFHead, CosineHead, *(partial(ETFHead, structure=kind) for kind in ("grouped", "centre"))],
)
def test_short_features_have_finite_gradients_in_float16(build, pure, length):
    head = build(8, 8, scale=64.0)
    head = head.half() if pure else head
    features = F.normalize(gaussian(4, 8, dtype=torch.float32), dim=1).mul_(length)
    features = (features.half() if pure else features).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=not pure):
        logits = head(features)
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3]), reduction="sum").backward()
    for gradient in [features.grad, *(parameter.grad for parameter in head.parameters())]:
        assert gradient.isfinite().all()
    if length == 0.1:
        wide = features.detach().double().requires_grad_()
        F.cross_entropy(head.double()(wide), torch.tensor([0, 1, 2, 3]), reduction="sum").backward()
        assert (features.grad - wide.grad).norm() < 0.01 * wide.grad.norm()


def test_linear_head_is_nn_linear():
    head, plain = LinearHead(12, 5), torch.nn.Linear(12, 5)
    plain.load_state_dict(head.state_dict())
    features = gaussian(7, 12, dtype=torch.float32)
    assert torch.equal(head(features), plain(features))
    assert (head.in_features, head.num_classes, head.scale) == (12, 5, 1.0)
    assert head.weight.abs().max() <= 1 / math.sqrt(12) < 1.2 * head.weight.abs().max()
    assert LinearHead(12, 5, bias=False).bias is None


def test_cosine_head_ignores_lengths():
    head = CosineHead(12, 5, scale=2.0, **F64)
    features = gaussian(7, 12).requires_grad_()
    cosines = F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    with torch.no_grad():
        head.weight.mul_(7)
    assert torch.allclose(head(features), 2 * cosines, atol=1e-12)
    call = lambda x, w: torch.func.functional_call(head, {"weight": w}, x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (features, head.weight))


@pytest.mark.parametrize("name", HEADS)
def test_heads_draw_from_their_own_generator(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = HEADS[name](16, 4), HEADS[name](16, 4), HEADS[name](16, 4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("normalize", [True, False])
def test_nearest_head_follows_the_class_means(normalize):
    """Means by a plain loop; the frame is the nearest simplex of them every third update, and not between."""
    head = NearestETFHead(6, 4, momentum=0.25, every=3, normalize=normalize, **F64)
    means, seen = head.weight.clone(), set()
    for step in range(1, 7):
        before = head.weight.clone()
        features, target = gaussian(5, 6, seed=step), torch.tensor([0, 0, 1, 1, step % 3])
        head.update(features, target)
        rows = F.normalize(features, dim=1) if normalize else features
        for c in set(target.tolist()):
            mean = torch.stack([row for row, t in zip(rows, target, strict=True) if t == c]).mean(0)
            means[c] = means[c] + (0.25 if c in seen else 1.0) * (mean - means[c])
            seen.add(c)
        assert torch.allclose(head.means, means, atol=1e-12)
        if step % 3:
            assert torch.equal(head.weight, before)
        else:
            assert (head.weight - nearest_simplex_etf(means)).abs().max() < 1e-3
            assert etf_distance(head.weight) < 1e-20
    assert head.seen.tolist() == [True, True, True, False] and head.updates == 6


def test_nearest_head_resumes_exactly_and_keeps_undetermined_directions():
    head, twin = (NearestETFHead(8, 5, every=1, seed=s, **F64) for s in (0, 1))
    features, target = gaussian(4, 8), torch.tensor([0, 1, 0, 1])
    head.update(features, target)
    twin.load_state_dict(head.state_dict())
    for other in head, twin:
        other.update(features + 1, target)
    assert torch.equal(head.weight, twin.weight) and torch.equal(head.means, twin.means)
    flat = NearestETFHead(8, 5, every=1, momentum=1.0, **F64)  # all means in one point: nothing to follow
    start = flat.weight.clone()
    flat.update(torch.ones(5, 8, **F64), torch.arange(5))
    assert torch.allclose(flat.weight, start, atol=1e-9)
    flat.update(torch.zeros(5, 8, **F64), torch.arange(5))  # features that died
    assert torch.allclose(flat.weight, start, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_nearest_head_takes_labels_of_any_integer_type(dtype):
    head, twin = (NearestETFHead(8, 5, every=1, **F64) for _ in range(2))
    features, target = gaussian(6, 8), torch.tensor([0, 4, 1, 2, 3, 4])
    head.update(features, target)
    twin.update(features, target.to(dtype))
    assert torch.equal(head.weight, twin.weight) and torch.equal(head.means, twin.means)
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\), got 0 to 5"):
        twin.update(features[:2], torch.tensor([0, 5], dtype=dtype))


@pytest.mark.parametrize("normalize", [True, False])
def test_an_update_before_backward_leaves_the_gradient_that_of_the_frame_in_use(normalize):
    """The gradient of cross-entropy and of ½(w·h)² in the features, from the class vectors as they were."""
    head = NearestETFHead(6, 4, every=1, normalize=normalize, scale=3.0, **F64)
    for step in range(3):
        features, target = gaussian(5, 6, seed=step).requires_grad_(), torch.tensor([0, 1, 2, 3, step])
        before = head.weight.clone()
        loss = F.cross_entropy(head(features), target, reduction="sum")
        loss = loss + 0.5 * (features * head.weight[target]).sum(1).square().sum()  # a loss that reads the frame itself
        head.update(features.detach(), target)
        assert not torch.allclose(head.weight, before) and head.weight.is_contiguous()
        loss.backward()
        for row, label, found in zip(features.detach(), target, features.grad, strict=True):
            length = row.norm() if normalize else torch.ones((), **F64)
            unit = row / length
            pulled = before.T @ (3.0 * ((3.0 * before @ unit).softmax(0) - torch.eye(4, **F64)[label]))
            pulled = pulled - (pulled @ unit) * unit if normalize else pulled
            expected = pulled / length + (row @ before[label]) * before[label]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_replica_of_data_parallel_is_not_updated():
    replica = NearestETFHead(6, 4)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"model.module.head.update\(features, target\)"):
        replica.update(torch.ones(2, 6), torch.tensor([0, 1]))


def test_class_vectors_that_lie_in_columns_are_saved_by_safetensors():
    vectors = torch.eye(6, 4).T + 1
    saved = safetensors.torch.save(FixedHead(vectors, scale=1.0).state_dict())
    assert torch.equal(safetensors.torch.load(saved)["weight"], vectors)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_saved_with_its_model_by_safetensors(name, tmp_path):
    """save_model, which Accelerate and the hub's mixin call, refuses a view of a larger storage."""
    saved, loaded = (torch.nn.ModuleDict({"head": HEADS[name](9, 4)}) for _ in range(2))
    for tensor in (*saved.parameters(), *saved.buffers()):
        if name != "code":  # which checks that its vector is that of the seed
            tensor.data.mul_(3)
    safetensors.torch.save_model(saved, tmp_path / "model.safetensors")
    assert safetensors.torch.load_model(loaded, tmp_path / "model.safetensors") == (set(), [])
    state = loaded.state_dict()
    assert state and all(torch.equal(value, state[key]) for key, value in saved.state_dict().items())


def _update_on_two(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    nccl_rules.enforce()
    ours, alone = NearestETFHead(6, 4, every=1, **F64), NearestETFHead(6, 4, every=1, **F64)
    batches = [(gaussian(7, 6, seed=s), torch.tensor([0, 1, 2, 3, 0, 1, s % 4])) for s in range(3)]
    for features, target in batches:
        part = slice(0, 2) if rank == 0 else slice(2, 7)
        ours.update(features[part], target[part])
    dist.barrier()  # before torch 2.8 a group destroyed right after a collective may hang
    dist.destroy_process_group()
    for features, target in batches:
        alone.update(features, target)
    assert torch.allclose(ours.weight, alone.weight, atol=1e-12)
    assert torch.equal(ours.seen, alone.seen)


def test_nearest_head_on_two_ranks_equals_one(tmp_path):
    mp.start_processes(_update_on_two, args=(tmp_path / "meet",), nprocs=2, start_method=warm_start.METHOD)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", HEADS)
def test_heads_refuse(name):
    build = HEADS[name]
    with pytest.raises(ValueError, match="num_classes=1"):
        build(8, 1)
    with pytest.raises(TypeError, match="=8.5 must be an integer"):
        build(8.5, 4)
    with pytest.raises(ValueError, match=r"\(2, 8, 1, 1\)"):
        build(8, 4)(torch.zeros(2, 8, 1, 1))
    with pytest.raises(ValueError, match=r"\(batch, 8\)"):
        build(8, 4)(torch.zeros(2, 9))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ETFHead(8, 10), "dim=8.*project=9.*softmax_code"),
        (lambda: ETFHead(9, 10, structure="grouped"), "in_features=9.*needs in_features >= 10.*project=10"),
        (lambda: ETFHead(10, 10, structure="householder"), "needs in_features 9.*structure='dense'"),
        (lambda: ETFHead(9, 10, structure="centre"), "needs in_features 10"),
        (lambda: ETFHead(9, 10, structure="helmert"), "'helmert' must be one of 'dense'"),
        (lambda: ETFHead(9, 10, structure=["dense"]), r"structure=\['dense'\] must be one of 'dense'"),
        (lambda: ETFHead(9, 4, permutation=[0, 1, 2, 2]), "each of 0 … 3 exactly once"),
        (lambda: ETFHead(9, 4, permutation=[0, 1, 2]), "one integer for each of 4"),
        (lambda: ETFHead(9, 4, permutation=[0.0, 1.0, 2.0, 3.0]), "one integer"),
        (lambda: ETFHead(9, 2, permutation=[True, False]), "one integer"),
        (lambda: ETFHead(9, 4, scale=0.0), "scale=0.0 must be finite and above 0; None"),
        (lambda: ETFHead(9, 4, scale=math.nan), "scale=nan"),
        (lambda: FixedHead(torch.zeros(4)), "floating-point"),
        (lambda: FixedHead(torch.zeros(1, 4)), "num_classes >= 2"),
        (lambda: FixedHead(torch.eye(3, dtype=torch.long)), "floating-point"),
        (lambda: FixedHead(torch.full((3, 4), torch.nan)), "finite"),
        (lambda: FixedHead(torch.ones(3, 4)), "smallest margin"),
        (lambda: NearestETFHead(8, 4, momentum=0.0), "momentum=0.0"),
        (lambda: NearestETFHead(8, 4, every=0), "every=0"),
        (lambda: NearestETFHead(2, 4), "dim=2"),
        (lambda: NearestETFHead(8, 4).update(torch.ones(2, 8), torch.tensor([0, 4])), r"target must lie in \[0, 4"),
        (lambda: NearestETFHead(8, 4).update(torch.ones(2, 8), torch.tensor([0])), "one class index for each of 2"),
        (lambda: NearestETFHead(8, 4).update(torch.ones(2, 8), torch.zeros(2)), "one class index"),
        (lambda: NearestETFHead(8, 4).update(torch.ones(2, 8), torch.ones(2) > 0), "torch.bool.*one class index"),
    ],
)
def test_heads_refuse_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ETFHead(9, 4, scale="8"), "scale='8' must be a number"),
        (lambda: ETFHead(9, 4, seed="a"), "seed='a' must be an integer"),
        (lambda: LinearHead(9, 4, seed=0.5), "seed=0.5"),
        (lambda: FixedHead([[1.0, 0.0], [0.0, 1.0]]), "must be a tensor of class vectors, not list"),
        (lambda: FixedHead(torch.eye(3), normalize="no"), "normalize='no' must be True or False"),
        (lambda: ETFHead(9, 4, normalize="no"), "normalize='no' must be True or False"),
        (lambda: NearestETFHead(9, 4, normalize="no"), "normalize='no' must be True or False"),
        (lambda: NearestETFHead(9, 4, momentum="0.1"), "momentum='0.1' must be a number"),
        (lambda: LinearHead(9, 4, bias="False"), "bias='False' must be True or False"),
        (lambda: ETFHead(9, 4, dtype=torch.int64), "dtype=torch.int64 must be a floating-point dtype"),
        (lambda: ETFHead(9, 4, structure="grouped", dtype=torch.int64), "dtype=torch.int64"),
        (lambda: NearestETFHead(9, 4, dtype=torch.int64), "dtype=torch.int64"),
        (lambda: CosineHead(9, 4, dtype=torch.int64), "dtype=torch.int64"),
        (lambda: LinearHead(9, 4, dtype=torch.int64), "dtype=torch.int64"),
        (lambda: ETFHead(9, 4)([[1.0] * 9]), "features must be a tensor .* not list"),
        (lambda: ETFHead(9, 4)(torch.ones(2, 9).double()), "features of torch.float64 into a head of torch.float32"),
        (lambda: CosineHead(9, 4)(torch.ones(2, 9).double()), "features of torch.float64 into a head of torch.float32"),
        (lambda: LinearHead(9, 4)(torch.ones(2, 9).half()), "features of torch.float16 into a head of torch.float32"),
        (lambda: ETFHead(9, 4, structure="grouped")(torch.ones(2, 9).long()), "features of torch.int64"),
    ],
)
def test_heads_refuse_wrong_types(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.usefixtures("unchecked")
def test_nearest_head_survives_a_bad_batch():
    head = NearestETFHead(8, 4, every=1)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        head.update(torch.full((2, 8), torch.inf), torch.tensor([0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_frames_by_name_are_those_frames():
    assert torch.equal(HEADS["softmax_code"](3, 8, seed=2).weight, softmax_code(8, 3, seed=2))
    assert HEADS["orthoplex"](4, 8, scale=2.0).scale == 2.0
    assert max_cosine(HEADS["tammes"](3, 6).weight).abs() < 1e-6
    assert torch.equal(ETFHead(9, 4, seed=5).weight, simplex_etf(4, 9, generator=torch.Generator().manual_seed(5)))


@pytest.mark.slow
def test_every_head_compiles_and_exports():
    """In a process of its own, without the test suite's annotation checks, as a user has it."""
    script = Path(__file__).with_name("compile_heads.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") == 2 * 15


def test_a_cosine_heads_class_vectors_are_the_unit_rows_it_decides_by():
    head = CosineHead(5, 4, scale=3.0, dtype=torch.float64)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.1], [1.0], [7.0], [100.0]]))
    numpy_rows = head.weight.detach().numpy() / np.linalg.norm(head.weight.detach().numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(head.class_vectors.detach().numpy(), numpy_rows, rtol=1e-12)
    features = torch.randn(6, 5, dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(features), 3.0 * unit @ head.class_vectors.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (6, 3), (4, 4), (11, 2), (20, 7)])
def test_the_grouped_heads_own_backward_is_that_of_the_plain_formula(dim, classes):
    generator = torch.Generator().manual_seed(dim)
    features = torch.randn(5, dim, dtype=torch.float64, generator=generator)
    features[3] = 0  # a row that is shorter than EPS
    upstream = torch.randn(5, classes, dtype=torch.float64, generator=generator)
    found = []
    for function in (GroupedCosine.apply, grouped_cosine):
        rows = features.clone().requires_grad_()
        out = function(rows, classes, 3.0)
        found.append((out.detach(), *torch.autograd.grad(out, rows, upstream)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    rows = features[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: GroupedCosine.apply(h, classes, 3.0), (rows,))
    assert torch.autograd.gradgradcheck(lambda h: GroupedCosine.apply(h, classes, 3.0), (rows,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("head", ["etf", "cosine", "linear", "nearest_etf"])
def test_a_model_that_is_traced_in_training_is_right_at_other_batch_sizes_and_warns_of_nothing(head):
    """Warnings are errors here; trace itself compares two traces and a fresh forward pass."""
    model = swap_head("test_resnet", head, num_classes=10).eval()
    traced = torch.jit.trace(model, torch.rand(2, 3, 32, 32))
    images = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(traced(images), model(images))


@pytest.mark.parametrize("start", [1.0, 6.0])
@pytest.mark.parametrize(
    "build",
    {
        "dense": lambda: ETFHead(24, 5),
        "dense, raw": lambda: ETFHead(24, 5, normalize=False),
        "grouped": lambda: ETFHead(24, 5, structure="grouped"),
        "grouped, raw": lambda: ETFHead(24, 5, structure="grouped", normalize=False),
        "fixed": lambda: FixedHead(torch.eye(5, 24)),
        "nearest": lambda: NearestETFHead(24, 5),
        "cosine": lambda: CosineHead(24, 5),
        "code": lambda: CodeHead(24, 5),
    }.values(),
)
def test_a_scale_that_is_set_to_be_learned_gets_its_gradient(build, start):
    """d/ds of the cross-entropy of s·u is the mean over p of u less that of the label; 1 counts as any other scale."""
    head, generator = build().double(), torch.Generator().manual_seed(3)
    features = torch.randn(9, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.arange(9) % 5
    head.scale = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    assert f"scale={start:.4g}" in repr(head) and "scale" in dict(head.named_parameters())
    rows = features.detach().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if head.normalize else rows
    inner = rows @ getattr(head, "class_vectors", head.weight).detach().numpy().T
    chances = np.exp(start * inner) / np.exp(start * inner).sum(1, keepdims=True)
    wanted = ((chances * inner).sum(1) - inner[np.arange(9), target]).mean()
    for loss in (
        lambda: F.cross_entropy(head(features), target),
        lambda: chunked_cross_entropy(features, head, target, chunk=2),
    ):
        found = torch.autograd.grad(loss(), [head.scale, features])
        assert float(found[0]) == pytest.approx(wanted, rel=1e-9)
        constant = copy.deepcopy(head)
        del constant._parameters["scale"]
        constant.scale = start
        expected = torch.autograd.grad(F.cross_entropy(constant(features), target), features)[0]
        torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_a_scale_that_could_not_be_learned_is_refused():
    for build in (ETFHead, CosineHead, CodeHead):
        with pytest.raises(TypeError, match="set it on the head that was built"):
            build(24, 5, scale=torch.nn.Parameter(torch.tensor(3.0)))
    assert ETFHead(24, 5, scale=torch.tensor(3.0)).scale == 3
    with pytest.raises(AttributeError, match="scale"):
        LinearHead(24, 5).scale = 3.0


@pytest.mark.parametrize("build", [lambda: ETFHead(24, 5), lambda: ETFHead(24, 5, structure="grouped")])
def test_a_learned_scale_in_float16_keeps_a_zero_features_gradient_within_range(build):
    head, features = build().half(), torch.zeros(2, 24, dtype=torch.float16, requires_grad=True)
    head.scale = torch.nn.Parameter(torch.tensor(30.0, dtype=torch.float16))
    head(features).float().square().sum().backward()
    head(features)[:, 0].sum().backward()
    assert bool(features.grad.isfinite().all()) and bool(head.scale.grad.isfinite())


def seats(seed, classes=10):
    return torch.randperm(classes, generator=torch.Generator().manual_seed(seed))


SAVED = {
    "given": lambda seed: FixedHead(gaussian(10, 16, seed=seed).float() + 4 * torch.eye(10, 16)),
    "given raw": lambda seed: FixedHead((1 + seed) * torch.eye(10, 16), normalize=False),
    "given scale": lambda seed: FixedHead((1 + seed) * torch.eye(10, 16), scale=5.0),
    **{
        name: lambda seed, name=name: HEADS[name](16, 10, seed=seed) for name in ("orthoplex", "tammes", "softmax_code")
    },
    "hypercube": lambda seed: HEADS["hypercube"](16, 10, seed=seed, permutation=seats(seed)),
    "dense": lambda seed: ETFHead(16, 10, seed=seed, permutation=seats(seed)),
    "grouped": lambda seed: ETFHead(16, 10, structure="grouped", permutation=seats(seed)),
    "householder": lambda seed: ETFHead(9, 10, structure="householder", permutation=seats(seed)),
    "centre": lambda seed: ETFHead(10, 10, structure="centre", permutation=seats(seed)),
    "nearest": lambda seed: moved(NearestETFHead(16, 10), seed),
    "linear": lambda seed: LinearHead(16, 10),
    "cosine": lambda seed: CosineHead(16, 10),
}


def moved(head, seed):
    head.update(gaussian(50, head.in_features, seed=seed).float(), torch.arange(50) % 10)
    return head


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_head_gives_the_logits_of_the_one_that_was_saved(name):
    """To the last bit, into a head of other class vectors: a scale that was left open is that of those that came."""
    first, second = SAVED[name](1).eval(), SAVED[name](2).eval()
    features = gaussian(8, first.in_features).float()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(features), first(features))


def test_a_scale_that_was_left_open_follows_the_class_vectors_and_no_rounding():
    head = FixedHead(3 * torch.eye(10, 16))
    own = head.scale
    head.load_state_dict({"weight": 2 * torch.eye(10, 16)})
    assert head.scale == pytest.approx(1.5 * own)  # the margin is the length
    head = HEADS["tammes"](16, 10)
    own = head.scale
    levels = 127 / head.weight.abs().max()
    for rounded in (head.weight.bfloat16(), head.weight.bfloat16().float(), (head.weight * levels).round() / levels):
        head.load_state_dict({"weight": rounded})  # whose margin is another one
        assert head.scale == own
    head.load_state_dict({"weight": 2 * torch.eye(10, 16)})
    head.reset_parameters()
    assert head.scale == own
    for learned in (7.0, torch.nn.Parameter(torch.tensor(7.0))):
        head.scale = learned
        head.load_state_dict({"weight": torch.eye(10, 16)}, strict=False)
        assert head.scale == 7


@pytest.mark.usefixtures("unchecked")
def test_loaded_class_vectors_without_a_default_scale_are_refused():
    with pytest.raises(ValueError, match="does not beat the other classes.*give a scale"):
        FixedHead(torch.eye(10, 16)).load_state_dict({"weight": torch.ones(10, 16)})
