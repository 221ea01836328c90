"""YAML 1.2, strictly: what a text means, what is refused, and that what is written is read back."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st

from sylva_ray.core.errors import UserError
from sylva_ray.core.files import read_text_file
from sylva_ray.core.yaml import EmptyYamlError, YamlError, parse_documents, parse_yaml, to_yaml

TEXTS = (
    "1:30",
    "yes",
    "No",
    "on",
    "OFF",
    "y",
    "2026-01-31",
    "2026-13-01",
    "1_000",
    "0b1",
    "8/255",
    "0o8",
    "0xG",
    "+.nan",
    "<",
    "=",
)
NUMBERS = {
    "0o17": 15,
    "017": 17,
    "0x1F": 31,
    "-3": -3,
    "+3": 3,
    "1e-3": 0.001,
    "1.": 1.0,
    ".5": 0.5,
    "-1.5E+2": -150.0,
    "1e400": math.inf,
}


@pytest.mark.parametrize("word", TEXTS)
def test_these_are_texts(word: str) -> None:
    assert parse_yaml(f"a: {word}") == {"a": word}


@pytest.mark.parametrize("word", NUMBERS)
def test_these_are_numbers(word: str) -> None:
    read: Any = parse_yaml(f"a: {word}")
    assert read == {"a": NUMBERS[word]}
    assert type(read["a"]) is type(NUMBERS[word])
    assert parse_yaml(f"a: '{word}'") == {"a": word}


def test_the_other_plain_words() -> None:
    assert parse_yaml("[true, False, TRUE, tRue, null, ~, Null, .inf, -.INF, ]") == [
        *(True, False, True, "tRue", None, None, None),
        *(math.inf, -math.inf),
    ]
    read: Any = parse_yaml("{a: .NaN, b: , c: -.nan}")
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (None, "-.nan")


def test_an_alias_is_a_copy() -> None:
    read: Any = parse_yaml("a: &x {b: [1]}\nc: *x\n")
    assert read == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert read["a"] is not read["c"]
    assert read["a"]["b"] is not read["c"]["b"]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghijklm"
)

REFUSED = {
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice (first in line 1)"),
    "a key twice, in a section": ("s:\n  a: 1\n  a: 2", "line 3: the key 'a' is given twice (first in line 2)"),
    "a key twice, in braces": ("- {a: 1, 'a': 2}", "line 1: the key 'a' is given twice"),
    "a key twice, by an alias": ("{&k a: 1, *k : 2}", "line 1: the key 'a' is given twice"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a, b: 2}", "line 2: merge keys (<<)"),
    "a number as a key": ("1: a", "line 1: the key 1 is not a text"),
    "a truth as a key": ("true: a", "line 1: the key True is not a text"),
    "nothing as a key": ("~: a", "line 1: the key None is not a text"),
    "a list as a key": ("? [a]\n: b", "is not a text"),
    "a key that cannot be printed": ('"a\\nb": 1', "line 1: a key must be printable"),
    "a very long key": (f"? {'k' * 600}\n: 1", "at most 500 characters"),
    "Python's tags": ("a: !!python/object/apply:os.system [ls]", "line 1: the tag tag:yaml.org,2002:python/object"),
    "a binary": ("a: !!binary aGk=", "line 1: the tag tag:yaml.org,2002:binary"),
    "a set": ("!!set {a, b}", "line 1: the tag tag:yaml.org,2002:set"),
    "a tag of one's own": ("a:\n  - !x 1", "line 2: the tag !x"),
    "an alias of nothing": ("a: *b", "line 1: *b stands for"),
    "an alias of itself": ("a: &a [*a]", "line 1: *a stands for"),
    "an anchor of another document": ("a: &a 1\n---\nb: *a", "line 3: *a stands for"),
    "a bomb of aliases": (BOMB, "more than 50,000 values"),
    "a deep list": ("[" * 100_000, "line 1: more than 32 lists and mappings"),
    "a deep mapping": ("{a: " * 100_000, "line 1: more than 32 lists and mappings"),
    "a deep block": ("- " * 100_000, "line 1: more than 32 lists and mappings"),
    "depth by aliases": (
        "a: &a [[[[[[[[1]]]]]]]]\nb: &b [[[[[[[[*a]]]]]]]]\nc: &c [[[[[[[[*b]]]]]]]]\nd: [[[[[[[[*c]]]]]]]]",
        "line 4: more than 32",
    ),
    "many values": ("- a\n" * 50_001, "more than 50,000 values"),
    "a long text": ("a" * 500_001, "500,001 characters"),
    "a long number": (f"a: {'9' * 5000}", "line 1: a number has 5,000 characters"),
    "a long hexadecimal number": (f"a: 0x{'f' * 5000}", "line 1: a number has 5,002 characters"),
    "a list without end": ("a: [1, 2\nb: 3", "line 2: "),
    "a zero byte": ("a: \0", "control characters"),
    "half of a character": ("a: \ud800", "not Unicode"),
    "a version of the future": ("%YAML 3.0\n---\na", "incompatible"),
    "two documents": ("a: 1\n---\nb: 2", "2 documents"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_misread_is_refused_at_once_with_its_line(case: str) -> None:
    text, says = REFUSED[case]
    started = time.process_time()
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert time.process_time() - started < 2
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n", "# nothing\n"])
def test_a_text_without_a_document_is_empty_and_null_is_not(text: str) -> None:
    with pytest.raises(EmptyYamlError):
        parse_yaml(text)
    assert parse_documents(text) == []
    assert parse_yaml("null") is None
    assert parse_documents("a: 1\n---\n- 2") == [{"a": 1}, [2]]


WORDS = [
    "~",
    "",
    " ",
    " leading",
    "trailing ",
    "null",
    "true",
    "#",
    "a: b",
    "- a",
    "a #b",
    "'",
    '"',
    "\\",
    "!x",
    "&x",
    "*x",
]
SIGNS = [
    "|",
    ">",
    "%",
    "@",
    "`",
    "{",
    "[",
    ",",
    "?",
    ":",
    "-",
    "---",
    "...",
    "<<",
    "0o",
    ".",
    "+",
    "1e",
    "1e5",
    "-0",
    "00",
]
OTHERS = ["é", "字", "😀", "\x85", "\u2028", "\ufeff", "a\nb", "\n", "\t", "\r\n", "\x1b[31m", "x" * 300, "word " * 60]
TRICKY = st.sampled_from([*TEXTS, *NUMBERS, *WORDS, *SIGNS, *OTHERS, "1_0.5", "190:20:30"])
ANY_TEXT = TRICKY | st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False) | ANY_TEXT
KEYS = ANY_TEXT.filter(lambda key: key.isprintable() and key != "<<")
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(TREES)
def test_what_is_written_is_read_back_equal(tree: object) -> None:
    written = to_yaml(tree)
    assert repr(parse_yaml(written)) == repr(tree)


@given(st.dictionaries(KEYS, TRICKY | st.integers(-99, 99) | st.booleans(), max_size=4))
def test_other_programs_read_the_same_texts(tree: dict[str, object]) -> None:
    """YAML 1.1, which Ray and most others read; only its numbers are spelt in other ways."""
    assert pyyaml.safe_load(to_yaml(tree)) == tree


def test_no_anchors_are_written() -> None:
    shared = [1]
    assert to_yaml({"a": shared, "b": shared}) == "a:\n- 1\nb:\n- 1\n"


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_text_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("a: é\r\n".encode())
    assert read_text_file(path) == "a: é\r\n"


FILES = {
    "latin 1": (b"a: \xe9", "not a text in UTF-8 (byte 3)"),
    "UTF-16": ("a: b".encode("utf-16"), "not a text in UTF-8 (byte 0)"),
    "a byte order mark": (b"\xef\xbb\xbfa: b", "byte order mark"),
    "a large file": (b" " * 2_000_001, "larger than 2 MB"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_another_kind_is_refused(case: str, tmp_path: Path) -> None:
    content, says = FILES[case]
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text_file(tmp_path / "a.yaml")
    assert says in caught.value.fix


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "nothing", "no such file"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(UserError) as caught:
            read_text_file(path)
        assert says in caught.value.fix, path
