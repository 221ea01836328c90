"""Valid settings of every section, drawn from its schema, and damage that is done to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.core.sections import Section
from sylva_ray.core.yaml import to_yaml

Strategy = st.SearchStrategy[Any]

TRICKY_TEXTS = (
    "1:30",
    "no",
    "0x1F",
    "0o17",
    "~",
    "",
    " leading",
    "trailing ",
    "true",
    "8/255",
    "a: b",
    "# x",
    "é字😀",
    "'",
    '"',
    "1e3",
    "<<",
    "*a",
    "!x",
)
"""Texts that a careless writer or reader of YAML takes for something else."""

TEXTS = st.sampled_from(TRICKY_TEXTS) | st.text(max_size=20).filter(str.isprintable)


def valid(section: type[Section]) -> Strategy:
    """Return mappings with some of a section's keys; each value is valid, rules over several keys may be broken."""
    schema = section.model_json_schema()
    return _from_schema(schema, schema.get("$defs", {}))


def _from_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Strategy:
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return _OWN[name]() if name in _OWN else _from_schema(definitions[name], definitions)
    if "anyOf" in schema:
        return st.one_of([_from_schema(part, definitions) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    return {
        "object": _mapping, "array": _list, "integer": _number, "number": _number, "string": _text,
        "boolean": lambda *_: st.booleans(), "null": lambda *_: st.none(), None: lambda *_: PLAIN,
    }[kind](schema, definitions)  # fmt: skip


def _mapping(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Strategy:
    if "properties" not in schema:
        inner = schema.get("additionalProperties")
        values = _from_schema(inner, definitions) if isinstance(inner, dict) else PLAIN
        return st.dictionaries(TEXTS.filter(lambda key: key not in ("", "<<")), values, max_size=3)
    keys = {key: _from_schema(part, definitions) for key, part in schema["properties"].items()}
    required = {key: keys.pop(key) for key in schema.get("required", ())}
    return st.fixed_dictionaries(required, optional=keys)


def _list(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Strategy:
    if "prefixItems" in schema:
        return st.tuples(*[_from_schema(part, definitions) for part in schema["prefixItems"]]).map(list)
    return st.lists(_from_schema(schema["items"], definitions), min_size=schema.get("minItems", 0), max_size=3)


def _number(schema: Mapping[str, Any], _: object) -> Strategy:
    low, high = (schema.get(key, schema.get(f"exclusiveM{key[1:]}")) for key in ("minimum", "maximum"))
    if schema["type"] == "integer":
        return st.integers(low + ("exclusiveMinimum" in schema), high - ("exclusiveMaximum" in schema))
    open_low, open_high = "exclusiveMinimum" in schema, "exclusiveMaximum" in schema
    return st.floats(low, high, allow_nan=False, exclude_min=open_low, exclude_max=open_high)


def _text(schema: Mapping[str, Any], _: object) -> Strategy:
    return st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True) if "pattern" in schema else TEXTS


def _attack() -> Strategy:
    return st.one_of([valid(attack) for attack in ATTACKS.values()])


def _algorithm() -> Strategy:
    def named(name: str) -> Strategy:
        return valid(ALGORITHMS[name].Parameters).map(lambda parameters: {"name": name} | parameters)

    return st.sampled_from(sorted(ALGORITHMS)).flatmap(named)


_OWN = {"Attack": _attack, "AlgorithmSection": _algorithm}
"""Sections whose keys depend on a name."""

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e38, 1e38) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
"""Any value that YAML holds."""

_NUMBERS = [True, -1, 0, 2**31, 2**64, 10**50, 0.5, 1e308, float("inf"), float("nan")]
_TEXTS = ["", "x", "3", "1:30", "a\nb", "\0", "x" * 9999]
_TREES: list[Any] = [None, [], {}, [None], [[[]]], {"name": 3}, {"a": {"b": {"c": 1}}}]
WRONG = st.sampled_from([*_NUMBERS, *_TEXTS, *_TREES])
"""What is seldom a right value."""


@st.composite
def damaged(draw: st.DrawFn, tree: Any) -> Any:
    """Return a copy of a tree with a few keys and values replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        tree = _damaged_once(draw, tree)
    return tree


def _damaged_once(draw: st.DrawFn, tree: Any) -> Any:
    is_deeper = isinstance(tree, dict | list) and tree and draw(st.integers(0, 4))
    if not is_deeper:
        return draw(WRONG | PLAIN)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if draw(st.integers(0, 5)):
        copy[key] = _damaged_once(draw, tree[key])
    elif isinstance(copy, dict):
        copy[draw(TEXTS.filter(bool) | st.sampled_from([str(key).upper(), f"{key}x", "int", "name"]))] = copy.pop(key)
    else:
        copy.append(copy[key])
    return copy


_SIGNS = [
    "&a ",
    "*a",
    "<<: ",
    "---\n",
    "...",
    "? ",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "\\",
    "|\n",
    "#",
    "%YAML 1.1\n",
]
_OTHERS = ["\n", "\t", " ", "\0", "\ufeff", "\x85", "é", "😀", "name: x\n", "!!python/name:os.system "]
PIECES = st.sampled_from([*_SIGNS, *_OTHERS, "[" * 5000, "{a: " * 2000, "9" * 5000])
"""Pieces with a meaning in YAML, and some that no text of ours has."""


@st.composite
def damaged_text(draw: st.DrawFn, text: str) -> str:
    """Return a text with pieces inserted, parts removed, and parts repeated."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + draw(PIECES | st.just("") | st.just(text[start:end] * 2)) + text[end:]
    return text


def texts_like(trees: Strategy) -> Strategy:
    """Return contents of YAML files: valid trees, damaged trees, damaged texts, and bytes of any kind."""
    written = (trees | trees.flatmap(damaged)).map(to_yaml)
    texts = written | written.flatmap(damaged_text) | st.lists(PIECES | TEXTS).map("".join)
    return texts.map(lambda text: text.encode(errors="replace")) | st.binary(max_size=300)
