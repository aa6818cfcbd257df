"""`python -m trainer convert-lora`: a LoRA file in the form that another program reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from trainer.lora.form_names import Form
from trainer.lora.form_writer import BaseLayers
from trainer.lora.forms import converted
from trainer.lora.layer_names import is_flux_path, is_norm_path
from trainer.lora.lora_file import read_lora_file
from trainer.model.weights import read_planned
from trainer.schema.base import UserError
from trainer.schema.key_plans import flux_plan
from trainer.schema.model_check import check_kind
from trainer.schema.model_kinds import identify, noun
from trainer.schema.safetensors_header import read_header
from trainer.schema.weight_files import read_weights
from trainer.train.checkpoint import save_lora

FORMS: Final[tuple[Form, ...]] = ("sd-scripts", "diffusers", "bfl", "xlabs")


def convert_lora(arguments: Sequence[str]) -> str:
    """Does what the command line asks for and returns the line to print. Raises `UserError`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer convert-lora",
        description="Writes a LoRA for FLUX.1 or Chroma in another form; the form of the input is recognised.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", type=Path, required=True, help="the LoRA, a safetensors file")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--form", choices=FORMS, required=True, help="the form to write")
    parser.add_argument(
        "--model",
        type=Path,
        help="the FLUX.1 model (single file), for --form bfl: ComfyUI and diffusers load that form only with every "
        "layer and norm of the model in it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it is there")
    known = parser.parse_args(arguments)
    source, target, form, model = (
        cast("Path", known.input),
        cast("Path", known.output),
        cast("Form", known.form),
        cast("Path | None", known.model),
    )
    _check_output(source, target, may_overwrite=known.overwrite)
    if model is not None and form != "bfl":
        raise UserError("--model is used for --form bfl only", "--model", "Leave it out.", exit_code=2)
    _refuse_models(source)
    state, metadata = read_lora_file(source)
    base = None if model is None else _base_layers(model)
    written, added, old_form = converted(state, metadata, form, base=base, where=str(source))
    save_lora(target, written, added)
    line = f"{source}: {old_form} -> {target}: {form}, {len(written)} tensors"
    if form == "bfl" and base is None and not any(key.endswith("_norm.scale") for key in written):
        line += "\nComfyUI and diffusers load this form only with all of the model's layers in it: give --model."
    return line


def _check_output(source: Path, target: Path, *, may_overwrite: bool) -> None:
    if target.suffix != ".safetensors":
        raise UserError("the output's name must end with .safetensors", f"--output={target}", exit_code=2)
    if target.is_dir():
        raise UserError("this is a folder", f"--output={target}", "Give a file's name.", exit_code=2)
    if target.exists() and not may_overwrite:
        raise UserError(
            "this file is there already", f"--output={target}", "Add --overwrite to replace it.", exit_code=2
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError("input and output are the same file", f"--output={target}", "Give another name.", exit_code=2)


def _refuse_models(source: Path) -> None:
    header = read_header(source)
    if identify(header) not in ("lora", "unknown"):
        raise UserError(f"this is {noun(header)}, given as --input", str(source), "Give a LoRA.", field="input")


def _base_layers(model: Path) -> BaseLayers:
    """What a whole BFL file needs of the model: from its header, and a few small tensors."""
    header = read_weights(model, "flux")
    problem = check_kind(header, "flux", "model")
    if problem is not None:
        raise UserError(problem.what, problem.where, "Give the FLUX.1 model that the LoRA is for.")
    plan = flux_plan(header)
    linears = {
        planned.target.removesuffix(".weight"): (planned.shape[0], planned.shape[1])
        for planned in plan
        if planned.target.endswith(".weight")
        and len(planned.shape) == 2
        and is_flux_path(planned.target.removesuffix(".weight"))
    }
    norms = [planned for planned in plan if is_norm_path(planned.target.removesuffix(".scale"))]
    return BaseLayers(
        linears, {name.removesuffix(".scale"): tensor for name, tensor in read_planned(header, norms).items()}
    )
