"""One adversarial evaluation: attacks side by side, AutoAttack as the headline, and checks of its credibility."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from ncreg._checks import check_choice, check_flag, check_seed
from ncreg._features import exact_cost
from ncreg.robustness._inputs import Model, predict
from ncreg.robustness.adversarial.attacks import fgsm, pgd
from ncreg.robustness.adversarial.attempt import AttackResult, clean_logits
from ncreg.robustness.adversarial.autoattack import autoattack as run_autoattack
from ncreg.robustness.adversarial.black_box import random_search
from ncreg.robustness.adversarial.objectives import Loss, expected_cost
from ncreg.robustness.adversarial.sanity_checks import Finding, find_suspicions
from ncreg.robustness.adversarial.steps import Norm
from ncreg.robustness.intervals import binomial_interval

Preset = Literal["quick", "full"]
_STEPS = {"quick": 20, "full": 40}
_RESTARTS = {"quick": 1, "full": 5}
_QUERIES = {"quick": 100, "full": 1000}
_APGD_STEPS = {"quick": 50, "full": 100}


@dataclass(frozen=True, eq=False)
class AttackRow:
    """One row of the report: an attack and the accuracy that it leaves.

    Attributes:
        name: which attack, with its settings; "clean" is none.
        robust: (B,) classified rightly before and after it.
        correct: how many images that is.
        accuracy: their fraction, in [0, 1].
        low: lower end of Wilson's 95 % interval.
        high: upper end.
    """

    name: str
    robust: Bool[Tensor, " batch"]
    correct: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class CostSummary:
    """What mistakes cost before and after the attacks on costs, a mean over all images.

    Attributes:
        expected_clean: Σ_j M[y,j] p_j, by the model's probabilities.
        expected: the same after whichever of both attacks raised it more, for each image.
        decided_clean: M[y, ŷ] of the predicted class.
        decided: the same after whichever of both attacks raised it more, or of the clean image where neither did.
        confusion: (C, C) images of class y that are class j in `decided`, in row y and column j.
    """

    expected_clean: float
    expected: float
    decided_clean: float
    decided: float
    confusion: Int[Tensor, "classes classes"]


@dataclass(frozen=True, eq=False)
class AdversarialReport:
    """Attacks on one model at one radius; print all of it: no row means much without the findings.

    Attributes:
        norm: "linf" or "l2".
        epsilon: radius of the ball, in units of images in [0, 1].
        images: how many were attacked.
        seed: of every attack.
        preset: "quick" or "full".
        rows: clean, FGSM, PGD on cross-entropy and on the margin, random search, then each attack of AutoAttack. These
            last run on what all rows above left, so each is at most every row before it.
        headline: AutoAttack's row; without AutoAttack the images that every attack left, and then flagged.
        findings: the checks, flagged or not.
        note: what differs from AutoAttack as published, "" for nothing.
        costs: what mistakes cost, where a matrix of costs was given.
    """

    norm: Norm
    epsilon: float
    images: int
    seed: int
    preset: Preset
    rows: tuple[AttackRow, ...]
    headline: AttackRow
    findings: tuple[Finding, ...]
    note: str
    costs: CostSummary | None = None

    @property
    def flagged(self) -> bool:
        """Whether any finding is flagged: then believe no row, except perhaps the headline."""
        return any(finding.flagged for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; masks are left out."""
        rows = [_plain(row) for row in self.rows]
        return {
            "norm": self.norm,
            "epsilon": self.epsilon,
            "images": self.images,
            "seed": self.seed,
            "preset": self.preset,
            "rows": rows,
            "headline": _plain(self.headline),
            "findings": [asdict(finding) for finding in self.findings],
            "flagged": self.flagged,
            "note": self.note,
        } | ({} if self.costs is None else {"costs": asdict(self.costs) | {"confusion": self.costs.confusion.tolist()}})

    def __str__(self) -> str:
        """The table with its findings."""
        lines = [f"{self.norm}, epsilon {self.epsilon:.4g}, {self.images} images, seed {self.seed}, {self.preset}"]
        lines += [_line(row) for row in (*self.rows, self.headline)]
        if self.costs is not None:
            lines.append(
                f"expected cost           {self.costs.expected_clean:8.4g}  attacked {self.costs.expected:.4g}"
            )
            lines.append(f"cost of predictions     {self.costs.decided_clean:8.4g}  attacked {self.costs.decided:.4g}")
        lines += [f"note: {self.note}"] if self.note else []
        for finding in self.findings:
            mark = "FLAGGED" if finding.flagged else "ok"
            lines.append(f"{mark:<8}{finding.name:<20}{finding.value:>9.4g}  (at most {finding.threshold:g})")
            lines += [f"        {finding.explanation}"] if finding.flagged else []
        return "\n".join(lines)


