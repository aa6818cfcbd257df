"""What accelerate's own configuration may ask for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from accelerate import Accelerator

from trainer.schema.base import UserError
from trainer.schema.options import Options
from trainer.train import engine
from trainer.train.engine import Engine


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_accelerate_configuration_that_is_not_carried_out_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=f"accelerate is set up for {kind}") as error:
        Engine.start(Options())
    assert error.value.exit_code == 2


def test_ddp_timeout_is_how_long_processes_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate hands to torch's process groups, which a run by itself has none of."""
    handed: list[object] = []

    class Recorded(Accelerator):
        def __init__(self, **settings: Any) -> None:
            handed.append(settings["kwargs_handlers"])
            super().__init__(**settings)
            if self.init_handler is not None:
                handed.append(self.init_handler.timeout)

    monkeypatch.setattr(engine, "Accelerator", Recorded)
    Engine.start(Options(device="cpu"))
    assert handed == [[]]
    Engine.start(Options(device="cpu", ddp_timeout=7))
    assert handed[-1] == timedelta(minutes=7)
