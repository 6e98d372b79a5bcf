"""FSDP2 over two ranks: mixed precision, measures of a sharded classifier, and folding it, against one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ncreg.heads import HEADS, ETFHead, FixedHead
from ncreg.metrics import NearestClassCenter, NeuralCollapse
from ncreg.models import fold, swap_head
from ncreg.norms import NORMS, LastBatchNorm, last_norm
from tests import nccl_rules, warm_start

CLASSES = 4
LEARNED_AND_FIXED = ["etf", "nearest_etf", "linear", "cosine"]
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
IMAGES = torch.rand(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


def build(head, norm="batch"):
    torch.manual_seed(0)
    return swap_head("test_vit", head, num_classes=CLASSES, norm=norm)


def collapse(model, rank=None):
    """Measures of 24 features, half of them on each rank."""
    own = slice(None) if rank is None else slice(12 * rank, 12 * rank + 12)
    metric = NeuralCollapse(CLASSES, 64, model.head)
    metric.update(FEATURES[own], (torch.arange(24) % CLASSES)[own])
    return metric.compute()


def streamed(model, rank=None):
    """Measures of the 24 features without the cache: all of them on the first rank, none on the second."""
    metric = NeuralCollapse(CLASSES, 64, model.head, cache=False)
    for _ in metric.passes():
        for batch in torch.arange(24).split(10) if rank in (None, 0) else ():
            metric.update(FEATURES[batch], batch % CLASSES)
    return metric.compute()


def refusal(head):
    """What NearestClassCenter says of a classifier that it cannot read alone."""
    try:
        NearestClassCenter(torch.eye(64)[:CLASSES], head)
    except ValueError as error:
        return str(error)
    return None


def two_forwards(model, images):
    """Logits and features in training, with a backward pass, then logits in eval mode."""
    out = model.train()(images, with_features=True)
    out.logits.float().logsumexp(1).sum().backward()
    with torch.no_grad():
        return [out.logits.detach(), out.features.detach(), model.eval()(images)]


def shard(model, mesh, policy):
    for part in (*model.backbone.blocks, model.norm, model.head):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(minutes=2), world_size=2, rank=rank)
    nccl_rules.enforce()
    mesh, found = dist.device_mesh.init_device_mesh("cpu", (2,)), {}
    for head in LEARNED_AND_FIXED:
        for name, policy in {"float32": MixedPrecisionPolicy(), "bfloat16": HALF}.items():
            model = shard(build(head), mesh, policy)
            seen = two_forwards(model, IMAGES.chunk(2)[rank])
            folded = fold(model, normalize="drop")
            assert not any(isinstance(p, DTensor) for p in folded.parameters())
            assert isinstance(model, FSDPModule) and isinstance(model.backbone.blocks[0], FSDPModule)
            with torch.no_grad():
                found[head, name] = *seen, folded(IMAGES), collapse(model, rank), model.eval()(IMAGES)
    found["head alone"] = head_alone(mesh, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def head_alone(mesh, rank):
    """A classifier whose class vectors alone are spread over the ranks, without FSDP."""
    model = build("linear").eval()
    for name, parameter in list(model.head.named_parameters()):
        setattr(model.head, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    with torch.no_grad():
        return fold(model)(IMAGES), collapse(model, rank), streamed(model, rank), refusal(model.head)


@pytest.fixture(scope="module")
def ranks_found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    mp.start_processes(run_rank, args=(str(folder),), nprocs=2, start_method=warm_start.METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("head", LEARNED_AND_FIXED)
def test_a_sharded_classifier_gives_the_logits_of_one_process(ranks_found, head):
    wanted = two_forwards(build(head), IMAGES)
    for place in range(3):
        got = torch.cat([found[head, "float32"][place] for found in ranks_found])
        torch.testing.assert_close(got, wanted[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", LEARNED_AND_FIXED)
def test_under_mixed_precision_logits_come_in_the_dtype_of_the_features(ranks_found, head):
    rounded = build(head).head.to(torch.bfloat16)
    for found in ranks_found:
        logits, features, later, *_ = found[head, "bfloat16"]
        assert {logits.dtype, features.dtype, later.dtype} == {torch.bfloat16}
        torch.testing.assert_close(logits, rounded(features), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", LEARNED_AND_FIXED)
def test_measures_and_fold_read_whole_parameters(ranks_found, head, precision):
    """In float32 also after a forward pass in bfloat16, which leaves gathered parameters rounded."""
    plain = build(head).eval()
    for found in ranks_found:
        *_, folded, measured, logits = found[head, precision]
        torch.testing.assert_close(measured, collapse(plain), rtol=1e-6, atol=1e-9)
        agreement = (folded.argmax(1) == logits.argmax(1)).float().mean()
        assert folded.dtype == torch.float32 and (agreement == 1 or precision == "bfloat16")
    torch.testing.assert_close(ranks_found[0][head, precision][3], ranks_found[1][head, precision][3])


def test_a_head_that_alone_is_spread_over_ranks(ranks_found):
    plain = build("linear").eval()
    with torch.no_grad():
        wanted = fold(plain)(IMAGES), collapse(plain), streamed(plain)
    for found in ranks_found:
        *measured, refused = found["head alone"]
        torch.testing.assert_close(tuple(measured), wanted, rtol=1e-5, atol=1e-5)
        assert "classifier.weight is spread over the ranks" in refused and "full_tensor()" in refused
    assert refusal(plain.head) is None


# ---- the rule that makes mixed precision hold, without ranks


FIXED = {name: HEADS[name] for name in ("etf", "nearest_etf", "orthoplex", "softmax_code")}
FIXED |= {"not normalised": lambda d, c: ETFHead(d, c, normalize=False)}
FIXED |= {"given": lambda d, c: FixedHead(torch.randn(c, d), scale=3.0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_frame_follows_coarser_features(name, dtype):
    """As if the head itself had been brought to the features' dtype; gradients too; the frame stays as it is."""
    head, features = FIXED[name](12, 6), torch.randn(5, 12).to(dtype)
    rounded = FIXED[name](12, 6)
    rounded.load_state_dict(head.state_dict())
    rounded.to(dtype)
    found = []
    for each in (head, rounded):
        rows = features.clone().requires_grad_()
        logits = each(rows)
        assert logits.dtype == dtype
        found.append((logits, torch.autograd.grad(logits.float().sin().sum(), rows)[0]))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert head.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="features of torch.float32 into a head of"):
        rounded(features.float())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("gamma", ["vector", "scalar", "none"])
def test_the_last_norm_takes_rounded_parameters_beside_float32_statistics(gamma, train):
    norm, wide = (LastBatchNorm(12, gamma=gamma, bias=True).train(train) for _ in range(2))
    for parameter in norm.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    features = torch.randn(8, 12).to(torch.bfloat16)
    out = norm(features)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide(features.float()), rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.running_var, wide.running_var, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", HEADS)
def test_a_model_in_pure_bfloat16(head, norm):
    model = nn.Sequential(last_norm(norm, 12), HEADS[head](12, 6)).to(torch.bfloat16)
    out = model(torch.randn(8, 12, dtype=torch.bfloat16, requires_grad=True))
    out.float().logsumexp(1).sum().backward()
    assert out.dtype == torch.bfloat16
