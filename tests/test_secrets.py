"""Credentials in URLs are in no output, no error and no file that others can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.config.cluster import ClusterSection
from sylva_ray.core.credentials import has_credentials, mask_credentials, mask_value, mask_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.yaml import parse_yaml, to_yaml
from sylva_ray.execution.ray.session import check_authentication
from sylva_ray.storage.atomic import write_atomically
from tests.conftest import TINY

pytestmark = pytest.mark.long

MASKED = {
    "https://ada:s3cret@host:5000/x": "https://***@host:5000/x",
    "https://token@host/x": "https://***@host/x",
    "https://ada:@host/x": "https://***@host/x",
    "https://ada:s3/cr/et@host/x": "https://***@host/x",
    "https://ada:s3@cr@et@host/x": "https://***@host/x",
    "https://ada:s3:cr:et@host/x": "https://***@host/x",
    "https://ada:s3?cr#et@host/x": "https://***@host/x",
    "https://ada:s3%2Fcr%40et@host/x": "https://***@host/x",
    "https://ada:p@[::1]:5000/x": "https://***@[::1]:5000/x",
    "https://host/x?token=s3cret": "https://host/x?token=***",
    "https://host/x?region=eu&sig=a=b&empty=": "https://host/x?region=eu&sig=***&empty=",
    "https://host/x?s3cret": "https://host/x?***",
    "https://host/x#s3cret": "https://host/x#***",
    "https://ada:p@host/x?token=t#f": "https://***@host/x?token=***#***",
    "postgresql://ada:p@db:5432/mlflow": "postgresql://***@db:5432/mlflow",
    "mysql+pymysql://ada:p%25@db/mlflow?charset=utf8": "mysql+pymysql://***@db/mlflow?charset=utf8",
    "databricks://profile:s3cret@workspace": "databricks://***@workspace",
    "s3://key:s3cret@bucket/run": "s3://***@bucket/run",
    "simplecache::s3://key:s3cret@bucket/run": "simplecache::s3://***@bucket/run",
    "https://[::1/s3cret": "https://***",
    "https://ada:s3cret": "https://***",
    "https://host:99999/s3cret": "https://***",
    "sqlite:////runs/mlflow.db": "sqlite:////runs/mlflow.db",
    "https://host:5000/a/@b": "https://***@b",  # it may be a password with a slash
    "https://to/s3cret@host/x": "https://***@host/x",  # a token with a slash looks like a path
    "https://host/a@b": "https://***@b",
    "s3://bucket/a@b": "s3://bucket/a@b",
    "https://host/x?to=a@b": "https://host/x?to=***",
    "jdbc:sqlserver://host;user=ada;password=s3cret/x": "jdbc:sqlserver://host;user=***;password=***/x",
    "https://host/x;token=s3cret": "https://host/x;token=***",
    "file:///a/b": "file:///a/b",
    "https://": "https://",
    "no URL: a@b, 8/255": "no URL: a@b, 8/255",
}


@pytest.mark.parametrize("url", MASKED)
def test_what_becomes_of_a_url(url: str) -> None:
    assert mask_credentials(url) == mask_value(url) == MASKED[url]
    assert mask_value({"tracking": [{"uri": url}]}) == {"tracking": [{"uri": MASKED[url]}]}
    assert mask_credentials(f"at {url}, then (see {url}). End") == f"at {MASKED[url]}, then (see {MASKED[url]}). End"
    assert has_credentials(url) == (url != MASKED[url])
    assert parse_yaml(mask_yaml(to_yaml({"uri": url}))) == {"uri": MASKED[url]}


@pytest.mark.parametrize("password", ["it's-me", 'a"b"c', "one two", "a\\b\\c", "a|b|c", "a<b>", "a,b, c", "ü€ß$"])
def test_a_password_of_any_characters_in_a_setting(password: str) -> None:
    url = f"https://ada:{password}@host/x"
    assert mask_value(url) == "https://***@host/x"
    assert parse_yaml(mask_yaml(to_yaml({"tracking": {"uri": url}}))) == {"tracking": {"uri": "https://***@host/x"}}
    assert password not in str(UserError("tracking.uri", url, f"there is no {url}"))[:60]
    assert password not in mask_credentials(f"no answer to /x with {password}, {quote(password)}", url)


def test_a_message_that_quotes_a_part_of_a_known_url(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://ada:pa%2Fss@host/x?token=t0ken"
    text = "HTTPConnectionPool(host='host'): no url: /x/api?token=t0ken (pa/ss, pa%2Fss, ada:pa%2Fss)"
    masked = mask_credentials(text, url)
    assert not {"t0ken", "pa/ss", "pa%2Fss"} & {word for word in ("t0ken", "pa/ss", "pa%2Fss") if word in masked}
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from-the-environment")
    assert mask_credentials("401 for from-the-environment") == "401 for ***"


def test_an_error_shows_no_credentials() -> None:
    error = UserError("tracking.urii", "https://ada:s3cret@host", "unknown key in https://ada:s3cret@host")
    assert str(error) == "tracking.urii = 'https://***@host': unknown key in https://***@host"


@pytest.mark.parametrize(("text", "mode"), [("uri: https://a:b@host\n", 0o600), ("uri: https://host\n", 0o644)])
def test_a_file_with_credentials_is_for_its_owner_only(text: str, mode: int, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / ".config.yaml").write_text("left by a process that was killed")
        path = write_atomically(tmp_path / "config.yaml", text)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


SECRETS = ("us3r-name", "pa/ss@w:rd", "t0k3n-value")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a store that does not answer and whose URL has a user, a password and a token; and all its output."""
    root = tmp_path_factory.mktemp("tracked")
    user, password, token = SECRETS
    uri = f"http://{user}:{quote(password, safe='')}@127.0.0.1:9/path?token={token}"
    config: dict[str, Any] = TINY | {
        "tracking": {"uri": uri, "flush_timeout_s": 5.0},
        "training": TINY["training"] | {"rounds": 1},
        "algorithm": {"name": "fedit_at"},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(config))
    outputs = ""
    for words in (
        ["run", str(root / "c.yaml"), "--out", str(root / "run")],
        ["run", str(root / "run"), "--resume"],
        ["report", str(root / "run")],
        ["track", str(root / "run")],
        ["compare", str(root / "run")],
        ["compare", "an-experiment", "--uri", uri],
        ["run", str(root / "c.yaml"), f"tracking.urii={uri}", "--out", str(root / "x")],
        ["run", str(root / "c.yaml"), "--out", f"s4://{user}:{password}@bucket/{token}?token={token}"],
    ):
        result = CliRunner().invoke(app, words)
        outputs += result.output + result.stderr + str(result.exception or "")
    return root, outputs


