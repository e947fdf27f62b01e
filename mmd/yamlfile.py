"""YAML with line numbers: the subset that a configuration needs, read strictly.

Differences from PyYAML's safe loader, all of them to keep what was written: a key given twice is an error; keys are strings;
plain scalars follow YAML 1.2's core schema, so that `off`, `no`, `0022`, `12:30` and `2024-01-01` stay strings.
Aliases and `<<` work as usual, within bounds: a few lines in which every list holds the one before it nine times stand for a
billion values. What they stand for is counted before it is built, and a document that is too large is refused as a whole.

It works on the nodes that libyaml composes, which costs less than PyYAML's constructor and keeps every line number for the case
that there is something to complain about.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from yaml import MappingNode, Node, SafeDumper, ScalarNode, SequenceNode, YAMLError
from yaml import dump as yaml_dump
from yaml._yaml import CParser

from mmd.problem import Problem

__all__ = ["BYTES_MAX", "Document", "dump", "parse"]

_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|-?[0-9]+[eE][-+]?[0-9]+")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_STRING = "str"
_PLAIN = "plain"
_MERGE = "<<"

BYTES_MAX = 4 << 20
"""The longest text: thousands of models. libyaml would take a hundred times as much memory for what is longer."""

# Values in a document, each alias counted as all that it stands for. A model has 10 to 40, so this is several thousand models;
# a node takes about 600 bytes, so it is 60 MB at most.
_NODES_MAX = 100_000

# Characters of all values, counted in the same way: one long text and many aliases of it are few nodes.
_CHARACTERS_MAX = 8 << 20

# More mistakes are not listed: each is looked up in the whole document, and nobody reads a thousand.
_COMPLAINTS_MAX = 100


class Document(NamedTuple):
    """A file's content as plain values, and the nodes that know where each of them stands."""

    file: Path
    value: Any
    root: Node | None = None
    problems: tuple[tuple[tuple[str, ...], Problem], ...] = ()
    """What is wrong with it as YAML, by the path of the key."""
    places: dict[int, dict[str, tuple[int, Node]]] | None = None
    """By the id() of a mapping's node: the line and the node of each key's value, those that are merged last. Filled
    as lines are asked for; a search per question would take a minute for 40,000 mistakes."""

    def line(self, path: tuple[str | int, ...]) -> int:
        """The line (from 1) of the key at `path`, or of the innermost part of the path that exists."""
        node, line = self.root, 1
        for part in path:
            found = self._child(node, part)
            if found is None:
                break
            line, node = found
        return line

    def lines(self, key: str) -> dict[str, int]:
        """The line of every key of the mapping at the top's `key`."""
        found = self._child(self.root, key)
        if found is None or not isinstance(found[1], MappingNode):
            return {}
        pairs = reversed(found[1].value)  # of a key given twice the first counts
        return {node.value: node.start_mark.line + 1 for node, _ in pairs if isinstance(node, ScalarNode)}

    def has(self, path: tuple[str | int, ...]) -> bool:
        """Whether there is a key at `path`."""
        node = self.root
        for part in path:
            found = self._child(node, part)
            if found is None:
                return False
            node = found[1]
        return True

    def _child(self, node: Node | None, part: str | int) -> tuple[int, Node] | None:
        """The line and the node of a mapping's key or a list's item."""
        if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            item = node.value[part]
            return item.start_mark.line + 1, item
        if not isinstance(node, MappingNode) or not isinstance(part, str):
            return None
        return _children(node, {} if self.places is None else self.places).get(part)


def parse(text: str | bytes, file: Path) -> Document:
    """The document in `text`. After a syntax error, or when it is too large, its value is None and its one problem says why."""
    reader = _Reader()
    try:
        if len(text) > BYTES_MAX:
            raise _TooLargeError(f"longer than {BYTES_MAX >> 20} MiB")
        root = _Composer(text).get_single_node()
        if root is None:
            return Document(file, None)
        value = reader.read(root)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        message = getattr(error, "problem", None) or str(error).splitlines()[0]
        problem = Problem(file, mark.line + 1 if mark else 0, "", f"not valid YAML: {message}")
        return Document(file, None, problems=(((), problem),))
    except _TooLargeError as error:
        return Document(file, None, problems=(((), Problem(file, 0, "", f"too large: {error}")),))
    except RecursionError:
        return Document(file, None, problems=(((), Problem(file, 0, "", "not valid YAML: nested too deeply")),))
    problems = []
    paths = _paths(root, {id(node) for node, _, _ in reader.complaints})
    for node, message, hint in reader.complaints:
        path = paths.get(id(node), ())
        problems.append((path, Problem(file, node.start_mark.line + 1, ".".join(path), message, hint)))
    return Document(file, value, root, tuple(problems), {})


class _TooLargeError(Exception):
    """The document holds, or its aliases stand for, more than is read."""


