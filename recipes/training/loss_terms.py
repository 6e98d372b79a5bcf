"""The loss of a recipe: a sum of named terms, each with a weight and a phase."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ncreg import losses
from ncreg.distributed import all_reduce_sum, gather_batch, world_size
from ncreg.functional import class_weights
from ncreg.numerics import in_float64
from recipes.core.config import TermConfig
from recipes.core.errors import UserError
from recipes.core.memory import is_out_of_memory
from recipes.core.own_code import in_a_line, is_own, load_own, raised
from recipes.core.suggestions import a_kind, did_you_mean
from recipes.training.own_parts import given_what_it_takes

if TYPE_CHECKING:
    from ncreg.models import Classifier

AVAILABLE = ("features", "logits", "target", "weight", "encoder", "head")
"""What a loss can read: a batch's features (B, d), logits (B, C) and classes, the head's class vectors (C, d), the
backbone's own features (B, width), and the head, which then makes no logits unless another loss reads them."""

BY_POSITION_OR_NAME = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)

WEIGHABLE = (
    "cross_entropy",
    "chunked_cross_entropy",
    "dot_regression",
    "ntce",
    "nonl",
    "mse_one_hot",
    "spectral_decoupling",
    "logit_adjusted",
)
"""Losses that take a weight for each class."""


