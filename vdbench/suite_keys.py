"""configs/README.md, every key of a suite file, from the models that check them.

`python -m vdbench.suite_keys > configs/README.md` after a change to `config.py`.
"""

import json
from typing import Any

from vdbench.config import Suite

INTRODUCTION = """# Suite files

A suite file says what is run; nothing is set anywhere else. `paper.yaml` is the full reproduction, `smoke.yaml` a
check of the machinery in a few minutes, `inference.yaml` times nets and layers that are not trained, `cifar.yaml` and
`cifar_full.yaml` are the VGG-like net, `ptb.yaml` and `ptb_full.yaml` language models, and the `explore_*.yaml` say how
recipes were chosen. An unknown key, a missing one or a wrong value is refused, by name, before any job starts.

    vdbench plan configs/paper.yaml                          # jobs, and estimated hours
    snakemake --cores 8                                      # configs/paper.yaml
    snakemake --cores 2 --configfile configs/smoke.yaml      # any other file, one at a time
    vdbench status configs/paper.yaml                        # done, running, stale, missing

Changing an experiment reruns that experiment; a new seed runs only itself; a comment, or the order of keys, reruns
nothing. For a suite of your own, copy one of these and give it a `suite` of its own, which names its results folder.

This file is generated: `python -m vdbench.suite_keys > configs/README.md`.
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def describe() -> str:
    """The Markdown text: an introduction, then one table of keys for each kind of section."""
    schema = Suite.model_json_schema()
    sections = {"Suite": schema} | {name: schema["$defs"][name] for name in _order(schema)}
    return "\n".join((INTRODUCTION, *(_section(name, section) for name, section in sections.items())))


def _order(schema: dict[str, Any]) -> list[str]:
    """Sections in the order in which a reader of the file meets them."""
    found: list[str] = []
    pending = [schema]
    while pending:
        for part in _references(pending.pop(0).get("properties", {})):
            if part not in found:
                found.append(part)
                pending.append(schema["$defs"][part])
    return found


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _references(item)]
    if isinstance(node, dict):
        own = [_name(node)] if "$ref" in node else []
        return own + [name for value in node.values() for name in _references(value)]
    return []


def _name(node: dict[str, Any]) -> str:
    return node["$ref"].rsplit("/", 1)[-1]


def _section(name: str, section: dict[str, Any]) -> str:
    required = section.get("required", [])
    rows = [
        f"| `{key}` | {_type(field)} | {'required' if key in required else _default(field)} | {field['description']} |"
        for key, field in section["properties"].items()
    ]
    head = f"## {name}\n\n{section['description']}\n\n| key | value | default | meaning |\n|---|---|---|---|"
    return "\n".join((head, *rows, ""))


def _default(field: dict[str, Any]) -> str:
    value = field["default"]
    if isinstance(value, dict) and value:
        return "as below"
    return "none" if value in (None, "", [], {}) else f"`{json.dumps(value)}`"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return f"[{_name(field)}](#{_name(field).lower()})"
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        values = field.get("additionalProperties") or next(iter(field["patternProperties"].values()))
        return f"mapping of name to {_type(values)}"
    bounds = [f" {sign} {field[bound]:g}" for bound, sign in BOUNDS.items() if bound in field]
    pattern = f" matching `{field['pattern']}`".replace("|", r"\|") if "pattern" in field else ""
    kind = {"string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    return f"{kind}{','.join(bounds)}{pattern}"


if __name__ == "__main__":
    print(describe(), end="")
