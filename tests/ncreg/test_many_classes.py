"""Very many classes: cross-entropy in chunks against torch's own, procedural codes against their hash in Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncreg.frames import code_max_cosine, code_rows, expected_max_cosine, max_cosine, procedural_code
from ncreg.functional import chunked_argmax, chunked_cross_entropy
from ncreg.heads import CodeHead, CosineHead, ETFHead, FixedHead, LinearHead, NearestETFHead
from ncreg.losses import ChunkedCrossEntropyLoss
from ncreg.metrics import NeuralCollapse
from ncreg.models import Classifier, fold, swap_head

DIM, CLASSES = 24, 23


def heads(dtype: torch.dtype) -> dict[str, nn.Module]:
    made = {
        "nn.Linear": nn.Linear(DIM, CLASSES),
        "linear": LinearHead(DIM, CLASSES),
        "linear without bias": LinearHead(DIM, CLASSES, bias=False),
        "cosine": CosineHead(DIM, CLASSES),
        "dense": ETFHead(DIM, CLASSES),
        "dense, not normalised": ETFHead(DIM, CLASSES, normalize=False, scale=3.0),
        "grouped": ETFHead(DIM, CLASSES, structure="grouped"),
        "nearest": NearestETFHead(DIM, CLASSES),
        "fixed": FixedHead(torch.randn(CLASSES, DIM), scale=4.0),
        "code": CodeHead(DIM, CLASSES),
        "code, not normalised": CodeHead(DIM, CLASSES, normalize=False, scale=2.0),
    }
    return {name: head.to(dtype) for name, head in made.items()}


NAMES = list(heads(torch.float32))


def batch(dtype: torch.dtype = torch.float64, rows: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(rows, DIM, dtype=dtype, generator=generator, requires_grad=True)
    return features, torch.randint(CLASSES, (rows,), generator=generator)


def gradients(loss: Tensor, features: Tensor, head: nn.Module) -> list[Tensor]:
    upstream = torch.arange(1.0, 1 + loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad(loss, [features, *head.parameters()], upstream))


SETTINGS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2},
    {"weight": torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)},
    {"weight": torch.linspace(0.1, 2, CLASSES, dtype=torch.float64), "label_smoothing": 0.3, "reduction": "none"},
    {"weight": torch.linspace(0.1, 2, CLASSES, dtype=torch.float64), "label_smoothing": 0.3, "ignore_index": 4},
    {"ignore_index": 7, "reduction": "none"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: ",".join(s) or "plain")
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_torch_s(name: str, setting: dict) -> None:
    features, target = batch()
    target[:2] = torch.tensor([4, 7])
    head = heads(torch.float64)[name]
    ours = {"class_weight" if key == "weight" else key: value for key, value in setting.items()}
    expected = F.cross_entropy(head(features), target, **setting)
    wanted = gradients(expected, features, head)
    for chunk in (1, 5, CLASSES, None):
        found = chunked_cross_entropy(features, head, target, chunk=chunk, **ours)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for ours_grad, theirs in zip(gradients(found, features, head), wanted, strict=True):
            torch.testing.assert_close(ours_grad, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.uint8, -100), (torch.uint8, -1), (torch.uint8, 255), (torch.int16, -100), (torch.uint16, -100)],
)
def test_labels_of_narrow_integers_name_the_same_classes(dtype: torch.dtype, ignore_index: int) -> None:
    """In uint8, −100 is 156 and −1 is 255, which are classes."""
    features = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target, head = torch.tensor([156, 255, 4, 0]), nn.Linear(3, 256).double()
    expected = F.cross_entropy(head(features), target, ignore_index=ignore_index, reduction="none")
    for labels in (target, target.to(dtype)):
        found = chunked_cross_entropy(features, head, labels, ignore_index=ignore_index, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="from -1 to 2"):  # 255 is not to be ignored here: it is −1 in int8 alone
        chunked_cross_entropy(features, head, torch.tensor([1, 2, -1, 0], dtype=torch.int8), ignore_index=255)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_1e_6(name: str) -> None:
    features, target = batch(torch.float32)
    head = heads(torch.float32)[name]
    expected = F.cross_entropy(head(features), target)
    found = chunked_cross_entropy(features, head, target, chunk=6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(found, features, head), gradients(expected, features, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "fixed", "code"])
def test_gradcheck_passes_and_a_second_derivative_is_refused(name: str) -> None:
    features, target = batch(rows=3)
    head = heads(torch.float64)[name]
    inputs = (features, *head.parameters())
    along_one_direction = name in ("linear", "cosine")  # their class vectors are many numbers
    assert torch.autograd.gradcheck(
        lambda *_: chunked_cross_entropy(features, head, target, chunk=7), inputs, fast_mode=along_one_direction
    )
    loss = chunked_cross_entropy(features, head, target)
    with pytest.raises(RuntimeError, match="has no second derivative: use F.cross_entropy"):
        torch.autograd.grad(loss, features, create_graph=True)


@pytest.mark.parametrize("name", ["linear", "cosine", "fixed", "code", "grouped"])
def test_autocast_makes_products_in_half_precision_and_sums_in_float32(name: str) -> None:
    features, target = batch(torch.float32)
    head = heads(torch.float32)[name]
    exact = chunked_cross_entropy(features, head, target)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = chunked_cross_entropy(features, head, target, chunk=5)
        whole = F.cross_entropy(head(features), target)
    assert rounded.dtype == torch.float32 and whole != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(rounded, features, retain_graph=True)
    (expected,) = torch.autograd.grad(exact, features)
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.02)
    assert all(torch.autograd.grad(rounded, p)[0].dtype == p.dtype for p in itertools.islice(head.parameters(), 1))


def test_the_smoothing_of_a_structured_simplex_is_summed_in_float32_under_autocast() -> None:
    """No product with a matrix is made there: nothing is to be in half precision."""
    draw = torch.Generator().manual_seed(0)
    features, target = torch.randn(5, 24, generator=draw), torch.tensor([0, 3, 3, 8, 1])
    weight = torch.rand(9, generator=draw) + 0.1
    head = ETFHead(24, 9, structure="grouped")
    options = {"label_smoothing": 0.5, "class_weight": weight.double()}
    exact = F.cross_entropy(head.double()(features.double()), target, label_smoothing=0.5, weight=weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(features, head.float(), target, **options)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_bfloat16_model() -> None:
    features, target = batch(torch.bfloat16)
    head = LinearHead(DIM, CLASSES).bfloat16()
    found = chunked_cross_entropy(features, head, target, chunk=5)
    expected = F.cross_entropy(head(features).float(), target)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert gradients(found, features, head)[1].dtype == torch.bfloat16


def test_huge_logits_absent_rows_and_nan() -> None:
    features, target = batch()
    head = LinearHead(DIM, CLASSES).double()
    far = chunked_cross_entropy(features * 1e6, head, target, chunk=4)
    torch.testing.assert_close(far, F.cross_entropy(head(features * 1e6), target), rtol=1e-12, atol=0)
    ignored = torch.full_like(target, -100)
    assert chunked_cross_entropy(features, head, ignored).isnan()  # as in torch
    assert chunked_cross_entropy(features, head, ignored, reduction="sum") == 0
    broken = features.detach().clone()
    broken[2, 0] = math.nan
    each = chunked_cross_entropy(broken, head, target, reduction="none", chunk=4)
    assert each.isnan().nonzero().tolist() == [[2]]


def test_zero_class_vectors_and_zero_features_stay_finite() -> None:
    features, target = batch()
    head = CosineHead(DIM, CLASSES).double()
    with torch.no_grad():
        head.weight[3] = 0
        features[1] = 0
    expected, found = F.cross_entropy(head(features), target), chunked_cross_entropy(features, head, target, chunk=4)
    for ours, theirs in zip(gradients(found, features, head), gradients(expected, features, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_argmax_in_chunks(name: str) -> None:
    features, _ = batch(rows=50)
    head = heads(torch.float64)[name]
    for chunk in (1, 6, None):
        assert torch.equal(chunked_argmax(features, head, chunk=chunk), head(features).argmax(1))


def test_memory_of_a_step_stays_below_one_row_of_logits_for_each_sample() -> None:
    """The largest tensor of a step, over all operations, is a chunk and not (B, C)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple | list) else (result,):
                if isinstance(part, Tensor):
                    self.numel = max(self.numel, part.numel())
            return result

    features = torch.randn(32, 16, requires_grad=True)
    head, target = CodeHead(16, 20_000, scale=5.0), torch.arange(32)
    with Largest() as seen:
        chunked_cross_entropy(features, head, target, chunk=500).backward()
    assert seen.numel <= 20_000  # range of classes, chunk of logits 16,000, chunk of rows 8,000


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, h, t: chunked_cross_entropy(f, nn.Sequential(h), t), TypeError, "head=Sequential cannot be taken"),
        (lambda f, h, t: chunked_cross_entropy(f, h, torch.ones(9, CLASSES)), ValueError, r"soft labels.*828 bytes"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t + CLASSES), ValueError, r"must be in \[0, 23\)"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t.float()), TypeError, "integer class indices"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t.tolist()), TypeError, "target must be a tensor"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t[:3]), ValueError, r"target must have shape \(9,\)"),
        (lambda f, h, t: chunked_cross_entropy(f[:, :5], h, t), ValueError, "features have 5 columns where head takes"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t, chunk=0), ValueError, "chunk=0 must be at least 1"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t, reduction="all"), ValueError, "reduction='all'"),
        (lambda f, h, t: chunked_cross_entropy(f, h, t, label_smoothing=2), ValueError, "label_smoothing=2"),
        (
            lambda f, h, t: chunked_cross_entropy(f, h, t, class_weight=torch.ones(3)),
            ValueError,
            r"of shape \(23,\), got \(3,\)",
        ),
        (
            lambda f, h, t: chunked_cross_entropy(f, h, t, class_weight=[1.0] * 23),
            ValueError,
            r"class_weight must be a tensor",
        ),
        (lambda f, h, t: chunked_cross_entropy(f, h, t, class_weight=-torch.ones(23)), ValueError, "not negative"),
        (
            lambda f, h, t: chunked_cross_entropy(f, h, t, class_weight=torch.full((23,), torch.nan)),
            ValueError,
            "finite",
        ),
        (lambda f, h, t: chunked_cross_entropy(f.float(), h, t), TypeError, "bring both to one dtype"),
        (lambda f, h, t: ChunkedCrossEntropyLoss(chunk=-1), ValueError, "chunk=-1"),
        (
            lambda f, h, t: torch.func.grad(lambda x: chunked_cross_entropy(x, h, t))(f),
            RuntimeError,
            "no transform of torch.func",
        ),
    ],
)
def test_refusals(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    features, target = batch()
    with pytest.raises(error, match=message):
        call(features, LinearHead(DIM, CLASSES).double(), target)


# Procedural codes


def finaliser(word: int) -> int:
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def signs_in_python(label: int, dim: int, seed: int) -> list[int]:
    """The definition, one bit at a time, in Python's integers."""
    seed %= 2**64
    state = finaliser(label ^ finaliser((seed + 0x9E3779B9) % 2**32))
    signs = []
    for place in range(dim):
        word, bit = divmod(place, 32)
        key = finaliser((word * 0x9E3779B9 + finaliser(seed >> 32)) % 2**32)
        signs.append(1 if finaliser(finaliser(state ^ key)) >> bit & 1 else -1)
    return signs


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -1])
def test_code_is_the_hash_that_it_is_said_to_be(seed: int) -> None:
    labels = [0, 1, 2, 999_999, 2**31 - 1]
    found = code_rows(torch.tensor(labels), 70, seed=seed, dtype=torch.float64)
    expected = np.array([signs_in_python(label, 70, seed) for label in labels]) / 70**0.5
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)


