r"""timm's own train.py and validate.py, unmodified, with heads, loss terms and terminal phase of ncreg by flags.

Importing this module registers `ncreg_HEAD.BACKBONE` as names of models and replaces five names of timm
(`create_optimizer_v2`, `create_loader`, `create_scheduler_v2`, `ClassificationTask`, `get_pretrained_cfg`) wherever
they are bound. They do what they did before for every other model; `uninstall()` gives timm its own back.

    python train.py --device-modules ncreg.integrations.timm --model ncreg_etf.resnet18 \
        --model-kwargs "terminal_phase={'max_epochs': 200}" "loss_terms={'IntraClassCosineLoss': 0.1}" ...
    python -m ncreg.integrations.timm validate.py --model ncreg_etf.resnet18 --checkpoint last.pth.tar ...

`--model-kwargs` of these models: `norm`, `project`, `head_args` as in `ncreg.swap_head`; `loss_terms` (class name in
`ncreg.losses` → weight, or a dict of weight, phase and arguments); `terminal_phase` (True, or the arguments of
`TPTScheduler`); whatever else the backbone takes. docs/integrations.md says what cannot work there.

Example:
    >>> import timm
    >>> model = timm.create_model("ncreg_etf.test_resnet", num_classes=10)
    >>> model.head
    ETFHead(in_features=96, num_classes=10, ...)
"""

from ncreg.integrations.timm._hooks import install, uninstall
from ncreg.integrations.timm._models import REQUESTS, register_names
from ncreg.integrations.timm._schedule import TerminalPhaseEnded, TerminalPhaseSchedule
from ncreg.integrations.timm._task import CollapseTask, LossTerms

__all__ = [
    "REQUESTS",
    "CollapseTask",
    "LossTerms",
    "TerminalPhaseEnded",
    "TerminalPhaseSchedule",
    "install",
    "uninstall",
]

register_names()
install()
