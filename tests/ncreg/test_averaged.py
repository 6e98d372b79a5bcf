"""Averages of weights: timm's and torch's, over every head and the last norm."""

import copy
import pickle
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import ncreg
from ncreg.averaging import update_bn
from ncreg.frames import nearest_simplex_etf, simplex_etf
from ncreg.heads import HEADS, CodeHead, FixedHead, NearestETFHead
from ncreg.norms import LastBatchNorm
from ncreg.numerics import whole
from tests import nccl_rules, warm_start

CLASSES, DIM = 6, 12


class TimmV2:
    def __init__(self, model):
        self.average = ModelEmaV2(model, decay=0.9)

    def update(self, model):
        self.average.update(model)

    @property
    def model(self):
        return self.average.module


class TimmV3(TimmV2):
    def __init__(self, model, **args):
        self.average = ModelEmaV3(model, decay=0.9, **args)


class Torch(TimmV2):
    def __init__(self, model, **args):
        self.average = swa_utils.AveragedModel(model, **args)

    def update(self, model):
        self.average.update_parameters(model)


class InPlace(TimmV2):
    """Entries of the state_dict multiplied and added in place, as many repositories do it."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update(self, model):
        new = model.state_dict()
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                value *= 0.9
                value += 0.1 * new[key].detach()

    model = property(lambda self: self.module)


EMA = swa_utils.get_ema_multi_avg_fn(0.9)
AVERAGES = {
    "timm V2": TimmV2,
    "timm V3": TimmV3,
    "timm V3 one by one": lambda m: TimmV3(m, foreach=False),
    "timm V3 without buffers": lambda m: TimmV3(m, exclude_buffers=True),
    "SWA": Torch,
    "SWA of buffers": lambda m: Torch(m, use_buffers=True),
    "SWA of buffers, one by one": lambda m: Torch(m, avg_fn=swa_utils.get_swa_avg_fn(), use_buffers=True),
    "EMA": lambda m: Torch(m, multi_avg_fn=EMA),
    "EMA of buffers": lambda m: Torch(m, multi_avg_fn=EMA, use_buffers=True),
    "EMA of buffers, one by one": lambda m: Torch(m, avg_fn=swa_utils.get_ema_avg_fn(0.9), use_buffers=True),
    "in place": InPlace,
}


def train(model, average, rounds=12):
    """Means that wander, so that the frame turns; the model behind keeps its last norm's statistics too."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(3 * CLASSES) % CLASSES
    for _ in range(rounds):
        means = torch.randn(CLASSES, DIM, generator=generator)
        features = model[0](means[target] + 0.1 * torch.randn(len(target), DIM, generator=generator))
        head = model[1]
        if isinstance(head, NearestETFHead):
            head.update(features.detach(), target)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        average.update(model)


def simplex_error(weight):
    gram = weight.double() @ weight.double().T
    identity = torch.eye(CLASSES, dtype=torch.float64)
    return (gram - (CLASSES * identity - 1) / (CLASSES - 1)).abs().max().item()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("build", AVERAGES.values(), ids=AVERAGES)
def test_every_average_of_every_head_keeps_its_constraint(head, build):
    seen = {"seed": 1}
    args = {"every": 1, "momentum": 1.0} if head == "nearest_etf" else {}
    model = nn.Sequential(LastBatchNorm(DIM), HEADS[head](DIM, CLASSES, **seen, **args))
    fixed = model[1].weight.clone() if isinstance(model[1], FixedHead | CodeHead) else None
    average = build(model)
    train(model, average)
    found = average.model[1]
    if fixed is not None:
        torch.testing.assert_close(found.weight, fixed, atol=1e-6, rtol=0)
    if head == "nearest_etf":
        assert simplex_error(found.weight) < 1e-5
        torch.testing.assert_close(found(found.weight), found.scale * found.weight @ found.weight.T)
        assert found.seen.gt(0).all()
        stored = found.state_dict()["weight"]
        if simplex_error(stored) > 1e-3:  # averaged: W is the nearest simplex of the average
            torch.testing.assert_close(found.weight, nearest_simplex_etf(stored))
    assert average.model[0].running_var.gt(0).all()


