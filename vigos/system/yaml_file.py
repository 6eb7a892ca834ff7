"""YAML files that people write: plain values alone, every key once, nothing without end, errors with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_BYTES = 2**18  # PyYAML reads a megabyte in ten seconds
_MAX_DEPTH = 20
_MAX_DIGITS = 20


def read_yaml(path: str | Path) -> Any:
    """Return the values of a YAML file: text, numbers, truth values, None, lists, and mappings with text as keys.

    Raises:
        ValueError: naming file and line: not YAML, a tag, an alias, a key twice, a number that is none, too deep.
    """
    return read_marked(path)[0]


def read_marked(path: str | Path) -> tuple[Any, dict[str, int]]:
    """Return the values of a YAML file, and the line on which each key first stands."""
    import yaml

    with Path(path).open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES} bytes")
    try:
        loader = _loader()(data.decode("utf-8"))
        try:
            return loader.get_single_data(), loader.lines
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{place}: {reason[:200]}") from error


def _loader() -> Any:
    import yaml

    def wrong(problem: str, mark: Any) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    class Loader(yaml.SafeLoader):
        """Safe loading without tags, aliases and dates; `no`, `off` and their like are words, as in YAML 1.2."""

        depth = 0
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [
                (tag, pattern)
                for tag, pattern in found
                if not tag.endswith(("timestamp", "merge", "value"))
                and not (tag.endswith("bool") and first in "yYnNoO")
            ]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lines: dict[str, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                raise wrong("an alias (*name) is not read here", event.start_mark)
            if event.tag is not None:
                raise wrong(f"a tag ({event.tag}) is not read here", event.start_mark)
            if self.depth == _MAX_DEPTH:
                raise wrong(f"more than {_MAX_DEPTH} levels", event.start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if not key.tag.endswith(":str"):
                    raise wrong(f"a key must be text, got {str(key.value)[:40]}: quote it", key.start_mark)
                if key.value in seen:
                    raise wrong(f"the key {key.value[:40]!r} again", key.start_mark)
                seen.add(key.value)
                self.lines.setdefault(key.value, key.start_mark.line + 1)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> Any:
            if len(node.value) > _MAX_DIGITS:
                raise wrong(f"a number of more than {_MAX_DIGITS} digits", node.start_mark)
            return super().construct_yaml_int(node)

        def construct_yaml_float(self, node: Any) -> Any:
            value = super().construct_yaml_float(node) if len(node.value) < 100 else float("nan")
            if value != value:
                raise wrong("not a number", node.start_mark)
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    return Loader
