"""The permutation of a fixed head: a buffer that keeps its values when buffers are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class PermutedHead(nn.Module):
    """A head whose classes may sit on permuted vertices."""

    num_classes: int
    _seats: tuple[int, ...] | None = None  # the permutation once more, in two forms that no average changes
    _kept: Tensor | None = None

    @property
    def permutation(self) -> Tensor | None:
        """Class c sits on vertex permutation[c]; None where class c sits on vertex c.

        It is a buffer. An average of buffers rounds some of its integers down, which makes their sum too small: then
        the numbers that the head keeps beside the buffer are given.
        """
        stored = self._stored_permutation
        if stored is None or stored.is_meta or self._kept is None:
            return stored
        complete = stored.sum() == self.num_classes * (self.num_classes - 1) // 2
        return torch.where(complete, stored, self._kept.to(stored.device))

    @property
    def _stored_permutation(self) -> Tensor | None:
        return cast(Tensor | None, super().__getattr__("permutation"))

    def _register_permutation(self, seats: Tensor | None, device: torch.device) -> None:
        self.register_buffer("permutation", seats if seats is None else seats.to(device))
        self._keep(seats)

    def _reset_permutation(self) -> None:
        if self._stored_permutation is not None:
            self._stored_permutation.copy_(torch.tensor(self._seats, device="cpu"))

    def _keep(self, seats: Tensor | None) -> None:
        """Keep a permutation beside its buffer: as plain numbers, and as a tensor where the buffer is."""
        self._seats = None if seats is None else tuple(seats.tolist())
        self._kept = None if seats is None else seats.clone()
        self._follow()

    def _follow(self) -> None:
        """Bring the kept tensor to the device of the buffer; the meta device would lose its numbers."""
        stored = self._stored_permutation
        if stored is not None and self._kept is not None and not stored.is_meta:
            self._kept = self._kept.to(stored.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._seats is None and self._stored_permutation is not None:  # pickled before the numbers were kept
            self._keep(self._stored_permutation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PermutedHead:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        stored, permutation = self._stored_permutation, self.permutation
        if stored is not None and permutation is not None and not stored.is_inference():  # nobody may write to such
            stored.copy_(permutation)  # in place: an entry of the state is the buffer itself, as everywhere in torch
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "permutation"
        seats, checked = state_dict.get(key), None
        if self._stored_permutation is not None and seats is not None and not seats.is_meta:
            try:
                checked = checked_permutation(seats.cpu(), self.num_classes)
            except ValueError as error:
                args[-1].append(f"{key}: {error}")
                state_dict[key] = self._stored_permutation
        super()._load_from_state_dict(state_dict, prefix, *args)
        if checked is not None:
            self._keep(checked)


def checked_permutation(permutation: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """A copy of the permutation in int64 on the CPU.

    Raises:
        ValueError: for anything but each of 0 … C − 1 exactly once.
    """
    seats = torch.as_tensor(permutation, device="cpu")
    if seats.is_floating_point() or seats.dtype == torch.bool or seats.shape != (num_classes,):
        got = f"shape {tuple(seats.shape)} of {seats.dtype}"
        raise ValueError(f"permutation has {got}: it needs one integer for each of {num_classes} classes")
    if not torch.equal(seats.sort().values, torch.arange(num_classes, device="cpu")):
        raise ValueError(f"permutation must hold each of 0 … {num_classes - 1} exactly once")
    return seats.to(torch.int64, copy=True)
