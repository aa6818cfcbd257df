"""What the Train page does with values beside the check of its form."""

from __future__ import annotations

import pytest

from fluxgui.train_values import with_options
from trainer.schema.base import UserError


def test_lines_of_more_options_take_values_and_keep_the_rest() -> None:
    lines = "# mine\nclip_skip = 2\ncpu_offload_checkpointing = true\n\n[memory]\ncheckpoint_blocks = 10\n"
    changes = {"checkpoint_blocks": 46, "offload_modulation": "file", "cpu_offload_checkpointing": False}
    found = with_options(lines, changes)
    assert found == ('offload_modulation = "file"\n# mine\nclip_skip = 2\n\n[memory]\ncheckpoint_blocks = 46')
    assert with_options(found, {"checkpoint_blocks": None, "clip_skip": None, "offload_modulation": None}).split() == [
        "#",
        "mine",
        "[memory]",
    ]
    assert with_options("", {"torch_compile": True}) == "torch_compile = true"


def test_lines_that_cannot_be_read_are_named() -> None:
    with pytest.raises(UserError, match="More options"):
        with_options("a = ", {"torch_compile": True})
