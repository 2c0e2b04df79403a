"""The JSON schema of a configuration file: editors complete and check YAML with it."""

from __future__ import annotations

from typing import Any

from plop_dist.config.schema import Config


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file; names that other installed packages add are allowed in it."""
    schema = _without_titles(Config.model_json_schema())
    for name, node in schema["properties"].items():
        if "$ref" in node and name not in schema["required"]:
            # a section whose keys are all commented out is null in YAML
            schema["properties"][name] = {"anyOf": [node, {"type": "null"}]}
    title = "plop-dist configuration"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def section_of(schema: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a section's own part of the schema, None for a key that is no section."""
    node = schema["properties"][name]
    for choice in (node, *node.get("anyOf", ())):
        if "$ref" in choice:
            return schema["$defs"][choice["$ref"].rpartition("/")[2]]
    return None


def _without_titles(node: Any) -> Any:
    # pydantic makes titles out of names ("Num Samples"): editors would show both
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {name: _without_titles(child) for name, child in node.items() if name != "title" or isinstance(child, dict)}
