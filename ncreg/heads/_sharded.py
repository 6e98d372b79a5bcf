"""A learned head whose classes are divided over ranks: each rank's share, and the whole one for a checkpoint."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncreg._checks import check_integer, check_num_classes
from ncreg.distributed import world_size
from ncreg.heads._learned import CosineHead

Head = TypeVar("Head", bound=nn.Module)  # nn.Linear, LinearHead or CosineHead


def class_shard(num_classes: int, *, rank: int | None = None, ranks: int | None = None) -> range:
    """The classes of a rank: consecutive, in the order of the ranks, the first C mod R of which have one more.

    Args:
        num_classes: C.
        rank: of whom; this process by default.
        ranks: R; the world's size by default.

    Raises:
        ValueError: fewer classes than ranks, or a rank that is none.

    Example:
        >>> class_shard(10, rank=1, ranks=3)
        range(4, 7)
    """
    ranks = world_size() if ranks is None else check_integer("ranks", ranks, 1)
    rank = (dist.get_rank() if world_size() > 1 else 0) if rank is None else check_integer("rank", rank, 0, ranks - 1)
    if check_num_classes(num_classes) < ranks:
        raise ValueError(
            f"num_classes={num_classes} over {ranks} ranks leaves ranks without a class: keep the head whole"
        )
    share, more = divmod(num_classes, ranks)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


def shard_head(head: Head) -> Head:
    """This rank's share of a whole learned head, a head of the same kind: classes `class_shard(C)` of it.

    The whole one must be the same on all ranks (of one seed, or loaded from one file); it is not changed.

    Raises:
        TypeError: a head that is neither nn.Linear, LinearHead nor CosineHead.
        ValueError: fewer classes than ranks, or a weight that is computed from others.

    Example:
        >>> shard_head(nn.Linear(4, 10)).weight.shape  # in a single process the share is the whole
        torch.Size([10, 4])
    """
    weight, bias = _learned(head)
    classes = class_shard(len(weight))
    own = slice(classes.start, classes.stop)
    return _with_rows(head, weight[own], None if bias is None else bias[own])


@torch.no_grad()
def gather_head(shard: Head) -> Head | None:
    """The whole head on the CPU of rank 0, for a checkpoint; None on the other ranks. Every rank must call.

    Raises:
        TypeError: a head that is neither nn.Linear, LinearHead nor CosineHead.
        ValueError: a weight that is computed from others.

    Example:
        >>> gather_head(nn.Linear(4, 10)).weight.shape
        torch.Size([10, 4])
    """
    own_weight, own_bias = _learned(shard)
    weight = _gathered(own_weight)
    bias = None if own_bias is None else _gathered(own_bias)
    return None if weight is None else _with_rows(shard, weight, bias)


def _learned(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Class vectors and bias."""
    if not isinstance(head, nn.Linear | CosineHead):
        raise TypeError(
            f"head={type(head).__name__} cannot be divided over ranks: it must be nn.Linear, LinearHead or CosineHead; "
            "fixed class vectors need no share (CodeHead stores none)"
        )
    if head._parameters.get("weight") is None:
        raise ValueError(
            f"head={type(head).__name__} computes its weight from others (weight norm, pruning, …), of which a share "
            "would hold no rows: remove that first (torch.nn.utils.prune.remove for pruning, "
            "torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return head.weight, head.bias


def _with_rows(head: Head, weight: Tensor, bias: Tensor | None) -> Head:
    """A head of the same kind with these class vectors."""
    made = copy.copy(head)
    made._parameters = {}
    rows = {"weight": weight, "bias": bias}
    for name, former in head._parameters.items():  # beside the two a scale that is learned
        value = rows.get(name, former)
        if former is not None and value is not None:
            value = value.detach().clone().to(weight.device)
            made._parameters[name] = nn.Parameter(value, requires_grad=former.requires_grad)
        else:
            made._parameters[name] = None
    setattr(made, "out_features" if isinstance(made, nn.Linear) else "num_classes", len(weight))
    return made


def _gathered(rows: Tensor) -> Tensor | None:
    """All ranks' rows on the CPU of rank 0, one rank's at a time on its device."""
    if world_size() == 1:
        return rows.detach().cpu()
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    if dist.get_rank() != 0:
        dist.send(rows.detach().contiguous(), 0)
        return None
    parts = [rows.detach().cpu()]
    for rank, count in enumerate(counts.tolist()[1:], start=1):
        part = rows.new_empty(count, *rows.shape[1:])
        dist.recv(part, rank)
        parts.append(part.cpu())
    return torch.cat(parts)
