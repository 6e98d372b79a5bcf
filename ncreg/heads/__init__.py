"""Classifier heads on (batch, in_features) features, fixed and learned.

Every head has `.weight` (num_classes, in_features) as in nn.Linear, `.in_features`, `.num_classes`, `.scale` and
`.normalize` (whether features are brought to length 1). A head draws from a generator of its own, seeded by
`seed`: runs that differ in the head alone stay paired.

A fixed frame follows its features: it is rounded to their dtype where that is the coarser one, and logits come in it
(bfloat16 features into a float32 head, as mixed precision of FSDP makes them); finer features are refused.
"""

from collections.abc import Callable
from typing import Any

from ncreg.heads._code import CodeHead
from ncreg.heads._drawn import hypercube_head, orthoplex_head, softmax_code_head, tammes_head
from ncreg.heads._fixed import ETFHead, FixedHead
from ncreg.heads._learned import CosineHead, LinearHead
from ncreg.heads._nearest import NearestETFHead
from ncreg.heads._sharded import class_shard, gather_head, shard_head

__all__ = [
    "HEADS",
    "CodeHead",
    "CosineHead",
    "ETFHead",
    "FixedHead",
    "LinearHead",
    "NearestETFHead",
    "class_shard",
    "gather_head",
    "shard_head",
]

HEADS: dict[str, Callable[..., Any]] = {
    "linear": LinearHead,
    "cosine": CosineHead,
    "etf": ETFHead,
    "nearest_etf": NearestETFHead,
    "orthoplex": orthoplex_head,
    "hypercube": hypercube_head,
    "tammes": tammes_head,
    "softmax_code": softmax_code_head,
    "code": CodeHead,
}
"""Heads that swap_head knows by name; each is called as head(in_features, num_classes, **head_args)."""
