"""The look of the page: a gradio theme with the system's own fonts, and the style sheet beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gradio.themes import Base

STYLE: Final = Path(__file__).with_name("style.css")


def make_theme() -> Base:
    """A theme that fetches nothing: fonts are given by their system names."""
    return Base(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        # Grey text keeps a contrast of 4.5 to 1 on its background in both modes.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_text_weight="600",
        block_title_text_weight="600",
    )
