"""A second device without one: tensors that lie in CPU memory, say that they are elsewhere, and refuse to be mixed.

What a GPU refuses is refused here: an operation on tensors of both devices, a generator of the CPU for draws elsewhere,
numpy's view of a tensor that is not on the CPU. Values are the CPU's to the last bit, so that what runs on both devices
must give equal numbers. `lazy` plays the device, since torch runs its backward pass without threads of a driver.

    with OtherDevice():
        loss = module.to(DEVICE)(features.to(DEVICE))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default, aten.to.other}
# a tensor elsewhere may be indexed by one of the CPU: torch moves that, waiting for the device
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}


class Elsewhere(Tensor):
    """A tensor that says it is on DEVICE; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        out = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        out.inner = inner
        return out

    def __init__(self, inner: Tensor) -> None: ...

    def __repr__(self, **_: Any) -> str:
        return f"elsewhere: {self.inner!r}"

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu", *args, **kwargs)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        dtype = dtype or (data.dtype if isinstance(data, Tensor) else self.dtype)
        return tensor(data, dtype=dtype, device=device or DEVICE, requires_grad=requires_grad)

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_lists_moved(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_moved(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            out = self.detach().clone().requires_grad_(self.requires_grad)
            out = torch.nn.Parameter(out, self.requires_grad) if isinstance(self, torch.nn.Parameter) else out
            memo[id(self)] = out
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file holds it as one of the CPU, as `map_location="cpu"` reads it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _lists_moved(index: Any) -> Any:
    """Lists of an index as tensors elsewhere: torch itself would build them below what is caught here."""
    if isinstance(index, tuple):
        return tuple(_lists_moved(item) for item in index)
    return tensor(index, device=DEVICE) if isinstance(index, list) else index


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation of torch, in inference mode too."""
    # a tensor of inference mode would have no version for torch's own code to count
    with torch.inference_mode(False), torch.no_grad():
        return _on_inner(func, args, kwargs)


def _on_inner(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation of torch on the inner tensors, refused where a GPU would refuse it."""
    names = [argument.name for argument in func._schema.arguments]
    if "device" in names[: len(args)]:  # by position: in inference mode `to` itself comes here
        at = names.index("device")
        args, kwargs = args[:at], {**kwargs, **dict(zip(names[at:], args[at:], strict=False))}
    given = _tensors((args, kwargs))
    there = [item for item in given if isinstance(item, Elsewhere)]
    indexed = func in INDEXED and isinstance(args[0], Elsewhere)
    judged = _tensors((args[0], args[2:], kwargs)) if indexed else given
    here = [item for item in judged if not isinstance(item, Elsewhere) and item.ndim]
    if there and here and func not in BETWEEN_DEVICES:
        about = [(tuple(item.shape), str(item.device)) for item in given]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {about}")
    wrapped = bool(there)
    if (device := kwargs.get("device")) is not None:
        wrapped = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu" if wrapped else device}
    if wrapped and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
    unwrap = lambda item: item.inner if isinstance(item, Elsewhere) else item  # noqa: E731
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    for item in there:
        assert item.shape == item.inner.shape, f"{func} resizes a tensor in place, which this device cannot follow"
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    if first is not None and first.is_write and args and isinstance(args[0], Tensor):
        return args[0]
    same = {id(item.inner): item for item in there}
    return tree_map(lambda item: _moved(item, same.get(id(item)), wrapped), out)


def _tensors(values: Any) -> list[Tensor]:
    return [item for item in tree_leaves(values) if isinstance(item, Tensor)]


def _moved(item: Any, given: Elsewhere | None, wrapped: bool) -> Any:
    """A result where it belongs; what came in unchanged is itself there, and a copy here."""
    if not isinstance(item, Tensor) or isinstance(item, Elsewhere):
        return item
    if wrapped:
        return Elsewhere(item) if given is None else given
    return item if given is None else item.clone()


_below = torch.library.Library("_", "IMPL")  # kept alive: tensors that torch's own code makes on the device
_below.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), DEVICE.type.capitalize())
_tensor, _as_tensor, _autocast = torch.tensor, torch.as_tensor, torch.autocast


def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """torch.tensor, whose own code fills memory below what is caught here."""
    made = data.detach().clone().to(dtype=dtype) if isinstance(data, Elsewhere) else _tensor(data, dtype=dtype)
    return made.to(device if device is not None else made.device).requires_grad_(requires_grad)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """torch.as_tensor, likewise."""
    made = data if isinstance(data, Tensor) else _as_tensor(data, dtype=dtype)
    return made.to(device=device if device is not None else made.device, dtype=dtype or made.dtype)


class autocast(_autocast):  # noqa: N801 - the name of torch's
    """torch.autocast, which knows no such device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """While entered, tensors may be made on DEVICE and moved there."""

    def __enter__(self) -> OtherDevice:
        torch.tensor, torch.as_tensor, torch.autocast = tensor, as_tensor, autocast
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor, torch.as_tensor, torch.autocast = _tensor, _as_tensor, _autocast
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})
