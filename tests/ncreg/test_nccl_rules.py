"""The rules that the tests of several processes hold collectives to can fail."""

import pytest
import torch

from tests import nccl_rules


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.arange(6.0).view(2, 3).t(), "not contiguous"),
        (torch.arange(3, dtype=torch.int16), "no type of NCCL's"),
        (torch.eye(3).to_sparse(), "strides|shape|layout"),
        (torch.empty(3, device="meta"), "shape"),
    ],
)
def test_what_nccl_refuses_is_found(tensor, word):
    with pytest.raises((AssertionError, RuntimeError), match=word):
        nccl_rules.check_tensors("all_gather", [[torch.ones(2)], [tensor]])


def test_what_nccl_takes_passes():
    images = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    nccl_rules.check_tensors("all_reduce", [images, torch.ones(0, 3), torch.tensor(True), 3, "sum"])
