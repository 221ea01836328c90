"""A forecast in lines of text, for a terminal of 80 columns, and as the table of docs/sizing.md."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.preparation.memory import MemoryPlan, plan_memory
from sylva_ray.preparation.memory_budget import CPU_PROCESS_BYTES, actor_budget, size_text
from sylva_ray.provisioning.cards import CARDS, GIB, MACHINES, Card
from sylva_ray.provisioning.demand import Demand
from sylva_ray.provisioning.fit import gpu_plan
from sylva_ray.provisioning.forecast import CPU_SHARE, EFFICIENCY, LAUNCH_S, Forecast, Gpus, share_bytes
from sylva_ray.provisioning.launcher_file import LauncherFile
from sylva_ray.provisioning.placement import actors_per_gpu, num_actors_here

COLUMNS = 80
"""Of a terminal, at most."""

_SHARES = " or ".join(f"{share:.0%} ({precision})" for precision, share in EFFICIENCY.items())
ESTIMATE = f"estimated: {_SHARES} of a card's dense rate, or {1e6 * LAUNCH_S:.0f} us a kernel"


def run_lines(found: Forecast, columns: int = COLUMNS) -> list[str]:
    """Describe what a run on this machine asks for, and what it would on one GPU of every known kind.

    Args:
        found: the forecast.
        columns: of the terminal.

    Raises:
        UserError: its actors do not fit this machine.
    """
    config, asked, traffic = found.config, found.asked, found.traffic
    everyone, size = config.partition.num_clients, config.training.cohort_size
    participants = config.training.clients_per_round or everyone
    per_client = found.sketch.size.num_train // everyone
    lines = [
        f"{config.name} ({config.algorithm.name}): nothing was started, and nothing was written",
        f"  clients       {everyone} with about {per_client} images each; {participants} a round in "
        f"{-(-participants // size)} cohorts of {size}",
        f"  model         {config.backbone.name}: {found.flops / 1e9:.3g} GFLOP an image forward, "
        f"{size_text(traffic.backbone_bytes)} of weights",
        f"  data          {size_text(traffic.data_bytes)} in memory, once per node",
        f"  travels       {traffic.upload_bytes:,} B up and {traffic.download_bytes:,} B down per client and round; "
        f"{size_text(participants * traffic.upload_bytes)} up in a round",
        f"  checkpoint    {size_text(found.checkpoint_bytes)} after every stage",
    ]
    if "auto" in (asked.training.precision, asked.evaluation.precision):
        lines.append("  precision     auto is measured when a run starts; float32 is assumed here")
    if config.training.device == "cpu":
        plan = cpu_plan(found)
        budget = f"{size_text(plan.peak)} of the {size_text(plan.budget)} that it may use here"
        lines += [f"  memory        an actor: {budget}; {_windows(plan)}", _cpu_time_line(found)]
    else:
        lines.append(f"  memory        an actor: {size_text(found.host_bytes)} of RAM, and on its card as below")
    title = f"on one GPU, with as many actors as it holds ({ESTIMATE})"
    return [*wrapped([*lines, title], columns), *table_lines(found, columns)]


def _cpu_time_line(found: Forecast) -> str:
    """Estimate the time on this machine's CPUs from a short measurement of how fast they multiply."""
    from sylva_ray.models.flops import multiplication_rate  # PyTorch

    config, section = found.config, found.config.cluster
    threads = section.threads_per_actor
    actors = 1 if section.pool == "in_process" else num_actors_here(section)
    precisions: set[str] = {"float32", config.training.precision, config.evaluation.precision}
    rates = {precision: multiplication_rate(precision, threads) for precision in sorted(precisions)}
    measured = " and ".join(f"{rate / 1e9:.3g} GFLOP/s ({precision})" for precision, rate in rates.items())
    return (
        f"  time          a round {duration(found.cpu_seconds(rates, actors, only_round=True))}, all stages "
        f"{duration(found.cpu_seconds(rates, actors))} on CPUs as here, {actors} x {threads} threads, without start-up "
        f"and aggregation (an estimate: {CPU_SHARE:.0%} of {measured}, at which matrices were just multiplied)"
    )


def wrapped(lines: Sequence[str], columns: int = COLUMNS) -> list[str]:
    """Break lines for a terminal of 40 to 80 columns; what follows is indented like the values."""
    width = min(max(columns, 40), COLUMNS)
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, width, subsequent_indent=16 * " ", break_long_words=False) or [""]
    ]


def planned_config(found: Forecast) -> ResolvedConfig:
    """Return the resolved settings, with the windows of this machine where its CPUs do the work."""
    if found.config.training.device != "cpu" or found.asked.training.windows != "auto":
        return found.config
    training = found.config.training.model_copy(update={"windows": cpu_plan(found).windows})
    return found.config.model_copy(update={"training": training})


