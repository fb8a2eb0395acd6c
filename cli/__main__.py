"""``python -m wsi_engine.cli`` is ``wsi``."""

from wsi_engine.cli import main

main()
