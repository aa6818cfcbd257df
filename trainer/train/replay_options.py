"""Which options a replay has a use for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from trainer.schema.cli import ParsedCommand, read_command_line
from trainer.schema.option_status import STATUS
from trainer.schema.options import GROUPS
from trainer.train.recording import GROUPS_OF_A_STEP, Recording

_RECORDED: Final = frozenset(
    {
        *("clip_l", "t5xxl", "ae", "tokenizer_cache_dir", "clip_l_tokenizer", "t5xxl_tokenizer", "clip_l_activation"),
        *("t5xxl_max_token_length", "no_half_vae", "text_encoder_lr", "masked_loss", "prior_loss_weight"),
        *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "logit_mean", "logit_std", "mode_scale"),
        *("min_timestep", "max_timestep"),
    }
)
"""Of the groups of a step, what decides about something that a recording holds already."""
_OF_A_COURSE: Final = frozenset(
    {"max_train_epochs", "max_train_steps", "gradient_accumulation_steps", "initial_epoch", "initial_step"}
)
_OF_THE_COMMAND: Final = frozenset({"config_file", "console_log_level", "console_log_file", "console_log_simple"})


def replay_advice(command: ParsedCommand, recording: Recording) -> Iterator[str]:
    """One line for the options that were given and have no effect in a replay; not for those of the recording."""
    recorded = read_command_line(recording.options)
    used = {name for group in GROUPS_OF_A_STEP for name in GROUPS[group].model_fields} | _OF_THE_COMMAND
    used -= _RECORDED | _OF_A_COURSE

    def is_recorded(name: str) -> bool:
        same = getattr(command.options, name) == getattr(recorded.options, name)
        return name in recorded.explicit and same

    unused = [
        name
        for name in STATUS
        if name in command.explicit - used and STATUS[name].status == "supported" and not is_recorded(name)
    ]
    if unused:
        have = "has" if len(unused) == 1 else "have"
        yield f"{', '.join(unused)} {have} no effect on a replay: it makes --steps steps on one batch that is recorded"