@dataclass(frozen=True)
class Term:
    """One loss with its inputs, its weight and the phase in which it acts."""

    name: str
    loss: nn.Module
    consumes: tuple[str, ...]
    factor: float
    phase: str

    def weight(self, ramp: float) -> float:
        """Its weight when the terminal phase has faded in to `ramp`, in [0, 1]."""
        return self.factor * {"always": 1.0, "fitting": 1.0 - ramp, "terminal": ramp}[self.phase]

    def __call__(self, available: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, from its features, logits, target and the head's weight."""
        return self.loss(*(available[name] for name in self.consumes))

    def share(self, part: Tensor, batch: Tensor, parts: int) -> float:
        """What the loss of one of a batch's equal parts is multiplied by, for their mean to be the batch's loss.

        1, but where classes have weights: each part's mean was divided by the weights of its own samples. A loss that
        is a sum over samples counts once for every part, and for every rank unless it is over the images of all.

        Args:
            part: target of the part.
            batch: of the whole batch; both are this rank's.
            parts: how many there are.
        """
        weight = getattr(self.loss, "weight" if self.name == "cross_entropy" else "class_weight", None)
        if getattr(self.loss, "reduction", None) == "sum":
            over_all = getattr(self.loss, "gather", isinstance(self.loss, CrossEntropyLoss) and weight is not None)
            return float(parts if over_all else parts * world_size())
        by_number = self.name == "cross_entropy" and batch.is_floating_point()  # as torch takes the mean of soft labels
        if parts == 1 or self.name not in WEIGHABLE or weight is None or by_number or self.loss.reduction != "mean":
            return 1.0
        sums = torch.stack([_weights_of(target, in_float64(weight)).sum() for target in (part, batch)])
        own, whole = all_reduce_sum(sums).tolist()
        return float(parts * own / whole)


def _weights_of(target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each sample's class, or of its soft label."""
    return target.to(weight) @ weight if target.is_floating_point() else weight[target]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch's cross-entropy; with class weights, its mean is taken over the batches of all ranks."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of the batch."""
        if self.weight is not None:
            logits, target = gather_batch(logits, target)
            if logits.dtype == torch.float64:
                self.weight = self.weight.double()
        return super().forward(logits, target)


def _losses(class_counts: Tensor, num_features: int) -> dict[str, Callable[..., nn.Module]]:
    num_classes = len(class_counts)
    return {
        "cross_entropy": CrossEntropyLoss,
        "chunked_cross_entropy": losses.ChunkedCrossEntropyLoss,
        "dot_regression": losses.DotRegressionLoss,
        "ntce": losses.NTCELoss,
        "nonl": losses.NONLLoss,
        "supcon": losses.SupConLoss,
        "koleo": losses.KoLeoLoss,
        "mse_one_hot": losses.OneHotMSELoss,
        "expected_cost": losses.ExpectedCostLoss,
        "spectral_decoupling": losses.SpectralDecouplingLoss,
        "center": partial(losses.CenterLoss, num_classes, num_features),
        "logit_adjusted": partial(losses.LogitAdjustedLoss, class_counts),
        "intra_class_cosine": losses.IntraClassCosineLoss,
        "inter_class_cosine": partial(losses.InterClassCosineLoss, num_classes),
    }


def loss_names() -> tuple[str, ...]:
    """The losses that a configuration can name."""
    return tuple(_losses(torch.ones(2), 1))


def build_terms(
    config: Mapping[str, TermConfig],
    *,
    class_counts: Tensor,
    num_features: int,
    num_encoder_features: int | None = None,
    device: torch.device | None = None,
    cost: Tensor | None = None,
) -> list[Term]:
    """The loss terms that a configuration names.

    Args:
        config: the terms by name.
        class_counts: training images of each class (C,).
        num_features: d, length of the features.
        num_encoder_features: length of those that leave the backbone; None for d as well.
        device: of the losses' buffers.
        cost: what mistakes cost (C, C), of the loss expected_cost where its own arguments do not say it.

    Raises:
        UserError: an unknown loss, or arguments that it does not take.
    """
    widths = {"last": num_features, "encoder": num_encoder_features or num_features}
    terms = []
    for name, term in config.items():
        width = widths[term.features]
        known = _losses(class_counts, width)
        if is_own(name):
            loss = _own(name, term, class_counts, width).to(device)
        elif name not in known:
            near = did_you_mean(name, [*known, *(term.rpartition(":")[2] for term in config if is_own(term))])
            raise UserError(f"loss.{name} is unknown: one of {', '.join(known)}, or FILE.py:NAME{near}")
        else:
            costs = {} if cost is None or name != "expected_cost" else {"cost": cost}
            args = costs | term.args | class_weight_args(name, term, class_counts)
            loss = _built(name, known[name], args).to(device)
        try:
            consumed = _consumed(loss)
        except ValueError as error:
            raise UserError(f"loss.{name}: {error}") from None
        terms.append(Term(name, loss, _read(name, term, consumed), term.weight, term.phase))
    return terms


def _read(name: str, term: TermConfig, consumed: tuple[str, ...]) -> tuple[str, ...]:
    """What a term reads: the encoder's features in the place of the last ones where it asks for them."""
    if term.features == "last":
        return consumed
    if "features" not in consumed:
        raise UserError(f"loss.{name}.features={term.features}: it reads {', '.join(consumed)}, but no features")
    return tuple("encoder" if part == "features" else part for part in consumed)


def _own(name: str, term: TermConfig, class_counts: Tensor, num_features: int) -> nn.Module:
    """A loss of the user's: a class, or a function that is the loss itself if it has no other arguments."""
    class_weight_args(name, term, class_counts)  # refuses them
    factory = load_own(name, "loss")
    offered = {"num_classes": len(class_counts), "num_features": num_features, "class_counts": class_counts}
    args = given_what_it_takes(factory, offered) | term.args
    loss = _built(name, factory if isinstance(factory, type) else partial(_Function, factory), args)
    if not isinstance(loss, nn.Module):
        raise UserError(f"loss.{name} is {a_kind(loss)}, not an nn.Module or a function")
    if learned := [key for key, value in loss.named_parameters() if value.requires_grad]:
        raise UserError(
            f"loss.{name} has parameters to learn ({', '.join(learned)}), but only the classifier's are trained: "
            "make them buffers"
        )
    return loss


class _Function(nn.Module):
    """A function of a batch's tensors as a loss, with fixed further arguments."""

    def __init__(self, function: Callable[..., Tensor], **args: Any) -> None:
        super().__init__()
        self.function, self.args = function, args
        self.consumes = _consumed_by(function, given=args)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The loss of the batch."""
        if all(name in inspect.signature(self.function).parameters for name in self.consumes):
            return self.function(**dict(zip(self.consumes, tensors, strict=True)), **self.args)
        return self.function(*tensors, **self.args)


def _consumed(loss: nn.Module) -> tuple[str, ...]:
    """What a loss reads of a batch: as `consumes` or its forward says, else what torch's own losses read."""
    return tuple(getattr(loss, "consumes", None) or _consumed_by(loss.forward))


def _consumed_by(function: Callable[..., Any], given: Collection[str] = ()) -> tuple[str, ...]:
    """The parts of a batch that a function's parameters name; logits and target for two parameters, as torch's losses.

    Raises:
        ValueError: a parameter without a default that is no part of a batch.
    """
    taken = [item for item in inspect.signature(function).parameters.values() if item.name not in given]
    named = tuple(item.name for item in taken if item.name in AVAILABLE)
    required = [item.name for item in taken if item.default is item.empty and item.kind in BY_POSITION_OR_NAME]
    other = [name for name in required if name not in AVAILABLE]
    if named and not other:
        return named
    any_number = any(item.kind is inspect.Parameter.VAR_POSITIONAL for item in taken)
    if (len(required) == 2 and set(named) <= {"target"}) or (any_number and not required):
        return ("logits", "target")
    said = f"its arguments are {', '.join(required)}" if required else "it has no arguments"
    raise ValueError(f"{said}: a loss names what it reads, of {', '.join(AVAILABLE)}; others need a value in args")


def class_weight_args(name: str, term: TermConfig, class_counts: Tensor) -> dict[str, Any]:
    """Arguments of a loss for its class weights, which have mean 1 over the training images."""
    if term.class_weights == "none":
        return {}
    if name not in WEIGHABLE:
        raise UserError(f"loss.{name}.class_weights={term.class_weights}: only {', '.join(WEIGHABLE)} weigh classes")
    weight = class_weights(class_counts, term.class_weights)
    weight = (weight * (class_counts.sum() / (weight * class_counts).sum())).to(torch.get_default_dtype())
    return {"weight": weight} if name == "cross_entropy" else {"class_weight": weight, "gather": True}


def try_terms(terms: Sequence[Term], model: Classifier, *, soft: bool) -> None:
    """Compute every term once on a few made-up images, so that a wrong argument fails before the run begins.

    Raises:
        UserError: a term's arguments do not work, it cannot take soft labels (`soft`), or it is not a single number.
    """
    like: dict[str, Any] = {"device": next(model.parameters()).device, "dtype": next(model.parameters()).dtype}
    classes, width = model.num_classes, model.head_hidden_size
    labels = torch.arange(4, device=like["device"]) % 2
    read = {part for term in terms for part in term.consumes}
    sizes = {"features": (4, width), "weight": (classes, width), "encoder": (4, model.backbone_width)}
    rows = {name: torch.eye(*size, **like) for name, size in sizes.items() if name in read}
    if "logits" in read:
        rows["logits"] = torch.zeros(4, classes, **like)
    tried: dict[str, Any] = {name: made.requires_grad_().clone() for name, made in rows.items()}  # free to change
    tried["target"] = torch.full((4, classes), 1 / classes, **like) if soft else labels
    tried["head"] = model.head
    for term in terms:
        with_soft = " with augment.mixup, cutmix or smoothing" if soft else ""
        try:
            value = replace(term, loss=copy.deepcopy(term.loss))(tried)
        except raised(term.name, ValueError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            said = in_a_line(error) if is_own(term.name) else " ".join(str(error).split())
            raise UserError(f"loss.{term.name}{with_soft}: {said}") from None
        if not isinstance(value, Tensor):
            raise UserError(f"loss.{term.name} gives {a_kind(value)}, not a tensor")
        if value.ndim:
            way = "args.reduction must be mean or sum" if "reduction" in vars(term.loss) else "return their mean"
            raise UserError(f"loss.{term.name} gives {value.numel()} numbers for 4 images: {way}")
        if not value.requires_grad:
            raise UserError(
                f"loss.{term.name} has no gradient: it would change nothing, because it does not depend on what it "
                "reads, or detaches it"
            )


def _built(name: str, factory: Callable[..., nn.Module], args: Mapping[str, Any]) -> nn.Module:
    try:
        return factory(**args)
    except raised(name, TypeError, ValueError) as error:
        raise UserError(f"loss.{name}.args={dict(args)}: {' '.join(str(error).split())}") from None
