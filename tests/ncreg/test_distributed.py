"""Losses of all ranks' batches: every averaged gradient equals that of one process on the whole batch."""

import inspect
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ncreg import losses
from ncreg.distributed import all_reduce_sum, broadcast, gather_batch, world_size
from tests import nccl_rules, warm_start

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")  # torch.func's own import
CLASSES, DIM, INPUT = 4, 6, 5
# Samples a rank: an uneven last batch, and in the second a rank without any.
SHARDS = {2: [8, 5], 4: [5, 4, 4, 0]}
WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)


def memory():
    return losses.ClassMeanMemory(CLASSES, DIM, momentum=0.5).double()


CASES = {
    "intra": lambda: losses.IntraClassCosineLoss(),
    "intra, memory": lambda: losses.IntraClassCosineLoss(memory=memory()),
    "inter": lambda: losses.InterClassCosineLoss(CLASSES),
    "inter, batch centre": lambda: losses.InterClassCosineLoss(CLASSES, center="batch"),
    "inter, memory": lambda: losses.InterClassCosineLoss(CLASSES, memory=memory()),
    "ntce": lambda: losses.NTCELoss(temperature=0.5),
    "ntce, sum": lambda: losses.NTCELoss(temperature=0.5, reduction="sum"),
    "nonl": lambda: losses.NONLLoss(temperature=0.5, class_weight=WEIGHTS),
    "supcon": lambda: losses.SupConLoss(temperature=0.5),
    "koleo": lambda: losses.KoLeoLoss(),
    "dot regression": lambda: losses.DotRegressionLoss(gather=True, class_weight=WEIGHTS),
    "expected cost": lambda: losses.ExpectedCostLoss(1 - torch.eye(CLASSES), gather=True).double(),
    "mse": lambda: losses.OneHotMSELoss(gather=True),
    "spectral decoupling": lambda: losses.SpectralDecouplingLoss(gather=True),
    "centre": lambda: losses.CenterLoss(CLASSES, DIM).double(),
    "chunked": lambda: losses.ChunkedCrossEntropyLoss(chunk=3, gather=True, class_weight=WEIGHTS),
    "logit adjusted": lambda: losses.LogitAdjustedLoss([4, 3, 2, 1], gather=True, class_weight=WEIGHTS).double(),
}


def test_every_loss_that_gathers_is_a_case():
    made = {getattr(losses, name) for name in losses.__all__}
    gather = {loss for loss in made if "gather" in inspect.signature(loss).parameters}
    assert gather == {type(case()) for case in CASES.values()}


def whole_batch():
    """Inputs and labels in the order of the classes, so that no rank has them all."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(13, INPUT, generator=generator, dtype=torch.float64)
    return images, torch.arange(13) * CLASSES // 13


def two_steps(name, images, target, wrap=lambda net: net):
    """Loss and gradients of a small network at the second of two batches (memories and centres then hold the first)."""
    torch.manual_seed(1)
    backbone = nn.Linear(INPUT, DIM).double()
    head = nn.Linear(DIM, CLASSES, bias=False).double()
    weight = head.weight
    term, trained = CASES[name](), wrap(backbone)
    for scale in (1.0, -0.5):
        backbone.zero_grad()
        weight.grad = None
        features = trained(images * scale + 1)
        available = {
            "features": features,
            "target": target,
            "weight": weight,
            "head": head,
            "logits": features @ weight.T,
        }
        loss = term(*(available[key] for key in term.consumes))
        loss.backward()
    grads = [backbone.weight.grad, backbone.bias.grad, weight.grad]
    return loss.detach(), [torch.zeros(1).double() if grad is None else grad for grad in grads], term.state_dict()


def run_rank(rank, folder):
    """One of four processes, which meet as four, then two of them as two, which spares starting others."""
    for ranks in (4, 2):
        if rank < ranks:
            file, patience = f"{folder}/{ranks}", timedelta(minutes=2)
            dist.init_process_group("gloo", f"file://{file}", patience, world_size=ranks, rank=rank)
            nccl_rules.enforce()
            torch.save(run_cases(rank, ranks), f"{file}-{rank}.pt")
            dist.barrier()  # before torch 2.8 a group destroyed right after a collective may hang
            dist.destroy_process_group()


def run_other_rank(index, folder):
    torch.set_num_threads(1)
    run_rank(index + 1, folder)


def run_cases(rank, ranks):
    """Every case on the rank's own shard, gradients averaged as DDP averages them."""
    shards = [tensor.split(SHARDS[ranks])[rank] for tensor in whole_batch()]
    found = {}
    for name in CASES:
        loss, grads, state = two_steps(name, *shards)
        for grad in grads:
            dist.all_reduce(grad)
            grad /= ranks
        found[name] = loss, grads, state
    found["ddp"] = two_steps("supcon", *shards, wrap=DistributedDataParallel)
    found["sum"] = sum_of_squares(rank, ranks)
    found["rows"] = gather_batch(*shards)
    found["other labels"] = gather_batch(shards[0], shards[1].to((torch.int32, torch.int64)[rank % 2]))
    found["refused"] = [refused(*other) for other in unlike(rank, *shards)]
    found["transforms"] = transforms(rank, ranks, *shards)
    found["of rank 0"] = buffer = torch.full((3, 2), float(rank)).t()
    broadcast(buffer)
    return found


