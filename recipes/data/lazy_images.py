"""Images that stay in their files until a batch needs them, read ahead of the training step by worker processes."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.core.errors import RankError, UserError
from recipes.core.own_code import LoadedCode, in_a_line
from recipes.data.unreadable import Unreadable

CPU = torch.device("cpu")
STOPS = {signal.SIGINT, signal.SIGTERM}
CHECKED_AT_ONCE = 256
"""Images that a worker checks between two messages."""


@dataclass(frozen=True)
class LazyImages:
    """Images that are read when a batch needs them; takes the place of a tensor (N, channels, side, side) of bytes.

    Attributes:
        read: maps an image's number to its bytes (channels, side, side), the same at every call; with a method
            `check(number)` that is quicker, such as one that reads the file's header alone, if there is one.
        numbers: the numbers of these images, (N,).
        image_shape: channels, side, side.
        workers: processes that read images; 0 reads in the training process.
        device: where batches are put.
    """

    read: Callable[[int], Tensor]
    numbers: Tensor
    image_shape: tuple[int, int, int]
    workers: int
    device: torch.device = CPU

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that all images would make."""
        return torch.Size((len(self.numbers), *self.image_shape))

    @property
    def nbytes(self) -> int:
        """Bytes that all images would take in memory."""
        return self.shape.numel()

    def __getitem__(self, index: Tensor | slice) -> LazyImages:
        return replace(self, numbers=self.numbers[index.cpu() if isinstance(index, Tensor) else index])

    def to(self, device: torch.device) -> LazyImages:
        """The same images with their batches on a device."""
        return replace(self, device=device)

    def read_all(self) -> Tensor:
        """All images, read into memory.

        Raises:
            Unreadable: names all images that cannot be read.
        """
        images = torch.empty(self.shape, dtype=torch.uint8)
        unreadable: dict[str, str] = {}
        for position, number in enumerate(self.numbers.tolist()):
            try:
                images[position] = self.read(number)
            except Unreadable as error:
                unreadable |= error.images
        if unreadable:
            raise Unreadable(unreadable)
        return images.to(self.device)

    def unreadable(self, *, headers: bool) -> dict[int, Unreadable]:
        """The images that cannot be read, by their position; workers look at them.

        Args:
            headers: only see whether a file begins as an image does, where the reader can; else read all of it.
        """
        check = getattr(self.read, "check", self.read) if headers else self.read
        found: dict[int, Unreadable] = {}
        loader = DataLoader(
            _Checked(check, self.numbers),
            batch_size=CHECKED_AT_ONCE,
            num_workers=self.workers if len(self.numbers) > CHECKED_AT_ONCE else 0,
            collate_fn=_failures,
            worker_init_fn=_keep_reading_after_signals,
            generator=torch.Generator(),
            multiprocessing_context=_start_method(self.workers if len(self.numbers) > CHECKED_AT_ONCE else 0),
        )
        for failures in _checked_batches(loader):
            found |= failures
        return found

    def batches(self, indices: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images in [0, 1], positions), one for each of the given indices, in their order.

        Workers read whole batches; timm's PrefetchLoader copies the next one to the device while this one is used.

        Raises:
            UserError: an image cannot be read.
        """
        positions = torch.arange(len(self.numbers))
        wanted = [positions[index.cpu() if isinstance(index, Tensor) else index].tolist() for index in indices]
        workers = min(self.workers, len(wanted)) if len(wanted) > 1 else 0
        loader = DataLoader(
            _Numbered(self.read, self.numbers),
            batch_sampler=wanted,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_keep_reading_after_signals,
            generator=torch.Generator(),  # the global one is left as it is
            multiprocessing_context=_start_method(workers),
        )
        scale: dict[str, Any] = {"mean": (0.0,) * self.image_shape[0], "std": (1.0,) * self.image_shape[0]}
        source = _checked_batches(loader)
        for images, index in PrefetchLoader(source, channels=self.image_shape[0], device=self.device, **scale):
            yield images.contiguous(memory_format=torch.channels_last), index


def concatenate_lazy(parts: Sequence[LazyImages]) -> LazyImages:
    """The images of several readers as those of one."""
    numbers = torch.arange(sum(len(part.numbers) for part in parts))
    return replace(parts[0], read=_Concatenated(tuple(parts)), numbers=numbers)


@dataclass(frozen=True)
class _Concatenated:
    parts: tuple[LazyImages, ...]

    def __call__(self, number: int) -> Tensor:
        for part in self.parts:
            if number < len(part.numbers):
                return part.read(int(part.numbers[number]))
            number -= len(part.numbers)
        raise IndexError(number)


class _ForWorker(Dataset):
    """A dataset that may hold objects of the user's own code, also where workers start without what was loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        state: Any = self
        return _for_worker, (LoadedCode(), type(self), *(getattr(self, item.name) for item in fields(state)))


