"""Find the parquet files of a data set's halves by their names.

docs/datasets.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import shortened
from sylva_ray.data.sources import Halves, choose_halves, is_hidden, split_of

SUFFIX = ".parquet"
EXPECTED = "train.parquet, train-*.parquet or train/*.parquet, and the same for test, in PATH or in PATH/data"

SHARD = re.compile(r"(\d+)-of-(\d+)")
"""The number of a file and the number of all files, as in ``train-00000-of-00002.parquet``."""

Groups = dict[str, dict[str, list[Path]]]
"""Files by split and by the pattern that their names have in common."""


def find_parquet(root: Path, key: str) -> Halves[list[Path]]:
    """Return the files of the training half and of the test half, each sorted by name.

    Args:
        root: the folder of the data set.
        key: the data set, for messages.

    Raises:
        UserError: a half has no files, or it cannot be told which files belong to it.
    """
    groups: Groups = {}
    unread: list[Path] = []
    for base in (root, root / "data"):
        for entry in _visible(base, key):
            if entry.is_dir():
                files = [file for file in _visible(entry, key) if file.suffix == SUFFIX]
                split, pattern = split_of(entry.name), f"{entry.relative_to(root)}/*{SUFFIX}"
            else:
                files = [entry] if entry.suffix == SUFFIX else []
                split, stem = _split_of_file(entry.stem, key) if files else (None, "")
                pattern = f"{entry.relative_to(root).parent / stem}*{SUFFIX}"
            if files and split is not None:
                groups.setdefault(split, {}).setdefault(pattern, []).extend(files)
            elif entry != root / "data":
                unread += files
    halves = choose_halves(key, groups, EXPECTED + _found(root, unread))
    for pattern_files in (halves.train, halves.test):
        _check_shards(root, pattern_files, key)
    _refuse_equal_files(root, (*halves.train, *halves.test), key)
    if not unread:
        return halves
    count = "1 parquet file is" if len(unread) == 1 else f"{len(unread):,} parquet files are"
    notice = f"{key}: {count} not read: {shortened(file.relative_to(root) for file in unread)}"
    return replace(halves, notices=(*halves.notices, notice))


def _visible(folder: Path, key: str) -> list[Path]:
    """Return what is in a folder and not hidden, sorted; nothing if it is no folder."""
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name)) if folder.is_dir() else []
    except OSError as error:
        raise UserError("dataset.name", key, f"has a folder that cannot be read: {folder} ({error.strerror})") from None


def _split_of_file(stem: str, key: str) -> tuple[str | None, str]:
    """Return the split that a word in a file's name stands for, and the name up to that word."""
    words = list(re.finditer(r"[^-_. ]+", stem))
    found = [(split, word.end()) for word in words if (split := split_of(word.group())) is not None]
    if len({split for split, _ in found}) > 1:
        raise UserError("dataset.name", key, f"has a file whose name has two splits: {stem}{SUFFIX}; rename it")
    return (found[0][0], stem[: found[0][1]]) if found else (None, "")


def _check_shards(root: Path, files: Sequence[Path], key: str) -> None:
    """Refuse files of one split of which one is missing, or which do not belong together."""
    names = shortened(file.relative_to(root) for file in files)
    for file in files:
        if not file.is_file():
            raise UserError("dataset.name", key, f"has {file.relative_to(root)}, which is a broken link or no file")
    numbered = [match for file in files if (match := SHARD.search(file.stem))]
    if not numbered:
        in_own_folder = split_of(files[0].parent.name) is not None
        if len(files) > 1 and not in_own_folder and any(not file.stem[-1].isdigit() for file in files):
            raise UserError("dataset.name", key, f"has several files of one split without numbers: {names}; keep one")
        return
    shards = sorted(int(match[1]) for match in numbered)
    counts = {int(match[2]) for match in numbered}
    if len(numbered) < len(files) or len(counts) > 1 or len(set(shards)) < len(shards):
        raise UserError("dataset.name", key, f"has files of one split that do not belong together: {names}")
    count = counts.pop()
    if len(shards) != count:
        raise UserError("dataset.name", key, f"has {len(shards)} of {count} files of one split: {names}")


def _refuse_equal_files(root: Path, files: Sequence[Path], key: str) -> None:
    """Refuse links that make one file two, e.g. the training half the test half."""
    known: dict[tuple[int, int], Path] = {}
    for file in files:
        found = file.stat()
        other = known.setdefault((found.st_dev, found.st_ino), file)
        if other != file:
            twice = f"{other.relative_to(root)} and {file.relative_to(root)}"
            raise UserError("dataset.name", key, f"has the same file twice, as {twice}; remove one of them")


def _found(root: Path, unread: Sequence[Path]) -> str:
    """Return what the folder has instead of the expected files, for the end of a message."""
    if not unread:
        return ""
    below = [file.parent for file in unread if file.parent != root]
    hint = f"; try parquet:{below[0]}" if below else ""
    return f"; found {shortened(file.relative_to(root) for file in unread)}{hint}"
