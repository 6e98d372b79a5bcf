"""The last-layer norms against torch's own, on one process and on two."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from ncreg.norms import LastBatchNorm, last_norm
from tests import nccl_rules, warm_start


def batch(rows, columns, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_is_batch_norm_without_beta(momentum):
    ours, theirs = LastBatchNorm(6, momentum=momentum).double(), nn.BatchNorm1d(6, momentum=momentum).double()
    for seed in range(3):
        features = 3 * batch(9, 6, seed) + 2
        assert torch.allclose(ours(features), theirs(features), atol=1e-13)
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, theirs.state_dict()[name]), name
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(features), theirs(features), atol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_batch_that_overflowed_leaves_no_trace_in_the_running_statistics(momentum, value):
    """torch's stay NaN for good, although a GradScaler skips the step."""
    ours, theirs = LastBatchNorm(6, momentum=momentum), nn.BatchNorm1d(6, momentum=momentum)
    for seed in range(3):
        features = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        spoilt = features.clone()
        spoilt[seed, 1] = value
        assert bool(ours(spoilt)[:, 1].isnan().all())
        torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=0)
    for name, wanted in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), wanted), name


@pytest.mark.parametrize("scales", [[1, 2000], [2000, 2000], [2000, 1, 1]])
def test_a_batch_that_overflows_in_float16_is_told_once_on_the_way_to_eval_mode(scales):
    """A tenth of the variance of 4e6 is beyond float16, though the normalised features are finite."""
    model = nn.Sequential(nn.Identity(), LastBatchNorm(6)).half()
    for seed, scale in enumerate(scales):
        assert bool(model(scale * batch(64, 6, seed).half()).isfinite().all())
    assert model[1].num_batches_tracked == scales.count(1)
    with pytest.warns(UserWarning, match="LastBatchNorm left batches out .* not finite in float16") as told:
        model.eval()
    assert len(told) == 1 and ("none has entered" in str(told[0].message)) is (1 not in scales)
    for _ in range(2):  # warnings are errors
        model.train()(2000 * batch(64, 6).half())
        copy.deepcopy(model).eval()
        model.eval()


def test_what_overflowed_before_loading_is_not_told_of_the_loaded_statistics():
    right, norm = LastBatchNorm(6).half(), LastBatchNorm(6).half()
    right(batch(64, 6).half())
    norm(2000 * batch(64, 6).half())
    norm.load_state_dict(right.state_dict())
    norm.eval()  # warnings are errors
    assert torch.equal(norm.running_var, right.running_var) and norm.num_batches_tracked == 1


def test_nothing_is_told_where_all_batches_enter_or_none_is_seen():
    for model in (LastBatchNorm(6).half(), LastBatchNorm(6)):
        model.eval().train()
        model(2000 * batch(64, 6).to(model.weight.dtype) / (2000 if model.weight.dtype == torch.half else 1))
        model.eval().train().eval()
        assert model.num_batches_tracked == 1


def test_what_cannot_be_read_is_not_kept():
    """On the meta device and under torch.func (in compiled code: compile_heads.py) training in float16 goes on."""
    norm = LastBatchNorm(4, device="meta", dtype=torch.float16)
    assert norm(torch.zeros(3, 4, device="meta", dtype=torch.float16)).is_meta and norm._entered is None
    norm.eval()
    norms = [LastBatchNorm(4).half() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(norms)
    many = 2000 * batch(16, 4).half().expand(2, 16, 4)
    torch.vmap(lambda p, b, x: torch.func.functional_call(norms[0], (p, b), x))(parameters, buffers, many)
    assert norms[0]._entered is None


def test_features_that_overflow_under_autocast_are_told():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), LastBatchNorm(4))
    with torch.autocast("cpu", torch.float16):
        assert model[1](torch.zeros(2, 4)).dtype == torch.float32  # whose input overflowed all the same
        model(1e6 * torch.ones(8, 6))
    with pytest.warns(UserWarning, match="none has entered them, and eval mode goes by mean 0 and variance 1"):
        model.eval()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_batch_counts_once_under_activation_checkpointing(momentum, reentrant):
    """Backward recomputes the forward pass; torch's own BatchNorm takes each batch in twice there."""
    plain = nn.Sequential(nn.Linear(6, 4), LastBatchNorm(4, momentum=momentum), nn.Linear(4, 3)).double()
    again = copy.deepcopy(plain)
    for seed in range(3):
        features = (3 * batch(9, 6, seed) + 2).requires_grad_()
        plain(features).square().sum().backward()
        checkpoint(again, features, use_reentrant=reentrant).square().sum().backward()
    assert plain[1].num_batches_tracked == again[1].num_batches_tracked == 3
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for mine, its in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.usefixtures("unchecked")
def test_the_plain_average_of_batches_is_kept_in_one_graph_too():
    """torch's BatchNorm1d(momentum=None) breaks the graph: its count is read."""
    ours, theirs = LastBatchNorm(6, momentum=None), nn.BatchNorm1d(6, momentum=None)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        features = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(features), theirs(features))
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), value, msg=name)


