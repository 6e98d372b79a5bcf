"""The five names of timm that a script calls and that are to know of ncreg, replaced wherever they are bound."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm.data.loader
import timm.optim._optim_factory
import timm.scheduler.scheduler_factory
import timm.task
from timm.data.dataset import AugMixDataset
from timm.data.model_config import resolve_input_data_config
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from ncreg.heads import NearestETFHead
from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations.timm._models import REQUESTS, forget, get_pretrained_cfg, requested_by, timm_pretrained_cfg
from ncreg.integrations.timm._schedule import TerminalPhaseSchedule
from ncreg.integrations.timm._task import CollapseTask, LossTerms
from ncreg.models import Classifier
from ncreg.optim import param_groups
from ncreg.tpt import TPTScheduler

_ORIGINAL: dict[str, Any] = {
    "create_optimizer_v2": timm.optim._optim_factory.create_optimizer_v2,
    "create_loader": timm.data.loader.create_loader,
    "create_scheduler_v2": timm.scheduler.scheduler_factory.create_scheduler_v2,
    "ClassificationTask": timm.task.ClassificationTask,
    "get_pretrained_cfg": timm_pretrained_cfg,
}


class _Made(NamedTuple):
    loader: Any
    given: dict[str, Any]  # the arguments that it was made of


_LOADERS: dict[bool, _Made] = {}  # is_training → the last such loader


def install() -> None:
    """Put the replacements in place; a script that has imported timm's names already gets them as well."""
    _rebind(_ORIGINAL, _replacements())


def uninstall() -> None:
    """Give timm its own five names back, and forget what models and loaders have said so far."""
    _rebind(_replacements(), _ORIGINAL)
    _LOADERS.clear()
    forget()


def _replacements() -> dict[str, Any]:
    return {
        "create_optimizer_v2": create_optimizer_v2,
        "create_loader": create_loader,
        "create_scheduler_v2": create_scheduler_v2,
        "ClassificationTask": CollapseTask,
        "get_pretrained_cfg": get_pretrained_cfg,
    }