def test_the_raw_average_is_no_simplex_and_evaluations_do_not_change_it():
    """What an average holds is the plain mean, whether or not the averaged model is used in between."""

    def averaged(used):
        model = nn.Sequential(LastBatchNorm(DIM), NearestETFHead(DIM, CLASSES, every=1, momentum=1.0))
        average = TimmV3(model)
        for _ in range(3):
            train(model, average, rounds=4)
            if used:
                average.model.eval()
                average.model(torch.ones(2, DIM))
        return average.model.state_dict()

    alone, used = averaged(False), averaged(True)
    assert all(torch.equal(alone[key], used[key]) for key in alone)
    assert simplex_error(alone["1.weight"]) > 0.1


def test_an_untouched_frame_is_the_buffer_itself():
    head = NearestETFHead(DIM, CLASSES)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        head.to(dtype)
        assert head.weight is head._buffers["weight"]
    assert head.to("meta").weight.is_meta


def test_training_goes_on_from_an_average():
    model = nn.Sequential(LastBatchNorm(DIM), NearestETFHead(DIM, CLASSES, every=5, momentum=1.0))
    average = TimmV3(model)
    train(model, average)
    model.load_state_dict(average.model.state_dict())
    model[1].update(torch.randn(CLASSES, DIM), torch.arange(CLASSES))
    assert simplex_error(model[1]._buffers["weight"]) < 1e-5  # written back by the first update


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_inference_mode_and_after_it(mode):
    head = NearestETFHead(DIM, CLASSES).eval()
    with torch.no_grad():
        head._buffers["weight"].lerp_(simplex_etf(CLASSES, DIM, generator=torch.Generator().manual_seed(9)), 0.5)
    with mode():
        assert simplex_error(head(torch.eye(DIM)).T / head.scale) < 1e-5
    features = torch.randn(2, DIM, requires_grad=True)
    head(features).sum().backward()
    assert features.grad.isfinite().all()


def nearest_by_numpy(frame):
    """The simplex nearest to a frame: the rotation of one is an orthogonal Procrustes problem."""
    corners = (np.eye(CLASSES) - 1 / CLASSES) * np.sqrt(CLASSES / (CLASSES - 1))
    left, _, right = np.linalg.svd(corners.T @ frame.numpy(), full_matrices=False)
    return torch.from_numpy(corners @ left @ right)


def test_an_average_that_is_written_through_data_is_seen():
    """`.data` leaves a tensor's version as it was, and so do collectives: ema-pytorch and others average that way."""
    one, other = (NearestETFHead(DIM, CLASSES, seed=seed, dtype=torch.float64) for seed in (0, 1))
    average = copy.deepcopy(one).eval()
    stored = average._buffers["weight"]
    assert torch.equal(average.weight, one.weight)
    for _ in range(3):
        stored.data.lerp_(other.weight, 0.3)
        torch.testing.assert_close(average.weight, nearest_by_numpy(stored), atol=1e-12, rtol=0)
    stored.data.copy_(one.weight)  # the weights of before are put back, and training goes on
    assert torch.equal(average.train().weight, one.weight)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_of_an_average_that_was_in_use_follows_its_own_buffer(again):
    """A copied tensor counts its versions from the start, and came to those that the first one had been looked at."""
    head, other = (NearestETFHead(DIM, CLASSES, seed=seed, dtype=torch.float64) for seed in (0, 1))
    for _ in range(5):
        head._buffers["weight"].lerp_(other.weight, 0.1)
    torch.testing.assert_close(head.weight, nearest_by_numpy(head._buffers["weight"]), atol=1e-12, rtol=0)
    for writes in range(1, 6):
        copied = again(head)
        for _ in range(writes):
            copied._buffers["weight"].lerp_(other.weight, 0.2)
        torch.testing.assert_close(copied.weight, nearest_by_numpy(copied._buffers["weight"]), atol=1e-12, rtol=0)


def test_a_copy_of_a_head_that_was_compiled_in_place_computes_with_its_own_frame():
    """`Module.compile` keeps a call of the module itself, which torch leaves out of copies."""
    head, x = NearestETFHead(DIM, CLASSES, normalize=False, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)
    head.compile(backend="eager")
    average = copy.deepcopy(head).eval()
    average._buffers["weight"].neg_()
    torch.testing.assert_close(average(x), -head(x))
    assert torch.equal(pickle.loads(pickle.dumps(head))(x), head(x))


