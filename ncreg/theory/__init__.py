"""Closed forms: what each loss, head and weight decay can reach at best, and a certificate of collapse."""

from ncreg.theory.scale import minimal_cross_entropy, scale_for_loss

__all__ = ["minimal_cross_entropy", "scale_for_loss"]