def cpu_plan(found: Forecast) -> MemoryPlan:
    """Return the windows of an actor on the CPUs of this machine.

    Raises:
        UserError: not even one image fits.
    """
    base = CPU_PROCESS_BYTES + found.costs.model
    return plan_memory(found.config, found.sketch.algorithm, found.costs, actor_budget(found.config), base)


def table_rows(found: Forecast, cards: Sequence[Card] = tuple(CARDS.values())) -> list[tuple[str, ...]]:
    """Return the cells of a table: what a run takes on one card of every kind, with as many actors as make sense."""
    rows: list[tuple[str, ...]] = []
    for card in cards:
        count = found.actors_on(card)
        if not count:
            rows.append((card.name, "0", "", "", "", "", ""))
            continue
        plan = found.plan(share_bytes(card, 1 / count))
        gpus = [Gpus(card, 1, count)]
        hours = found.run_seconds(gpus) / 3600
        rows.append(
            (
                card.name,
                str(count),
                f"{plan.peak / 1e9:.1f} GB",
                str(plan.windows.train),
                duration(found.round_seconds(gpus)),
                duration(3600 * hours),
                _price(hours * _hourly(card)),
            )
        )
    return rows


HEADINGS = ("card", "actors", "memory of one", "images at once", "a round", "all stages", "assumed price")


def table_lines(found: Forecast, columns: int = COLUMNS) -> list[str]:
    """Return the table for a terminal; a narrow one has no room for the actors' memory and images."""
    rows = [("card", "actors", "memory", "images", "a round", "all", "price"), *table_rows(found)]
    widths: tuple[int, ...] = (10, 7, 9, 8, 9, 9, 11)
    if columns < sum(widths) + 2:
        kept = (0, 1, 4, 5, 6)
        rows, widths = [tuple(row[i] for i in kept) for row in rows], tuple(widths[i] for i in kept)
    return [
        "  " + row[0].ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def markdown_table(found: Forecast) -> str:
    """Return the table for docs/sizing.md."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def cluster_lines(demand: Demand, found: Forecast, file: LauncherFile) -> list[str]:
    """Describe memory, time, price and checkpoints of a run on the nodes that it would get."""
    checkpoint = f"  checkpoint    {size_text(found.checkpoint_bytes)} after every stage"
    section = found.config.cluster
    if section.gpus_per_actor == 0:
        return [checkpoint, "  time          not estimated: the actors are on CPUs"]
    kinds = [kind for kind in file.workers if kind.name in demand.nodes]
    unknown = [kind.name for kind in kinds if kind.machine is None or kind.machine.card is None]
    if unknown or not kinds:
        what = ", ".join(unknown) or "no worker"
        return [checkpoint, f"  time          not estimated: the card of {what} is not known (InstanceType)"]
    lines, gpus, hourly = [], [], 0.0
    for kind in kinds:
        assert kind.machine is not None, "unknown types have been sorted out"
        card = CARDS[kind.machine.card or ""]
        plan = gpu_plan(found, card, kind.name)
        lines.append(
            f"  memory        an actor on {kind.name}: {size_text(plan.peak)} of its share of an {card.name} "
            f"({card.memory / GIB:.0f} GiB), {size_text(found.host_bytes)} of RAM; {_windows(plan)}"
        )
        count = demand.nodes[kind.name] * kind.resources.get("GPU", 0)
        gpus.append(Gpus(card, count, actors_per_gpu(section)))
        hourly += demand.nodes[kind.name] * kind.machine.price
    hourly += file.head.machine.price if file.head.machine else 0.0
    seconds = found.run_seconds(gpus)
    return [
        *lines,
        f"  time          a round {duration(found.round_seconds(gpus))}, all stages {duration(seconds)} "
        f"without start-up and aggregation ({ESTIMATE}; not measured here)",
        f"  price         ${seconds / 3600 * hourly:,.2f} at ${hourly:.2f} an hour on demand (assumed)",
        checkpoint,
    ]


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> duration(0.04), duration(45), duration(600), duration(90_000)
    ('<1 s', '45 s', '10 min', '25.0 h')
    """
    if seconds < 1:
        return "<1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _price(dollars: float) -> str:
    return f"${dollars:.2g}" if dollars >= 0.01 else "<$0.01"


def _windows(plan: MemoryPlan) -> str:
    of = plan.windows.of
    return f"images at once: {of('train')} trained, {of('attack')} attacked, {of('evaluate')} evaluated"


def _hourly(card: Card) -> float:
    """Return the assumed price of one such GPU for an hour: that of the cheapest machine that has some, per GPU."""
    return min(machine.price / machine.num_gpus for machine in MACHINES.values() if machine.card == card.name)
