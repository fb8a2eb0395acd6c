"""The command ``wsi``: one file a subcommand."""


def main() -> None:
    """Run the command line; ends the process with exit code 0, 1 (some input failed) or 2 (wrong usage)."""
    from wsi_engine.cli.app import app  # noqa: PLC0415 - importing the package must not load the command line

    app()
