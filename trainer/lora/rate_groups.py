"""Groups of trained tensors for an optimizer, each with a name and a learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainer.schema.base import UserError


def rate_groups(
    normal: Sequence[nn.Parameter], rate: float, name: str, *, plus: Sequence[nn.Parameter] = (), ratio: float = 0.0
) -> list[dict[str, object]]:
    """One group at `rate`, and one of `plus` at `ratio` times it (LoRA+). Groups without parameters or rate are left out."""
    return [
        {"params": list(parameters), "lr": group_rate, "name": group_name}
        for parameters, group_rate, group_name in ((normal, rate, name), (plus, rate * ratio, f"{name} plus"))
        if parameters and group_rate > 0
    ]


def require_any(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """The groups. Raises `UserError` (exit code 2) when there are none: nothing would be trained."""
    if not groups:
        raise UserError(
            "every learning rate is 0: nothing would be trained",
            "--learning_rate",
            field="learning_rate",
            exit_code=2,
        )
    return groups
