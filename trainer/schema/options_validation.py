"""Option group: a loss on pictures that are not trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.schema.base import Opt
from trainer.schema.options_model import OptionGroup


class ValidationOptions(OptionGroup):
    """Pictures that are held back, and when the loss on them is taken."""

    validation_split: Annotated[
        float,
        Field(ge=0, lt=1),
        Opt("Part of the pictures that is held back to measure the loss on, such as 0.1.", "Held back", "advanced"),
    ] = 0.0
    validation_seed: Annotated[
        int | None,
        Field(ge=0, lt=2**63),
        Opt(
            "Decides which pictures are held back, and their noise. Empty: always the same.",
            "Validation seed",
            "expert",
        ),
    ] = None
    validate_every_n_steps: Annotated[
        int | None, Field(ge=1), Opt("Validate after every so many steps.", "Validate every", "advanced", "steps")
    ] = None
    validate_every_n_epochs: Annotated[
        int | None,
        Field(ge=1),
        Opt("Validate after every so many epochs. Empty: after each.", "Validate every", "advanced", "epochs"),
    ] = None
    max_validation_steps: Annotated[
        int | None, Field(ge=1), Opt("Batches of one validation at most.", "Longest validation", "expert", "batches")
    ] = None
