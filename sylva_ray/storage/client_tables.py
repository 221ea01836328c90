"""What a record says of single clients, in Parquet files beside ``rounds.jsonl``, where these are many.

::

    rounds.jsonl                                     clients/stage_0007-4f1c09ae52d37b60.parquet
    {"step": 7, ..., "client_table": {"file": ...}}  one row per client: client, participants, metrics/loss, ...

A file is written before the line that names it. Its name ends with the beginning of its SHA-256, so that a file never
changes: wherever a write or a copy is interrupted, a line and the file that it names fit each other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.files import read_regular_file
from sylva_ray.core.records import ClientTable
from sylva_ray.core.text import as_argument
from sylva_ray.storage.atomic import sync_folder, write_atomically
from sylva_ray.storage.manifest import folder_name

MAX_CLIENTS_IN_LINE = 256
"""A record of more clients has a file."""

TABLE = "client_table"
"""The key of a line that names its file; see `ClientTable`."""

FOLDER = "clients"

GROUPS = ("participants", "missing", "dropped", "panel", "byzantine")
"""Keys of a record whose value is a list of client numbers; as columns, true or false."""

KEYS = (*GROUPS, "refused", "metrics", "evaluation", "neighbours")
"""All keys that say something of single clients, in the order of the columns."""

Column = dict[int, Any]
"""``{client: value}``; clients without a value are absent, and null in the file."""

_NAME = re.compile(r"stage_-?\d+-[0-9a-f]{16}\.parquet")


class ClientTables:
    """The Parquet files of a run. Creating the object does not access the disk.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / FOLDER

    def stored(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file of a record, and return the line that names it.

        Args:
            record: as plain values.

        Returns:
            The line; the record itself where it is of few clients, or holds what no table can (client numbers that are
            none, in a file that was changed by hand).
        """
        try:
            columns = _columns_of(record)
            if len(set().union(*columns.values())) <= MAX_CLIENTS_IN_LINE:
                return dict(record)
            content = _to_parquet(columns)
        except (ValueError, TypeError, OverflowError):
            return dict(record)
        path = self.folder / _name(record["step"], content)
        if not (path.is_file() and path.read_bytes() == content):
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.run)
            write_atomically(path, content, durable=True)
        moved = _record_of(columns)
        table = ClientTable(file=f"{FOLDER}/{path.name}", counts=_counts(columns), means=_means(columns))
        return {key: value for key, value in record.items() if key not in moved} | {TABLE: table.to_json()}

    def restored(self, line: dict[str, Any], source: str) -> dict[str, Any]:
        """Return the record of a line.

        Args:
            line: as `stored` returned it.
            source: where it stands, for messages.

        Raises:
            UserError: the file that it names is missing, damaged, or that of another line.
        """
        if TABLE not in line:
            return line
        table = ClientTable.from_json(line[TABLE], source)
        if not is_client_table(table.file):
            raise UserError("records", source, f"names a file of another kind; {self._fix}")
        path = self.run / table.file
        try:
            content = read_regular_file(path, "records")
        except FileNotFoundError:
            raise UserError("records", str(path), f"is missing, and {source} names it; {self._fix}") from None
        if path.name != _name(line.get("step"), content):
            raise UserError("records", str(path), f"is damaged, or not the file of {source}; {self._fix}")
        try:
            columns = _from_parquet(content)
            in_order = {name: columns[name] for name in (*table.means, *columns)}
            return {key: value for key, value in line.items() if key != TABLE} | _record_of(in_order)
        except Exception as error:  # pyarrow raises errors of many types
            raise UserError("records", str(path), f"cannot be read ({reason_of(error)}); {self._fix}") from None

    def remove_others(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Remove the files that none of ``lines`` names, and what writes left that were interrupted."""
        named = {line[TABLE]["file"] for line in lines if TABLE in line}
        for path in [*self._files(), *self.drafts()]:
            if f"{FOLDER}/{path.name}" not in named:
                path.unlink()
        with suppress(OSError):  # it is not empty, or not there
            self.folder.rmdir()

    def drafts(self) -> list[Path]:
        """Return what writes left that were interrupted."""
        return self._files(prefix=".")

    def _files(self, prefix: str = "") -> list[Path]:
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        own = [path for path in paths if path.name.startswith(prefix) and _NAME.fullmatch(path.name, len(prefix))]
        return [path for path in own if not path.is_dir()]

    @property
    def _fix(self) -> str:
        return f"restore it with: sylva-ray repair {as_argument(self.run)}"


def is_client_table(name: str) -> bool:
    """Return whether a file is one of these, by its path in the run folder."""
    folder, _, name = name.partition("/")
    return folder == FOLDER and _NAME.fullmatch(name) is not None


def without_file(line: object) -> object:
    """Return a line of ``rounds.jsonl`` without the name of its file, which depends on the version of pyarrow."""
    if isinstance(line, dict) and isinstance(table := line.get(TABLE), dict):
        return line | {TABLE: {key: value for key, value in table.items() if key != "file"}}
    return line


def _name(step: object, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()[:16]
    return f"{folder_name(step, 'stage') if isinstance(step, int) else step}-{digest}.parquet"


def _columns_of(record: Mapping[str, Any]) -> dict[str, Column]:
    """Return what a record says of single clients, without what `_record_of` would not return as it was.

    Raises:
        ValueError: a client has no number.
        TypeError: the record is of another form.
    """
    panel = record.get("panel")
    columns: dict[str, Column] = {}
    for key in KEYS:
        value = record.get(key)
        if value is None:
            continue
        if key in GROUPS:
            found = {key: dict.fromkeys(value, True)}
        elif key == "refused":
            found = {key: _by_number(value)}
        elif key == "metrics":
            found = {f"metrics/{metric}": _by_number(by_client) for metric, by_client in value.items()}
        elif key == "evaluation":
            found = {
                f"evaluation/{condition}/{name}": dict(zip(panel or range(len(values)), values, strict=True))
                for condition, accuracies in value.items()
                for name, values in accuracies.items()
            }
        else:
            found = {f"neighbours/{name}": dict(enumerate(rows)) for name, rows in value.items()}
        if _record_of(found) == {key: value}:
            columns |= found
    return columns


def _by_number(by_client: Mapping[str, Any]) -> Column:
    return {int(client): value for client, value in by_client.items()}


def _record_of(columns: Mapping[str, Column]) -> dict[str, Any]:
    """Invert `_columns_of`: lists are in the order of the client numbers."""
    record: dict[str, Any] = {}
    for column_name, column in columns.items():
        key, _, name = column_name.partition("/")
        by_client = sorted(column.items())
        values = [value for _, value in by_client]
        if key in GROUPS:
            record[key] = sorted(column)
        elif key == "refused":
            record[key] = {str(client): value for client, value in by_client}
        elif key == "metrics":
            record.setdefault(key, {})[name] = {str(client): value for client, value in by_client}
        elif key == "evaluation":
            condition, _, name = name.rpartition("/")
            record.setdefault(key, {}).setdefault(condition, {})[name] = values
        elif key == "neighbours":
            record.setdefault(key, {})[name] = values
    return record


def _counts(columns: Mapping[str, Column]) -> dict[str, int]:
    return {name: len(column) for name, column in columns.items() if not _is_number(name)}


def _means(columns: Mapping[str, Column]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    left_out = columns.get("byzantine", {})
    for name, column in columns.items():
        if _is_number(name):
            finite = [value for client, value in column.items() if client not in left_out and isfinite(value)]
            means[name] = fmean(finite) if finite else None
    return means


def _is_number(name: str) -> bool:
    return name.startswith(("metrics/", "evaluation/"))


def _to_parquet(columns: Mapping[str, Column]) -> bytes:
    """Return a Parquet file; equal columns give equal bytes, whatever their order is."""
    import pyarrow as pa  # few processes need it
    import pyarrow.parquet as pq

    types = dict.fromkeys(GROUPS, pa.bool_()) | {
        "refused": pa.string(),
        "neighbours/members": pa.list_(pa.int32()),
        "neighbours/weights": pa.list_(pa.float64()),
    }
    clients = sorted(set().union(*columns.values()))
    arrays = {"client": pa.array(clients, pa.int32())}
    for name in sorted(columns, key=lambda name: (KEYS.index(name.partition("/")[0]), name)):
        otherwise = False if name in GROUPS else None
        values = [columns[name].get(client, otherwise) for client in clients]
        arrays[name] = pa.array(values, types.get(name, pa.float64()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), sink, compression="zstd")
    return bytes(sink.getvalue())


def _from_parquet(content: bytes) -> dict[str, Column]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    clients = table["client"].to_numpy()
    columns: dict[str, Column] = {}
    for name in table.column_names[1:]:
        array = table[name].combine_chunks()
        has_value = (array if name in GROUPS else array.is_valid()).to_numpy(zero_copy_only=False)
        present = array.filter(pa.array(has_value))
        if pa.types.is_list(array.type):
            values = [row.tolist() for row in present.to_numpy(zero_copy_only=False)]
        elif pa.types.is_floating(array.type):
            values = present.to_numpy().tolist()
        else:
            values = present.to_pylist()
        columns[name] = dict(zip(clients[has_value].tolist(), values, strict=True))
    return columns
