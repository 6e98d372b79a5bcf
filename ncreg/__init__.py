"""Neural collapse on purpose: heads, norms, losses, measures and a terminal-phase scheduler."""

from ncreg.checkpoint import load_checkpoint, save_checkpoint
from ncreg.models import Classifier, ClassifierOutput, swap_head
from ncreg.optim import param_groups
from ncreg.tpt import TPTScheduler

__version__ = "0.1.0"
