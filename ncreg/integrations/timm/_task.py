"""timm's ClassificationTask with loss terms of ncreg added to timm's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from ncreg import losses
from ncreg._checks import check_choice, check_keywords, check_number
from ncreg.heads import NearestETFHead
from ncreg.integrations._following import follow, updates_seen
from ncreg.integrations.timm._models import keep_terms, note_followed, requested_by
from ncreg.models import Classifier

PHASES = ("always", "fitting", "terminal")


class LossTerms(nn.Module):
    """Σ weight · phase · loss over the requested terms; `ramp` fades the terminal phase in.

    Args:
        requested: class name in `ncreg.losses` → weight, or a dict with `weight`, `phase` ("always", "fitting" or
            "terminal") and arguments of the class. Numbers of classes and features are filled in.
        classifier: says them, and gives the class vectors.

    Raises:
        ValueError: an unknown loss or phase, or one that lacks an argument.
    """

    def __init__(self, requested: Mapping[str, Any], classifier: Classifier) -> None:
        super().__init__()
        self.ramp = 0.0
        self.losses = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.phases: dict[str, str] = {}
        self.consumes: dict[str, tuple[str, ...]] = {}
        sizes = {"num_classes": classifier.num_classes, "num_features": classifier.head_hidden_size}
        known = [name for name in losses.__all__ if name.endswith("Loss")]
        for name, value in requested.items():
            check_choice("loss_terms", name, known)
            args = dict(value) if isinstance(value, Mapping) else {"weight": value}
            self.weights[name] = check_number(f"loss_terms[{name}]['weight']", args.pop("weight", 1.0))
            self.phases[name] = check_choice(f"loss_terms[{name}]['phase']", args.pop("phase", "always"), PHASES)
            kind: Any = getattr(losses, name)
            taken = inspect.signature(kind).parameters
            check_keywords(f"loss_terms[{name!r}]", args, kind)
            try:
                self.losses[name] = kind(**{key: size for key, size in sizes.items() if key in taken} | args)
            except TypeError as error:
                raise ValueError(f"loss_terms[{name}]: {error}") from error
            self.consumes[name] = kind.consumes

    def forward(self, available: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each term that acts now, times its weight; available holds features, logits, target, head and weight."""
        factors = {"always": 1.0, "fitting": 1.0 - self.ramp, "terminal": self.ramp}
        weighed = {}
        for name, loss in self.losses.items():
            if factor := self.weights[name] * factors[self.phases[name]]:
                weighed[name] = factor * loss(*(available[part] for part in self.consumes[name]))
        return weighed


class CollapseTask(ClassificationTask):
    """timm's task for the `ncreg_*` model that it trains: adds its `loss_terms`, hands batches to a NearestETFHead.

    Without either it is timm's own.
    """

    terms: LossTerms | None

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.terms = None
        requests = requested_by(model.parameters())
        self._head: list[nn.Module] = []  # in a list: no submodule of the task
        self._follows = False
        if not isinstance(model, Classifier) or model is not requests.classifier:
            return
        self._head, self._follows = [model.head], isinstance(model.head, NearestETFHead)
        if requests.loss_terms:
            self.terms = LossTerms(requests.loss_terms, model).to(self.device)
            keep_terms(model, self.terms)
        if self._follows:
            note_followed(model)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Timm's dict of loss and output, with the weighed terms by name."""
        if self.terms is None and not self._follows:
            return super().forward(input, target)
        if target.ndim != 1:
            who, other = (
                ("loss_terms need", "loss_terms") if self.terms else ("head nearest_etf needs", "take head etf")
            )
            raise ValueError(
                f"{who} one class a sample, the target has shape {tuple(target.shape)}: "
                f"leave out --mixup, --cutmix and --jsd-loss, or {other}"
            )
        logits, features = self.trainable_module(input, with_features=True)
        (head,) = self._head
        available: dict[str, Any] = {"features": features, "logits": logits, "target": target, "head": head}
        if self.terms is not None and any("weight" in parts for parts in self.terms.consumes.values()):
            name = "class_vectors" if hasattr(head, "class_vectors") else "weight"
            available["weight"] = getattr(head, name)  # which some heads build at each access
        terms = {} if self.terms is None else self.terms(available)
        loss = torch.stack([self.criterion(logits, target), *terms.values()]).sum()
        follow(head, features, target, since=updates_seen(head))
        return {"loss": loss, "output": logits} | terms

    def get_clip_parameters(self, exclude_head: bool = False) -> Any:
        """Timm leaves out the last two parameters for the head; here the head's own, of which a fixed head has none."""
        module: Any = self.get_trainable_module()
        classifier = next((part for part in module.modules() if isinstance(part, Classifier)), None)
        if not exclude_head or classifier is None:
            return super().get_clip_parameters(exclude_head)
        head = {id(parameter) for parameter in classifier.head.parameters()}
        return [parameter for parameter in module.parameters() if id(parameter) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """timm's, and the buffers of the loss terms (centres, memories)."""
        state = super().get_task_state(module, ema)
        own = {} if self.terms is None or ema else self.terms.state_dict()
        return state | ({"ncreg_loss_terms": own} if own else {})

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Likewise."""
        super().load_task_state(state, strict, module, ema)
        if self.terms is not None and not ema:
            self.terms.load_state_dict((state or {}).get("ncreg_loss_terms", {}), strict=strict)
