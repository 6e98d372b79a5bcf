"""Attacks, AutoAttack, robustness curves, distances to the boundary, and checks of their credibility."""

from ncreg.robustness.adversarial.attacks import fgsm, pgd
from ncreg.robustness.adversarial.attempt import AttackResult
from ncreg.robustness.adversarial.autoattack import AutoAttackResult, autoattack
from ncreg.robustness.adversarial.black_box import random_search
from ncreg.robustness.adversarial.curve import RobustnessCurve, robustness_curve
from ncreg.robustness.adversarial.deepfool import DeepFoolResult, deepfool
from ncreg.robustness.adversarial.minimum_norm import MinimumNormResult, minimum_norm
from ncreg.robustness.adversarial.objectives import expected_cost, logit_margin
from ncreg.robustness.adversarial.report import AdversarialReport, AttackRow, CostSummary, evaluate_adversarial
from ncreg.robustness.adversarial.sanity_checks import Finding, find_suspicions

__all__ = [
    "AdversarialReport",
    "AttackResult",
    "AttackRow",
    "AutoAttackResult",
    "CostSummary",
    "DeepFoolResult",
    "Finding",
    "MinimumNormResult",
    "RobustnessCurve",
    "autoattack",
    "deepfool",
    "evaluate_adversarial",
    "expected_cost",
    "fgsm",
    "find_suspicions",
    "logit_margin",
    "minimum_norm",
    "pgd",
    "random_search",
    "robustness_curve",
]
