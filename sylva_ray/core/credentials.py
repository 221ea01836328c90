"""Passwords in tracking URIs stay out of whatever is shown or sent: warnings, report, tracked parameters."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/\s@]*:[^/\s]*@")


def mask_credentials(text: str) -> str:
    """``user:password@`` in any URI becomes ``***@``.

    >>> mask_credentials("uri: https://ada:s3cret@mlflow.example:5000/x")
    'uri: https://***@mlflow.example:5000/x'
    >>> mask_credentials("sqlite:////runs/mlflow.db")
    'sqlite:////runs/mlflow.db'
    """
    return _USER_INFO.sub("***@", text)