def _for_worker(code: LoadedCode, kind: type[_ForWorker], *values: Any) -> _ForWorker:
    return kind(*values)


@dataclass(frozen=True)
class _Numbered(_ForWorker):
    """What a worker reads from: an image and its position, or the error that reading it raised."""

    read: Callable[[int], Tensor]
    numbers: Tensor

    def __getitem__(self, position: int) -> tuple[Tensor, int] | UserError:
        try:
            return self.read(int(self.numbers[position])), position
        except UserError as error:  # raised by the loader, it would come with the worker's traceback in its message
            return error


@dataclass(frozen=True)
class _Checked(_ForWorker):
    """What a worker checks: nothing, or an image's position and the error that it raised."""

    check: Callable[[int], Any]
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[int, Unreadable] | None:
        try:
            self.check(int(self.numbers[position]))
        except Unreadable as error:
            return position, error
        return None


def _failures(items: list[tuple[int, Unreadable] | None]) -> dict[int, Unreadable]:
    return dict(item for item in items if item is not None)


def _start_method(workers: int) -> str | None:
    """How worker processes start: on Linux as forks, at once and with all that this process has loaded."""
    return "fork" if workers and sys.platform == "linux" else None


def _collate(items: list[Any]) -> Any:
    """The items as a batch, or the first error among them."""
    return next((item for item in items if isinstance(item, UserError)), None) or fast_collate(items)


def _checked_batches(loader: DataLoader[Any]) -> Any:
    """The loader's batches; raises the error of an image, and tells when a worker died while it sent a batch."""
    with _signals_blocked():
        batches = _started(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:  # the worker died before the loader noticed
            raise RuntimeError(f"DataLoader worker hung up: {type(error).__name__}") from error
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader at work.

    Raises:
        UserError: the data cannot be sent to workers, as those that are no forks need.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Got pickle error")  # what follows says it in a line
            return iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        start = loader.multiprocessing_context or torch.multiprocessing
        if not loader.num_workers or start.get_start_method() == "fork":
            raise
        raise UserError(
            f"the data cannot be sent to the processes that read images ({in_a_line(error)}): pickle takes functions "
            "and classes of a module's top level, no lambda; or --data.workers 0"
        ) from None


@contextmanager
def report_lost_workers() -> Iterator[None]:
    """Turn torch's error about a dead worker process, which can come at any step, into one line for the user."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise RankError(
            f"a process that reads images was lost ({reason}); with too little memory, or shared memory, "
            "lower --data.workers"
        ) from None


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM while workers start: one would kill them before their handlers are set."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _keep_reading_after_signals(worker: int) -> None:
    """Let a worker survive a signal to the whole job: the run finishes its step, saves, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))  # measures may take long; but not for ever
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def worker_count(requested: int | None) -> int:
    """Worker processes of this process: as requested, else one a core (at most 8), cores shared by a node's ranks."""
    if requested is not None:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
