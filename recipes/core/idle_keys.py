"""Keys of a configuration that are set, and that nothing reads because of another key."""

from __future__ import annotations

from typing import Any

from recipes.core.config import AdversarialConfig, TPTConfig, TrainConfig

TERMINAL = ("min_terminal", "max_terminal", "terminal", "terminal_lr", "stop_patience", "stop_measure")
"""Keys of tpt for a terminal phase of a length and rates of its own."""


def idle_notes(config: TrainConfig) -> list[str]:
    """A sentence for each key that turns others off while they are set.

    Example:
        >>> idle_notes(TrainConfig(adversarial=AdversarialConfig(steps=10)))
        ['adversarial.steps=10 changes nothing: adversarial.epsilon is 0']
    """
    tpt = config.tpt
    fades = any(term.phase != "always" for term in config.loss.values())
    idle = {
        "adversarial.epsilon is 0": config.adversarial.epsilon == 0
        and _set(config.adversarial, AdversarialConfig(), "adversarial"),
        "tpt.extend is null, which trains on to tpt.max_epochs": tpt.extend is None
        and _set(tpt, TPTConfig(), "tpt", TERMINAL),
        "tpt.stop_patience is null": tpt.extend is not None
        and tpt.stop_patience is None
        and _set(tpt, TPTConfig(), "tpt", ("stop_measure",)),
        "every term of the loss acts in all phases": not fades and _set(tpt, TPTConfig(), "tpt", ("ramp_epochs",)),
        "data.label_noise is 0": config.data.label_noise == 0 and _set(tpt, TPTConfig(), "tpt", ("target",)),
    }
    return [
        f"{', '.join(keys)} {'change' if len(keys) > 1 else 'changes'} nothing: {why}"
        for why, keys in idle.items()
        if keys
    ]


def _set(group: Any, default: Any, prefix: str, names: tuple[str, ...] | None = None) -> list[str]:
    """The keys of a group that are not at their default, with their values."""
    values = {name: getattr(group, name) for name in (vars(group) if names is None else names)}
    return [f"{prefix}.{name}={value}" for name, value in values.items() if value != getattr(default, name)]
