"""Write docs/summary.md from the types of a run's files.

    python scripts/artefact_docs.py

`tests/test_docs.py` holds the page equal to what this prints.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.records import Artefact, ClientTable, StageRecord
from sylva_ray.core.summary import Summary

PAGE = Path(__file__).parents[1] / "docs" / "summary.md"
INTRODUCTION = """\
# Files of a run

Every file below is JSON, and every object a type in `sylva_ray.core.records`, `sylva_ray.core.summary` or
`sylva_ray.core.evaluation`; this page is generated from them by `scripts/artefact_docs.py`. Python reads a run folder
with `sylva_ray.load_run`, whose objects have the keys as attributes: `run.summary.final.benign_accuracy.mean`.

Accuracies are fractions in [0, 1], epsilons are in pixel units (8/255 is 0.0314), K is the number of clients. An
attack's label reads `pgd20-eps4`: 20 steps at epsilon 4/255; `x5` after the steps means 5 restarts, `-margin` a loss
other than cross-entropy. Keys that a file lacks have the default of the type; readers must accept keys that are not
listed.

A stage that concerns more than 256 clients has a short line in `rounds.jsonl`. What it says of single clients is then
in a Parquet file, which `client_table.file` names: one row per client, by ascending number in the column `client`. The
other columns have the names of the keys that they replace: `participants`, `missing`, `dropped`, `panel` and
`byzantine` are true or false; `refused`, `metrics/METRIC`, `evaluation/CONDITION/accuracy` and so on are null where a
client has no value; `neighbours/members` and `neighbours/weights` are lists. `load_run` returns the same records as
from a line that says everything; other tools read both files:

```python
import json

import pandas as pd

lines = [json.loads(line) for line in open("runs/large/rounds.jsonl")]
first_round = pd.read_parquet("runs/large/" + lines[1]["client_table"]["file"])
first_round[first_round.participants].nlargest(5, "metrics/loss")
```

`predictions.safetensors` beside them holds the final model's answers, class numbers as `[n] int16`:
`{benign|ATTACK}/{client}`, and `labels/{client}`. With it, `sylva_ray.metrics.predictions.paired_difference` compares
runs image by image.
"""
FILES: tuple[tuple[str, type[Artefact]], ...] = (
    ("`summary.json`", Summary),
    ("A line of `rounds.jsonl`", StageRecord),
    ("`client_table` in a line of `rounds.jsonl`", ClientTable),
    ("`evaluation.json`", Evaluation),
    ("`inputs.json`", Inputs),
)


def artefacts_in(annotation: object) -> Iterator[type[Artefact]]:
    """Yield the artefact types that stand in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Artefact):
        yield annotation
    for argument in get_args(annotation):
        yield from artefacts_in(argument)


def type_text(annotation: object) -> str:
    """Write an annotation in JSON's words, e.g. ``list of number``."""
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    text = re.sub(r"typing\.|sylva_ray\.core\.\w+\.", "", text)
    words = {"float": "number", "int": "integer", "str": "string", "bool": "boolean", "None": "null"}
    text = re.sub(r"\b(float|int|str|bool|None)\b", lambda match: words[match[0]], text)
    text = text.replace("integer | number", "number").replace("tuple[", "list[").replace(", ...]", "]")
    return text.replace("|", "or").replace("dict[string, ", "object[")


def table(kind: type[Artefact]) -> str:
    """Write one type's fields as a Markdown table."""
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("``", "`").replace("|", "or")
        rows.append(f"| `{name}` | {type_text(field.annotation)} | {meaning} |")
    return "\n".join(rows)


def page() -> str:
    """Write the whole page."""
    parts, documented = [INTRODUCTION], set[type[Artefact]]()
    for title, kind in FILES:
        parts.append(f"## {title}\n\n{_summary_line(kind)}\n\n{table(kind)}\n")
        documented.add(kind)
        for part in _parts_of(kind):
            if part not in documented:
                documented.add(part)
                parts.append(f"### {part.__name__}\n\n{_summary_line(part)}\n\n{table(part)}\n")
    return "\n".join(parts)


def _parts_of(kind: type[Artefact]) -> Iterator[type[Artefact]]:
    """Yield the types inside ``kind``, each before the types inside it."""
    for field in kind.model_fields.values():
        for part in artefacts_in(field.annotation):
            yield part
            yield from _parts_of(part)


def _summary_line(kind: type[Artefact]) -> str:
    text = (kind.__doc__ or "").replace("``", "`")
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
