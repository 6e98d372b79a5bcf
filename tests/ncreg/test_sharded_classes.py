"""A head whose classes are divided over two processes, against the whole one in a single process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from ncreg.functional import sharded_argmax, sharded_cross_entropy
from ncreg.heads import CodeHead, CosineHead, LinearHead, class_shard, gather_head, shard_head
from ncreg.losses import ShardedCrossEntropyLoss
from tests import nccl_rules, warm_start

CLASSES, DIM, SPLIT = 11, 5, (9, 4)  # classes and samples that two ranks do not share evenly
WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
HEADS = {
    "nn.Linear": lambda: nn.Linear(DIM, CLASSES).double(),
    "linear": lambda: LinearHead(DIM, CLASSES, bias=False, dtype=torch.float64),
    "cosine": lambda: CosineHead(DIM, CLASSES, scale=7.0, dtype=torch.float64),
    "learned scale": lambda: learned_scale(CosineHead(DIM, CLASSES, dtype=torch.float64)),
}


def learned_scale(head):
    head.scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
    return head


OPTIONS = {
    "plain": {},
    "weighted": {"class_weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3},
    "sum": {"reduction": "sum", "label_smoothing": 0.2},
}


def build(name):
    torch.manual_seed(0)
    return nn.Linear(3, DIM).double(), HEADS[name]()


def batch():
    images = torch.randn(sum(SPLIT), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, torch.arange(sum(SPLIT)) * 4 % CLASSES


def on_rank(rank, name, options):
    """Loss, gradients of the backbone as DDP averages them and of the own share, the predictions, the whole head."""
    backbone, head = build(name)
    images, target = (part.split(SPLIT)[rank] for part in batch())
    share = shard_head(head)
    trained = DistributedDataParallel(backbone)  # kept until backward, which it averages
    features = trained(images)
    loss = ShardedCrossEntropyLoss(chunk=2, **options)(features, share, target)
    loss.backward()
    whole = gather_head(share)
    assert not {id(p) for p in share.parameters()} & {
        id(p) for p in (*head.parameters(), *getattr(whole, "parameters", list)())
    }
    return {
        "loss": loss.detach(),
        "backbone": [p.grad for p in backbone.parameters()],
        "share": [p.grad for p in share.parameters()],
        "argmax": sharded_argmax(features.detach(), share, chunk=2),
        "whole": None if whole is None else (type(whole), whole.state_dict()),
        "kept": head.state_dict(),
    }


def shares_of(rank):
    """Four classes on the first rank, none on the second."""
    head = nn.Linear(3, 4).double()
    if rank:
        head.weight, head.bias, head.out_features = nn.Parameter(head.weight[:0]), nn.Parameter(head.bias[:0]), 0
    return head


def refusals(rank):
    """What both ranks are told, together: none is left waiting."""
    images, target = (part.split(SPLIT)[rank] for part in batch())
    head = nn.Linear(3, 4).double()
    found = []
    for share, labels in ((shares_of(rank), target * 0), (head, target + 8 * rank)):
        try:
            sharded_cross_entropy(images, share, labels)
        except ValueError as error:
            found.append(str(error))
    return found


def frozen(rank):
    """Gradient in the features where the head's share learns nothing."""
    _, head = build("cosine")
    features, target = torch.ones(3, DIM, dtype=torch.float64).cumsum(0).cumsum(1), torch.tensor([0, 5, 10])
    features.requires_grad_()
    share = shard_head(head).requires_grad_(False)
    sharded_cross_entropy(features, share, target).backward()
    return features.grad


def an_empty_rank(rank):
    """The second rank has no sample left."""
    _, head = build("linear")
    features = torch.ones(2 * (1 - rank), DIM, dtype=torch.float64, requires_grad=True)
    loss = sharded_cross_entropy(features, shard_head(head), torch.arange(2 * (1 - rank)))
    loss.backward()
    return loss.detach(), features.grad.shape