def _rebind(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(__package__):
            continue
        for name, value in old.items():
            if getattr(module, "__dict__", {}).get(name) is value:
                setattr(module, name, new[name])


_OF_OTHER_GROUPS = ("layer_decay_min_scale", "layer_decay_no_opt_scale", "fallback_list", "fallback_no_weight_decay")


def create_optimizer_v2(model_or_params: Any, opt: str = "sgd", *args: Any, **kwargs: Any) -> Optimizer:
    """timm's; for a Classifier with the parameter groups of `ncreg.param_groups`, in which γ decays.

    Raises:
        ValueError: `layer_decay_min_scale`, `layer_decay_no_opt_scale`, `fallback_list` or `fallback_no_weight_decay`
            (of Muon), which these groups do not have.
    """
    make = _ORIGINAL["create_optimizer_v2"]
    if not isinstance(model_or_params, Classifier):
        return make(model_or_params, opt, *args, **kwargs)
    given = inspect.signature(make).bind(model_or_params, opt, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    if given.get("param_group_fn") is None and given.get("filter_bias_and_bn", True):
        if refused := [name for name in _OF_OTHER_GROUPS if given.get(name)]:
            raise ValueError(f"{', '.join(refused)}: ncreg.param_groups knows layer_decay alone; leave the others out")
        decay, layers = given.get("weight_decay", 0.0), given.pop("layer_decay", None)

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            return param_groups(model, decay, layer_decay=layers)

        given["param_group_fn"] = groups
    return make(**given)


def create_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """timm's; what it was made of is kept, for a second loader of the training set without augmentation."""
    make = _ORIGINAL["create_loader"]
    given = inspect.signature(make).bind(dataset, *args, **kwargs).arguments
    made = _LOADERS[bool(given.get("is_training", False))] = _Made(make(**given), given)
    return made.loader


_OF_EVALUATION = (
    *("input_size", "batch_size", "interpolation", "mean", "std", "num_workers"),
    *("crop_pct", "crop_mode", "pin_memory", "img_dtype", "device", "use_prefetcher"),
)


def clean_loader() -> Any:
    """The training images as the validation loader shows its own: no augmentation, every image once, in order.

    Raises:
        ValueError: there was no training loader of `create_loader`, or its data set can be read only once or wraps
            another, as a Subset does.
    """
    if True not in _LOADERS:
        raise ValueError(
            "terminal_phase needs the training loader of timm.data.create_loader: --naflex-loader makes another"
        )
    training = _LOADERS[True].given
    dataset = training["dataset"]
    while isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset
    if hasattr(dataset, "dataset"):
        raise ValueError(
            f"terminal_phase shows the training images without augmentation, and a {type(dataset).__name__} does not "
            "hand its transform to the data set inside: give create_loader a data set that transforms its own images"
        )
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"terminal_phase reads the training set a second time, which {type(dataset).__name__} does not allow: "
            "use a folder of images or another data set with a length"
        )
    like = _LOADERS[False].given if False in _LOADERS else _as_validation(training)
    kept = {name: like[name] for name in _OF_EVALUATION if name in like}
    return _ORIGINAL["create_loader"](copy.copy(dataset), is_training=False, persistent_workers=False, **kept)


def _as_validation(training: Mapping[str, Any]) -> dict[str, Any]:
    """Without a validation split: the images of the training loader, resized and cropped as the model asks for."""
    config = resolve_input_data_config(REQUESTS.classifier)
    interpolation = training.get("interpolation", "random")  # "random" is there for augmentation alone
    own = {"interpolation": config["interpolation"] if interpolation == "random" else interpolation}
    return dict(training) | own | {name: config[name] for name in ("crop_pct", "crop_mode")}


def _before_each_epoch(loader: Any, act: Callable[[], None]) -> None:
    """Have `act` called whenever the loader is read from its beginning; it stays the object that the script holds."""
    kind = type(loader)

    def read(self: Any) -> Any:
        act()
        return kind.__iter__(self)

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": read})


def create_scheduler_v2(optimizer: Optimizer, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """timm's; with `terminal_phase`, timm's schedule inside a TPTScheduler that measures the clean training set.

    Raises:
        ValueError: loss terms that no task computes, or settings that TPTScheduler refuses.
    """
    make = _ORIGINAL["create_scheduler_v2"]
    schedule, num_epochs = make(optimizer, *args, **kwargs)
    requested_by(parameter for group in optimizer.param_groups for parameter in group["params"])
    terms = REQUESTS.terms if isinstance(REQUESTS.terms, LossTerms) else None
    if REQUESTS.loss_terms and terms is None:
        raise ValueError("loss_terms are computed in timm's ClassificationTask alone: no distillation, no multilabel")
    if isinstance(getattr(REQUESTS.classifier, "head", None), NearestETFHead) and not REQUESTS.followed:
        warnings.warn(
            "head nearest_etf: timm's ClassificationTask alone hands it the batches, no distillation, no multilabel: "
            "it stays the simplex that it began with unless the loop calls head.update(features.detach(), target)",
            UserWarning,
            stacklevel=2,
        )
    if REQUESTS.terminal_phase is None or REQUESTS.classifier is None:
        if terms is not None and set(terms.phases.values()) != {"always"}:
            raise ValueError(f"loss_terms with the phases {terms.phases} need terminal_phase, which finds the phase")
        return schedule, num_epochs
    scheduler = TPTScheduler(optimizer, schedule, **_settings(REQUESTS.terminal_phase, num_epochs))
    updates = inspect.signature(make).bind(optimizer, *args, **kwargs).arguments.get("updates_per_epoch", 0)
    closer = EpochCloser(clean_loader())
    driver = TerminalPhaseSchedule(scheduler, schedule, closer, REQUESTS.classifier, terms, updates)
    _before_each_epoch(_LOADERS[True].loader, driver.stop_if_ended)
    return driver, scheduler.epoch if scheduler.finished else scheduler.max_epochs


def _settings(requested: Mapping[str, Any], num_epochs: int) -> dict[str, Any]:
    known = [name for name, p in inspect.signature(TPTScheduler).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(requested) - set(known))
    if unknown:
        raise ValueError(f"terminal_phase={dict(requested)}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return {"max_epochs": num_epochs} | dict(requested)