def test_code_behaves_as_random_signs() -> None:
    rows = procedural_code(4096, 256, seed=3, dtype=torch.float64)
    cosines = (rows @ rows.T)[torch.triu_indices(4096, 4096, 1).unbind()]
    assert abs(float(cosines.mean())) < 5 / len(cosines) ** 0.5
    assert float(cosines.square().mean()) == pytest.approx(1 / 256, rel=0.01)
    assert float(rows.mean(0).abs().max()) * 256**0.5 < 5 / 4096**0.5  # every bit is fair
    assert not torch.equal(rows, procedural_code(4096, 256, seed=4, dtype=torch.float64))


@pytest.mark.parametrize(("classes", "dim"), [(50, 64), (5000, 128)])
def test_max_cosine_in_tiles_is_that_of_the_matrix(classes: int, dim: int) -> None:
    exact = max_cosine(procedural_code(classes, dim, seed=2, dtype=torch.float64)).item()
    assert code_max_cosine(classes, dim, seed=2) == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx(expected_max_cosine(classes, dim), rel=0.2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [np.int32, torch.tensor])
def test_the_largest_cosine_of_as_many_classes_as_numpy_counts(kind) -> None:
    """70,000 squared leaves int32."""
    assert expected_max_cosine(kind(70_000), kind(64)) == expected_max_cosine(70_000, 64)
    assert type(code_max_cosine(kind(50), kind(64))) is float


