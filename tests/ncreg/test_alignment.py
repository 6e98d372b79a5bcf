"""Similar classes on near vertices: against all permutations, in heads, saved and read, refused for a simplex."""

from itertools import permutations

import numpy as np
import pytest
import torch

from ncreg.frames import orthoplex, similar_permutation, simplex_etf, softmax_code
from ncreg.functional import inter_class_cosine
from ncreg.heads import HEADS, ETFHead
from ncreg.models import Classifier, swap_head
from recipes.train import main

EXACT = {"dtype": torch.float64}
FRAMES = {
    "orthoplex 4": lambda: orthoplex(4, 2, **EXACT),
    "orthoplex 6": lambda: orthoplex(6, 3, **EXACT),
    "orthoplex 7": lambda: orthoplex(7, 4, **EXACT),
    "code 6": lambda: softmax_code(6, 2, **EXACT),
    "code 7": lambda: softmax_code(7, 3, **EXACT),
}


def alike(classes, seed):
    return torch.rand(classes, classes, **EXACT, generator=torch.Generator().manual_seed(seed))


def worth(similarity, rows, order):
    """Sum over all pairs by loops: similarity of two classes times the cosine of their vertices."""
    count = len(order)
    return sum(similarity[c, k] * rows[order[c]] @ rows[order[k]] for c in range(count) for k in range(count) if c != k)


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_it_is_the_best_of_all_permutations(frame):
    rows = frame()
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    cosines, orders = unit @ unit.T, np.array(list(permutations(range(len(rows)))))
    for seed in range(6):
        similarity = alike(len(rows), seed).numpy()
        off = similarity - np.diag(np.diag(similarity))
        every = (off * cosines[orders[:, :, None], orders[:, None, :]]).sum((1, 2))
        found = similar_permutation(3 * rows, torch.from_numpy(similarity))
        assert sorted(found.tolist()) == list(range(len(rows)))
        assert worth(similarity, unit, found.numpy()) == pytest.approx(every.max(), rel=1e-12)


def test_many_classes_are_seated_better_than_any_of_many_draws():
    rows, similarity = orthoplex(30, 15, **EXACT), alike(30, 1)
    similarity = (similarity + similarity.T).fill_diagonal_(0)
    gram = rows @ rows.T

    def value(order):
        return float((similarity * gram[order][:, order]).sum())

    found = similar_permutation(rows, similarity)
    drawn = [value(torch.randperm(30, generator=torch.Generator().manual_seed(seed))) for seed in range(2000)]
    assert value(found) > max(drawn)
    for first in range(30):  # no exchange of two classes raises it
        for second in range(first):
            order = found.clone()
            order[[first, second]] = order[[second, first]]
            assert value(order) <= value(found) + 1e-9
    assert torch.equal(found, similar_permutation(rows, similarity))


@pytest.mark.parametrize("name", ["orthoplex", "softmax_code", "tammes"])
def test_a_head_seats_its_classes_and_draws_them_again(name):
    classes, dim = 6, 3
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    target = torch.arange(60) % classes
    similarity = inter_class_cosine(features, target, classes, center=features.mean(0))
    plain, head = HEADS[name](dim, classes), HEADS[name](dim, classes, permutation="similar", similarity=similarity)
    order = similar_permutation(plain.weight, similarity)  # of equally good ones it may be another than the head's
    reached = worth(similarity, head.weight.double(), range(classes))
    assert float(reached) == pytest.approx(float(worth(similarity, plain.weight.double(), order)), abs=1e-5)
    assert float(reached) > float(worth(similarity, plain.weight.double(), range(classes)))
    before = head.weight.clone()
    head.weight.zero_()
    head.reset_parameters()
    assert torch.equal(head.weight, before)
    listed = HEADS[name](dim, classes, permutation=order.tolist())
    torch.testing.assert_close(listed.weight, plain.weight[order])


def test_a_classifier_keeps_it_on_disk(tmp_path):
    similarity = alike(4, 2).tolist()
    args = {"permutation": "similar", "similarity": similarity}
    classifier = swap_head("test_resnet", "orthoplex", num_classes=4, project=2, head_args=args).eval()
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert torch.equal(again.head.weight, classifier.head.weight)
    with torch.device("meta"):
        assert HEADS["orthoplex"](2, 4, **args).weight.is_meta


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: similar_permutation(simplex_etf(5, 8), alike(5, 0)), "weight is a simplex of 5 classes"),
        (lambda: HEADS["softmax_code"](4, 5, permutation="similar", similarity=alike(5, 0)), "all permutations are"),
        (lambda: ETFHead(8, 5, permutation="similar"), "all its permutations are congruent"),
        (lambda: HEADS["orthoplex"](3, 6, permutation="similar"), "go together"),
        (lambda: HEADS["orthoplex"](3, 6, similarity=alike(6, 0)), "go together"),
        (lambda: HEADS["orthoplex"](3, 6, permutation="alike"), "permutation='alike' must be 'similar'"),
        (lambda: HEADS["orthoplex"](3, 6, permutation=[0, 1, 2, 3, 4, 4]), "exactly once"),
        (lambda: similar_permutation(orthoplex(6, 3), alike(5, 0)), r"similarity of shape \(5, 5\)"),
        (lambda: similar_permutation(orthoplex(4, 2), [[0, 1], [1]]), "similarity must be a matrix of numbers"),
        (lambda: similar_permutation(orthoplex(6, 3), alike(6, 0).log() * torch.inf), "similarity must be finite"),
        (lambda: similar_permutation(torch.zeros(4, 2), alike(4, 0)), "length 0"),
    ],
)
def test_what_cannot_be_chosen_is_said(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.mark.usefixtures("unchecked")
def test_a_recipe_takes_it_and_refuses_it_for_a_simplex_in_a_line(tmp_path, capsys):
    small = ["--data.train_size", "128", "--data.batch_size", "64", "--tpt.max_epochs", "1", "--quiet", "true"]
    matrix = [[1.0 / (1 + abs(c - k)) for c in range(10)] for k in range(10)]
    words = [*small, "--out", str(tmp_path), "--model.head_args", f"{{permutation: similar, similarity: {matrix}}}"]
    assert main(["orthoplex", *words]) == 0
    capsys.readouterr()
    assert main(["etf", *small, "--out", str(tmp_path), "--model.head_args", "{permutation: similar}"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "congruent" in error[0]
