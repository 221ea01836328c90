r"""The one reader and the one writer of YAML, for every file and setting of this package.

Plain words become values by the core schema of YAML 1.2: ``true`` and ``false`` are the only booleans, ``1e-3`` is a
number, ``017`` is 17, and ``yes``, ``1:30``, ``1_000`` and ``2026-01-31`` are texts. What could be lost or misread in
silence is refused, with its line: a key that is given twice, a key that is no text, tags (``!!set``), merge keys
(``<<``). An alias is a copy of what its anchor names. Depth, size and the number of values are bounded.

>>> parse_yaml("{time: 1:30, lr: 1e-3, enabled: yes}")
{'time': '1:30', 'lr': 0.001, 'enabled': 'yes'}
>>> parse_yaml("a: 1\na: 2")
Traceback (most recent call last):
    ...
sylva_ray.core.yaml.YamlError: line 2: the key 'a' is given twice (first in line 1)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from sylva_ray.core.bounds import MAX_DEPTH
from sylva_ray.core.text import abbreviated

MAX_CHARACTERS = 500_000
"""Of a text: more than a sweep over 10,000 values takes."""

MAX_VALUES = 50_000
"""Of one text, with the copies that its aliases stand for."""

MAX_DIGITS = 100
"""Characters of a number."""

MAX_KEY = 500
"""Characters of a key."""

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # only its parser is used; PyYAML may be built without libyaml

_INT, _OCTAL, _HEX = r"[-+]?[0-9]+", r"0o[0-7]+", r"0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Scalar: TypeAlias = str | int | float | bool | None


class YamlError(ValueError):
    """A text is not YAML as this package reads it. The message is one line that begins with the number of the line."""


class EmptyYamlError(YamlError):
    """A text contains nothing, or comments only."""


def parse_yaml(text: str) -> object:
    """Parse a text with one document.

    Returns:
        Nested dictionaries and lists of texts, numbers, booleans and None; nothing in it is shared.

    Raises:
        EmptyYamlError: there is no document.
        YamlError: the text is not valid, see the module's rules, or has several documents.
    """
    documents = parse_documents(text)
    if not documents:
        raise EmptyYamlError("it contains nothing")
    if len(documents) > 1:
        raise YamlError(f"it contains {len(documents)} documents, and one is expected: remove the lines `---`")
    return documents[0]


def parse_documents(text: str) -> list[object]:
    """Parse a text with any number of documents, e.g. a manifest for Kubernetes; otherwise as `parse_yaml`."""
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"it has {len(text):,} characters, and {MAX_CHARACTERS:,} are read at most")
    try:
        return list(_Builder(text).documents())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.problem, error.context)))
        line = mark.line if mark else 0
        if any(
            re.match(r" *\t", broken) for broken in text.splitlines()[line : line + 1]
        ):  # none at the end of the text
            problem = "it is indented with a tab, which YAML does not allow: use blanks"
        raise YamlError(f"line {line + 1}: {problem}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise YamlError(" ".join(str(error).split())) from None
    except UnicodeError:
        raise YamlError("it contains characters that are not Unicode text") from None


def parse_scalar(text: str) -> Scalar:
    """Convert a plain word to the value that it stands for in YAML 1.2.

    Raises:
        YamlError: a number is too long.

    >>> [parse_scalar(word) for word in ("8", "-1e-3", "0x1F", "0o17", "017", "~", "True", "1_000", "8/255")]
    [8, -0.001, 31, 15, 17, None, True, '1_000', '8/255']
    """
    if text in _WORDS:
        return _WORDS[text]
    bases = ((_INT, 10), (_OCTAL, 8), (_HEX, 16))
    base = next((base for pattern, base in bases if re.fullmatch(pattern, text)), None)
    is_float = base is None and re.fullmatch(f"{_FLOAT}|{_NOT_FINITE}", text) is not None
    if (base or is_float) and len(text) > MAX_DIGITS:
        raise YamlError(f"a number has {len(text):,} characters, and {MAX_DIGITS} are read at most")
    if base:
        return int(text, base)
    if is_float:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def to_yaml(value: object) -> str:
    """Return a value as YAML that `parse_yaml` reads back equal.

    Texts that YAML 1.1 or 1.2 would read as anything else are quoted, so that other programs read them alike.

    Args:
        value: nested mappings and lists of texts, finite numbers, booleans and None.
    """
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, width=MAX_CHARACTERS)


class _Builder:
    """Builds values from the events of a parser, so that a limit ends the parsing and no value is made twice."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Event] = yaml.parse(text, Loader=_PARSER)
        self._anchors: dict[str, object] = {}
        self._num_values = 0

    def documents(self) -> Iterator[object]:
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                self._anchors.clear()
                yield self._value(next(self._events), 0)

    def _value(self, event: Event, depth: int) -> object:
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                name = abbreviated(event.anchor, length=60)
                raise _error(event, f"*{name} stands for an anchor that is not complete before it")
            return self._copy(event, self._anchors[event.anchor], depth)
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        self._count(event, depth)
        if event.tag is not None:
            tag = abbreviated(event.tag, length=60)
            raise _error(event, f"the tag {tag} is not read: write texts in quotes and everything else without tag")
        value = self._content(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _content(self, event: Event, depth: int) -> object:
        if isinstance(event, MappingStartEvent):
            return self._mapping(depth)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(depth)
        assert isinstance(event, ScalarEvent)
        try:
            return parse_scalar(event.value) if event.implicit[0] else event.value
        except YamlError as error:
            raise _error(event, str(error)) from None

    def _sequence(self, depth: int) -> list[object]:
        values = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            key, line = self._value(event, depth + 1), _line(event)
            if not isinstance(key, str):
                raise _error(event, f"the key {key!r} is not a text: write it in quotes")
            if key == "<<":
                raise _error(event, "merge keys (<<) are not part of YAML 1.2: write the keys themselves")
            if len(key) > MAX_KEY or not key.isprintable():
                raise _error(event, f"a key must be printable and of at most {MAX_KEY} characters")
            if key in mapping:
                raise _error(event, f"the key {key!r} is given twice (first in line {lines[key]})")
            mapping[key] = self._value(next(self._events), depth + 1)
            lines[key] = line
        return mapping

    def _copy(self, event: Event, value: object, depth: int) -> object:
        self._count(event, depth)
        if isinstance(value, dict):
            return {key: self._copy(event, inner, depth + 1) for key, inner in value.items()}
        return [self._copy(event, inner, depth + 1) for inner in value] if isinstance(value, list) else value

    def _count(self, event: Event, depth: int) -> None:
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise _error(event, f"more than {MAX_DEPTH} lists and mappings are inside each other")
        if self._num_values > MAX_VALUES:
            raise _error(event, f"there are more than {MAX_VALUES:,} values, those of aliases included")


def _error(event: Event, problem: str) -> YamlError:
    return YamlError(f"line {_line(event)}: {problem}")


def _line(event: Event) -> int:
    """Return the number of the line in which an event begins, from 1."""
    return event.start_mark.line + 1 if event.start_mark else 1


class _Writer(yaml.SafeDumper):
    """PyYAML's writer, which knows YAML 1.1, with the numbers of YAML 1.2 beside them; it writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - as PyYAML declares it
        return True


for _tag, _pattern in (("int", f"{_OCTAL}|{_HEX}|{_INT}"), ("float", f"{_FLOAT}|{_NOT_FINITE}")):
    _Writer.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
