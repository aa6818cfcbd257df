"""Everything that can be found wrong before a model is loaded, found at once.

Options have been checked by themselves; here they meet the files, the device and the pictures. Torch is imported only
by those checks that cannot do without, as it takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.schema.base import Problem
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.cli import ParsedCommand, check_files
from trainer.schema.dataset_file import dataset_config
from trainer.schema.dataset_keys import DatasetConfig
from trainer.schema.file_checks import check_network_files
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.network_rules import spec_of
from trainer.schema.options import Options
from trainer.schema.parameter_counts import OtherModels
from trainer.train.device_checks import check_device
from trainer.train.findings import EXIT_OPTIONS, Findings
from trainer.train.lora_form import form_problems
from trainer.train.model_checks import Tokenizers, check_models, check_tokenizers, fetch_models, read_flux
from trainer.train.network_checks import check_against_model, check_weights, spec_from_weights
from trainer.train.optimizer_checks import check_optimization
from trainer.train.reporting import Reporter
from trainer.train.resume import Start, find_state, plan_start, run_identity
from trainer.train.sample_prompts import SamplePrompt, read_sample_prompts
from trainer.train.schedule import Schedule, epochs_between_saves, make_schedule
from trainer.train.trackers import check_trackers


@dataclass(frozen=True)
class CheckedRun:
    """What the checks have read, so that nothing is read twice."""

    options: Options
    dataset: DatasetConfig
    index: DatasetIndex
    prompts: tuple[SamplePrompt, ...]
    flux: TransformerParams
    models: OtherModels
    spec: LoraSpec
    tokenizers: Tokenizers
    schedule: Schedule
    start: Start
    identity: Mapping[str, object]
    """What a state says about the run."""


def trains_clip(checked: CheckedRun) -> bool:
    """CLIP-L gets a LoRA unless the options leave it out; other networks than LoRA are FLUX's only."""
    return not checked.options.network_train_unet_only and checked.spec.kind != "oft"


def trains_t5(checked: CheckedRun) -> bool:
    """T5 gets a LoRA when the network settings ask for it, or the file that they are taken from has one."""
    return checked.spec.train_t5xxl and not checked.options.network_train_unet_only


def check_run(command: ParsedCommand, reporter: Reporter, *, num_processes: int = 1) -> CheckedRun:
    """Checks model files, tokenizers, prompts and every picture.

    Raises one `UserError` with all problems, those of the command among them. Models that are named by a hub id are
    downloaded as soon as nothing else is wrong.
    """
    options = command.options
    reporter.phase("check")
    findings = Findings(command.problems)
    for problem in check_files(options):
        findings.add(problem)
    check_device(options, findings)
    spec = findings.attempt(lambda: spec_of(options))
    prompts: tuple[SamplePrompt, ...] | None = ()
    if options.sample_prompts is not None and not findings.has("sample_prompts"):
        path: Path = options.sample_prompts
        prompts = findings.attempt(lambda: tuple(read_sample_prompts(path)))
    has_file = not findings.has("dataset_config") and not findings.has("in_json")
    dataset = None if not has_file else findings.attempt(lambda: dataset_config(options))
    index: DatasetIndex | None = None
    if dataset is not None:
        found: DatasetConfig = dataset
        index = findings.attempt(lambda: index_dataset(found, progress=reporter.progress))
    # Without pictures the number of steps is not known; the schedule is checked all the same.
    num_batches = index.num_batches_per_epoch if index is not None else 1
    schedule = make_schedule(options, num_batches, num_processes)
    check_optimization(options, findings, num_steps=schedule.num_steps, reporter=reporter)
    # One on the hub is fetched as soon as nothing else is wrong; before the models, as it is small and may not fit.
    state = None
    if not (options.resume_from_huggingface and findings.problems):
        state = findings.attempt(lambda: find_state(options, reporter))
    if not findings.problems:
        fetch_models(options, findings, reporter)
    flux = None if findings.has("pretrained_model_name_or_path") else read_flux(options, findings)
    models = None if flux is None else check_models(options, flux, findings)
    if spec is not None and options.dim_from_weights and not findings.has("network_weights"):
        spec = spec_from_weights(options, spec, findings)
    if flux is not None:
        check_against_model(options, spec, flux, findings)
    if flux is not None and spec is not None:
        for problem in form_problems(options, spec, flux):
            findings.add(problem, EXIT_OPTIONS)
    if options.network_weights is not None and not findings.has("network_weights"):
        check_weights(options.network_weights, findings)
    tokenizers = check_tokenizers(options, flux, findings)
    findings.attempt(lambda: check_trackers(options))
    findings.raise_if_any()
    if (
        dataset is None
        or index is None
        or flux is None
        or models is None
        or spec is None
        or tokenizers is None
        or prompts is None
    ):
        raise AssertionError("a check failed without saying why")
    for warning in index.warnings:
        reporter.warning(warning)
    every = epochs_between_saves(options, schedule.num_epochs)
    if every != options.save_every_n_epochs:
        reporter.note(f"save_n_epoch_ratio {options.save_n_epoch_ratio}: a LoRA is saved every {every} epochs")
        options = options.model_copy(update={"save_every_n_epochs": every})
    identity = run_identity(options, index, num_processes=num_processes)
    start = plan_start(options, state, schedule, identity, reporter)
    return CheckedRun(
        options=options,
        dataset=dataset,
        index=index,
        prompts=prompts,
        flux=flux,
        models=models,
        spec=spec,
        tokenizers=tokenizers,
        schedule=schedule,
        start=start,
        identity=identity,
    )


@dataclass(frozen=True)
class CheckedReplay:
    """What the checks of a replay have read."""

    flux: TransformerParams
    spec: LoraSpec


def check_replay(options: Options) -> CheckedReplay:
    """The checks that a replay needs: the transformer alone, the network and the device."""
    findings = Findings()
    if options.pretrained_model_name_or_path is None:
        what, hint = "the FLUX.1 model is not given", "Give its .safetensors file."
        field = "pretrained_model_name_or_path"
        findings.add(Problem(what, f"--{field}", hint, field), EXIT_OPTIONS)
    flux = read_flux(options, findings)
    check_device(options, findings)
    check_optimization(options, findings, num_steps=options.max_train_steps)
    if options.network_train_text_encoder_only:
        what = "a replay trains the transformer alone, which network_train_text_encoder_only rules out"
        hint = "Leave it out; a recording has the text encoded already."
        field = "network_train_text_encoder_only"
        findings.add(Problem(what, f"--{field}", hint, field), EXIT_OPTIONS)
    spec = findings.attempt(lambda: spec_of(options))
    for problem in check_network_files(options):
        findings.add(problem)
    if spec is not None and options.dim_from_weights and not findings.has("network_weights"):
        spec = spec_from_weights(options, spec, findings)
    if flux is not None:
        check_against_model(options, spec, flux, findings)
    findings.raise_if_any()
    if flux is None or spec is None:
        raise AssertionError("a check failed without saying why")
    return CheckedReplay(flux, spec)
