"""Losses as modules: the constructor takes hyperparameters, forward takes the batch.

Every module names what its `forward` takes in `consumes`, in order, out of "features" (batch, dim), "logits"
(batch, classes), "target" (batch,) and "weight" (classes, dim), the head's class vectors; three losses, which go
without logits, take "head", the head itself. A loop that has all of them can hold any list of losses (torch's own
take "logits", "target"):

    >>> import torch
    >>> available = {"features": torch.eye(2), "target": torch.tensor([0, 1]), "weight": torch.eye(2)}
    >>> terms = [(1.0, NTCELoss(temperature=1.0)), (0.5, InterClassCosineLoss(2))]
    >>> sum(factor * term(*(available[name] for name in term.consumes)) for factor, term in terms)
    tensor(0.8133)

Formula, source and errors are at the function of the same name in `ncreg.functional`. Two belong to the modules:

    gather   the loss is that of all ranks' batches together, and DistributedDataParallel's averaged gradient exactly
             the global batch's; every rank must make the call. On where samples are compared with each other, off
             where the loss is a mean over samples: equal batches then need none. With class_weight= they do, since
             the weights of each rank's batch add up to something else: hand in gather=True.
    memory   a ClassMeanMemory, one for each loss, which every batch updates in training mode, after the loss,
             except under torch.no_grad(), as validation is: loops seldom call eval() on a loss.
"""

from ncreg.losses.chunked import ChunkedCrossEntropyLoss
from ncreg.losses.contrastive import NONLLoss, NTCELoss, SupConLoss
from ncreg.losses.cosine import InterClassCosineLoss, IntraClassCosineLoss
from ncreg.losses.costs import ExpectedCostLoss
from ncreg.losses.imbalance import LogitAdjustedLoss
from ncreg.losses.logits import OneHotMSELoss, SpectralDecouplingLoss
from ncreg.losses.memory import ClassMeanMemory
from ncreg.losses.prototypes import CenterLoss, DotRegressionLoss
from ncreg.losses.sampled import SampledCrossEntropyLoss
from ncreg.losses.sharded import ShardedCrossEntropyLoss
from ncreg.losses.spread import KoLeoLoss

__all__ = [
    "CenterLoss",
    "ChunkedCrossEntropyLoss",
    "ClassMeanMemory",
    "DotRegressionLoss",
    "ExpectedCostLoss",
    "InterClassCosineLoss",
    "IntraClassCosineLoss",
    "KoLeoLoss",
    "LogitAdjustedLoss",
    "NONLLoss",
    "NTCELoss",
    "OneHotMSELoss",
    "SampledCrossEntropyLoss",
    "ShardedCrossEntropyLoss",
    "SpectralDecouplingLoss",
    "SupConLoss",
]
