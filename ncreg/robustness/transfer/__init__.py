"""How well frozen features serve another task."""
