"""Out-of-distribution detection of one classifier: every score against every set, from one forward pass a set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ncreg._checks import check_choice, check_integer, described
from ncreg._features import NotDefined, check_all_present, check_features, check_indices, class_means
from ncreg._readable import readable
from ncreg.metrics.nc5 import nc5_of
from ncreg.numerics import exact, seeded
from ncreg.robustness._inputs import check_images, check_logits
from ncreg.robustness.ood import scores as ood_scores
from ncreg.robustness.ood.detection import Detection, evaluate_detection

SCORES = ("msp", "max_logit", "energy", "knn", "mahalanobis", "vim", "neco", "nci")
"""The scores of `evaluate_ood`, each higher for what is more in-distribution."""


@dataclass(frozen=True)
class OODReport:
    """Detection of each OOD set by each score, and NC5.

    Attributes:
        detections: by OOD set, then by score.
        nc5: by OOD set, the mean |cos| between its mean feature and the class means, from the origin; None where one of
            them has no length.
        nc5_centred: the same from the mean of the class means.
        id_scores: by score, of every in-distribution image (N,).
        ood_scores: by OOD set, then by score, of every image.
        skipped: by score, why it has no meaning here.
        num_train: training features that the scores were fitted to.
        neighbours: k of the nearest-neighbour score.
    """

    detections: dict[str, dict[str, Detection]]
    nc5: dict[str, float | None]
    nc5_centred: dict[str, float | None]
    id_scores: dict[str, Tensor]
    ood_scores: dict[str, dict[str, Tensor]]
    skipped: dict[str, str]
    num_train: int
    neighbours: int

    __str__ = readable


class _Data(NamedTuple):
    """Training data, and all images to score, ID first, in one matrix: every score is fitted once."""

    train: Tensor
    train_target: Tensor
    train_logits: Tensor | None
    features: Tensor
    logits: Tensor
    weight: Tensor | None
    bias: Tensor | None


def evaluate_ood(
    train_features: Float[Tensor, "train dim"],
    train_target: Integer[Tensor, " train"],
    id_features: Float[Tensor, "id dim"],
    id_logits: Float[Tensor, "id classes"],
    ood: Mapping[str, tuple[Tensor, Tensor]],
    *,
    train_logits: Float[Tensor, "train classes"] | None = None,
    weight: Float[Tensor, "classes dim"] | None = None,
    bias: Float[Tensor, " classes"] | None = None,
    scores: Sequence[str] | None = None,
    temperature: float = 1.0,
    neighbours: int | None = None,
    vim_dim: int | None = None,
    neco_dim: int | None = None,
    nci_alpha: float = 0.0,
) -> OODReport:
    """AUROC and FPR95 of each score on each OOD set, and NC5, from stored features and logits.

    Args:
        train_features: of clean training images, in eval mode.
        train_target: their classes.
        id_features: of test images.
        id_logits: of the same images.
        ood: by name, (features, logits) of out-of-distribution images.
        train_logits: of the training images, for ViM; None takes train_features @ weight.T + bias, after a check that
            this is how the head makes its logits.
        weight: the head's, for ViM and NCI.
        bias: the head's, for ViM.
        scores: which of `SCORES`; None takes all that can be computed and says in `skipped` why the others cannot.
        temperature: of the energy.
        neighbours: k of the nearest-neighbour score; None takes 50, or a tenth of the training features if that is
            less, and the report says how many.
        vim_dim: principal directions of ViM; None as in `vim_score`.
        neco_dim: principal directions of NECO; None as in `neco_score`.
        nci_alpha: weight of the features' length in NCI.

    Raises:
        ImportError: MSP, max-logit, energy or kNN without pytorch-ood.
        TypeError: no tensors, or of the wrong kind.
        ValueError: no or empty OOD sets, shapes that do not fit, values not finite, probabilities in place of logits,
            a class without a training feature, a score that is unknown or, where given by name, has no meaning.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> target = torch.arange(60) % 3
        >>> near = 5 * torch.eye(3, 8)[target] + torch.randn(60, 8, generator=draw)
        >>> far = torch.randn(40, 8, generator=draw)
        >>> head = torch.eye(3, 8)
        >>> report = evaluate_ood(near, target, near, near @ head.T, {"noise": (far, far @ head.T)}, weight=head)
        >>> {name: round(found.auroc, 2) for name, found in report.detections["noise"].items()}
        {'msp': 0.99, ...}
    """
    data, sizes = _checked(
        train_features, train_target, (id_features, id_logits), ood, train_logits=train_logits, weight=weight, bias=bias
    )
    classes = data.logits.shape[1]
    fewer = min(ood_scores.NEIGHBOURS, max(1, len(data.train) // 10))
    neighbours = fewer if neighbours is None else check_integer("neighbours", neighbours, 1)
    makers: dict[str, Callable[[], Tensor]] = {
        "msp": lambda: ood_scores.msp_score(data.logits),
        "max_logit": lambda: ood_scores.max_logit_score(data.logits),
        "energy": lambda: ood_scores.energy_score(data.logits, temperature),
        "knn": lambda: ood_scores.knn_score(data.features, data.train, neighbours=neighbours),
        "mahalanobis": lambda: ood_scores.mahalanobis_score(data.features, data.train, data.train_target),
        "vim": lambda: _vim(data, sizes[0], vim_dim),
        "neco": lambda: ood_scores.neco_score(data.features, data.train, num_classes=classes, dim=neco_dim),
        "nci": lambda: _nci(data, nci_alpha),
    }
    scored, skipped = _scored(makers, scores)
    parts = {name: values.split(sizes) for name, values in scored.items()}
    rows = dict(zip(ood, data.features.split(sizes)[1:], strict=True))
    means = class_means(data.train, data.train_target, torch.bincount(data.train_target))
    return OODReport(
        detections={
            key: {name: evaluate_detection(part[0], part[index]) for name, part in parts.items()}
            for index, key in enumerate(ood, start=1)
        },
        nc5={key: _nc5(means, part, False) for key, part in rows.items()},
        nc5_centred={key: _nc5(means, part, True) for key, part in rows.items()},
        id_scores={name: part[0] for name, part in parts.items()},
        ood_scores={key: {name: part[index] for name, part in parts.items()} for index, key in enumerate(ood, start=1)},
        skipped=skipped,
        num_train=len(data.train),
        neighbours=neighbours,
    )


def noise_images(
    images: Float[Tensor, "batch channels height width"], kind: str = "uniform", *, seed: int = 0
) -> Float[Tensor, "batch channels height width"]:
    """Noise images in [0, 1] of the same number, size, dtype and device as `images`, for an easy OOD set.

    "uniform": every value from U[0, 1]. "gaussian": from N(0.5, 1), clipped to [0, 1], as in ODIN (Liang et al., ICLR
    2018, arXiv 1706.02690). "shuffle": the image's own pixels in an order of its own, all channels alike: the same
    colours, no shape.

    Args:
        images: in-distribution images.
        kind: of noise.
        seed: of the draw; the global generator is not touched.

    Raises:
        ValueError: an unknown kind, images that are not (B, channels, H, W) in [0, 1].

    Example:
        >>> image = torch.arange(6.0).view(1, 1, 2, 3) / 6
        >>> noise_images(image, "shuffle").flatten().sort().values.equal(image.flatten())
        True
    """
    check_images(images)
    draw = seeded(seed)
    check_choice("kind", kind, ("uniform", "gaussian", "shuffle"))
    if kind == "uniform":
        return torch.rand(images.shape, generator=draw, dtype=torch.float32, device="cpu").to(images)
    if kind == "gaussian":
        drawn = torch.randn(images.shape, generator=draw, dtype=torch.float32, device="cpu")
        return drawn.add(0.5).clamp(0, 1).to(images)
    flat = images.flatten(2)
    drawn = torch.rand(len(flat), 1, flat.shape[2], generator=draw, dtype=torch.float32, device="cpu")
    order = drawn.argsort(2).to(images.device)
    return flat.gather(2, order.expand_as(flat)).view_as(images)


def _checked(
    train_features: Tensor,
    train_target: Tensor,
    inside: tuple[Tensor, Tensor],
    ood: Mapping[str, tuple[Tensor, Tensor]],
    *,
    train_logits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[_Data, list[int]]:
    """The checked data, features and logits in float64 on the CPU, and how many images each set has, ID first."""
    train = check_features("train_features", train_features)
    if not isinstance(ood, Mapping) or not ood:
        raise ValueError('ood must name at least one set: {"name": (features, logits)}')
    features, logits = [], []
    for key, pair in (("id", inside), *((f"ood[{name!r}]", pair) for name, pair in ood.items())):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{key} must be a pair (features, logits), got {described(pair)}")
        features.append(check_features(f"{key} features", pair[0], train.shape[1]))
        logits.append(exact(check_logits(pair[1], name=f"{key} logits")))
        if len(logits[-1]) != len(features[-1]) or logits[-1].shape[1] != logits[0].shape[1]:
            raise ValueError(
                f"{key}: logits {tuple(logits[-1].shape)} do not go with features {tuple(features[-1].shape)} "
                f"and {logits[0].shape[1]} classes"
            )
    classes = logits[0].shape[1]
    target = check_indices("train_target", train_target, len(train), classes)
    check_all_present("train_target", target, classes)
    if weight is not None and (not isinstance(weight, Tensor) or weight.shape != (classes, train.shape[1])):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be a tensor of shape ({classes}, {train.shape[1]}), got {got}")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (classes,)):
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must be a tensor of shape ({classes},), got {got}")
    data = _Data(train, target, train_logits, torch.cat(features), torch.cat(logits), weight, bias)
    return data, [len(part) for part in features]


def _scored(
    makers: Mapping[str, Callable[[], Tensor]], names: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scores of all images, and why some were skipped; a score in `names` that has no meaning is an error."""
    if isinstance(names, str):
        raise TypeError(f"scores must be a list, got {names!r}: [{names!r}]")
    scored, skipped = {}, {}
    for name in makers if names is None else names:
        check_choice("scores", name, makers)
        try:
            scored[name] = makers[name]()
        except NotDefined as reason:
            if names is not None:
                raise
            skipped[name] = str(reason)
    return scored, skipped