@pytest.mark.parametrize("gamma, size", [("vector", 6), ("scalar", 1), ("none", 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_gamma_is_the_features_length(gamma, size, bias):
    """(1/N)Σ‖y‖² = ‖γ‖² + ‖β‖², γ counted as a vector (theory of last-layer BatchNorm)."""
    norm = LastBatchNorm(6, gamma=gamma, bias=bias, eps=1e-14).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(batch(1, parameter.numel(), 5)[0])
    assert sum(p.numel() for p in norm.parameters()) == size + 6 * bias
    weight = torch.ones(6).double() if norm.weight is None else norm.weight.expand(6)
    expected = weight.square().sum() + (norm.bias.square().sum() if bias else 0)
    assert norm(batch(9, 6)).square().sum(1).mean().item() == pytest.approx(expected.item())


@pytest.mark.parametrize("gamma", ["vector", "scalar"])
def test_gradcheck(gamma):
    norm = LastBatchNorm(3, gamma=gamma, bias=True).double()
    call = lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (batch(5, 3).requires_grad_(), norm.weight, norm.bias))


def test_sync_conversion_leaves_it_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), LastBatchNorm(3))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm) and isinstance(converted[1], LastBatchNorm)


SPLITS = [(5, 3), (1, 7), (1, 1), (8, 0)]


