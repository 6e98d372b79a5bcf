"""ncreg in other people's training loops; nothing here is imported by `import ncreg`.

timm          `--device-modules ncreg.integrations.timm` for timm's train.py, `python -m` for its other scripts
lightning     a callback for Lightning's Trainer
transformers  a callback, a schedule and a model with a loss for Hugging Face's Trainer

EpochCloser   the same for a loop of your own: measure the training set, then step the TPTScheduler

docs/integrations.md shows each one, and Accelerate and DistributedDataParallel, which need no module.
"""

from ncreg.integrations._epochs import EpochCloser
from ncreg.integrations._training_set import find_classifier, measure_training_set

__all__ = ["EpochCloser", "find_classifier", "measure_training_set"]
