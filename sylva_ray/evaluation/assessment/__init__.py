"""Attacking the trained clients of a run again: what to measure (`plan`), where measurements are kept (`parts`), what follows
from them (`findings`, `evidence` of the checks)."""
