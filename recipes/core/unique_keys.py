"""A loader of YAML files that are read as they are meant: no key is named twice, no number has two readings."""

from __future__ import annotations

from typing import Any

import yaml

from recipes.core.two_readings import readings_of


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML silently keeps the last one, and numbers such as 010."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """The value of a node without others in it."""
        if (said := readings_of(node)) is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {said}")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is named twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)
