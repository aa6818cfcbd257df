"""The list of all options, for programs and for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.schema.base import GROUP_TITLES
from trainer.schema.option_reference import reference_page
from trainer.schema.option_status import STATUS

KEYS = {
    "name",
    "type",
    "list",
    "default",
    "choices",
    "refused_choices",
    "range",
    "unit",
    "group",
    "level",
    "status",
    "reason",
    "help",
    "ours",
}


def test_the_json_list_states_everything_about_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(STATUS)
    assert len(rows) == len(STATUS)
    for row in rows:
        assert set(row) == KEYS, row["name"]
        assert row["group"] in GROUP_TITLES
        assert row["level"] in ("basic", "advanced", "expert")
        assert row["help"].endswith("."), row["name"]
        assert (row["reason"] is None) == (row["status"] == "supported"), row["name"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["network_dim"] == {
        "name": "network_dim",
        "type": "integer",
        "list": False,
        "default": None,
        "choices": [],
        "refused_choices": {},
        "range": "1 to 1024",
        "unit": None,
        "group": "network",
        "level": "basic",
        "status": "supported",
        "reason": None,
        "help": "The LoRA's rank; 16 is a usual choice for a character. Empty: 4.",
        "ours": False,
    }
    assert by_name["mixed_precision"]["choices"] == ["no", "fp16", "bf16"]
    assert by_name["text_encoder_lr"]["range"] == "0 or more"
    assert by_name["text_encoder_lr"]["list"] is True
    assert by_name["sdpa"]["status"] == "inert"


def test_the_plain_list_names_every_option_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    text = capsys.readouterr().out
    assert [name for name in STATUS if f"--{name}" not in text] == []
    assert "--sdpa [no effect]" in text
    assert "--device {auto,cpu,cuda,mps} [ours]" in text


def test_the_committed_page_is_what_the_program_makes() -> None:
    """After a change of options: `python -m trainer options --markdown > docs/options.md`."""
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == reference_page(), "docs/options.md is out of date"


def test_the_page_holds_every_option_once() -> None:
    rows = [line.split("`")[1] for line in reference_page().splitlines() if line.startswith("| `--")]
    assert sorted(rows) == sorted(f"--{name}" for name in STATUS)
