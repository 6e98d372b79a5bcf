"""What NCCL asks of a tensor beyond gloo, checked while tests run on gloo: no GPU is at hand to run NCCL itself.

The rules are those of torch's ProcessGroupNCCL: a dense tensor, contiguous in its own memory format, of a type that
NCCL knows (int16, for one, it does not), and on a device (here: not the meta device).
"""

import functools

import torch
import torch.distributed as dist

KNOWN = {
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce", "gather", "scatter", "send", "recv")


def check_tensors(name, values):
    """Fail on the first tensor among the arguments of a collective that NCCL would refuse."""
    for value in values:
        if isinstance(value, (list, tuple)):
            check_tensors(name, value)
        elif isinstance(value, torch.Tensor):
            about = f"{name}: shape {tuple(value.shape)}, strides {value.stride()}, {value.dtype}"
            assert value.layout == torch.strided and not value.is_meta, about
            assert value.is_contiguous(memory_format=_own_format(value)), f"{about} is not contiguous"
            assert value.dtype in KNOWN, f"{about} is no type of NCCL's"


def _own_format(value):
    wide = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if wide else torch.contiguous_format


def enforce():
    """Check the arguments of every collective of this process from here on."""
    for name in COLLECTIVES:
        setattr(dist, name, _checked(name, getattr(dist, name)))


def _checked(name, collective):
    @functools.wraps(collective)
    def checked(*args, **kwargs):
        check_tensors(name, [*args, *kwargs.values()])
        return collective(*args, **kwargs)

    return checked