def test_scale_of_the_code_is_its_formula_s_and_keeps_its_promise() -> None:
    head = CodeHead(512, 1_000_000)
    s, d = head.scale, 512
    assert math.log(999_999) - s + d * math.log(math.cosh(s / d)) == pytest.approx(math.log(math.expm1(0.01)))
    small = CodeHead(128, 5000)
    losses = chunked_cross_entropy(small.weight, small, torch.arange(5000), reduction="none")
    assert float(losses.mean()) == pytest.approx(0.01, rel=0.1)


def test_code_head_is_fixed_head_on_its_matrix_with_all_derivatives() -> None:
    features, target = batch()
    code = CodeHead(DIM, CLASSES, seed=2, dtype=torch.float64)
    fixed = FixedHead(code.weight, scale=code.scale)
    torch.testing.assert_close(code(features), fixed(features))
    for head in (code, CodeHead(DIM, CLASSES, dtype=torch.float64, normalize=False)):
        assert torch.autograd.gradcheck(head, (features[:2],))
        assert torch.autograd.gradgradcheck(head, (features[:2],))
    assert torch.equal(torch.func.vmap(lambda row: code(row[None])[0])(features), code(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_a_code_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Its products are made in chunks of classes; summed in half precision they rounded the whole after each."""
    head = CodeHead(64, 150_000, dtype=torch.float64, normalize=False)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 64, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(4, 150_000, generator=generator).to(dtype)
    (found,) = torch.autograd.grad(head(features), features, upstream)
    exact = upstream.double() @ head.weight.to(dtype).double()
    off = (found.double() - exact).norm() / exact.norm()
    assert off < 0.6 * torch.finfo(dtype).eps


def test_code_head_makes_a_million_classes_from_nothing() -> None:
    model = swap_head("test_resnet", "code", num_classes=1_000_000, norm="batch").eval()
    assert list(model.head.state_dict()) == ["first_vector"] and not list(model.head.parameters())
    # the logits of the parameters that remain are the backbone's and the norm's alone
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    assert size < 1_000_000
    with pytest.raises(RuntimeError, match=r"would take 2,048,000,000 bytes, more than the 1,073,741,824"):
        CodeHead(512, 1_000_000).weight  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_code_of_another_seed_is_refused_on_loading(dtype: torch.dtype) -> None:
    trained = nn.Sequential(nn.Linear(4, 33), CodeHead(33, 50, seed=7)).to(dtype)
    state = trained.state_dict()
    averaged = {name: tensor * 0.9 + tensor * 0.1 for name, tensor in state.items()}
    for good in (state, averaged):
        again = nn.Sequential(nn.Linear(4, 33), CodeHead(33, 50, seed=7))
        again.load_state_dict(good)
        assert torch.equal(again[1].weight, CodeHead(33, 50, seed=7).weight)
    other = nn.Sequential(nn.Linear(4, 33), CodeHead(33, 50, seed=8))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"1.first_vector: .* of another seed than seed=8: build the head with"):
            other.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match="size mismatch for 1.first_vector"):
        nn.Sequential(nn.Linear(4, 33), CodeHead(40, 50, seed=7)).load_state_dict(state)
    earlier = {name: tensor for name, tensor in state.items() if name != "1.first_vector"}
    other[1].first_vector.fill_(3.0)
    other.load_state_dict(earlier)  # a file without it loads as it did
    assert torch.equal(other[1].first_vector, CodeHead(33, 50, seed=8).first_vector)
    for odd in (torch.zeros(33), torch.full((33,), torch.nan)):
        with pytest.raises(RuntimeError, match=r"1.first_vector: no class vector, with entries of ±1/√d"):
            other.load_state_dict(earlier | {"1.first_vector": odd})


@pytest.mark.parametrize("head", [CosineHead(16, 50), nn.Linear(16, 50)])
def test_a_compiled_head_is_taken_apart_like_itself(head: nn.Module) -> None:
    features, target = torch.randn(8, 16), torch.arange(8)
    loss = chunked_cross_entropy(features, torch.compile(head, backend="eager"), target)
    torch.testing.assert_close(loss, F.cross_entropy(head(features), target))


def test_what_needs_the_matrix_of_a_code_is_refused_with_its_bytes() -> None:
    model = swap_head("test_resnet", "code", num_classes=5_000_000, norm="none").eval()
    size = 5_000_000 * model.head_hidden_size * 4
    with pytest.raises(RuntimeError, match=f"would take {size:,} bytes"):
        fold(model)
    with pytest.raises(RuntimeError, match=f"would take {size:,} bytes"):
        NeuralCollapse(5_000_000, model.head_hidden_size, classifier=model.head, cache=False, scatter=False)


@pytest.mark.parametrize("through_folder", [False, True])
def test_small_codes_fold_and_are_saved(tmp_path, through_folder: bool) -> None:  # type: ignore[no-untyped-def]
    model, images = swap_head("test_resnet", "code", num_classes=50, norm="none").eval(), torch.rand(2, 3, 32, 32)
    if through_folder:
        model.save_pretrained(tmp_path)
        again = Classifier.from_pretrained(tmp_path)
        assert torch.equal(again(images), model(images)) and list(again.head.state_dict()) == ["first_vector"]
    else:
        assert torch.equal(fold(model, normalize="drop")(images).argmax(1), model(images).argmax(1))


def test_code_head_refuses_what_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match=r"in_features=20 are too few signs.*project=40 or more"):
        CodeHead(20, 1_000_000)
    assert CodeHead(40, 1_000_000).scale > 18
    with pytest.raises(ValueError, match=r"num_classes=2147483649 must be at most 2\*\*31"):
        CodeHead(64, 2**31 + 1)


def test_classes_that_a_bias_rules_out_are_no_trouble_in_any_chunk():
    head = torch.nn.Linear(4, 5).double()
    with torch.no_grad():
        head.bias[:2] = -torch.inf
    features = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([2, 3, 4, 2, 3, 4])
    wanted = torch.nn.functional.cross_entropy(head(features), target)
    (gradient,) = torch.autograd.grad(wanted, features)
    for chunk in (1, 2, 3, 5):
        found = chunked_cross_entropy(features, head, target, chunk=chunk)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found, features)[0], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("classes", "kind", "said"),
    [
        (torch.tensor([-1, 2]), ValueError, "classes go from -1 to 2: indices must be"),
        (torch.tensor([1.5]), TypeError, "a tensor of integers"),
        (torch.tensor([[1, 2]]), ValueError, r"shape \(1, 2\)"),
    ],
)
def test_what_is_no_index_of_a_class_is_refused(classes, kind, said):
    for rows in (lambda: code_rows(classes, 8), lambda: CodeHead(64, 100).class_rows(classes)):
        with pytest.raises(kind, match=said):
            rows()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_indices_of_any_integer_type_name_the_same_rows(dtype):
    classes = torch.tensor([0, 99, 7])
    assert torch.equal(CodeHead(64, 100).class_rows(classes.to(dtype)), CodeHead(64, 100).class_rows(classes))
    with pytest.raises(ValueError, match="go from 0 to 99: indices must be in 0 to 98"):
        CodeHead(64, 99).class_rows(classes.to(dtype))


def test_an_index_beyond_the_last_class_is_refused_and_none_gives_no_rows():
    with pytest.raises(ValueError, match="in 0 to 99"):
        CodeHead(64, 100).class_rows(torch.tensor([100]))
    assert code_rows(torch.tensor([], dtype=torch.long), 40).shape == (0, 40)
