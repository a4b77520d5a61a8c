"""YAML in which a mistake that plain YAML lets pass is one."""

from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; plain YAML quietly takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