def test_nan_stays_to_be_seen():
    head = NearestETFHead(DIM, CLASSES).eval()
    head._buffers["weight"][0, 0] = torch.nan
    assert head(torch.ones(1, DIM))[0, 0].isnan()


def test_a_state_of_earlier_versions_loads():
    """`seen` was boolean."""
    head = NearestETFHead(3, 2, every=1)
    head.update(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    old = head.state_dict() | {"seen": torch.tensor([True, False])}
    for assign in (False, True):
        for prefix, model in (("", NearestETFHead(3, 2)), ("1.", nn.Sequential(nn.ReLU(), NearestETFHead(3, 2)))):
            model.load_state_dict({prefix + key: value.clone() for key, value in old.items()}, assign=assign)
            found = model[1] if prefix else model
            assert found.seen.tolist() == [1.0, 0.0] and found.seen.dtype == torch.float32
            found.update(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1]))
            assert found.means[1].tolist() == [0.0, 1.0, 0.0] and found.seen.tolist() == [1.0, 1.0]


def batches(count=7, size=9, width=4):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(size, width, generator=generator) * 3 + 1, torch.zeros(size)) for _ in range(count)]


def test_update_bn_is_torchs_where_torch_knows_the_norm():
    ours = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), LastBatchNorm(4), nn.BatchNorm1d(4, momentum=0.3))
    theirs = copy.deepcopy(ours)
    theirs[2] = nn.BatchNorm1d(4)
    ours.eval(), theirs.eval()
    ours[0].train()  # a mode of its own comes back
    update_bn(batches(), ours)
    swa_utils.update_bn(batches(), theirs)
    inside = ours[1](torch.cat([nn.functional.batch_norm(rows, None, None, training=True) for rows, _ in batches()]))
    for place in (0, 2, 3):
        assert ours[place].num_batches_tracked == theirs[place].num_batches_tracked == 7
        torch.testing.assert_close(ours[place].running_mean, theirs[place].running_mean)
    torch.testing.assert_close(ours[2].running_var, inside.var(0))  # theirs is the mean over batches
    assert [part.training for part in ours] == [True, False, False, False] and not ours.training
    assert ours[2].momentum == 0.1 and ours[3].momentum == 0.3


def uneven(rows, sizes=(100, 100, 100, 20)):
    return list(rows.split(sizes))


@pytest.mark.parametrize("sizes", [(100, 100, 100, 20), (320,), (2, 316, 2), (64,) * 5])
def test_update_bn_gives_the_exact_statistics_of_the_whole_set(sizes):
    """However the set is cut into batches; the oracle is numpy in float64."""
    rows = torch.randn(320, 4, generator=torch.Generator().manual_seed(1)) * 3 + 50
    rows[300:] += 20  # the last images are of another kind
    norm = ncreg.LastBatchNorm(4)
    norm(10 * torch.randn(8, 4))
    ncreg.update_bn(uneven(rows, sizes), norm, device="cpu")
    exact = rows.double().numpy()
    torch.testing.assert_close(norm.running_mean, torch.tensor(exact.mean(0)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var, torch.tensor(exact.var(0, ddof=1)).float(), rtol=1e-6, atol=0)
    assert norm.num_batches_tracked == len(sizes)


def test_update_bn_of_a_compiled_model_that_ran_before():
    """Its code was made before the hooks were set, for a norm of the momentum that update_bn sets."""
    rows = torch.randn(320, 4, generator=torch.Generator().manual_seed(1)) * 3 + 50
    net = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(rows[:9])
    update_bn(uneven(rows), compiled)
    torch.testing.assert_close(net[0].running_var, rows.double().var(0).float())


def test_update_bn_changes_no_batch_of_a_model_that_changes_its_input_in_place():
    class Centred(nn.Module):
        def forward(self, rows):
            return rows.sub_(50)

    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) + 50
    batches, norm = list(rows.clone().split(9)), nn.BatchNorm1d(4)
    for _ in range(2):
        update_bn(batches, nn.Sequential(Centred(), norm))
        torch.testing.assert_close(norm.running_mean, (rows - 50).double().mean(0).float())
    assert torch.equal(torch.cat(batches), rows)


