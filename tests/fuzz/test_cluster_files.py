"""Files for Ray's cluster launcher and for Kubernetes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sylva_ray.core.yaml import parse_documents, to_yaml

pytest.importorskip("ray")

from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.provisioning.demand import file_lines
from sylva_ray.provisioning.launcher_file import LauncherFile, load_launcher_file, load_promised
from tests.fuzz.outcome import outcome
from tests.fuzz.settings import damaged, damaged_text, texts_like

ROOT = Path(__file__).parents[2]
LOCAL = {
    "cluster_name": "mine",
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]},
    "auth": {"ssh_user": "me"},
}
SHIPPED = [(ROOT / name).read_text() for name in ("cluster.yaml", "deploy/raycluster.yaml")]
TREES = st.sampled_from([*(document for text in SHIPPED for document in parse_documents(text)), LOCAL])
DAMAGED = TREES.flatmap(damaged).map(lambda tree: to_yaml(tree).encode(errors="replace"))


@pytest.fixture(scope="module", autouse=True)
def _ray_is_imported() -> None:
    """The time of the import belongs to no input."""
    load_launcher_file(ROOT / "cluster.yaml", RayLauncher())


@given(
    DAMAGED
    | st.sampled_from(SHIPPED).flatmap(damaged_text).map(lambda text: text.encode(errors="replace"))
    | texts_like(TREES)
)
def test_a_cluster_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content)
    for load in (lambda: load_launcher_file(path, RayLauncher()), lambda: load_promised(path)):
        file = outcome(load, untouched=tmp_path)
        if isinstance(file, LauncherFile):
            outcome(lambda file=file: file_lines(file))  # type: ignore[misc]
            outcome(lambda file=file: RayLauncher().nodes_for(file, [{"CPU": 1}, {"CPU": 2, "GPU": 1}]))  # type: ignore[misc]
