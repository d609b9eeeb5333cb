"""YAML as settings need it: each key once, dates as text, no aliases, no depth, no surprise."""

from __future__ import annotations

from typing import Any

import yaml

from .errors import short_repr

DEEPEST = 12  # lists and mappings inside each other; a real configuration has 5


class _StrictLoader(yaml.SafeLoader):
    """A safe loader whose every refusal is a YAMLError."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- as yaml declares it
        first: [(tag, regex) for tag, regex in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {mark.line + 1} has an alias (*name): write the value out")
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"line {mark.line + 1} is nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            line, value = name.start_mark.line + 1, self.construct_object(name)
            if value in lines:  # however it is spelt: 1 and 01
                raise yaml.YAMLError(
                    f"{short_repr(value)} stands on line {lines[value]} and again on line {line}: "
                    "keep one"
                )
            lines[value] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise yaml.YAMLError(
                f"{short_repr(node.value)} on line {node.start_mark.line + 1} cannot be read"
            ) from error


def read_yaml(text: str | bytes) -> Any:
    """The plain values of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or holds an alias, a key twice, or a value that cannot be
            read; says where.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not UTF-8: {error}") from error
