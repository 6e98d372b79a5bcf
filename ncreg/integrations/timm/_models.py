"""Names for timm.create_model: `ncreg_HEAD.BACKBONE`, for every head of ncreg and every timm model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import timm.models
from timm.models import PretrainedCfg, is_model, register_model
from torch import Tensor, nn

from ncreg.heads import HEADS
from ncreg.models import Classifier, swap_head

timm_pretrained_cfg = timm.models.get_pretrained_cfg


@dataclass
class Requests:
    """What `--model-kwargs` requests beyond the model itself, for the hooks that see loss, loader and schedule."""

    loss_terms: Mapping[str, Any] = field(default_factory=dict)
    terminal_phase: Mapping[str, Any] | None = None
    classifier: Classifier | None = None
    terms: nn.Module | None = None  # once a task computes them
    followed: bool = False  # whether a task hands batches to a head that follows the class means

    def clear(self) -> None:
        """Request nothing."""
        self.__init__()  # type: ignore[misc]


REQUESTS = Requests()
"""Those of the model that is trained: the last `ncreg_*` one that was made, until an optimizer or a task says which."""

_MADE: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()  # every live model's, without itself


def requested_by(trained: Iterable[Tensor]) -> Requests:
    """The requests of the model that has these parameters; a teacher may have been made since.

    Parameters of no `ncreg_*` model leave the requests as they are.
    """
    wanted = {id(parameter) for parameter in trained}
    for classifier, requests in _MADE.items():
        if classifier is not REQUESTS.classifier and any(id(p) in wanted for p in classifier.parameters()):
            REQUESTS.__init__(classifier=classifier, **requests)  # type: ignore[misc]
            break
    return REQUESTS


def keep_terms(classifier: Classifier, terms: nn.Module) -> None:
    """Note the loss terms that a task computes for the model that is trained."""
    REQUESTS.terms = _MADE[classifier]["terms"] = terms


def note_followed(classifier: Classifier) -> None:
    """Note that a task hands the batches of the model that is trained to its NearestETFHead."""
    REQUESTS.followed = _MADE[classifier]["followed"] = True


def forget() -> None:
    """Forget what every model requested."""
    REQUESTS.clear()
    _MADE.clear()


def register_names() -> None:
    """Make `ncreg_HEAD` known to timm for every head, once."""
    for head in HEADS:
        if not is_model(f"ncreg_{head}"):
            register_model(_entrypoint(head))


def get_pretrained_cfg(model_name: str, *args: Any, **kwargs: Any) -> PretrainedCfg | None:
    """timm's; that of `ncreg_HEAD.BACKBONE` is the backbone's, whose name stands in it as the tag."""
    name, _, backbone = model_name.partition(".")
    if not (name.startswith("ncreg_") and backbone):
        return timm_pretrained_cfg(model_name, *args, **kwargs)
    found = timm_pretrained_cfg(backbone, *args, **kwargs) or PretrainedCfg()
    return replace(found, architecture=name, tag=backbone)


def _entrypoint(head: str) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: Any = None,
        *,
        num_classes: int | None = None,
        backbone: str | None = None,
        norm: str = "batch",
        project: int | str | None = None,
        head_args: Mapping[str, Any] | None = None,
        loss_terms: Mapping[str, Any] | None = None,
        terminal_phase: bool | Mapping[str, Any] | None = None,
        **model_args: Any,
    ) -> nn.Module:
        name, cfg = _backbone(head, backbone, pretrained_cfg)
        known = {"pretrained": pretrained, "pretrained_cfg": cfg, "cache_dir": cache_dir}
        known["pretrained_cfg_overlay"] = pretrained_cfg_overlay
        classifier = swap_head(
            name,
            head,
            num_classes=num_classes,
            norm=norm,
            project=project,
            model_args=model_args | {name: value for name, value in known.items() if value},
            head_args=_mapping("head_args", head_args),
        )
        requests: dict[str, Any] = {"loss_terms": _mapping("loss_terms", loss_terms), "terms": None}
        requests["terminal_phase"] = None
        if terminal_phase is not None and terminal_phase is not False:
            requests["terminal_phase"] = {} if terminal_phase is True else _mapping("terminal_phase", terminal_phase)
        _MADE[classifier] = requests
        REQUESTS.__init__(classifier=classifier, **requests)  # type: ignore[misc]
        return classifier

    build.__name__ = build.__qualname__ = f"ncreg_{head}"
    build.__doc__ = f"swap_head(BACKBONE, {head!r}); BACKBONE follows the name after a dot."
    return build


def _backbone(head: str, backbone: str | None, cfg: Any) -> tuple[str, dict[str, Any] | None]:
    """The backbone's name, which stands where timm expects a tag, or `backbone=`; and its cfg, if timm hands it in."""
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    tag = cfg.get("tag") if isinstance(cfg, Mapping) else cfg
    if backbone is not None and tag:
        raise ValueError(f"the backbone is named twice: ncreg_{head}.{tag} and backbone={backbone!r}")
    name = tag or backbone
    if not isinstance(name, str):
        raise ValueError(f"ncreg_{head} needs a backbone: ncreg_{head}.resnet18, or --model-kwargs backbone=resnet18")
    if not (tag and isinstance(cfg, Mapping)):
        return name, None
    architecture, _, own_tag = name.partition(".")
    return name, {**cfg, "architecture": architecture, "tag": own_tag or None}


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name}={value!r} must be a dict; on the command line --model-kwargs \"{name}={{'key': value}}\""
        )
    return value
