"""Removal of credentials from URLs before they are shown, logged, written to results or sent.

Credentials are a user and a password, the values of a query (``?token=...``) and a fragment. What is not understood is
removed: of a malformed URL only the protocol stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from sylva_ray.core.yaml import YamlError, parse_yaml, to_yaml

MASK = "***"

_BEGINNING = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_END = re.compile(r"""[\s"'<>`|\\^{}]|[),.;:]+(?=\s|$)""")
"""What ends a URL in a text: a character that no URL has, or punctuation before a space."""

_PARAMETER = re.compile(r";([^;=/@]*)=([^;/]*)")

_SERVERS = frozenset({"http", "https", "ftp", "sftp", "postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle"})
"""Protocols in whose addresses an ``@`` after a slash ends a password rather than being part of a path."""

_HARMLESS = frozenset(
    {"", "region", "charset", "driver", "sslmode", "ssl_mode", "timeout", "check_same_thread", "cache"}
)
"""Keys of a query whose values are no secrets."""

_SECRET_VARIABLES = re.compile(r"(PASSWORD|TOKEN|SECRET|CREDENTIAL|API_KEY|ACCESS_KEY)", re.IGNORECASE)
_VARIABLE_PREFIXES = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "DATABRICKS_", "FSSPEC_")
MIN_SECRET = 4
"""Characters of the shortest secret that is looked for by itself; shorter ones are parts of ordinary words."""


def mask_credentials(text: str, *known: str) -> str:
    """Replace the credentials of every URL in a text by ``***``.

    Args:
        text: any text.
        known: URLs whose credentials are replaced wherever they stand, e.g. in a message that quotes a part of the URL.

    >>> mask_credentials("uri: https://ada:s3/cr@t@mlflow.example:5000/x?token=abc (503)")
    'uri: https://***@mlflow.example:5000/x?token=*** (503)'
    >>> mask_credentials("sqlite:////runs/mlflow.db")
    'sqlite:////runs/mlflow.db'
    """
    parts, place = [], 0
    for begin, end in _urls(text):
        parts += [text[place:begin], _masked(text[begin:end])]
        place = end
    masked = "".join([*parts, text[place:]])
    for secret in sorted(_secrets(known), key=len, reverse=True):
        masked = masked.replace(secret, MASK)
    return masked


def mask_value(value: Any) -> Any:
    """Return a setting, or a tree of settings, without the credentials in its texts.

    A text that begins with a protocol is one URL, whatever is in it.
    """
    if isinstance(value, Mapping):
        return {key: mask_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [mask_value(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return _masked(value) if _BEGINNING.match(value) else mask_credentials(value)


def mask_yaml(text: str) -> str:
    """Return a configuration as YAML without credentials."""
    if "://" not in text:
        return text
    try:
        return to_yaml(mask_value(parse_yaml(text)))
    except YamlError:  # the file is damaged; it is shown as it is
        return mask_credentials(text)


def has_credentials(text: str) -> bool:
    """Return whether a URL in a text has credentials."""
    return any(_masked(text[begin:end]) != text[begin:end] for begin, end in _urls(text))


def _urls(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the URLs in a text begin and end."""
    place = 0
    while (start := _BEGINNING.search(text, place)) is not None:
        end = _END.search(text, start.end())
        place = len(text) if end is None else end.start()
        yield start.start(), place


def _masked(url: str) -> str:
    """Return a URL without its credentials."""
    scheme = url.partition("://")[0]
    try:
        parts = _split(url)
        _ = parts.port
    except ValueError:
        return f"{scheme}://{MASK}"
    address = f"{MASK}@{parts.netloc.rpartition('@')[2]}" if "@" in parts.netloc else parts.netloc
    address, path = _PARAMETER.sub(_masked_parameter, address), _PARAMETER.sub(_masked_parameter, parts.path)
    query = "&".join(_masked_pair(pair) for pair in parts.query.split("&")) if parts.query else ""
    ending = (f"?{query}" if parts.query or url.endswith("?") else "") + (f"#{MASK}" if parts.fragment else "")
    return f"{scheme}://{address}{path}{ending}"


def _masked_parameter(found: re.Match[str]) -> str:
    """Return ``;key=value`` without the value, as connections to SQL Server and old web servers have them."""
    return found.group() if found[1].lower() in _HARMLESS else f";{found[1]}={MASK}"


def _split(url: str) -> SplitResult:
    """Split a URL at the last ``@`` before the query: a password may hold any character that nobody has escaped.

    Raises:
        ValueError: it is malformed.
    """
    scheme, _, rest = url.partition("://")
    before, at, after = rest.rpartition("@")
    is_server = scheme.partition("+")[0].lower() in _SERVERS and "?" not in before
    if at and (is_server or ":" in before.partition("/")[0]):  # user:password@, with whatever is in the password
        parts = urlsplit(f"{scheme}://{after}")
        return parts._replace(netloc=f"{before}@{parts.netloc}")
    return urlsplit(url)


def _masked_pair(pair: str) -> str:
    key, equals, value = pair.partition("=")
    if not equals:
        return MASK if pair else ""
    return pair if key.lower() in _HARMLESS or not value else f"{key}={MASK}"


def _secrets(known: tuple[str, ...]) -> set[str]:
    """Return the secrets of URLs and of the environment, in every spelling."""
    found: set[str] = set()
    for url in known:
        found |= _secrets_of(url)
    for name, value in os.environ.items():
        if name.startswith(_VARIABLE_PREFIXES) and _SECRET_VARIABLES.search(name):
            found.add(value)
    return {secret for secret in found if len(secret) >= MIN_SECRET}


def _secrets_of(url: str) -> set[str]:
    try:
        parts = _split(url)
    except ValueError:
        return {url.partition("://")[2]}
    user_info = parts.netloc.rpartition("@")[0]
    user, _, password = user_info.partition(":")
    secrets = {user_info, password, *([] if password else [user]), parts.fragment}
    secrets |= {pair.partition("=")[2] for pair in parts.query.split("&") if pair.partition("=")[0] not in _HARMLESS}
    secrets |= {value for key, value in parse_qsl(parts.query) if key.lower() not in _HARMLESS}
    secrets |= {value for key, value in _PARAMETER.findall(url) if key.lower() not in _HARMLESS}
    secrets |= {unquote(secret) for secret in secrets}
    return secrets | {quote(secret, safe="") for secret in secrets}
