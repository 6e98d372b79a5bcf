"""Neural collapse on purpose: heads, norms, losses, measures and a terminal-phase scheduler for classifiers."""

__version__ = "0.1.0"
