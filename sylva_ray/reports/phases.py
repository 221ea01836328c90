"""The ends of a run's phases, as tables show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import StageAccuracies, Summary
from sylva_ray.federation.stages.kinds import phase_title


class PhaseEnd(NamedTuple):
    """The end of a phase, or the state before phase 1.

    Attributes:
        heading: what it is called.
        accuracies: of the clients at that time.
    """

    heading: str
    accuracies: StageAccuracies


def phase_ends(summary: Summary, records: Sequence[StageRecord]) -> list[PhaseEnd]:
    """Return the ends that a summary holds, in chronological order: before the defence, phase 1, and the run's end.

    Args:
        summary: of the run.
        records: of its stages; the phase of the last one names the run's end.
    """
    ends = [("before", summary.initial), ("phase 1", summary.phase1)]
    if summary.has_later_phase:
        ends.append((phase_title([record.stage for record in records[-1:]]), summary.final))
    return [PhaseEnd(heading, accuracies) for heading, accuracies in ends if accuracies is not None]
