"""The classifier that a metric measures, read when it is needed and never owned."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ncreg._checks import described
from ncreg._modes import evaluating
from ncreg._wrappers import as_next_forward
from ncreg.metrics._geometry import LARGEST
from ncreg.metrics._inputs import check_not_meta
from ncreg.numerics import is_composed, is_dtensor, whole


class LastLayer:
    """A pointer to a classifier with `.weight` (C, d) and perhaps `.bias` (C,), checked when the metric is made.

    Copies of the metric share the classifier, and it is no part of the metric's state. A head that brings its weight's
    rows to unit length in its forward pass says so by `.class_vectors` (C, d): those decide, so those are measured.
    Of a linear layer with adapters (PEFT's LoRA), whose weight is that without them, or with quantized weights
    (torchao) both are read off its outputs.

    Raises:
        TypeError: there is no tensor `.weight`, or the bias is no tensor.
        ValueError: the weight or the bias has another shape, or no values (on the meta device).
    """

    _copies: dict[int, Any] | None = None  # of the deepcopy that made this

    def __init__(self, module: Any, num_classes: int, num_features: int) -> None:
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise TypeError(
                f"classifier must have a tensor .weight of shape (num_classes, num_features), "
                f"got {type(module).__name__}: pass the last layer, e.g. model.head or model.get_classifier()"
            )
        self._module, self.num_classes, self.num_features = module, num_classes, num_features
        self._checked_tensors()

    @property
    def module(self) -> Any:
        """The classifier; in a copy of a module that holds metric and classifier the copied one."""
        if self._copies is not None:
            self._module, self._copies = self._copies.get(id(self._module), self._module), None
        return self._module

    def __deepcopy__(self, memo: dict[int, Any]) -> LastLayer:
        other = copy.copy(self)
        other._copies = memo  # looked up when first needed: the classifier may be copied after its metric
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self.module} | {name: value for name, value in vars(self).items() if name != "_module"}

    def version(self) -> tuple[int, ...]:
        """Numbers that change where the weights are written to or replaced; nothing is read from the device."""
        module = self.module  # a weight that is computed at each access would be another tensor every time
        held = list(getattr(module, "__dict__", {}).values())
        if isinstance(module, nn.Module):
            held = [*module.parameters(), *module.buffers()]
        tensors = [value for value in held if isinstance(value, Tensor)]
        return tuple(part for value in tensors for part in (id(value), 0 if value.is_inference() else value._version))

    def agrees_with(self, other: LastLayer) -> bool:
        """Whether the two are one classifier, or hold the same values."""
        if self.module is other.module:
            return True
        mine, theirs = (layer.read(torch.device("cpu"), on_every_rank=False) for layer in (self, other))
        return all(map(torch.equal, mine, theirs))

    def read(self, device: torch.device, *, on_every_rank: bool) -> tuple[Tensor, Tensor]:
        """Weight (C, d) and bias (C,), zero without one, in float64, as they are now.

        Args:
            device: where they go.
            on_every_rank: all ranks call this together, so that a classifier spread over them can be gathered.

        Raises:
            ValueError: another shape, entries that are NaN, infinite or beyond 1e100, or a classifier that is spread
                over the ranks (DTensor) where they do not call together.
        """
        if not on_every_rank:
            self.check_not_sharded()
        weight, bias = self._checked_tensors()
        weight, bias = whole(weight), None if bias is None else whole(bias)
        weight = weight.to(device).double()  # moved before it is cast: Apple's GPUs know no float64
        bias = weight.new_zeros(self.num_classes) if bias is None else bias.to(device).double()
        largest = torch.stack([weight.abs().amax(), bias.abs().amax()])  # NaN is passed on
        if not (largest <= LARGEST).all():
            name, value = ("bias", largest[1]) if largest[0] <= LARGEST else ("weight", largest[0])
            raise ValueError(
                f"classifier.{name} holds NaN, infinite or huge values (the largest is {float(value):.3g}): "
                "collapse cannot be measured on a diverged model"
            )
        return weight, bias

    def check_not_sharded(self) -> None:
        """Refuse a classifier that only all ranks together can read: a rank without samples would not call.

        Raises:
            ValueError: the weight or the bias is a DTensor.
        """
        for name, value in zip(("weight", "bias"), self._checked_tensors(), strict=True):
            if is_dtensor(value):
                raise ValueError(
                    f"classifier.{name} is spread over the ranks (DTensor), and a rank without samples would not join "
                    "in gathering it: pass whole copies that every rank made before, such as "
                    "types.SimpleNamespace(weight=head.weight.full_tensor(), bias=head.bias.full_tensor())"
                )

    def _tensors(self) -> tuple[Any, Any]:
        """Class vectors and bias as the next forward pass has them; the classifier itself stays as it is."""
        module = self.module
        if isinstance(module, nn.Module) and _acts_otherwise(module):
            return _read_off(module, self.num_features)
        with torch.no_grad(), as_next_forward(module) if isinstance(module, nn.Module) else nullcontext():
            return getattr(module, "class_vectors", module.weight), getattr(module, "bias", None)

    def _checked_tensors(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._tensors()
        bias = None if bias is False else bias
        for name, value, shape in (
            ("weight", weight, (self.num_classes, self.num_features)),
            ("bias", bias, (self.num_classes,)),
        ):
            if isinstance(value, Tensor):
                check_not_meta(f"classifier.{name}", value)
                if tuple(value.shape) != shape:
                    raise ValueError(f"classifier.{name} must have shape {shape}, got {tuple(value.shape)}")
            elif name == "weight" or value is not None:
                raise TypeError(f"classifier.{name} must be a torch.Tensor, got {described(value)}")
        return weight.detach(), None if bias is None else bias.detach()


def _acts_otherwise(layer: nn.Module) -> bool:
    """Whether a linear layer is PEFT's, with adapters beside its weight, or its weight is a quantized tensor."""
    if "base_layer" in layer._modules and hasattr(layer, "active_adapters"):
        return True
    if not isinstance(layer, nn.Linear):
        return False
    return is_composed(layer.weight) and not is_dtensor(layer.weight)


def _read_off(layer: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map, from the images of 0 and of the unit vectors."""
    like: Any = layer.weight
    place = {"dtype": like.dtype, "device": like.device}
    with evaluating(layer), torch.autocast(like.device.type, enabled=False):
        bias = layer(torch.zeros(1, width, **place))[0]
        return (layer(torch.eye(width, **place)) - bias).T, bias
