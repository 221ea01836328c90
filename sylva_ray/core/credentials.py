"""Removal of credentials from tracking URIs before they are shown, logged or sent."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/\s@]*:[^/\s]*@")


def mask_credentials(text: str) -> str:
    """Replace ``user:password@`` in every URI of a text by ``***@``.

    >>> mask_credentials("uri: https://ada:s3cret@mlflow.example:5000/x")
    'uri: https://***@mlflow.example:5000/x'
    >>> mask_credentials("sqlite:////runs/mlflow.db")
    'sqlite:////runs/mlflow.db'
    """
    return _USER_INFO.sub("***@", text)
