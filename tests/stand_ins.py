"""What PEFT and torchao make of layers, in the parts that others can see; the suite runs without either."""

import torch
import torch.nn.functional as F
from torch import nn


class ModulesToSave(nn.Module):
    """PEFT's wrapper of a module named in `modules_to_save`: it calls a copy, and has an `update` of its own."""

    disable_adapters = False
    active_adapters = ("default",)

    def __init__(self, original, copied):
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({"default": copied})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.modules_to_save["default"], name)

    def forward(self, *args):
        return self.modules_to_save["default"](*args)

    def update(self, adapter_name):
        raise AssertionError("PEFT's own update adds an adapter")


class Adapted(nn.Module):
    """PEFT's LoRA around a linear layer: `weight` is that of the layer alone."""

    active_adapters = ("default",)

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer, self.dropout = layer, nn.Dropout(0.5)
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, dtype=layer.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def merged(self):
        return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight

    def forward(self, features):
        return self.base_layer(features) + self.lora_B(self.lora_A(self.dropout(features)))


class Quantized(torch.Tensor):
    """torchao's quantized weights: a linear layer multiplies by them, and nothing else reads their numbers."""

    def __tensor_flatten__(self):
        raise NotImplementedError("Quantized, a stand-in, is made of no other tensors")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            features, weight, *bias = args
            return F.linear(features, weight.as_subclass(torch.Tensor) / 8, *bias)
        if function in (torch.Tensor.abs, torch.Tensor.to, torch.Tensor.__sub__):
            raise NotImplementedError(f"Quantized dispatch: {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


def quantize(layer):
    """Bring the layer's weight to multiples of 1/8, kept as whole numbers."""
    numbers = (layer.weight.detach() * 8).round()
    layer.weight = nn.Parameter(numbers.as_subclass(Quantized), requires_grad=False)
    return numbers / 8
