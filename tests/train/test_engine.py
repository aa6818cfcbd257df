"""What accelerate's own configuration may ask for."""

from __future__ import annotations

import pytest

from trainer.schema.base import UserError
from trainer.schema.options import Options
from trainer.train.engine import Engine


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_accelerate_configuration_that_is_not_carried_out_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=f"accelerate is set up for {kind}") as error:
        Engine.start(Options())
    assert error.value.exit_code == 2