def _nc5(means: Tensor, rows: Tensor, centre: bool) -> float | None:
    try:
        return nc5_of(means, rows, centre=centre)
    except NotDefined:
        return None


def _nci(data: _Data, alpha: float) -> Tensor:
    if data.weight is None:
        raise NotDefined("NCI: pass the head's weight")
    return ood_scores.nci_score(data.features, data.logits, data.train, data.weight, alpha=alpha)


def _vim(data: _Data, num_id: int, dim: int | None) -> Tensor:
    train_logits = data.train_logits
    if train_logits is None:
        if data.weight is None:
            raise NotDefined("ViM: pass train_logits, or the weight and bias of a linear head")
        weight = exact(data.weight)
        bias = 0.0 if data.bias is None else exact(data.bias)
        made, logits = data.features[:num_id] @ weight.T + bias, data.logits[:num_id]
        if not torch.allclose(made, logits, rtol=0, atol=1e-2 * float(logits.abs().max())):
            raise NotDefined(
                "ViM: id_logits are not id_features @ weight.T + bias, so the head normalises or scales: "
                "pass train_logits"
            )
        train_logits = data.train @ weight.T + bias
    found = ood_scores.vim_score(
        data.features, data.logits, data.train, train_logits, weight=data.weight, bias=data.bias, dim=dim
    )
    outside = found - data.logits.to(found).logsumexp(1)  # the energy aside
    if float(outside.max() - outside.min()) <= 1e-3 * float(train_logits.amax(1).mean()):
        raise NotDefined(
            "ViM: no feature leaves the principal directions of the training features (units that are always 0?), so "
            "it would rank images as the energy does: pass a smaller vim_dim"
        )
    return found
