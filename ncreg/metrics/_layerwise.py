"""LayerwiseCollapse: the measures of collapse at inner layers, to see how it builds up with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from einops import reduce
from jaxtyping import Integer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.plot import _error_on_missing_matplotlib

from ncreg._checks import check_choice, check_num_classes, described
from ncreg._modes import uncompiled
from ncreg._transforms import recomputed
from ncreg.metrics._channels import FIRST, channel_axis, holders
from ncreg.metrics._neural_collapse import NeuralCollapse
from ncreg.metrics._plot import tell_apart

Results = Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Mapping[str, Tensor]]]


class LayerwiseCollapse:
    """Collapse of a model's inner layers, from pooled activations that forward hooks collect.

    A context manager: the hooks live from `with` to its end, whatever happens inside. After each forward pass
    `update(target)` takes in what the layers gave; `compute` returns the one-pass measures of NeuralCollapse (nc1,
    nc1_rank, stable_rank, effective_rank, within_stable_rank, cdnv, …) for each layer, in the order of `layers`.
    Deep collapse is something to observe: forcing it at every layer is not optimal (Súkeník et al., 2024).

    Token sequences (B, L, d) and maps, (B, C, H, W) or (B, H, W, C), are averaged over their positions in at least
    float32. Where a map has its channels is decided for each layer: by `output_fmt` of a timm module; by the kind of
    layer (convolutions, batch norms: first; linear layers, layer norms: last), of a chain its last one; by kinds and
    channel counts of what is inside; by the model around. Where both axes fit, timm's blocks have the model's
    `output_fmt`, or channels first without one; others are refused. Sums are float64. Works under no_grad, autocast and
    DistributedDataParallel, where every rank must call `compute`. Models of torch.compile run uncompiled within the
    block: their code calls no hook that was set after it was made.

    Args:
        model: any module; hooks go to its submodules, or to those of the module inside DistributedDataParallel.
        layers: names of submodules; the front of a path may be left out (`layer4` for `backbone.layer4`). None takes
            the stages that a timm model lists in `feature_info`.
        num_classes: C; by default the model's own `num_classes`.
        pool: function of a layer's output to (B, d), where the averages above do not fit.

    Raises:
        ValueError: no such layers, or in the forward pass an output that is no vector, sequence or map, or a map of
            which nothing tells where its channels are: `pool` can say.

    Example:
        >>> import timm, torch
        >>> from ncreg.metrics import LayerwiseCollapse
        >>> model = timm.create_model("test_resnet", num_classes=4).eval()
        >>> with torch.no_grad(), LayerwiseCollapse(model, layers=["layer1", "layer4"]) as depth:
        ...     logits = model(torch.randn(12, 3, 32, 32))
        ...     depth.update(torch.arange(12) % 4)
        ...     values = depth.compute()
        >>> [(name, int(found["nc1_rank"])) for name, found in values.items()]
        [('layer1', 3), ('layer4', 3)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        num_classes: int | None = None,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {described(model)}")
        model = model.module if isinstance(model, DistributedDataParallel) else model
        found: Any = num_classes if num_classes is not None else getattr(model, "num_classes", None)
        if num_classes is None and (not isinstance(found, int) or found < 2):
            raise ValueError(f"num_classes={found}: give num_classes=, at least 2; the model does not say")
        if isinstance(layers, str):
            raise TypeError(f"layers must be a sequence of names, got the string {layers!r}: layers=[{layers!r}]")
        if layers is not None and not (isinstance(layers, Iterable) and all(isinstance(name, str) for name in layers)):
            raise TypeError(f"layers={layers!r} must be a sequence of names, such as ['layer1', 'layer2']")
        if pool is not None and not callable(pool):
            raise TypeError(f"pool={pool!r} must be a function of a layer's output, not {type(pool).__name__}")
        self.num_classes, self.pool = check_num_classes(found), pool
        self.modules = _find(model, layers)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._around = {name: holders(model, module) for name, module in self.modules.items()}
        self._axes: dict[tuple[str, torch.Size], int | None] = {}
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        self._metrics: dict[str, NeuralCollapse] = {}

    def __enter__(self) -> LayerwiseCollapse:
        if self._handles:
            raise RuntimeError("this LayerwiseCollapse is already active: use one `with` at a time")
        self._uncompiled = uncompiled()
        self._uncompiled.__enter__()
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._uncompiled.__exit__(None, None, None)
        self._forget_activations()

    def update(self, target: Integer[Tensor, " batch"]) -> None:
        """Take in the activations since the last update, for samples with these labels (B,).

        Raises:
            RuntimeError: outside of the `with` block.
            ValueError: the model has not run since, or not on as many samples as there are labels.
        """
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a torch.Tensor of class labels, got {described(target)}")
        seen = self.activations()
        for name, features in seen.items():
            if len(features) != len(target):
                raise ValueError(
                    f"layer {name!r} gave {len(features)} samples since the last update, but target has {len(target)}: "
                    "call update(target) after each forward pass, and name no layer that runs several times in one"
                )
        for name, features in seen.items():
            self._metric(name, features.shape[1]).update(features, target)

    def activations(self) -> dict[str, Tensor]:
        """Pooled activations (B, d) of each layer since the last update, handed out instead of being taken in.

        Raises:
            RuntimeError: outside of the `with` block.
            ValueError: a layer has not run since.
        """
        if not self._handles:
            raise RuntimeError("no hooks are set: call update() inside `with LayerwiseCollapse(...)`")
        seen = {name: torch.cat(parts) for name, parts in self._seen.items() if parts}
        self._forget_activations()
        for name in self.modules:
            if name not in seen:
                raise ValueError(f"layer {name!r} has not run since the last update: call the model first")
        return seen

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Measures by layer, over all ranks.

        Raises:
            ValueError: no sample has been seen.
        """
        widths = torch.tensor(
            [self._metrics[name].num_features if name in self._metrics else 0 for name in self.modules],
            device=self.device,
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            widths = torch.stack(gather_all_tensors(widths)).amax(0)  # a rank may have seen no sample
        if not widths.all():
            raise ValueError("no samples seen: run the model and call update(target) before compute()")
        return {
            name: self._metric(name, width).compute() for name, width in zip(self.modules, widths.tolist(), strict=True)
        }

    def plot(self, val: Results | None = None, ax: Any = None, *, measure: str = "nc1") -> tuple[Any, Any]:
        """Figure and axis: one measure over the layers, a line for each result.

        Args:
            val: a result of compute(), or a list of them, one a step; None calls compute().
            ax: matplotlib's axis to draw on; None makes a figure.
            measure: a key of each layer's measures.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: `measure` is no key of the results.
        """
        _error_on_missing_matplotlib()
        import matplotlib.pyplot as plt  # an option: the library works without it

        val = self.compute() if val is None else val
        results = list(val) if isinstance(val, Sequence) else [val]
        known = {name for result in results for found in result.values() for name in found}
        check_choice("measure", measure, sorted(known))
        figure, ax = plt.subplots() if ax is None else (None, ax)
        first = len(ax.get_lines())
        for step, result in enumerate(results):
            values = [found[measure].item() for found in result.values()]
            ax.plot(list(result), values, marker="o", label=f"step {step}" if len(results) > 1 else None)
        ax.set_ylabel(measure)
        if len(results) > 1:
            ax.legend()
        tell_apart(ax, first)
        return figure, ax

    def reset(self) -> None:
        """Forget all samples."""
        self._metrics.clear()
        self._forget_activations()

    def _forget_activations(self) -> None:
        for parts in self._seen.values():
            parts.clear()

    def _metric(self, name: str, width: int) -> NeuralCollapse:
        if name not in self._metrics:
            self._metrics[name] = NeuralCollapse(self.num_classes, width, cache=False).to(self.device)
        return self._metrics[name]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not recomputed():
                self._seen[name].append(self._pooled(name, module, output))

        return keep

    def _channel_axis(self, name: str, module: nn.Module, shape: torch.Size) -> int | None:
        """Looked for once for each layer and shape of its maps, as it takes milliseconds."""
        if (name, shape) not in self._axes:
            self._axes[name, shape] = channel_axis(module, self._around[name], (-1, *shape))
        return self._axes[name, shape]

    def _pooled(self, name: str, module: nn.Module, output: Any) -> Tensor:
        if self.pool is not None:
            output = self.pool(output)
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {name!r} gives {kind}: give pool= a function of it that returns (batch, dim)")
        output = output.detach()
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if output.ndim == 4:
            axis = self._channel_axis(name, module, output.shape[1:])
            if axis is None:
                raise ValueError(
                    f"layer {name!r} gives {tuple(output.shape)}, whose channels may be axis 1 or 3: give pool=, such "
                    "as lambda maps: maps.mean((2, 3)) for channels first, maps.mean((1, 2)) for channels last"
                )
            return reduce(output, "b c h w -> b c" if axis == FIRST else "b h w c -> b c", "mean")
        return reduce(output, "b l c -> b c", "mean") if output.ndim == 3 else output.clone()


def _find(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The named submodules in order; of several paths that end with a name the one nearest to the root counts."""
    named = dict(model.named_modules())
    if layers is None:
        stages: Any = next((part.feature_info for part in model.modules() if hasattr(part, "feature_info")), [])
        layers = [stage["module"] for stage in stages if stage.get("module")]
    if not layers:
        raise ValueError(f"layers names no submodule; choose among {_some(named)}")
    found = {}
    for name in layers:
        ends = [path for path in named if f".{path}".endswith(f".{name}")]
        paths = [path for path in ends if path.count(".") == min(end.count(".") for end in ends)]
        if len(paths) != 1:
            problem = f"fits {len(paths)} submodules: {_some(paths)}" if paths else f"is none of {_some(named)}"
            raise ValueError(f"layer {name!r} {problem}")
        found[name] = named[paths[0]]
    return found


def _some(names: Sequence[str] | dict[str, Any], most: int = 12) -> str:
    listed = [repr(name) for name in names if name]
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")
