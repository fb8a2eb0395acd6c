"""All subcommands under one name."""

from __future__ import annotations

from typing import Annotated

import typer

from wsi_engine.cli import console
from wsi_engine.cli.bench import bench
from wsi_engine.cli.check import check
from wsi_engine.cli.classify import classify
from wsi_engine.cli.demo import demo
from wsi_engine.cli.encoders import encoders
from wsi_engine.cli.evaluate import evaluate_app
from wsi_engine.cli.export import export
from wsi_engine.cli.extract import extract
from wsi_engine.cli.import_ import import_
from wsi_engine.cli.info import info
from wsi_engine.cli.nuclei import nuclei
from wsi_engine.cli.status import status
from wsi_engine.cli.train import train_app
from wsi_engine.cli.train_nuclei import train_nuclei
from wsi_engine.cli.train_prompt import train_prompt
from wsi_engine.version import __version__

app = typer.Typer(
    name="wsi",
    help="Whole-slide images in, features and predictions out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wsi-engine {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Whole-slide images in, features and predictions out."""
    console.start(debug=debug)


app.command()(console.reporting(info))
app.command()(console.reporting(encoders))
app.command()(console.reporting(extract))
train_app.command("prompt")(console.reporting(train_prompt))
train_app.command("nuclei")(console.reporting(train_nuclei))
app.add_typer(train_app)
app.command()(console.reporting(classify))
app.command()(console.reporting(nuclei))
app.add_typer(evaluate_app)
app.command("import")(console.reporting(import_))
app.command("export")(console.reporting(export))
app.command()(console.reporting(check))
app.command()(console.reporting(status))
app.command()(console.reporting(bench))
app.command()(console.reporting(demo))
