"""The processes of a run under torchrun, and what they must agree on; alone, one process is rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncreg.distributed import broadcast
from recipes.core.errors import UserError

Made = TypeVar("Made")

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say where another rank is gone."""


STARTERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}
"""What starts copies of a command, and environment variables that tell a copy how many there are and which this is."""


def copies_notes() -> list[str]:
    """A sentence where srun or mpirun started several copies of a command and torchrun none; the first says it.

    Such copies would train the same run side by side.
    """
    if "RANK" in os.environ:
        return []
    for starter, (count, which) in STARTERS.items():
        copies = os.environ.get(count, "1")
        if copies.isdecimal() and int(copies) > 1 and os.environ.get(which, "0") == "0":
            return [
                f"{starter} started {copies} copies of this command, and each trains for itself: to train one run "
                f"together, have {starter} start torchrun, once a node"
            ]
    return []


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto takes a GPU if there is one, and torchrun's processes take one each.

    Raises:
        UserError: the device cannot be used.
    """
    local = os.environ.get("LOCAL_RANK", "0")
    if name in ("auto", "cuda"):
        name = f"cuda:{local}" if name == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}; cpu always works") from None


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def images_per_rank(self, size: int, parts: int = 1) -> int:
        """Images of a global batch of `size` that fall to each rank, in equal parts."""
        if size % self.size:
            raise UserError(
                f"data.batch_size={size} is the global batch: it must be a multiple of the {self.size} ranks"
            )
        if size // self.size % parts:
            raise UserError(
                f"optim.accumulate={parts}: the {size // self.size} images that a rank has of a batch are to be cut "
                "into equal parts"
            )
        if size // self.size // parts < 2:
            raise UserError(
                f"data.batch_size={size} leaves each of the {self.size} ranks one image, and BatchNorm has no "
                f"variance of one: at least {2 * self.size * parts}"
            )
        return size // self.size

    def wrap(self, model: nn.Module, device: torch.device, *, compiled: bool = False) -> nn.Module:
        """The model as a loop calls it: gradients averaged over ranks, compiled on request."""
        if self.size > 1:
            model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        return torch.compile(model) if compiled else model  # type: ignore[return-value]

    def no_sync_unless_last(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Leave gradients unaveraged while parts of a batch are to follow."""
        return nullcontext() if last or self.size == 1 else wrapped.no_sync()  # type: ignore[operator]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every rank the main rank's running statistics; DDP does so only before a forward pass in training."""
        for buffer in model.buffers():
            broadcast(buffer)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on all of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=device)))

    def gather(self, value: Any) -> list[Any]:
        """A plain value of each rank, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, make: Callable[[], Made]) -> Made:
        """What `make` gives on each rank; where it fails on one, such as a node without the data, all ranks end alike.

        Raises:
            UserError: on all ranks, the first rank's that has one.
        """
        made: Made | None = None
        error: UserError | None = None
        try:
            made = make()
        except UserError as found:
            error = found
        first = next((found for found in self.gather(error) if found is not None), None)
        if first is not None:
            raise first
        return made  # type: ignore[return-value]

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on all ranks."""
        return self.gather(value)[0]


def joined_ranks() -> Ranks:
    """The ranks that have been joined; alone, rank 0 of 1."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, if it did: NCCL for GPUs, gloo for CPUs."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield joined_ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL sends plain values over the current device: GPU 0 on all ranks otherwise
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the ranks cannot be joined: {' '.join(str(error).split())}; start with torchrun") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise UserError("another rank has ended, and so does this one; its own message says why") from None
    finally:
        dist.destroy_process_group()
