"""Events as lines with time stamps: sentences, or one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sylva_ray.core.text import LogFormat


class EventLines:
    """Writes one line per event.

    Args:
        write: takes a line without its end.
        form: ``plain``: a time stamp and a sentence; ``json``: an object with the keys ``time`` (ISO 8601, UTC),
            ``event`` and those of the event.
    """

    def __init__(self, write: Callable[[str], None], form: LogFormat = "plain") -> None:
        self._write, self._form = write, form

    def tell(self, event: str, sentence: str, **values: object) -> None:
        """Write a line.

        Args:
            event: the name of the event, for JSON.
            sentence: what happened, for people.
            values: the same as numbers and texts, for JSON.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        is_json = self._form == "json"
        self._write(json.dumps(_finite({"time": now, "event": event, **values})) if is_json else f"{now}  {sentence}")


def _finite(value: Any) -> Any:
    """Return a value with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
