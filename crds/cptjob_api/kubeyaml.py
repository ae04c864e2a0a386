"""YAML as Kubernetes reads it, with the line of every value.

kubectl reads manifests through sigs.k8s.io/yaml, whose plain scalars are neither PyYAML's nor
quite YAML 1.1: `2e-5` is a number, `on` and `y` are booleans, `12:30` and `2001-01-01` are
strings, `017` is octal. A manifest must mean the same here. Duplicate keys are refused.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import yaml

from cptjob_api.fields import Path
from cptjob_trainer.errors import Fault, ManifestError

MAX_BYTES = 1 << 20  # etcd takes no larger object
MAX_NODES = 100_000  # aliases can multiply

_TRUE = {"y", "yes", "true", "on"}
_FALSE = {"n", "no", "false", "off"}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INTEGERS = (
    (re.compile(r"0[bB]([01]+)"), 2),
    (re.compile(r"0[oO]([0-7]+)"), 8),
    (re.compile(r"0[xX]([0-9a-fA-F]+)"), 16),
    (re.compile(r"0([0-7]+)"), 8),
    (re.compile(r"(0|[1-9][0-9]*)"), 10),
)
_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1

_PLAIN = "plain"
_STR, _INT, _FLOAT_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Document:
    """One document: its value, and the line (from 1) on which each field or item begins."""

    value: Any
    line: int
    lines: dict[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """The line of a field, or of the nearest one above it that is written down."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.line)


def scalar(text: str) -> Any:
    """The value of a plain scalar: None, bool, int, float or str."""
    if text in ("", "~") or (text.lower() == "null" and _one_case(text)):
        return None
    if text.lower() in _TRUE | _FALSE and _one_case(text):
        return text.lower() in _TRUE
    number = _number(text)
    return text if number is None else number


def _one_case(word: str) -> bool:
    """yes, Yes and YES, but not yEs."""
    return word in (word.lower(), word.upper(), word.capitalize())


def _number(text: str) -> int | float | None:
    if text[:1] not in "+-.0123456789":
        return None
    if _SPECIAL_FLOAT.fullmatch(text):
        return math.nan if "n" in text.lower()[-1:] else math.inf
    digits = text.replace("_", "") if text[0] != "_" else text
    sign = -1 if digits.startswith("-") else 1
    unsigned = digits[1:] if digits[:1] in ("+", "-") else digits
    for pattern, base in _INTEGERS:
        match = pattern.fullmatch(unsigned)
        if match:
            value = sign * int(match[1], base)
            # What fits no integer of Go's is read as a float.
            return value if _INT64_MIN <= value <= _UINT64_MAX else _as_json(float(value))
    if not _FLOAT.fullmatch(digits):
        return None
    decimal = float(digits)
    # Go calls this out of range and leaves the text as it is.
    return None if math.isinf(decimal) else _as_json(decimal)


def _as_json(value: float) -> int | float:
    """Go writes 3.0 as 3 on its way to the API server, so whole floats become integers."""
    if value.is_integer() and abs(value) < 1e21:
        return int(Decimal(repr(value)))  # the digits that are written, not those behind them
    return value


class _Loader(yaml.SafeLoader):
    """Composes nodes; plain scalars keep a tag of their own so that we decide what they are."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _STR
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


def documents(text: str, file: str) -> Iterator[Document]:
    """The documents in a text that are not empty. Raises ManifestError with every fault of one."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ManifestError(
            faults=[Fault(file, 0, "larger than 1 MiB, which no cluster would take")]
        )
    try:
        for node in yaml.compose_all(text.removeprefix("\ufeff"), Loader=_Loader):
            if node is not None:
                document = _Builder(file).build(node)
                if document.value is not None:
                    yield document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        words = " ".join(each for each in (error.context, error.problem) if each)
        raise ManifestError(faults=[Fault(file, line, f"not YAML: {words}")]) from error
    except yaml.YAMLError as error:
        raise ManifestError(faults=[Fault(file, 0, f"not YAML: {error}")]) from error
    except RecursionError as error:
        raise ManifestError(faults=[Fault(file, 0, "nested too deeply")]) from error


class _Dumper(yaml.SafeDumper):
    """Writes what Kubernetes reads back as it was; equal parts are written out again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves `y` bare, which is a boolean to Kubernetes.
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar(_STR, text, style=style)


_Dumper.add_representer(str, _write_text)


def dump(value: Any) -> str:
    """A plain value as YAML that Kubernetes reads as the same value."""
    written = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return str(written)


class _Builder:
    """Turns nodes into values and gathers faults on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.lines: dict[Path, int] = {}
        self.open: set[int] = set()
        self.built = 0

    def build(self, node: yaml.Node) -> Document:
        value = self._value(node, ())
        if self.faults:
            raise ManifestError(faults=self.faults)
        return Document(value, node.start_mark.line + 1, self.lines)

    def _fault(self, node: yaml.Node, message: str) -> None:
        self.faults.append(Fault(self.file, node.start_mark.line + 1, message))

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self.built += 1
        if self.built > MAX_NODES:
            raise ManifestError(faults=[Fault(self.file, 0, f"more than {MAX_NODES} values")])
        if id(node) in self.open:
            self._fault(node, "an anchor contains itself")
            return None
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.open.add(id(node))
        try:
            return self._build(node, path)
        finally:
            self.open.discard(id(node))

    def _build(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*path, index)) for index, each in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node):
            key = self._key(key_node)
            if key is None:
                continue
            here = (*path, key)
            if key in result:
                first = self.lines[here]
                self._fault(key_node, f"{key} is given twice, first on line {first}")
                continue
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self._value(value_node, here)
        return result

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Keys and values, those of a merge (`<<`) included."""
        for key, value in node.value:
            if key.tag == _PLAIN and key.value == "<<":
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for each in merged:
                    if not isinstance(each, yaml.MappingNode) or id(each) in self.open:
                        self._fault(key, "<< needs a mapping, or a list of them")
                    else:
                        yield from self._pairs(each)
            else:
                yield key, value

    def _key(self, node: yaml.Node) -> str | None:
        value = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if value is None:
            self._fault(node, "a key must be text")
            return None
        if isinstance(value, bool):
            return "true" if value else "false"
        return str(value)

    def _scalar(self, node: yaml.Node) -> Any:
        text = str(node.value)
        if node.tag == _STR or node.tag not in (_PLAIN, _INT, _FLOAT_TAG, _BOOL, _NULL):
            return text
        value = scalar(text)
        wanted: dict[str, Any] = {_INT: int, _FLOAT_TAG: (int, float), _BOOL: bool}
        if node.tag in wanted and (
            not isinstance(value, wanted[node.tag])
            or (isinstance(value, bool) and node.tag != _BOOL)
        ):
            self._fault(node, f"{text!r} is no {node.tag.rpartition(':')[2]}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._fault(node, f"{text} is no number that JSON knows")
            return None
        return value
