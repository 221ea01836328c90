"""Write the tables of docs/sizing.md from the code that foretells runs.

    python scripts/sizing_docs.py [--check] [NAME ...]

A table stands below a comment that names its configuration in configs/. With ``--check`` nothing is written, and the
exit code is 1 if a table is not what the code says.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sylva_ray.config.experiment import load_config
from sylva_ray.provisioning.forecast import forecast
from sylva_ray.provisioning.forecast_lines import markdown_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sizing.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n\n)((?:\|.*\n)*\n?)")


def table_of(name: str) -> str:
    """Return the table of a configuration, as on a cluster whose head has no GPU."""
    overrides = ["cluster.address=auto", "cluster.gpus_per_actor=1"]
    return markdown_table(forecast(load_config(ROOT / "configs" / f"{name}.yaml", overrides)))


def page(text: str, names: list[str]) -> str:
    """Return the page with the tables of some configurations made anew; no names: of all."""

    def replaced(match: re.Match[str]) -> str:
        return match[0] if names and match[2] not in names else f"{match[1]}{table_of(match[2])}\n"

    return TABLE.sub(replaced, text)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="configurations; none: all of the page")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    before = PAGE.read_text()
    after = page(before, given.names)
    if not given.check:
        PAGE.write_text(after)
    return int(given.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
