"""What the closed forms take for numbers and sequences."""

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