class _Composer(CParser):
    """libyaml's parser; it asks these three methods what a scalar is, and all it needs to hear is whether it was quoted."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._nodes = 0

    def resolve(self, kind: type[Node], value: str | None, implicit: Any) -> str:
        self._nodes += 1
        if self._nodes > _NODES_MAX:
            raise _TooLargeError(f"more than {_NODES_MAX} values")
        return _PLAIN if kind is ScalarNode and implicit[0] else _STRING

    def descend_resolver(self, parent: Node | None, index: Any) -> None:
        pass

    def ascend_resolver(self) -> None:
        pass


class _Reader:
    """Turns nodes into values and notes duplicate keys, keys that are no strings, and tags."""

    def __init__(self) -> None:
        self.complaints: list[tuple[Node, str, str]] = []
        self._done: dict[int, tuple[Any, int, int]] = {}
        """By node, with how many nodes and characters it stands for: an alias is read once."""
        self._open: set[int] = set()
        """Finding itself inside itself is an error."""
        self._nodes = 0
        self._characters = 0

    def read(self, node: Node) -> Any:
        if isinstance(node, ScalarNode):
            self._count(1, len(node.value))
            return self._scalar(node)
        if node.tag is not _STRING:
            return self._complain(node, f"the tag {node.tag} is not supported")
        identity = id(node)
        if identity in self._done:
            value, nodes, characters = self._done[identity]
            self._count(nodes, characters)
            return value
        if identity in self._open:
            return self._complain(node, "an alias inside of what it stands for")
        self._open.add(identity)
        before = self._nodes, self._characters
        self._count(1, 0)
        value = self._mapping(node) if isinstance(node, MappingNode) else [self.read(item) for item in node.value]
        self._open.discard(identity)
        self._done[identity] = value, self._nodes - before[0], self._characters - before[1]
        return value

    def _count(self, nodes: int, characters: int) -> None:
        self._nodes += nodes
        self._characters += characters
        if self._nodes > _NODES_MAX or self._characters > _CHARACTERS_MAX:
            raise _TooLargeError(f"its aliases stand for more than {_NODES_MAX} values or {_CHARACTERS_MAX >> 20} MiB")

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        if node.tag is _PLAIN:
            return _plain_value(text)
        if node.tag is _STRING or node.tag == "tag:yaml.org,2002:str":
            return text
        return self._complain(node, f"the tag {node.tag} is not supported")

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, ScalarNode):
                self._complain(key_node, "a key must be a string")
            elif key == _MERGE and key_node.tag is _PLAIN:
                merged.append(value_node)
            elif key_node.tag is not _STRING and not isinstance(self._scalar(key_node), str):
                self._complain(key_node, "a key must be a string", f'write "{key}"')
            elif key in values:
                self._complain_of_copy(node, key_node)
            else:
                self._characters += len(key)
                values[key] = self.read(value_node)
        for source in merged:
            self._merge(values, source)
        return values

    def _merge(self, values: dict[str, Any], source: Node) -> None:
        for node in source.value if isinstance(source, SequenceNode) else [source]:
            value = self.read(node)
            if isinstance(value, dict):
                for key, item in value.items():
                    values.setdefault(key, item)
            else:
                self._complain(node, "must be a mapping or a list of mappings")

    def _complain_of_copy(self, mapping: MappingNode, key_node: ScalarNode) -> None:
        if len(self.complaints) < _COMPLAINTS_MAX:
            first = next(other for other, _ in mapping.value if other.value == key_node.value)
            self._complain(key_node, f"given twice, first in line {first.start_mark.line + 1}")

    def _complain(self, node: Node, message: str, hint: str = "") -> None:
        if len(self.complaints) < _COMPLAINTS_MAX:
            self.complaints.append((node, message, hint))


def _paths(root: Node, wanted: set[int]) -> dict[int, tuple[str, ...]]:
    """The paths of nodes, by id(), found by looking everywhere: only needed for what is wrong."""
    paths: dict[int, tuple[str, ...]] = {}
    stack: list[tuple[Node, tuple[str, ...]]] = [(root, ())] if wanted else []
    seen: set[int] = set()
    while stack:
        node, path = stack.pop()
        if id(node) in wanted:
            paths.setdefault(id(node), path)
        if isinstance(node, ScalarNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, MappingNode):
            for key, value in node.value:
                below = (*path, str(key.value)) if isinstance(key, ScalarNode) else path
                stack += [(key, below), (value, below)]
        else:
            stack += [(item, (*path, str(index))) for index, item in enumerate(node.value)]
    return paths


def _plain_value(text: str) -> Any:
    """What a scalar without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "-0123456789":
        if _INT.fullmatch(text) and len(text) < 20:
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text


def _children(node: MappingNode, places: dict[int, dict[str, tuple[int, Node]]]) -> dict[str, tuple[int, Node]]:
    known = places.get(id(node))
    if known is not None:
        return known
    found: dict[str, tuple[int, Node]] = {}
    places[id(node)] = found  # before what is merged: a mapping may be merged into itself
    merged: list[Node] = []
    for key_node, value_node in node.value:
        if isinstance(key_node, ScalarNode):
            if key_node.value == _MERGE and key_node.tag is not _STRING:
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            else:
                found.setdefault(key_node.value, (key_node.start_mark.line + 1, value_node))
    for source in merged:
        if isinstance(source, MappingNode):
            for key, place in _children(source, places).items():
                found.setdefault(key, place)
    return found


def dump(value: Any) -> str:
    """`value` as YAML that `parse` reads back as it is."""
    return str(yaml_dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None))


class _Dumper(SafeDumper):
    """PyYAML's dumper quotes what YAML 1.1 would misread; this one also quotes what `parse` would (`1e5`)."""

    def represent_text(self, text: str) -> ScalarNode:
        style = None if isinstance(_plain_value(text), str) else "'"
        if not text.isprintable():  # only double quotes know escapes
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