@torch.inference_mode(False)
def evaluate_adversarial(
    model: Model,
    images: Float[Tensor, "batch channels height width"],
    target: Integer[Tensor, " batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    preset: Preset = "quick",
    seed: int = 0,
    autoattack: bool = True,
    cost: Float[Tensor, "classes classes"] | None = None,
    batch_size: int = 256,
) -> AdversarialReport:
    """Several attacks, with AutoAttack as the headline, and every reason to distrust their results.

    An image counts where it is classified rightly before and after the attack. Attacks on cross-entropy stand beside
    those on the margin, always. "quick": PGD of 20 steps, 100 queries of random search, AutoAttack's two APGD attacks
    at 50 steps, where 100 are published. "full": PGD of 40 steps and 5 restarts, 1000 queries, the standard AutoAttack.
    AutoAttack runs on what the other attacks left: the headline is at most every row.

    Args:
        model: images in [0, 1] (B, channels, H, W) to logits (B, C); a module must be in eval mode.
        images: in [0, 1].
        target: class indices (B,).
        epsilon: radius, in units of images in [0, 1].
        norm: "linf" or "l2".
        preset: "quick" or "full".
        seed: of every attack.
        autoattack: run it (needs the extra `robust`); without it the report is flagged.
        cost: M (C, C), 0 on the diagonal: what taking class y for j costs, in row y and column j. PGD on both losses
            of costs then runs too, and the report holds what mistakes cost.
        batch_size: images at once.

    Raises:
        ImportError: autoattack without the package pyautoattack.
        TypeError: arguments of the wrong kind.
        ValueError: images outside [0, 1], a target out of range, a model in training mode or one that returns
            probabilities or no finite logits, epsilon < 0, an unknown preset.

    Example:
        >>> model = lambda x: 10 * torch.stack([x.sum((1, 2, 3)), torch.full((len(x),), 1.0)], 1)
        >>> images = torch.tensor([0.3, 0.5]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
        >>> report = evaluate_adversarial(model, images, torch.tensor([0, 0]), epsilon=0.1, autoattack=False)
        >>> report.headline.accuracy, report.flagged, [finding.name for finding in report.findings if finding.flagged]
        (0.5, True, ['no_ensemble'])
    """
    check_choice("preset", preset, _STEPS)
    check_flag("autoattack", autoattack)
    seed = check_seed(seed)
    common: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "batch_size": batch_size}
    clean, target = clean_logits(model, images, target, batch_size)
    settings: dict[str, Any] = common | {"steps": _STEPS[preset], "restarts": _RESTARTS[preset], "seed": seed}
    step = fgsm(model, images, target, **common)
    cross_entropy = pgd(model, images, target, loss="cross_entropy", **settings)
    margin = pgd(model, images, target, loss="margin", **settings)
    black_box = random_search(model, images, target, queries=_QUERIES[preset], seed=seed, **common)
    attacks: tuple[AttackResult, ...] = (step, cross_entropy, margin, black_box)
    costs = None
    if cost is not None:
        losses: tuple[Loss, ...] = ("cost", "cost_margin")
        on_costs = tuple(pgd(model, images, target, loss=loss, cost=cost, **settings) for loss in losses)
        attacks += on_costs
        costs = _cost_summary(model, clean, target, cost, on_costs, batch_size)
    rows = [_row("clean", clean.argmax(1) == target), *(_row(attack.name, attack.robust) for attack in attacks)]
    survivors, note = rows[0].robust, ""
    for attack in attacks:
        survivors = survivors & attack.robust
    name = "every attack above"
    if autoattack:
        version: Literal["standard", "apgd"] = "standard" if preset == "full" else "apgd"
        settings = common | {"version": version, "steps": _APGD_STEPS[preset], "seed": seed}
        ensemble = run_autoattack(model, images, target, survivors=survivors, **settings)
        rows += [_row(attack, mask) for attack, mask in ensemble.after.items()]
        survivors, note, name = ensemble.robust, ensemble.note, ensemble.name
    findings = find_suspicions(
        model,
        images,
        target,
        cross_entropy=cross_entropy.robust,
        margin=margin.robust,
        black_box=black_box.robust,
        ensemble=survivors if autoattack else None,
        batch_size=batch_size,
    )
    headline = _row(name, survivors)
    return AdversarialReport(
        norm, float(epsilon), len(images), seed, preset, tuple(rows), headline, findings, note, costs
    )


def _cost_summary(
    model: Model, clean: Tensor, target: Tensor, cost: Tensor, attacks: tuple[AttackResult, ...], batch_size: int
) -> CostSummary:
    prices = exact_cost(cost, clean.shape[1]).to(clean.device)[target]
    attacked = [predict(model, attack.images, batch_size).argmax(1) for attack in attacks]
    guesses = torch.stack([*attacked, clean.argmax(1)])  # a higher expected cost may have a cheaper class in front
    paid = torch.stack([prices.gather(1, guess[:, None]).squeeze(1) for guess in guesses])
    worst = paid.argmax(0)
    confusion = torch.zeros(clean.shape[1], clean.shape[1], dtype=torch.int64, device=clean.device)
    confusion.index_put_((target, guesses.gather(0, worst[None])[0]), torch.ones_like(target), accumulate=True)
    expected = torch.stack([attack.expected_cost for attack in attacks if attack.expected_cost is not None])
    return CostSummary(
        expected_clean=float(expected_cost(clean.double(), target, cost).mean()),
        expected=float(expected.amax(0).mean()),
        decided_clean=float(prices.gather(1, clean.argmax(1, keepdim=True)).mean()),
        decided=float(paid.amax(0).mean()),
        confusion=confusion,
    )


def _row(name: str, robust: Tensor) -> AttackRow:
    correct = int(robust.sum())
    return AttackRow(name, robust, correct, correct / len(robust), *binomial_interval(correct, len(robust)))


def _plain(row: AttackRow) -> dict[str, Any]:
    return {key: getattr(row, key) for key in ("name", "correct", "accuracy", "low", "high")}


def _line(row: AttackRow) -> str:
    return f"{row.name:<24}{100 * row.accuracy:6.1f} %  [{100 * row.low:.1f}, {100 * row.high:.1f}]"
