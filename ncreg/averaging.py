"""After averaging weights: the running statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncreg._checks import described
from ncreg._modes import modes_kept, uncompiled
from ncreg.distributed import all_reduce_sum, world_size
from ncreg.norms import LastBatchNorm
from ncreg.numerics import fill, in_float64, is_dtensor


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Running statistics of every batch norm, `LastBatchNorm` included, anew from one pass over the data.

    Averaged weights (SWA, moving averages) need it: the statistics that they inherit are of other weights. With n_b
    values of a channel in batch b, their mean μ_b and unbiased variance v_b, N = Σ n_b and μ = Σ n_b μ_b / N,

        running_mean = μ,    running_var = Σ [(n_b − 1) v_b + n_b (μ_b − μ)²] / (N − 1),

    the mean and unbiased variance of all that the norm saw: batches may be of any size, and what a norm behind no
    other batch norm gets does not depend on how the set is cut into batches. The whole model is in training mode, so a
    norm behind another one sees what that one made of each batch by its own statistics, and dropout acts.
    torch.optim.swa_utils.update_bn passes LastBatchNorm by, and takes the plain mean of μ_b and v_b, in which a small
    last batch counts as a full one. Afterwards every module is in the mode in which it was.

    Args:
        loader: batches: a tensor, or a tuple or list whose first item is one. On several ranks each reads its own, of
            any size, but equally many where the ranks need each other: with `LastBatchNorm`, SyncBatchNorm,
            DistributedDataParallel or `fully_shard` (FSDP2).
        model: whose norms are to be brought up to date; one without running statistics, or that no batch reaches,
            keeps what it has.
        device: where batches go first; None leaves them where they are.

    Raises:
        TypeError: a batch that is neither a tensor nor begins with one.
        ValueError: a loader without batches, fewer batches on one rank than on another, or one whose loader or features
            fail (said on every rank), a batch of one sample, or one with features that are not finite; the statistics
            are then as before. What the model itself raises on one rank is raised there alone: let its process end, for
            the others wait for it within the model.

    Example:
        >>> import ncreg
        >>> norm = ncreg.LastBatchNorm(2)
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 2.0], [2.0, 2.0], [7.0, 2.0]])
        >>> update_bn(rows.split(3), norm)  # batches of 3 and 2
        >>> norm.running_mean, norm.running_var
        (tensor([3., 2.]), tensor([5.5000, 0.0000]))
    """
    batches = iter(loader)
    norms: list[Any] = [norm for norm in model.modules() if _has_statistics(norm)]
    if not norms:
        return
    pools: list[_Pool] = []
    agreed = _in_step(_images(batches, device), pools, _groups(model), norms[0].running_mean.device)
    first = next(agreed, None)
    if first is None:
        raise ValueError("loader gave no batch: the running statistics stay as they were")
    with modes_kept(model), uncompiled():
        model.train()
        try:
            pools += [_Pool(norm) for norm in norms if norm.training]  # the model's own train() may keep some frozen
            for batch in chain([first], agreed):
                model(batch.clone())  # it may change its input in place
            for pool in pools:
                pool.write()
        finally:
            for pool in pools:
                pool.close()


def _has_statistics(module: nn.Module) -> bool:
    kinds = LastBatchNorm | nn.modules.batchnorm._BatchNorm
    return isinstance(module, kinds) and getattr(module, "running_mean", None) is not None


def _groups(model: nn.Module) -> list[Any]:
    """The groups of ranks that wait for each other in a forward pass of the model in training mode."""
    if world_size() == 1:
        return []
    kinds = LastBatchNorm | nn.SyncBatchNorm | DistributedDataParallel
    parts = [module for module in model.modules() if isinstance(module, kinds)]
    groups = [getattr(part, "process_group", None) or dist.group.WORLD for part in parts]
    if any(is_dtensor(parameter) for parameter in model.parameters()):  # FSDP gathers them in each forward pass
        groups.append(dist.group.WORLD)
    return list(dict.fromkeys(groups))  # in the order of the modules, which is the same on every rank