def unlike(rank, images, target):
    """Batches that cannot become one: rank 1 has another dtype, width, or number of axes."""
    odd = rank == 1
    yield images.float() if odd else images, target
    yield images[:, :-1] if odd else images, target
    yield images, target.double() if odd else target
    yield images, target[:, None] if odd else target


def refused(*batch):
    try:
        gather_batch(*batch)
    except ValueError as error:
        return str(error)
    return ""


def sum_of_squares(rank, ranks):
    """Gradient of Σ_s (s + 1) · (Σ_r x_r)² in this rank's x, and the gradient of that gradient."""
    x = torch.tensor(rank + 1.0, dtype=torch.float64, requires_grad=True)
    loss = (rank + 1) * all_reduce_sum(x) ** 2
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    return first.detach(), second


def transforms(rank, ranks, images, target):
    """all_reduce_sum under jvp and vmap; a gathered loss's jvp, averaged over ranks; what vmap over a gather says."""
    x = torch.tensor(rank + 1.0, dtype=torch.float64)
    slope = torch.func.jvp(lambda x: all_reduce_sum(x) ** 2, (x,), (2 * x,))[1]
    ensemble = torch.func.vmap(all_reduce_sum)(torch.stack([x, 10 * x]))
    along = torch.func.jvp(lambda rows: losses.SupConLoss()(rows, target), (images,), (images.sin(),))[1]
    dist.all_reduce(along)
    message = ""
    if len(images):
        try:
            torch.func.vmap(lambda rows: losses.SupConLoss()(rows, target))(images[None])
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return slope, ensemble, along / ranks, message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of all ranks; this process is rank 0."""
    made = tmp_path_factory.mktemp("ranks")
    others = mp.start_processes(run_other_rank, args=(made,), nprocs=3, join=False, start_method=warm_start.METHOD)
    run_rank(0, made)
    while not others.join():
        pass
    return made


@pytest.fixture(params=[2, 4])
def ranks_found(request, folder):
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_the_averaged_gradient_is_the_whole_batchs(ranks_found, name):
    wanted = two_steps(name, *whole_batch())
    for found in ranks_found:
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-12)


def test_under_distributed_data_parallel_itself(ranks_found):
    wanted = two_steps("supcon", *whole_batch())
    for found in ranks_found:
        torch.testing.assert_close(found["ddp"], wanted, rtol=0, atol=1e-12)


def test_a_loss_left_local_would_be_wrong():
    """The check above has teeth: the mean of shards' gradients is far from the whole batch's."""
    images, target = whole_batch()
    wanted = two_steps("inter", images, target)[1][0]
    shards = zip(images.split(SHARDS[2]), target.split(SHARDS[2]), strict=True)
    local = torch.stack([two_steps("inter", *shard)[1][0] for shard in shards]).mean(0)
    assert (local - wanted).norm() > 0.1 * wanted.norm()


def test_all_reduce_sum_differentiates_the_sum_of_all_losses(ranks_found):
    ranks = len(ranks_found)
    total = factor = ranks * (ranks + 1) / 2
    for found in ranks_found:
        first, second = found["sum"]
        assert math.isclose(first, 2 * factor * total)
        # Each rank differentiates its own first derivative, 2 · factor · Σx: ranks of them reach every x.
        assert math.isclose(second, 2 * factor * ranks)


def test_sums_and_gathered_batches_under_torch_func(ranks_found):
    """Tangents are summed as gradients are; the ranks' slopes of a gathered loss average to the whole batch's."""
    total = len(ranks_found) * (len(ranks_found) + 1) / 2
    images, target = whole_batch()
    wanted = torch.func.jvp(lambda rows: losses.SupConLoss()(rows, target), (images,), (images.sin(),))[1]
    for rank, found in enumerate(ranks_found):
        slope, ensemble, along, message = found["transforms"]
        assert math.isclose(slope, 2 * total * 2 * total)
        assert ensemble.tolist() == [total, 10 * total]
        torch.testing.assert_close(along, wanted, rtol=0, atol=1e-12)
        assert "give the loss gather=False" in message or SHARDS[len(ranks_found)][rank] == 0


def test_gather_batch_keeps_rank_order(ranks_found):
    for found in ranks_found:
        for got, wanted in zip(found["rows"], whole_batch(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_buffers_that_are_not_contiguous_are_broadcast_too(ranks_found):
    assert all(torch.equal(found["of rank 0"], torch.zeros(2, 3)) for found in ranks_found)


def test_labels_of_any_integer_type_are_gathered(ranks_found):
    for found in ranks_found:
        assert torch.equal(found["other labels"][1], whole_batch()[1].long())


def test_ranks_with_unlike_batches_are_told_on_every_rank(ranks_found):
    for rank, found in enumerate(ranks_found):
        assert len(found["refused"]) == 4
        assert all("rank 1 holds a batch of another dtype" in message for message in found["refused"])
        assert all(f"rank {rank}, this one, holds float" in message for message in found["refused"])


def test_alone_everything_is_the_identity():
    rows, labels = torch.randn(3, 2, requires_grad=True), torch.arange(3)
    assert world_size() == 1
    assert all_reduce_sum(rows) is rows
    assert gather_batch(rows, labels) == (rows, labels)
    broadcast(buffer := torch.ones(2))
    assert torch.equal(buffer, torch.ones(2))


def test_a_batch_of_unequal_lengths_is_refused(monkeypatch):
    monkeypatch.setattr("ncreg.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"same length, got \[3, 2\]"):
        gather_batch(torch.zeros(3, 2), torch.zeros(2))
