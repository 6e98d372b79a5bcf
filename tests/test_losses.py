"""The modules: each states what it consumes, and equals its function."""

import torch

from ncreg import functional as nf
from ncreg import losses


def test_a_loop_can_hold_any_list_of_losses():
    g = torch.Generator().manual_seed(0)
    available = {
        "features": torch.randn(8, 5, generator=g),
        "logits": torch.randn(8, 3, generator=g),
        "target": torch.randint(3, (8,), generator=g),
        "weight": torch.randn(3, 5, generator=g),
    }
    features, target, weight = available["features"], available["target"], available["weight"]
    wanted = {
        losses.IntraClassCosineLoss(): nf.intra_class_cosine_loss(features, target),
        losses.InterClassCosineLoss(3): nf.inter_class_cosine_loss(features, target, 3),
        losses.DotRegressionLoss(): nf.dot_regression_loss(features, target, weight),
    }
    for module, value in wanted.items():
        torch.testing.assert_close(module(*(available[name] for name in module.consumes)), value)