def spellings() -> set[str]:
    """The secrets as they are and escaped; ``pa`` alone would be part of other words."""
    return {text for secret in SECRETS for text in (secret, quote(secret, safe=""), quote(secret))}


def test_no_output_of_any_command_holds_a_secret(tracked: tuple[Path, str]) -> None:
    _, outputs = tracked
    assert "did not receive" in outputs
    lines = [line for line in outputs.splitlines() if any(secret in line for secret in spellings())]
    assert [line for line in lines if "s4://" not in line] == []
    assert all(SECRETS[1] not in line for line in lines)


def test_no_file_but_the_config_holds_a_secret_and_that_is_private(tracked: tuple[Path, str]) -> None:
    root, _ = tracked
    holders = {
        path.relative_to(root / "run")
        for path in (root / "run").rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in spellings())
    }
    assert holders == {Path("config.yaml")}
    assert stat.S_IMODE((root / "run" / "config.yaml").stat().st_mode) == 0o600


@pytest.mark.parametrize(("mode", "accepted"), [(None, True), ("token", True), ("disabled", False), ("", False)])
def test_ray_without_a_token_needs_a_flag(mode: str | None, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    check_authentication(ClusterSection(allow_unauthenticated=True))
    if accepted:
        check_authentication(ClusterSection())
    else:
        with pytest.raises(UserError, match=r"RAY_AUTH_MODE = .*cluster\.allow_unauthenticated=true"):
            check_authentication(ClusterSection())


def test_the_cluster_file_installs_a_fixed_program_and_keeps_the_store_off_command_lines() -> None:
    text = (Path(__file__).parents[1] / "cluster.yaml").read_text()
    raw = yaml.safe_load(text)
    assert "| sh\n" not in text
    assert "sha256sum --check" in " ".join(raw["setup_commands"])
    assert "MLFLOW_STORE" not in " ".join(raw["setup_commands"] + raw["worker_start_ray_commands"])
    assert "--backend-store-uri" not in " ".join(raw["head_start_ray_commands"])
