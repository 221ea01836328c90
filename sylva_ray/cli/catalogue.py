"""The commands ``sylva-ray list``, ``show`` and ``init``."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from sylva_ray.cli.arguments import Imports, complete_kinds, complete_recipes


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="methods, attacks, datasets, backbones, partitions, checks or recipes (default: all).",
            autocompletion=complete_kinds,
        ),
    ] = None,
) -> None:
    """List what a configuration may name, each with a sentence."""
    from sylva_ray import api

    columns = shutil.get_terminal_size((100, 24)).columns
    if kind is not None:
        typer.echo("\n".join(api.listed(kind, columns=columns)))
        return
    for kind in api.KINDS:
        typer.echo(f"{kind}:")
        typer.echo("\n".join(api.listed(kind, columns=columns)) + "\n")


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A key (attack.epsilon), a section (attack), or a name of `list`.")
    ],
    imports: Imports = None,
) -> None:
    """Show what a setting, a section, a method, any other name or a word of the glossary means.

    A setting has a type, a range, a default and the place where it is declared.
    """
    from sylva_ray import api

    columns = shutil.get_terminal_size((100, 24)).columns
    typer.echo("\n".join(api.describe(name, columns=columns, imports=imports or [])))


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder, which may be new.")],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The recipe to copy, see `sylva-ray list recipes`.",
            autocompletion=complete_recipes,
        ),
    ] = "digits",
) -> None:
    """Copy a recipe to a folder, to be changed there.

    Beside it is a schema by which editors complete and check its keys.
    """
    from sylva_ray import api

    first, *others = api.init(folder, recipe)
    for path in (first, *others):
        typer.echo(path)
    command = "tune" if first.parent.name == "tune_spaces" else "pretrain" if recipe.startswith("pretrain") else "run"
    typer.echo(f"Start it with: sylva-ray {command} {first}")
