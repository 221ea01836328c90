"""Read images from folders: PATH/SPLIT/CLASS/IMAGE, or PATH/CLASS/IMAGE, which is split by class.

docs/datasets.md has the rules.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import abbreviated, did_you_mean, shortened
from sylva_ray.data.images import image_suffixes
from sylva_ray.data.sources import Source, Sources, choose_halves, is_hidden, split_of, splits_in, stratified_halves

EXPECTED = "PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, or PATH/CLASS/*.png"


_REMEDY = f"expected {EXPECTED}"


class _Scan:
    """The folder of a data set, and what in it is not read.

    Args:
        root: the folder.

    Attributes:
        unread: files that are not images or not in the folder of a class, and entries that are no files.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.key = root, f"imagefolder:{root}"
        self.unread: list[Path] = []
        self._entries: dict[Path, tuple[list[Path], list[Path]]] = {}
        self._names: dict[tuple[int, int], Path] = {}

    def refuse(self, fix: str) -> UserError:
        """Return the error that refuses the folder."""
        return UserError("dataset.name", self.key, fix)

    def shown(self, path: Path) -> str:
        """Return a path below the root as text, abbreviated if it is long."""
        return abbreviated(f"{path.relative_to(self.root)}{'/' if path.is_dir() else ''}", length=200)

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the folders and the files in a folder, sorted. Hidden ones are left out, links are followed.

        Raises:
            UserError: the folder cannot be read, or it was read under another name: a link leads to it.
        """
        if folder not in self._entries:
            try:
                self._refuse_second_name(folder)
                self._entries[folder] = self._read(folder)
            except OSError as error:
                fix = f"has a folder that cannot be read: {self.shown(folder)} ({error.strerror})"
                raise self.refuse(fix) from None
        return self._entries[folder]

    def _refuse_second_name(self, folder: Path) -> None:
        """Refuse a folder that was read under another name; it would not end, or put an image into two classes."""
        found = folder.stat()
        other = self._names.setdefault((found.st_dev, found.st_ino), folder)
        if other != folder and os.path.realpath(other) == os.path.realpath(folder):  # inodes are not unique everywhere
            twice = f"{self.shown(other)} and {self.shown(folder)}"
            raise self.refuse(f"has the same folder twice, as {twice}, one of which is a link; remove it")

    def _read(self, folder: Path) -> tuple[list[Path], list[Path]]:
        folders, files = [], []
        with os.scandir(folder) as found:
            for entry in found:
                path = folder / entry.name
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(path)
                elif entry.is_file():
                    files.append(path)
                else:  # a broken link, a pipe, a device
                    self.unread.append(path)
        return sorted(folders), sorted(files)

    def files_below(self, folder: Path) -> Iterator[Path]:
        """Yield every file in a folder and in the folders in it."""
        waiting = [folder]
        while waiting:
            folders, files = self.entries(waiting.pop())
            yield from files
            waiting += folders


def read_folder(root: Path) -> Sources:
    """Read a folder of images.

    Args:
        root: the folder, which exists.

    Raises:
        UserError: the folders of splits and classes do not form a data set; the message names the first problem.
    """
    scan = _Scan(root)
    folders, files = scan.entries(root)
    found, others = _splits_among(folders)
    if not found:
        names, labelled = _labelled_images(scan, root)
        train, test = stratified_halves(labelled)
        return Sources(train, test, names, _notices(scan, names))
    scan.unread += files
    _refuse_images_beside_splits(scan, found, others)
    halves = choose_halves(scan.key, found, EXPECTED)
    names, train = _labelled_images(scan, halves.train)
    test = _test_images(scan, halves.test, names)
    return Sources(train, test, names, halves.notices + _notices(scan, names))


def _splits_among(folders: Sequence[Path]) -> tuple[dict[str, dict[str, Path]], list[Path]]:
    """Return the folders of splits by split and name, and the other folders."""
    found: dict[str, dict[str, Path]] = {}
    others = []
    for folder in folders:
        split = split_of(folder.name)
        if split is None:
            others.append(folder)
        else:
            found.setdefault(split, {})[f"{folder.name}/"] = folder
    return found, others


def _refuse_images_beside_splits(scan: _Scan, found: Mapping[str, Mapping[str, Path]], others: Sequence[Path]) -> None:
    for folder in others:
        for path in scan.files_below(folder):
            if _is_image(path):
                split = next(iter(next(iter(found.values()))))
                raise scan.refuse(f"has images in {folder.name}/ beside {split}, which is a split; {_REMEDY}")
            scan.unread.append(path)


def _labelled_images(scan: _Scan, top: Path) -> tuple[tuple[str, ...], Source]:
    """Return the names of the class folders in ``top``, which must all hold images, and the images."""
    folders, files = scan.entries(top)
    scan.unread += files
    if not folders:
        where = "" if top == scan.root else f" in {top.name}/"
        outside = sum(map(_is_image, files))
        found = f"; {outside} images lie outside of the folder of a class" if outside else ""
        raise scan.refuse(f"has no folders of classes{where}{found}; {_REMEDY}")
    _check_class_folders(scan, folders)
    by_class = [_images_of_class(scan, folder) for folder in folders]
    for folder, images in zip(folders, by_class):
        if not images:
            others = [path.name for path in scan.unread if folder in path.parents]
            held = f"it holds {shortened(others)}" if others else "it is empty"
            fix = f"has no images in the class folder {scan.shown(folder)} ({held}); fill or remove it"
            raise scan.refuse(fix if any(by_class) else f"{fix}; {_REMEDY}")
    return tuple(folder.name for folder in folders), _source(by_class)


def _test_images(scan: _Scan, top: Path, names: Sequence[str]) -> Source:
    """Return the images of the classes ``names`` in the folder of the test half."""
    folders, files = scan.entries(top)
    scan.unread += files
    for folder in folders:
        if folder.name not in names:
            spelling = unicodedata.normalize("NFC", folder.name)
            is_same = spelling in {unicodedata.normalize("NFC", name) for name in names}
            hint = "it is there in another Unicode spelling" if is_same else did_you_mean(folder.name, names)
            fix = f"has class {folder.name!r} in {top.name}/ but not in the training half; {hint}"
            raise scan.refuse(fix.rstrip("; "))
    by_name = {folder.name: _images_of_class(scan, folder) for folder in folders}
    if not any(by_name.values()):
        held = f"; it holds {shortened(path.name for path in files)}" if files else ""
        raise scan.refuse(f"has no images in folders of classes in {top.name}/{held}; {_REMEDY}")
    return _source([by_name.get(name, []) for name in names])


def _check_class_folders(scan: _Scan, folders: Sequence[Path]) -> None:
    words = [splits_in(folder.name) for folder in folders]
    if all(words) and len(set().union(*words)) > 1:
        names = shortened(f"{folder.name}/" for folder in folders)
        raise scan.refuse(f"has {names}, names of splits, where the folders of classes are; {_REMEDY}")
    for folder in folders:
        if split_of(folder.name) is not None:
            raise scan.refuse(f"has {scan.shown(folder)}, the name of a split, where the folders of classes are")
        if not folder.name.isprintable():
            raise scan.refuse(f"has a class folder whose name is not printable text: {folder.name!r}; rename it")
    if len(folders) == 1:
        inner, _ = _splits_among(scan.entries(folders[0])[0])
        if inner:
            below = shortened(name for names in inner.values() for name in names)
            raise scan.refuse(f"has one folder, with {below} in it; use imagefolder:{folders[0]}")


def _images_of_class(scan: _Scan, folder: Path) -> list[Path]:
    """Return the images in the folder of a class, and in folders below it, sorted."""
    images: list[Path] = []
    for path in scan.files_below(folder):
        between = path.relative_to(folder).parts[:-1]
        if inner := next((name for name in between if split_of(name) is not None), None):
            fix = f"has {inner}/, the name of a split, in the class folder {scan.shown(folder)}; {_REMEDY}"
            raise scan.refuse(fix)
        (images if _is_image(path) else scan.unread).append(path)
    return sorted(images)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _source(by_class: Sequence[Sequence[Path]]) -> Source:
    files = [path for images in by_class for path in images]
    labels = np.repeat(np.arange(len(by_class)), [len(images) for images in by_class])
    return Source(labels.astype(np.int64), lambda row: files[row], lambda row: str(files[row]))


def _notices(scan: _Scan, names: Sequence[str]) -> tuple[str, ...]:
    notices = []
    if scan.unread:
        count = "1 file is" if len(scan.unread) == 1 else f"{len(scan.unread):,} files are"
        notices.append(f"{scan.key}: {count} not read: {shortened(map(scan.shown, sorted(scan.unread)))}")
    similar: dict[str, list[str]] = {}
    for name in names:
        similar.setdefault(name.casefold().strip(), []).append(name)
    for group in similar.values():
        if len(group) > 1:
            notices.append(f"{scan.key}: classes that differ in case or blanks only: {shortened(map(repr, group))}")
    if all(name.isdecimal() for name in names) and list(map(int, names)) != list(range(len(names))):
        text = f"labels 0 to {len(names) - 1} are the class folders in the order of text: {shortened(names, 12)}"
        notices.append(f"{scan.key}: {text}")
    return tuple(notices)
