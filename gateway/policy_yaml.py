"""A YAML file as plain values, with the line of each and every problem of form.

Only what a policy needs is read: mappings with text keys, lists, text, numbers, booleans and null. Tags, aliases and
merge keys are refused, so that nothing but plain values can be made and a small file stays small when it is read.
"""

from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Path = tuple[str | int, ...]
LIMIT_BYTES = 256 * 1024
_TAG = "tag:yaml.org,2002:"
_TEXT = f"{_TAG}str"
_PLAIN = {
    MappingNode: {f"{_TAG}map"},
    SequenceNode: {f"{_TAG}seq"},
    ScalarNode: {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str")},
}


class Problem(NamedTuple):
    """Something wrong in a file: where, and in words; an empty path means the file as a whole."""

    line: int
    path: Path
    message: str

    def told(self, file: str) -> str:
        """One line for people and editors: ``file:line: path.to.field: message``."""
        where = ".".join(map(str, self.path))
        return f"{file}:{self.line}: {where}: {self.message}" if where else f"{file}:{self.line}: {self.message}"


class Document(NamedTuple):
    """The values of a file, the line of each path in it, and what is wrong with its form."""

    content: Any
    lines: dict[Path, int]
    problems: list[Problem]


def read_document(raw: bytes) -> Document:
    """Read a file's bytes; whatever is wrong becomes a problem, and nothing is raised."""
    if len(raw) > LIMIT_BYTES:
        return _broken(1, f"the file has {len(raw)} bytes; at most {LIMIT_BYTES} are read")
    try:
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
        if root is None:
            return _broken(1, "the file is empty; the least that it needs is 'schema_version: 1'")
        return _Reader().read(root)
    except UnicodeDecodeError as error:
        return _broken(raw.count(b"\n", 0, error.start) + 1, "not UTF-8 text")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(part for part in (error.context, error.problem) if part)
        return _broken(mark.line + 1 if mark else 1, f"not valid YAML: {words}")
    except yaml.YAMLError as error:
        return _broken(1, f"not valid YAML: {' '.join(str(error).split())}")
    except RecursionError:
        return _broken(1, "nested too deeply")


def _broken(line: int, message: str) -> Document:
    return Document(None, {}, [Problem(line, (), message)])


class _Reader:
    def __init__(self) -> None:
        self._lines: dict[Path, int] = {}
        self._problems: list[Problem] = []
        self._seen: set[int] = set()
        self._scalars = SafeConstructor()

    def read(self, root: Node) -> Document:
        content = self._value(root, ())
        return Document(content, self._lines, self._problems)

    def _value(self, node: Node, path: Path) -> Any:
        """The node's value; None, with a problem noted, for one that is refused."""
        self._lines.setdefault(path, _line(node))
        if id(node) in self._seen:
            return self._refuse(path, "aliases (*name) are not read; what is shared belongs under default or routes")
        self._seen.add(id(node))
        if node.tag not in _PLAIN[type(node)]:
            return self._refuse(
                path, f"the tag {node.tag.replace(_TAG, '!!')} is not read here; put text in quotes, drop other tags"
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._value(item, (*path, position)) for position, item in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, ArithmeticError):  # an explicit tag that does not fit
            return self._refuse(path, f"{node.value[:40]!r} is no {node.tag.removeprefix(_TAG)}")

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag != _TEXT or not isinstance(key, ScalarNode):
                self._problems.append(Problem(_line(key), path, _wrong_key(key)))
                continue
            inner = (*path, key.value)
            if key.value in content:
                self._problems.append(Problem(_line(key), inner, f"given twice; first in line {self._lines[inner]}"))
                continue
            self._lines[inner] = _line(key)
            content[key.value] = self._value(value, inner)
        return content

    def _refuse(self, path: Path, message: str) -> None:
        self._problems.append(Problem(self._lines[path], path, message))


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _wrong_key(key: Node) -> str:
    if not isinstance(key, ScalarNode):
        return "keys are text, not lists or mappings"
    if key.tag == f"{_TAG}merge":
        return "merge keys (<<) are not read; what is shared belongs under default or routes"
    return f"keys are text; put {key.value[:40]!r} in quotes"