def test_update_bn_pools_maps_and_a_norm_that_runs_twice():
    maps = torch.randn(32, 3, 5, 4, generator=torch.Generator().manual_seed(2)) + 1
    norm = nn.BatchNorm2d(3, momentum=None)
    update_bn(uneven(maps, (20, 12)), nn.Sequential(norm, nn.ReLU(), norm))
    once = [nn.functional.batch_norm(part, None, None, training=True).relu() for part in uneven(maps, (20, 12))]
    exact = torch.cat([maps, *once]).double().transpose(0, 1).flatten(1).numpy()
    torch.testing.assert_close(norm.running_mean, torch.tensor(exact.mean(1)).float())
    torch.testing.assert_close(norm.running_var, torch.tensor(exact.var(1, ddof=1)).float())
    assert norm.momentum is None and not norm._forward_hooks


def test_update_bn_leaves_frozen_and_unreached_norms_alone():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    frozen, free = Frozen(4), nn.BatchNorm1d(4, track_running_stats=False)
    frozen.running_mean.fill_(7), frozen.num_batches_tracked.fill_(3)
    free.unreached = nn.BatchNorm1d(2)
    free.unreached.running_var.fill_(3)
    update_bn([rows for rows, _ in batches()], nn.Sequential(frozen, free))
    assert frozen.running_mean.eq(7).all() and frozen.num_batches_tracked == 3
    assert free.unreached.running_var.eq(3).all() and free.running_mean is None


@pytest.mark.usefixtures("unchecked")
def test_update_bn_refuses_and_leaves_settings_alone():
    norm = LastBatchNorm(4).eval()
    norm.running_mean.fill_(5)
    with pytest.raises(ValueError, match="loader gave no batch"):
        update_bn([], norm)
    assert norm.running_mean.eq(5).all()
    for wrong in ({"x": torch.zeros(2, 4)}, [], "images"):
        with pytest.raises(TypeError, match="a batch must be a tensor or begin with one, got"):
            update_bn([wrong], norm)
    with pytest.raises(ValueError, match="batch of 1 sample"):
        update_bn([torch.zeros(3, 4), torch.zeros(1, 4)], norm)
    assert norm.running_mean.eq(5).all() and norm.num_batches_tracked == 0
    assert norm.momentum == 0.1 and not norm.training
    update_bn([], nn.Linear(2, 2))  # nothing to bring up to date


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [LastBatchNorm(4), nn.BatchNorm1d(4)])
def test_update_bn_refuses_batches_that_are_not_finite(norm, value):
    update_bn([torch.randn(8, 4)], norm)
    before = [buffer.clone() for buffer in norm.buffers()]
    spoilt = torch.randn(8, 4)
    spoilt[3, 2] = value
    with pytest.raises(ValueError, match=f"batch 2 brings NaN or infinite values to {type(norm).__name__}"):
        update_bn([torch.randn(8, 4), spoilt], norm)
    assert all(torch.equal(*pair) for pair in zip(norm.buffers(), before, strict=True))


