"""The README and pages as a user with a type checker writes them: mypy reads this file, nothing runs it."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

from ncreg import Classifier, NeuralCollapse, TPTScheduler, losses, param_groups, swap_head
from ncreg.heads import HEADS, FixedHead, NearestETFHead
from ncreg.models import ClassifierOutput, EncoderOutput, FeaturesOutput
from ncreg.quantization import round_weights


def ten_lines(backbone: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """README's example; `in_features` of the head is an int, not a Tensor or Module."""
    model = swap_head(backbone, "etf", num_classes=10)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=0.1)
    assert_type(TPTScheduler(optimizer, max_epochs=200).onset_epoch, int | None)
    collapse = NeuralCollapse(10, model.head.in_features, classifier=model.head)
    logits, features = model(images, with_features=True)
    collapse.update(features, target)
    model.head.update(features, target)
    return collapse.compute()


def outputs(model: Classifier, images: Tensor, flag: bool) -> Tensor:
    """What a call gives follows `with_features`."""
    assert_type(model(images, with_features=True), ClassifierOutput)
    assert_type(model(images, with_features="encoder"), EncoderOutput)
    assert_type(model(images, with_features="alone"), FeaturesOutput)
    assert_type(model(images, flag), Tensor | ClassifierOutput | EncoderOutput | FeaturesOutput)
    return assert_type(model(images), Tensor)


def heads_and_losses(available: dict[str, Tensor], frame: NearestETFHead, model: Classifier) -> Any:
    """The weight of a head by name, a list of losses of different kinds, a rounded copy that keeps its type."""
    head = HEADS["orthoplex"](3, 6)
    assert_type((head.weight @ head.weight.T).norm(), Any)
    assert_type(round_weights(frame, 4), FixedHead)
    assert_type(round_weights(model, 4), Classifier)
    terms = [(1.0, losses.DotRegressionLoss()), (0.5, losses.IntraClassCosineLoss())]
    return sum(share * term(*(available[name] for name in term.consumes)) for share, term in terms)
