"""A tracker of one's own: one line of CSV per stage and metric.

sylva-ray run digits --import . 'tracking.observers=[examples.own_tracker:Csv]'
"""

from __future__ import annotations

from collections.abc import Mapping

from sylva_ray.observers.tracker import Tracker


class Csv(Tracker):
    """Writes ``metrics.csv`` into the run folder. An error here is a warning of the run, which goes on."""

    def start(self, step: int) -> None:
        """See `Tracker.start`. The file of a run that continues is kept."""
        if step == 0:
            (self.folder / "metrics.csv").write_text("step,metric,value\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        with (self.folder / "metrics.csv").open("a") as file:
            file.writelines(f"{step},{name},{value!r}\n" for name, value in values.items())
