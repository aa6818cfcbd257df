"""The demo's command line: the built-in preset `demo` on the bundle's files."""

from __future__ import annotations

from trainer.schema.base import UserError
from trainer.schema.cli import to_argv, validate_options
from trainer.schema.options import Options
from trainer.schema.presets import list_presets
from trainer.tools.tiny_models import DemoBundle

DEMO_PRESET = "demo"


def demo_arguments(bundle: DemoBundle) -> list[str]:
    """The options of a demo run, all but `--output_dir`. Raises `UserError` when the preset is gone."""
    preset = next((preset for preset in list_presets() if preset.name == DEMO_PRESET), None)
    if preset is None:
        raise UserError("the built-in preset demo is missing", "presets/demo.toml", "Get the program's files again.")
    values = {
        # What the preset says about the pictures is in the bundle's dataset file.
        **{name: value for name, value in preset.values.items() if name in Options.model_fields},
        "pretrained_model_name_or_path": str(bundle.flux),
        "clip_l": str(bundle.clip_l),
        "t5xxl": str(bundle.t5xxl),
        "ae": str(bundle.ae),
        "clip_l_tokenizer": str(bundle.clip_l_tokenizer),
        "t5xxl_tokenizer": str(bundle.t5xxl_tokenizer),
        "dataset_config": str(bundle.dataset_config),
        "sample_prompts": str(bundle.sample_prompts),
        "output_name": "demo",
    }
    return to_argv(validate_options(values, where="presets/demo.toml").options)
