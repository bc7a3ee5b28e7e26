"""YAML of which nothing is lost."""

from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """Loader that refuses a key that a mapping has twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):  # without those of a merge, "<<"
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r:.80} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value that a text of YAML stands for, by plain types alone.

    Raises:
        yaml.YAMLError: it is not YAML, or a key is there twice.
    """
    return yaml.load(text, _UniqueKeys)
