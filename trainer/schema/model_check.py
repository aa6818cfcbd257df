"""Whether a model file is what an option asks for, whole and loadable: everything that its header can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trainer.schema.base import Problem, UserError
from trainer.schema.checkpoint_header import EXPECTED_NOUNS, REFUSALS
from trainer.schema.key_plans import PLANS
from trainer.schema.model_kinds import ModelKind, identify, noun
from trainer.schema.safetensors_header import Header

_OWN_OPTION: Final[Mapping[str, str]] = {
    "flux": "--pretrained_model_name_or_path",
    "autoencoder": "--ae",
    "clip_l": "--clip_l",
    "t5xxl": "--t5xxl",
    "lora": "--network_weights",
}


def check_kind(header: Header, expected_kind: ModelKind, field: str) -> Problem | None:
    """The problem with giving this file as the option `field`, which takes files of `expected_kind`; None if there is none.

    Besides the kind it checks all that loading would refuse: missing, unexpected and misshapen tensors, and storage.
    """
    kind = identify(header)
    where = str(header.path)
    if kind != expected_kind:
        refusal = REFUSALS.get(kind)
        if refusal is not None and expected_kind == "flux":
            return Problem(refusal[0], where, refusal[1], field)
        own = _OWN_OPTION.get(kind)
        hint = f"--{field} takes {EXPECTED_NOUNS.get(expected_kind, expected_kind)}."
        if own is not None and own != f"--{field}":
            hint += f" This file belongs to {own}."
        return Problem(f"this is {noun(header)}, given as --{field}", where, hint, field)
    plan = PLANS.get(kind)
    try:
        if plan is not None:
            plan(header)
    except UserError as error:
        first = error.problems[0]
        return Problem(first.what, first.where, first.hint, field)
    return None
