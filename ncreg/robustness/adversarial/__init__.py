"""Attacks, AutoAttack, robustness curves, and what makes their results suspect."""

from ncreg.robustness.adversarial.attacks import AttackResult, fgsm, pgd, random_search
from ncreg.robustness.adversarial.autoattack import AutoAttackResult, autoattack
from ncreg.robustness.adversarial.curve import RobustnessCurve, robustness_curve
from ncreg.robustness.adversarial.report import AdversarialReport, AttackRow, evaluate_adversarial
from ncreg.robustness.adversarial.sanity_checks import Finding, find_suspicions
from ncreg.robustness.adversarial.steps import logit_margin

__all__ = [
    "AdversarialReport",
    "AttackResult",
    "AttackRow",
    "AutoAttackResult",
    "Finding",
    "RobustnessCurve",
    "autoattack",
    "evaluate_adversarial",
    "fgsm",
    "find_suspicions",
    "logit_margin",
    "pgd",
    "random_search",
    "robustness_curve",
]