def _rank(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    nccl_rules.enforce()
    torch.set_num_threads(1)
    for gamma in ("vector", "scalar", "none"):
        for split in SPLITS:
            _compare(rank, split, gamma)
    norm = LastBatchNorm(4).double()
    try:
        norm(batch(1 - rank, 4))
    except ValueError as error:
        assert "1 sample(s) over all ranks" in str(error) and norm.num_batches_tracked == 0
    else:
        raise AssertionError("one sample over two ranks went through")
    dist.barrier()  # before torch 2.8 a group destroyed right after a collective may hang
    dist.destroy_process_group()


def _compare(rank, split, gamma):
    """Forward, backward and running statistics on two ranks equal those of the joint batch on one."""
    ours, whole = LastBatchNorm(4, gamma=gamma, bias=True).double(), nn.BatchNorm1d(4).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(batch(1, parameter.numel(), 7)[0])
        whole.weight.copy_(1 if gamma == "none" else ours.weight.expand(4))
        whole.bias.copy_(ours.bias)
    everything = (10 * batch(sum(split), 4) + 3).requires_grad_()
    mine = everything.detach().split(split)[rank].requires_grad_()
    out, expected = ours(mine), whole(everything)
    out.cos().sum().backward()
    expected.cos().sum().backward()
    assert torch.allclose(out, expected.split(split)[rank], atol=1e-12)
    assert torch.allclose(mine.grad, everything.grad.split(split)[rank], atol=1e-12)
    assert torch.allclose(ours.running_mean, whole.running_mean, atol=1e-12)
    assert torch.allclose(ours.running_var, whole.running_var, atol=1e-12)
    assert ours.num_batches_tracked == 1
    if gamma != "none":
        dist.all_reduce(ours.weight.grad)
        wanted = whole.weight.grad if gamma == "vector" else whole.weight.grad.sum(0, keepdim=True)
        assert torch.allclose(ours.weight.grad, wanted, atol=1e-10)


def test_two_ranks_equal_one_process(tmp_path):
    mp.start_processes(_rank, args=(tmp_path / "meet",), nprocs=2, start_method=warm_start.METHOD)


@pytest.mark.usefixtures("unchecked")
def test_refuses():
    norm = LastBatchNorm(3)
    with pytest.raises(ValueError, match="batch of 1 sample.*drop_last=True"):
        norm(torch.zeros(1, 3))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.zeros(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        norm(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        norm(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="features must be a tensor .* not list"):
        norm([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="num_features=0"):
        LastBatchNorm(0)
    with pytest.raises(ValueError, match="gamma='full'.*'scalar'"):
        LastBatchNorm(3, gamma="full")
    with pytest.raises(ValueError, match="'group' is unknown.*'batch'"):
        last_norm("group", 3)
    with pytest.raises(ValueError, match="norm .'batch'. is unknown"):
        last_norm(["batch"], 3)
    with pytest.raises(ValueError, match="'none' has no setting, but got eps"):
        last_norm("none", 3, eps=1e-3)
    with pytest.raises(ValueError, match="gamma=.'vector'. must be one of"):
        LastBatchNorm(3, gamma=["vector"])
    with pytest.raises(TypeError, match="features of torch.int64.*floating-point"):
        norm(torch.zeros(2, 3, dtype=torch.int64))
    for kind in ("batch", "filter_response"):
        with pytest.raises(TypeError, match="bias='False' must be True or False"):
            last_norm(kind, 3, bias="False")
        with pytest.raises(ValueError, match="eps=inf must be finite and above 0"):
            last_norm(kind, 3, eps=torch.inf)
    with pytest.raises(TypeError, match="momentum='0.1' must be a number"):
        LastBatchNorm(3, momentum="0.1")


HALVES = torch.float16, torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, *HALVES])
def test_features_of_a_dtype_that_does_not_fit_are_named(given, own, training):
    norm, features = LastBatchNorm(3, dtype=own).train(training), batch(6, 3).to(given)
    if given == own or (given in HALVES and own == torch.float32):
        plain = nn.BatchNorm1d(3).double().train(training)
        torch.testing.assert_close(norm(features).double(), plain(features.double()), atol=2e-2, rtol=0)
        return
    with pytest.raises(TypeError, match=rf"features of {given} into a LastBatchNorm of {own}.*norm.to\({given}\)"):
        norm(features)
    assert norm.num_batches_tracked == 0


def test_last_norm_kinds():
    features = batch(4, 6).float()
    assert torch.equal(last_norm("none", 6)(features), features)
    centred = features - features.mean(1, keepdim=True)
    layer = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(last_norm("layer", 6)(features), layer, atol=1e-6)
    rms = features / features.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(last_norm("rms", 6)(features), rms, atol=1e-5)
    assert list(last_norm("layer", 6).state_dict()) == ["weight"]
    assert last_norm("batch", 6, gamma="none").weight is None
    filtered = last_norm("filter_response", 6)
    assert torch.allclose(filtered(features), features / (features.square() + 1).sqrt(), atol=1e-6)
    assert {name for name, _ in filtered.named_parameters()} == {"weight", "eps"}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 300.0), (torch.float32, 1e20), (torch.float64, 1e200)])
def test_filter_response_norm_of_long_features_is_their_sign(dtype, size):
    norm = last_norm("filter_response", 2).to(dtype)
    found = norm(torch.tensor([[size, -size]], dtype=dtype))
    assert found.dtype == dtype and found.tolist() == [[1.0, -1.0]]


def test_filter_response_norm_keeps_its_floor_in_float16():
    norm = last_norm("filter_response", 2).half()
    with torch.no_grad():
        norm.eps.zero_()
    features = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    norm(features).sum().backward()
    torch.testing.assert_close(features.grad, torch.full_like(features, 1000.0))  # 1/√1e-6


def test_filter_response_norm_gradcheck():
    norm = last_norm("filter_response", 3, bias=True).double()
    call = lambda x, *p: torch.func.functional_call(norm, dict(zip(("weight", "bias", "eps"), p)), x)  # noqa: B905, E731
    values = batch(5, 3).requires_grad_(), norm.weight, norm.bias, norm.eps
    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize(
    ("kind", "known"), [("batch", "bias, gamma, eps"), ("layer", "eps, elementwise_affine"), ("rms", "eps, elem")]
)
def test_an_unknown_setting_is_named_with_those_there_are(kind, known):
    with pytest.raises(ValueError, match=rf"norm '{kind}': args\['epsilon'\]=0.1 is unknown; known: {known}"):
        last_norm(kind, 4, epsilon=0.1)