def _in_step(
    batches: Iterator[Tensor], pools: list[_Pool], groups: list[Any], device: torch.device
) -> Iterator[Tensor]:
    """The batches, each after all ranks have said that they have one: a rank alone would wait for the others for ever.

    Raises:
        ValueError: some ranks have one and others have none, or fail, on every rank.
        Exception: of this rank, what reading the batch or the pools' look at the last one raised.
    """
    end = object()
    for number in count(1):
        batch: Any = end
        error: Exception | None = next((pool.error for pool in pools if pool.error is not None), None)
        try:
            batch = end if error else next(batches, end)
        except Exception as raised:  # the caller's loader may raise anything
            error = raised
        said = [_votes([error is not None, error is None and batch is end], group, device) for group in groups]
        if error is not None:
            raise error
        for failed, ended, size in said:
            if failed:
                raise ValueError(
                    f"{failed} of {size} ranks failed at batch {number} or the one before, for the reason that they "
                    "raise; the running statistics stay as they were"
                )
            if 0 < ended < size:
                raise ValueError(
                    f"{ended} of {size} ranks have fewer than {number} batches, the others have more: give each rank "
                    "as many, as torch's DistributedSampler does; the running statistics stay as they were"
                )
        if batch is end:
            return
        yield batch


def _votes(own: list[bool], group: Any, device: torch.device) -> tuple[int, int, int]:
    """How many ranks of a group failed, how many have no batch left, and how many there are."""
    votes = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(votes, group=group)
    return int(votes[0]), int(votes[1]), dist.get_world_size(group)


class _Pool:
    """The mean and the squared deviations of all batches that a norm sees, in float64.

    With momentum 1 a norm's running statistics after a forward pass are those of its batch.
    """

    def __init__(self, norm: Any) -> None:
        self.norm, self.momentum = norm, norm.momentum
        self.before = [buffer.clone() for buffer in norm.buffers(recurse=False)]
        self.count = self.mean = self.scatter = torch.zeros((), dtype=torch.float64, device="cpu")
        self.batches = 0
        self.error: ValueError | None = None  # raised between batches: within one, other ranks would wait in the model
        norm.reset_running_stats()
        norm.momentum = 1.0
        self.handle = norm.register_forward_hook(self._add)

    def _add(self, norm: Any, inputs: Any, output: Tensor) -> None:
        """Chan, Golub & LeVeque's update of mean and squared deviations."""
        if not norm.training or self.error is not None:  # the model's own train() keeps it frozen
            return
        mean, variance = in_float64(norm.running_mean), in_float64(norm.running_var)
        self.batches += 1
        skipped = isinstance(norm, LastBatchNorm) and int(norm.num_batches_tracked) < self.batches
        if skipped or not bool((mean.isfinite() & variance.isfinite()).all()):
            self.error = ValueError(
                f"batch {self.batches} brings NaN or infinite values to {type(norm).__name__}: images or weights that "
                "are not finite, or an overflow in half precision; the running statistics stay as they were"
            )
            return
        count = _over_its_ranks(norm, mean.new_full((), output.numel() // len(mean)))
        total, shift = self.count.to(mean) + count, mean - self.mean.to(mean)
        self.scatter = self.scatter.to(mean) + variance * (count - 1) + shift.square() * (total - count) * count / total
        self.mean = self.mean.to(mean) + shift * count / total
        self.count = total

    def write(self) -> None:
        """The statistics of all batches become the norm's, if there was one."""
        if self.count:
            fill(self.norm.running_mean, self.mean)
            fill(self.norm.running_var, self.scatter / (self.count - 1))
            self.before = []

    def close(self) -> None:
        """Let the norm be as it was, its statistics too unless new ones were written."""
        self.handle.remove()
        self.norm.momentum = self.momentum
        for buffer, value in zip(self.norm.buffers(recurse=False), self.before, strict=False):
            buffer.copy_(value)


def _over_its_ranks(norm: nn.Module, count: Tensor) -> Tensor:
    """The number of values behind a norm's batch statistics, which two kinds take over ranks."""
    if isinstance(norm, LastBatchNorm):
        return all_reduce_sum(count)
    if isinstance(norm, nn.SyncBatchNorm) and world_size() > 1:
        dist.all_reduce(count, group=norm.process_group)
    return count


def _images(batches: Iterator[Any], device: torch.device | str | int | None) -> Iterator[Tensor]:
    """The first tensor of each batch."""
    for batch in batches:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(f"a batch must be a tensor or begin with one, got {described(images)}")
        yield images if device is None else images.to(device)