def run_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(minutes=2), world_size=2, rank=rank)
    nccl_rules.enforce()
    found = {(name, words): on_rank(rank, name, options) for name in HEADS for words, options in OPTIONS.items()}
    found |= {"refusals": refusals(rank), "frozen": frozen(rank), "empty": an_empty_rank(rank)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_other_rank(index, folder):
    torch.set_num_threads(1)
    run_rank(index + 1, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of both ranks; this process is the first."""
    folder = tmp_path_factory.mktemp("ranks")
    others = mp.start_processes(run_other_rank, args=(folder,), nprocs=1, join=False, start_method=warm_start.METHOD)
    run_rank(0, folder)
    while not others.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_the_whole_head(found, name, words):
    options = dict(OPTIONS[words])
    backbone, head = build(name)
    images, target = batch()
    weight = options.pop("class_weight", None)
    loss = F.cross_entropy(head(backbone(images)), target, weight=weight, **options)
    loss.backward()
    chosen = head(backbone(images)).argmax(1)
    for rank, classes in enumerate((slice(0, 6), slice(6, 11))):
        mine = found[rank][name, words]
        torch.testing.assert_close(mine["loss"], loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(mine["backbone"], [p.grad for p in backbone.parameters()], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            mine["share"], [p.grad[classes] if p.ndim else p.grad for p in head.parameters()], rtol=0, atol=1e-12
        )
        assert torch.equal(mine["argmax"], chosen.split(SPLIT)[rank])
        torch.testing.assert_close(mine["kept"], head.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_the_whole_head_comes_back_on_the_first_rank(found, name):
    _, head = build(name)
    kind, state = found[0][name, "plain"]["whole"]
    assert kind is type(head)
    torch.testing.assert_close(state, dict(head.state_dict()), rtol=0, atol=0)
    assert found[1][name, "plain"]["whole"] is None


def test_what_one_rank_does_wrong_is_told_on_both(found):
    for rank in range(2):
        without_classes, out_of_range = found[rank]["refusals"]
        assert "ranks [1] hold no class of head" in without_classes
        assert "target must be in [0, 8), got indices from 0 to 15" in out_of_range


def test_a_share_that_learns_nothing_passes_the_gradient_on(found):
    _, head = build("cosine")
    features = torch.ones(3, DIM, dtype=torch.float64).cumsum(0).cumsum(1).requires_grad_()
    target = torch.tensor([0, 5, 10])
    F.cross_entropy(head(features), target).backward()
    for rank in range(2):  # both ranks hold the same three samples: each gets twice its half of the mean
        torch.testing.assert_close(found[rank]["frozen"], features.grad, rtol=0, atol=1e-12)


def test_a_rank_without_samples_joins_in(found):
    _, head = build("linear")
    wanted = F.cross_entropy(head(torch.ones(2, DIM, dtype=torch.float64)), torch.arange(2))
    for rank, rows in enumerate((2, 0)):
        loss, shape = found[rank]["empty"]
        assert abs(loss - wanted) < 1e-12
        assert shape == (rows, DIM)


@pytest.mark.parametrize("ranks", [1, 3, 4, 10])
def test_shares_follow_each_other_and_differ_by_one_class_at_most(ranks):
    shares = [class_shard(10, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [c for share in shares for c in share] == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_refusals_of_a_single_process():
    with pytest.raises(ValueError, match="num_classes=10 over 11 ranks leaves ranks without a class"):
        class_shard(10, rank=0, ranks=11)
    with pytest.raises(ValueError, match=r"rank=3 must be in 0..2"):
        class_shard(10, rank=3, ranks=3)
    with pytest.raises(TypeError, match="head=CodeHead cannot be divided over ranks"):
        shard_head(CodeHead(8, 10))
    for computed in (prune.l1_unstructured(LinearHead(4, 9), "weight", amount=5), weight_norm(CosineHead(4, 9))):
        for of_a_head in (shard_head, gather_head):
            with pytest.raises(ValueError, match=r"head=\w*(Linear|Cosine)Head computes its weight from others"):
                of_a_head(computed)
    with pytest.raises(TypeError, match="head=CodeHead learns no class vectors"):
        sharded_cross_entropy(torch.ones(2, 8), CodeHead(8, 10), torch.arange(2))
    with pytest.raises(ValueError, match="features have 5 columns where head takes 4"):
        sharded_cross_entropy(torch.ones(2, 5), nn.Linear(4, 9), torch.arange(2))


def test_a_share_has_its_own_memory_and_names_its_classes():
    head = CosineHead(4, 9)
    share = shard_head(head)
    assert (share.num_classes, share.scale) == (9, head.scale)
    with torch.no_grad():
        share.weight.zero_()
    assert head.weight.abs().sum() > 0
