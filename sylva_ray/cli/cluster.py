"""The commands ``sylva-ray cluster check`` and ``sylva-ray cluster gpu``."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from sylva_ray.cli.arguments import Imports, Overrides

cluster = typer.Typer(
    help="Check cluster files and GPUs.", epilog="Example: sylva-ray cluster check cluster.yaml", rich_markup_mode=None
)


@cluster.callback(invoke_without_command=True)
def commands(context: typer.Context) -> None:
    """Check cluster files and GPUs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@cluster.command(epilog="Example: sylva-ray cluster check cluster.yaml --config digits cluster.gpus_per_actor=0.5")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A cluster.yaml for `ray up`.")],
    overrides: Overrides = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Also list the resources that a run of this configuration requests."),
    ] = None,
    imports: Imports = None,
) -> None:
    """Validate a cluster.yaml without starting anything.

    With --config, also list the resources that a run would request from the cluster.
    """
    from sylva_ray import api

    columns = shutil.get_terminal_size((80, 24)).columns
    for line in api.check_cluster(file, config, overrides or [], columns=columns, imports=imports or []):
        typer.echo(line)


@cluster.command(epilog="Example: sylva-ray cluster gpu")
def gpu() -> None:
    """Check that every GPU of this machine can be used: its driver, then one tensor."""
    from sylva_ray import api

    for line in api.check_gpus():
        typer.echo(line)
