"""Neural collapse on purpose: heads, norms, losses, measures and a terminal-phase scheduler."""

__version__ = "0.1.0"