def test_averaged_weights_have_their_own_statistics_after_update_bn():
    """The training features of the averaged model have mean 0 again; torch's update_bn leaves those of another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), LastBatchNorm(4))
    average = swa_utils.AveragedModel(model)
    for shift in range(5):
        with torch.no_grad():
            model[0].bias.fill_(shift)
        for rows, _ in batches():
            model(rows)
        average.update_parameters(model)
    rows = torch.cat([rows for rows, _ in batches()])
    swa_utils.update_bn(batches(), average)
    assert average.eval()(rows).mean(0).abs().max() > 0.3
    update_bn(batches(), average)
    assert average.eval()(rows).mean(0).abs().max() < 1e-5


def test_update_bn_reads_a_frozen_norm_as_it_is():
    """What stands behind it sees what it gives: (x − 5)/2, by numpy."""

    class HalfFrozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(3, eps=0), nn.BatchNorm1d(3)

        def train(self, mode=True):
            super().train(mode)
            self.first.eval()
            return self

        def forward(self, x):
            return self.second(self.first(x))

    model = HalfFrozen().double()
    model.first.running_mean.fill_(5.0), model.first.running_var.fill_(4.0)
    x = torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 5
    update_bn(x.split(16), model)
    behind = (x.numpy() - 5) / 2
    np.testing.assert_allclose(model.second.running_mean.numpy(), behind.mean(0), atol=1e-12)
    np.testing.assert_allclose(model.second.running_var.numpy(), behind.var(0, ddof=1), atol=1e-12)
    assert model.first.running_mean.eq(5).all() and model.first.running_var.eq(4).all()


SIZES = [((4, 2, 6), (3, 8, 2)), ((4, 4, 4), (4,) * 5), ((), (4, 4)), ((4, 4), ()), ((), ())]
"""Sizes of the batches of each of two ranks."""


def _update_bn_on(rank, meeting):
    """Equal numbers of batches of any sizes give the statistics of all rows; others are refused on both ranks."""
    init = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **init)
    nccl_rules.enforce()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for sizes in SIZES:
        for wrap in (nn.Identity, DistributedDataParallel, partial(fully_shard, mesh=mesh)):
            net = nn.Sequential(nn.Linear(4, 4), LastBatchNorm(4)).double() if wrap is nn.Identity else joined()
            _update_and_compare(rank, sizes, net, wrap)
    _fail_on_the_second(rank)
    alone = nn.BatchNorm1d(4).double()  # whose ranks do not need each other
    rows = ranks_rows((12, 20))[rank]
    update_bn(rows.split(4), alone)
    np.testing.assert_allclose(alone.running_var.numpy(), rows.numpy().var(0, ddof=1), atol=1e-12)
    dist.barrier()
    dist.destroy_process_group()


def _fail_on_the_second(rank):
    """What one rank alone meets ends the other too: in its loader, in a batch, or in a norm of its own values."""
    rows = torch.ones(3, 4, dtype=torch.float64) * torch.arange(3)[:, None]

    def ends():
        yield rows
        raise OSError("damaged file")

    others = "1 of 2 ranks failed at batch (1|2|3)"
    for broken, kind, said in (
        (ends, OSError, "damaged file"),
        (lambda: [rows, "text"], TypeError, "a batch must be a tensor"),
        (lambda: [rows, rows / 0], ValueError, "batch 2 brings NaN"),
    ):
        net = nn.Sequential(nn.BatchNorm1d(4), LastBatchNorm(4)) if kind is not ValueError else joined()
        model = net.double() if kind is not ValueError else DistributedDataParallel(net)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        mine = broken() if rank else [rows, rows]
        with pytest.raises(kind if rank else ValueError, match=said if rank else others):
            update_bn(mine, model)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def joined():
    """A norm without a collective of its own, in a wrapper with one: DDP sends buffers, FSDP gathers weights."""
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()


def ranks_rows(counts):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, 4, dtype=torch.float64, generator=generator) * 3 + 1 for count in counts]


def _update_and_compare(rank, sizes, net, wrap):
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4)), net[0].bias.zero_()
    model, norm = net if wrap is nn.Identity else wrap(net), net[1]
    before = {name: whole(value).clone() for name, value in net.state_dict().items()}
    rows = ranks_rows([sum(parts) for parts in sizes])
    numbers = [len(parts) for parts in sizes]
    own = rows[rank].split(sizes[rank]) if sizes[rank] else []
    if numbers[0] == numbers[1] > 0:
        update_bn(own, model)
        if isinstance(norm, LastBatchNorm):
            every = torch.cat(rows).numpy()
            np.testing.assert_allclose(norm.running_mean.numpy(), every.mean(0), atol=1e-12)
            np.testing.assert_allclose(norm.running_var.numpy(), every.var(0, ddof=1), atol=1e-12)
        return
    words = "1 of 2 ranks have fewer than" if any(numbers) else "loader gave no batch"
    with pytest.raises(ValueError, match=words):
        update_bn(own, model)
    for name, value in net.state_dict().items():
        assert torch.equal(whole(value), before[name]), name
    assert net.training and norm.momentum == 0.1 and not norm._forward_hooks


def test_update_bn_on_two_ranks(tmp_path):
    mp.start_processes(_update_bn_on, args=(tmp_path / "meet",), nprocs=2, start_method=warm_start.METHOD)
