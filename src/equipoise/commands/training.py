"""`equipoise lab`: train small models with known properties. They are for study, never plug-and-play."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.arguments import Json, Quiet
from equipoise.commands.show import say, show

app = typer.Typer(no_args_is_help=True, help="Train and look at small models with known routing; for study, not plug-and-play.")
Data = Annotated[
    Path | None, typer.Option(help="directory that the mix's files are relative to", show_default="$EQUIPOISE_LAB_DATA")
]
RecipeFile = Annotated[Path, typer.Argument(help="recipe, such as configs/qwen3-32.toml")]


@app.command()
def train(
    recipe: RecipeFile,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="run directory", show_default="out/lab/NAME")] = None,
    until: Annotated[int | None, typer.Option(help="stop after this step with a checkpoint")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a recipe's model; the same command goes on with a run that was stopped."""
    from equipoise.lab.recipe import read_recipe
    from equipoise.lab.text import data_directory
    from equipoise.lab.training import train as run

    wanted = read_recipe(recipe)
    place = out or Path("out/lab") / wanted.name
    losses = run(wanted, data_directory(data), place, device=device, until=until, progress=not quiet, say=say(quiet))
    rows = {"model": wanted.name, "directory": str(place), "steps": len(losses), "loss": losses[-1]}
    show(as_json, rows, [f"{wanted.name}: {len(losses):,} steps, loss {losses[-1]:.4f}"], place)


@app.command()
def verify(
    recipe: RecipeFile,
    data: Data = None,
    steps: Annotated[int, typer.Option(help="steps to repeat")] = 200,
    against: Annotated[Path | None, typer.Option(help="losses.json to compare with", show_default="the shelf's")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the first steps of a recipe again and compare their losses bit for bit."""
    from equipoise.lab.recipe import read_recipe
    from equipoise.lab.text import data_directory
    from equipoise.lab.verify import repeat

    found = repeat(read_recipe(recipe), data_directory(data), steps=steps, against=against, progress=not quiet)
    show(as_json, found.model_dump(), [found.sentence()], None)
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def shelve(
    recipe: RecipeFile,
    run: Annotated[Path, typer.Argument(help="directory of a finished run")],
    data: Data = None,
    dense: Annotated[Path | None, typer.Option(help="directory of the run of the dense model beside it")] = None,
    out: Annotated[Path | None, typer.Option(help="directory to write", show_default="shelf/NAME")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a finished run on the shelf: weights in bf16, judged on held-out text, with its card."""
    from equipoise.lab.card import shelve as put
    from equipoise.lab.recipe import read_recipe
    from equipoise.lab.text import data_directory

    wanted = read_recipe(recipe)
    place = out or Path("shelf") / wanted.name
    found = put(wanted, run, data_directory(data), place, dense_run=dense, progress=not quiet)
    show(as_json, found.model_dump(mode="json"), [f"{wanted.name}: {found.sentence()}"], place)


@app.command()
def beside(
    recipe: RecipeFile,
    dense: Annotated[Path, typer.Argument(help="directory of the finished run of the dense model")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="directory of the model on the shelf", show_default="shelf/NAME")] = None,
    as_json: Json = False,
) -> None:
    """Put a dense model that was trained later beside a model of the shelf, on the same rows."""
    from equipoise.lab.card import add_dense
    from equipoise.lab.recipe import read_recipe
    from equipoise.lab.text import data_directory

    wanted = read_recipe(recipe)
    place = out or Path("shelf") / wanted.name
    found = add_dense(wanted, data_directory(data), place, dense)
    show(as_json, found.model_dump(mode="json"), [f"{wanted.name}: {found.sentence()}"], place)


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models of the shelf with what was measured of them."""
    from equipoise.lab.listing import shelf_rows, shelf_table

    rows = shelf_rows()
    show(as_json, {"shelf": rows}, [shelf_table(rows)], None)
