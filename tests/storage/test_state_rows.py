"""States as rows of files: what is written, what is shared, what is read back, and what stays on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sylva_ray.core.errors import UserError
from sylva_ray.storage.arrays import arrays_in, read_content, write_rows
from sylva_ray.storage.checkpoint import CheckpointFolder, Kept
from sylva_ray.storage.manifest import write_manifest
from sylva_ray.storage.state_rows import StoredStates
from tests.federation.runs import bare_record

State = dict[str, np.ndarray]


def own_states(num_clients: int, seed: int = 0) -> list[State]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (4,)}
    return [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(num_clients)]


class Run:
    """Checkpoints of one step after the other."""

    def __init__(self, root: Path, num_kept: int = 2) -> None:
        self.folder, self.num_kept, self.step = CheckpointFolder(root), num_kept, -1
        self.stored: StoredStates | None = None

    def save(self, states: list[State]) -> list[State]:
        self.step += 1
        records = [bare_record(step) for step in range(self.step + 1)]
        self.stored = self.folder.save(self.step, states, records, None, before=self.stored, kept=Kept(self.num_kept))
        assert self.stored is not None
        return [dict(state) for state in self.stored.states]

    def resume(self) -> list[State]:
        checkpoint = self.folder.latest()
        assert checkpoint is not None
        assert checkpoint.step == self.step
        self.stored = checkpoint.stored
        return checkpoint.states

    def file(self, name: str) -> Path:
        return self.folder.root / f"round_{self.step:04d}" / name


def assert_equal(found: list[State], expected: list[State]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_only_new_arrays_are_written_and_idle_clients_stay_where_they_are(tmp_path: Path) -> None:
    run, states = Run(tmp_path), own_states(10)
    states = run.save(states)
    assert load_file(run.file("states.safetensors"))["a"].shape == (10, 2, 3)
    assert not run.file("places.safetensors").exists()
    first = run.file("states.safetensors").stat().st_ino
    states[4] = own_states(1, seed=1)[0]
    states[7] = states[7] | {"b": np.ones(4, np.float32)}
    states = run.save(states)
    written = load_file(run.file("states.safetensors"))
    assert (len(written["a"]), len(written["b"])) == (1, 2)
    assert run.file("rows_0000.safetensors").stat().st_ino == first, "a link, not a copy"
    assert_equal(run.resume(), states)


def test_clients_that_share_an_array_share_its_row(tmp_path: Path) -> None:
    run, common = Run(tmp_path), own_states(1)[0]
    states = run.save([dict(common) for _ in range(50)])
    assert {name: len(value) for name, value in load_file(run.file("states.safetensors")).items()} == {"a": 1, "b": 1}
    found = run.resume()
    assert_equal(found, states)
    assert found[0]["a"] is found[49]["a"]


def test_nothing_new_writes_no_row(tmp_path: Path) -> None:
    run = Run(tmp_path)
    states = run.save(own_states(3))
    run.save(states)
    assert load_file(run.file("states.safetensors")) == {}
    assert_equal(run.resume(), states)


def test_a_run_that_is_resumed_at_every_step_writes_the_same_bytes(tmp_path: Path) -> None:
    """A tenth of the fleet changes in every step; files of which little is left are not kept."""
    contents = {}
    for name, resumes in (("whole", False), ("resumed", True)):
        run, rng, states = Run(tmp_path / name), np.random.default_rng(0), own_states(40)
        for step in range(60):
            states = run.save(states)
            if resumes:
                states = run.resume()
            for client in rng.choice(40, 4, replace=False):
                states[client] = own_states(1, seed=1000 * step + int(client))[0]
        found = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents[name] = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found}
    assert contents["whole"] == contents["resumed"]
    newest = [name for name in contents["whole"] if name.startswith("round_0059") and "rows" in name + "states"]
    sizes = [len(contents["whole"][name]) for name in newest if name.endswith("safetensors")]
    assert sum(sizes) < 3 * len(save({n: np.stack([s[n] for s in own_states(40)]) for n in "ab"}))
    assert [path.name for path in sorted((tmp_path / "whole").iterdir())] == ["round_0058", "round_0059"]


def test_states_cannot_be_changed_in_place(tmp_path: Path) -> None:
    """A change in place would not be written."""
    states = Run(tmp_path).save(own_states(2))
    with pytest.raises(ValueError, match="read-only"):
        states[0]["a"] += 1


def test_large_files_are_mapped_with_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("arrays", "state_rows"):
        monkeypatch.setattr(f"sylva_ray.storage.{module}.MIN_MAPPED_BYTES", 0)
    run, states = Run(tmp_path), own_states(5)
    mapped = run.save(states)
    assert_equal(mapped, states)
    assert mapped[0]["a"] is not states[0]["a"]
    mapped[2] = own_states(1, seed=5)[0]
    assert_equal(run.save(mapped), mapped)
    assert_equal(run.resume(), mapped)


def test_rows_are_a_safetensors_file(tmp_path: Path) -> None:
    rows: dict[str, list[np.ndarray]] = {
        "x": [np.arange(3, dtype=np.int64)] * 2,
        "yy": [np.full((2, 2), 7, np.float32)],
        "z": [np.array(True)],
    }
    write_rows(tmp_path / "x", rows)
    found = load_file(tmp_path / "x")
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[name], np.stack(rows[name])) for name in rows)


def test_a_mapped_file_with_a_wrong_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sylva_ray.storage.arrays.MIN_MAPPED_BYTES", 0)
    good = save({"x": np.ones((2, 3), np.float32)})
    for content in (good[:-1], good.replace(b"[2,3]", b"[2,9]"), (2**60).to_bytes(8, "little") + good[8:], good[:9]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match="is not a safetensors file"):
            arrays_in(tmp_path / "x", read_content(tmp_path / "x", "checkpoint"))


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"a,b": np.array([[0, 0], [0, 9]], np.int32)}, "names rows of 'a' that step 0 does not have"),
        ({"a,b": np.array([[0, 0], [5, 0]], np.int32)}, "names rows of 'a' that step 5 does not have"),
        ({"a,b": np.array([[0, -1], [0, 0]], np.int32)}, "names rows of 'a' that step 0 does not have"),
        ({"a,c": np.zeros((2, 2), np.int32)}, "names rows of 'c'"),
        ({"a,b": np.zeros((2, 2), np.float32)}, "must be int32"),
        ({"a": np.zeros((2, 2), np.int32), "b": np.zeros((3, 2), np.int32)}, "one row per client"),
        ({}, "one row per client"),
    ],
)
def test_places_that_do_not_exist_are_refused(places: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save([own_states(1)[0]] * 2)
    run.file("places.safetensors").write_bytes(save(places))
    names = ("progress.json", "states.safetensors", "places.safetensors")
    run.file("manifest.json").write_text(write_manifest(0, {name: run.file(name).read_bytes() for name in names}))
    with pytest.raises(UserError, match=says):
        run.folder.latest()
