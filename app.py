"""Starts the page: `python app.py`, with --help for the options."""

from __future__ import annotations

import sys

from fluxgui import before_gradio  # noqa: F401 # pyright: ignore[reportUnusedImport] - must precede gradio
from fluxgui.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
