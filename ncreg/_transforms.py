"""What torch's transforms need of a module: torch.fx, torch.func, forward-mode derivatives, traces, graphs.

torch.fx runs forward() on Proxy objects, torch.func wraps tensors, and compile, export, jit.trace and make_fx record
operations on tensors whose values nobody can read yet.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Output = TypeVar("Output")


def fx_leaf(forward: Callable[..., Output]) -> Callable[..., Output]:
    """Decorate a module's forward(): in a graph of torch.fx the whole module is one call_module node.

    The module then runs as it is whenever the graph runs: its checks, buffers, train and eval mode all hold.

    Raises:
        TypeError: where the module itself is what torch.fx traces.
    """

    @functools.wraps(forward)
    def leaf_or_forward(self: nn.Module, *inputs: Any, **options: Any) -> Output:
        proxies = [value for value in (*inputs, *options.values()) if isinstance(value, Proxy)]
        if not proxies:
            return forward(self, *inputs, **options)
        tracer: Any = proxies[0].tracer
        if tracer.root is self:
            raise TypeError(
                f"{type(self).__name__} is one node of a torch.fx graph and cannot be the whole of it: "
                "trace a module that holds it, such as nn.Sequential(module)"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, options)

    # torch.compile keeps eight versions of a code object: all heads, norms and losses must not share one
    leaf_or_forward.__code__ = leaf_or_forward.__code__.replace(co_name=forward.__name__)  # type: ignore[attr-defined]
    return leaf_or_forward


def jit_tracing() -> bool:
    """Whether torch.jit.trace is recording, which takes sizes for tensors and warns where one is compared."""
    return bool(torch._C._get_tracing_state())


def row_count(tensor: Tensor) -> int:
    """The number of rows, as a plain integer also where torch.jit.trace would warn of it."""
    if not jit_tracing():
        return len(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return int(tensor.shape[0])


def recorded(tensor: Tensor) -> bool:
    """Whether operations on the tensor are recorded for values to come: its own must not be read."""
    if torch.compiler.is_compiling() or jit_tracing():
        return True
    return isinstance(tensor, FakeTensor) or get_proxy_mode() is not None


def wrapped(tensor: Tensor) -> bool:
    """Whether torch.func holds the tensor: under vmap it stands for one of many, whose values cannot be read."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def batched(tensor: Tensor) -> bool:
    """Whether vmap runs over the tensor, at any level of torch.func's transforms."""
    while wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def bare(tensor: Tensor) -> Tensor:
    """The tensor under torch.func's wrappers, with all of vmap's axes and no tangent: it can be read and kept."""
    while wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).primal if forward_ad._current_level >= 0 else tensor


def derivatives_taken(tensor: Tensor) -> int:
    """How many derivatives in the tensor torch.func and forward mode are taking at once."""
    count = 0
    while wrapped(tensor):
        count += torch._C._functorch.is_gradtrackingtensor(tensor)
        tensor = torch._C._functorch.get_unwrapped(tensor)
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
    return count + dual


def recomputed() -> bool:
    """Whether backward is running: activation checkpointing calls forward then once more, on a batch seen before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def takes_in(loss: nn.Module) -> bool:
    """Whether a loss's running state follows this batch: in training mode, and not where gradients are off.

    Loops call eval() on the model, seldom on the loss: without this, validation batches would move what it keeps. It is
    asked before the loss is computed.

    Raises:
        RuntimeError: backward computes a batch again whose forward pass has moved the state: its gradient would be that
            of another state.
    """
    follows = loss.training and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return follows
    if not recomputed():
        loss._moved = follows  # type: ignore[assignment]
    elif follows and getattr(loss, "_moved", False):
        raise RuntimeError(
            f"{type(loss).__name__} is inside torch.utils.checkpoint, which computes it again in backward, where its "
            "running state has moved on: call the loss outside of the checkpointed part, or take use_reentrant=True"
        )
    return follows


def for_state(owner: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a running state may keep them, which outlives torch.func's wrappers.

    Raises:
        RuntimeError: vmap runs over one, and the state would have to be several.
    """
    if any(batched(tensor) for tensor in tensors):
        raise RuntimeError(
            f"{owner} keeps one running state in training, where vmap makes several of it: call .eval() on it, "
            "or keep vmap out of the training forward"
        )
    return tuple(bare(tensor) for tensor in tensors)


def own_backward_pays(tensor: Tensor) -> bool:
    """Whether a backward of our own is of use: gradients are taken, in plain reverse mode.

    Compilers fuse the plain formula; torch.func, forward mode and traces need it to differentiate, batch and record it.
    """
    if not (tensor.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (transformed or recorded(tensor))
