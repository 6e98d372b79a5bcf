"""Heads, norms and losses built on the meta device, then filled as FSDP fills them: to_empty, reset_parameters."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ncreg.frames import orthoplex
from ncreg.heads import HEADS, CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from ncreg.losses import CenterLoss, ClassMeanMemory, InterClassCosineLoss
from ncreg.models import Normalize, swap_head
from ncreg.norms import NORMS, FilterResponseNorm, LastBatchNorm, last_norm

SEATS = [3, 1, 0, 2, 5, 4]
PARTS = {name: lambda build=build: build(12, 6, seed=3) for name, build in HEADS.items()}
PARTS |= {
    "etf permuted": lambda: ETFHead(12, 6, permutation=SEATS, seed=5),
    "grouped": lambda: ETFHead(13, 6, structure="grouped", permutation=SEATS),
    "householder": lambda: ETFHead(5, 6, structure="householder", permutation=SEATS),
    "centre": lambda: ETFHead(6, 6, structure="centre"),
    "linear without bias": lambda: LinearHead(12, 6, bias=False, seed=2),
    "unnormalised": lambda: HEADS["softmax_code"](4, 6, normalize=False, scale=2.0),
    "batch with bias": lambda: LastBatchNorm(12, bias=True, gamma="scalar"),
    "batch without gamma": lambda: LastBatchNorm(12, gamma="none"),
    "filter response with bias": lambda: FilterResponseNorm(12, bias=True, eps=0.3),
    "centres": lambda: CenterLoss(6, 12),
    "class means": lambda: ClassMeanMemory(6, 12),
    "class means in a loss": lambda: InterClassCosineLoss(6, memory=ClassMeanMemory(6, 12)),
    "normalize": lambda: Normalize([0.1, 0.2], [0.3, 0.7]),
}
PARTS |= {f"norm {kind}": lambda kind=kind: last_norm(kind, 12) for kind in NORMS}


def fill(model, poison=float("nan")):
    """As FSDP: every module with parameters or buffers of its own is emptied and reset, by itself."""
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            module.to_empty(device="cpu", recurse=False)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data.fill_(poison if tensor.is_floating_point() else -7)
            module.reset_parameters()
    return model


def same(first, second):
    """Bit for bit: state, buffers outside the state, scale and structure."""
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    assert repr(first) == repr(second)
    scales = [[getattr(module, "scale", None) for module in model.modules()] for model in (first, second)]
    assert scales[0] == scales[1]


@pytest.mark.parametrize("build", PARTS.values(), ids=PARTS)
def test_deferred_and_direct_construction_give_the_same(build):
    with torch.device("meta"):
        deferred = build()
    assert {t.device.type for t in (*deferred.parameters(), *deferred.buffers())} <= {"meta"}
    same(fill(deferred), build())


@pytest.mark.parametrize("build", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_reset_undoes_everything_that_was_written(build, dtype):
    module = build().to(dtype)
    expected = copy.deepcopy(module)
    if dtype == torch.float64:  # rounded twice when built, once when reset
        expected = build()
        module = module.float()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(3)
    for part in module.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()
    same(module, expected)


def test_a_whole_classifier():
    def build():
        classifier = swap_head("test_vit", "nearest_etf", num_classes=10, project=12)
        classifier.preprocess = Normalize([0.5] * 3, [0.25] * 3)
        return classifier

    direct, deferred = build(), build().to("meta")
    for part in ("preprocess", "norm", "head"):
        same(fill(getattr(deferred, part)), getattr(direct, part))


def test_the_structured_heads_give_the_same_logits():
    features = torch.randn(4, 13, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        deferred = PARTS["grouped"]()
    assert torch.equal(fill(deferred)(features), PARTS["grouped"]()(features))


@pytest.mark.usefixtures("unchecked")
def test_class_vectors_that_were_given_cannot_be_drawn_again():
    head = FixedHead(orthoplex(6, 12))
    with pytest.raises(RuntimeError, match="FixedHead cannot draw its class vectors again.*load_state_dict"):
        head.reset_parameters()


@pytest.mark.parametrize("assign", [True, False])
def test_a_scale_left_open_on_the_meta_device_is_that_of_the_class_vectors_that_come(assign):
    weight = 3 * orthoplex(6, 12)
    direct, deferred = FixedHead(weight), FixedHead(weight.to("meta"))
    if not assign:
        deferred.to_empty(device="cpu")
    deferred.load_state_dict(direct.state_dict(), assign=assign)
    same(direct, deferred)


def test_a_scale_left_open_waits_for_the_part_of_a_state_that_brings_the_class_vectors():
    weight = 3 * torch.eye(6, 12)  # the margin of each of them is 3
    model = nn.ModuleList([nn.Linear(2, 2), FixedHead(weight.to("meta"))]).to_empty(device="cpu")
    model[1].weight.copy_(7 * torch.eye(6, 12))  # whatever lies in memory
    model.load_state_dict({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}, strict=False)
    model.load_state_dict({"1.weight": weight}, strict=False)
    assert model[1].scale == pytest.approx(math.log(5 / math.expm1(0.01)) / 3)


@pytest.mark.parametrize("name", ["orthoplex", "hypercube", "tammes", "softmax_code"])
def test_heads_by_name_are_saved_and_copied_whole(name):
    head = HEADS[name](12, 6, seed=1)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fill(loaded)
    same(loaded, head)


@pytest.mark.parametrize("build", [LinearHead, CosineHead, NearestETFHead, ETFHead, LastBatchNorm])
def test_sharded_parameters_are_filled(build, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        make = (lambda: nn.Sequential(build(12))) if build is LastBatchNorm else lambda: nn.Sequential(build(12, 6))
        with torch.device("meta"):
            deferred = make()
        fully_shard(deferred, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        deferred.to_empty(device="cpu")
        deferred[0].reset_parameters()
        for key, value in make().state_dict().items():
            found = deferred.state_dict()[key]
            assert torch.equal(getattr(found, "full_tensor", lambda found=found: found)(), value), key
    finally:
        dist.destroy_process_group()
