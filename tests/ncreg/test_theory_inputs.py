"""What the closed forms take for numbers and sequences."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from ncreg import theory

pytestmark = pytest.mark.usefixtures("unchecked")


def test_numpy_sequences_are_as_good_as_lists():
    assert theory.deep_linear_optimum(4, 5, np.array([1e-3, 2e-3]), 1e-3) == theory.deep_linear_optimum(
        4, 5, [1e-3, 2e-3], 1e-3
    )
    found = theory.imbalanced_mse_logits(np.array([100, 10, 1]), 1e-4, 1e-3)
    assert found == theory.imbalanced_mse_logits([100, 10, 1], 1e-4, 1e-3)
    assert {type(value) for value in found} == {float}


CALLS = {
    "loss='0.1'": lambda: theory.scale_for_loss(10, "0.1"),
    "scale='1'": lambda: theory.minimal_cross_entropy("1", 10),
    "weight_decay='1e-4'": lambda: theory.mse_optimum(10, 100, weight_decay="1e-4", feature_decay=1e-6),
    "feature_decay=None": lambda: theory.cross_entropy_optimum(10, 100, weight_decay=1e-4, feature_decay=None),
    "temperature='1'": lambda: theory.supcon_optimum(10, 100, "1"),
    "coefficient=": lambda: theory.spectral_decoupling_optimum(10, np.ones(2)),
    "weight_decays=0.1": lambda: theory.deep_linear_optimum(4, 5, 0.1, 1e-3),
    "weight_decays='0.1'": lambda: theory.deep_linear_optimum(4, 5, "0.1", 1e-3),
    r"weight_decays\[1\]='1'": lambda: theory.deep_linear_optimum(4, 5, [1e-3, "1"], 1e-3),
    "class_counts=array": lambda: theory.imbalanced_mse_logits(np.ones((2, 2), dtype=int), 1e-4, 1e-3),
    r"class_counts\[0\]": lambda: theory.imbalanced_mse_logits(np.array([1.5]), 1e-4, 1e-3),
    "weight must be a tensor .C, d., not ndarray": lambda: theory.collapse_certificate(
        loss=0.1, weight=np.eye(2), total_variance=2.0, class_counts=[1, 1]
    ),
    "class_counts=None": lambda: theory.collapse_certificate(
        loss=0.1, weight=torch.eye(2), total_variance=2.0, class_counts=None
    ),
    "class_counts=.nan, 1": lambda: theory.collapse_certificate(
        loss=0.1, weight=torch.eye(2), total_variance=2.0, class_counts=[np.nan, 1]
    ),
    "bias='False'": lambda: theory.mse_optimum(10, 100, 1e-4, 1e-6, bias="False"),
    "total_variance='2'": lambda: theory.collapse_certificate(
        loss=0.1, weight=torch.eye(2), total_variance="2", class_counts=[1, 1]
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_what_is_no_number_is_named(message):
    with pytest.raises(TypeError, match=message):
        CALLS[message]()


@pytest.mark.parametrize("empty", [[], np.array([])])
def test_empty_sequences_are_named(empty):
    with pytest.raises(ValueError, match="class_counts is empty"):
        theory.imbalanced_mse_logits(empty, 1e-4, 1e-3)
    with pytest.raises(ValueError, match="weight_decays is empty"):
        theory.deep_linear_optimum(4, 5, empty, 1e-3)


NUMBERS = {
    "binary_spectral_decoupling_optimum": (0.125,),
    "cross_entropy_optimum": (200, 100, 2.0**-11, 2.0**-20),
    "deep_linear_optimum": (200, 5, [2.0**-10, 2.0**-9], 2.0**-10),
    "dot_regression_optimum": (200, 2.0, 1.0, 2.0**-8),
    "layer_peeled_optimum": (200, 4.0, 9.0),
    "last_batch_norm_optimum": (200, 2.0**-11, 2.0**-11),
    "minimal_cross_entropy": (6.125, 200),
    "minority_collapse_threshold": (200, 2.0**-8, 2.0**-10),
    "mse_optimum": (200, 100, 2.0**-13, 2.0**-20),
    "nonl_optimum": (200, 8, 0.125),
    "ntce_optimum": (200, 8, 0.125),
    "relu_mse_optimum": (200, 5, [2.0**-10, 2.0**-9], 2.0**-10),
    "scale_for_loss": (200, 2.0**-7),
    "spectral_decoupling_optimum": (200, 2.0**-7),
    "supcon_optimum": (200, 8, 0.125),
}


def parts(found):
    """All numbers of a result."""
    if is_dataclass(found):
        return [part for value in vars_of(found) for part in parts(value)]
    return [part for value in found for part in parts(value)] if isinstance(found, tuple) else [found]


def vars_of(found):
    return [getattr(found, field.name) for field in fields(found)]


@pytest.mark.parametrize("whole, real", [(np.uint8, np.float32), (np.int64, np.float64), (torch.tensor, torch.tensor)])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_and_torch_give_what_plain_ones_give(name, whole, real):
    """200 classes are np.uint8 where labels are: 8 times 199 of them would be 56."""
    form, given = getattr(theory, name), NUMBERS[name]
    wanted = form(*given)

    def kind(value):
        if isinstance(value, list):
            return [kind(item) for item in value]
        return whole(value) if isinstance(value, int) else real(value)

    found = form(*map(kind, given))
    assert found == wanted
    assert {type(part) for part in parts(found)} == {float}
