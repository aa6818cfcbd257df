"""Writes the LoRA files of a run: state, metadata, name, retention, event."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from trainer.lora.form_reader import Origin
from trainer.lora.form_writer import BaseLayers
from trainer.lora.forms import from_published
from trainer.lora.lycoris import AnyNetwork
from trainer.schema.folders import data_home
from trainer.schema.options import Options
from trainer.train.checkpoint import CheckpointKind, checkpoint_name, remove_superseded, save_dtype, save_lora
from trainer.train.file_hashes import FileHashes
from trainer.train.hub_upload import HubUploader
from trainer.train.metadata import lora_metadata
from trainer.train.metadata_facts import TrainingFacts
from trainer.train.reporting import Reporter
from trainer.train.rescue import save_or_rescue
from trainer.train.step_position import StepPosition
from trainer.train.training_facts import with_hashes


@dataclass(frozen=True)
class LoraSaver:
    """Saves `network` into `folder`. Only the main process has one that writes.

    `origin` is how the file was written that the weights started from; `base` is needed for the BFL form. `hashes` are
    those of `model_files`, by the same names.
    """

    network: AnyNetwork
    folder: Path
    options: Options
    facts: TrainingFacts
    reporter: Reporter
    is_main: bool
    origin: Origin | None = None
    base: BaseLayers | None = None
    hashes: FileHashes | None = None
    upload: HubUploader | None = None
    requested: set[int] = field(default_factory=set[int])
    """Steps that were saved out of turn, because somebody asked for it: they are not removed as old ones."""

    def __call__(self, position: StepPosition, kind: CheckpointKind) -> None:
        if not self.is_main:
            return
        self.reporter.phase("saving")
        number = position.epoch if kind == "epoch" else position.step
        path = self.folder / checkpoint_name(self.options.output_name, kind, number)
        finished_at = time.time()
        state, added = self.tensors()

        def write(hashes: Mapping[str, str]) -> None:
            metadata = lora_metadata(
                with_hashes(self.facts, hashes),
                step=position.step,
                epoch=position.epoch,
                finished_at=finished_at,
                no_metadata=self.options.no_metadata,
            )
            save_lora(path, state, {**metadata, **added})

        write(self.hashes.ready() if self.hashes is not None else {})
        if kind == "final" and self.hashes is not None and not self.hashes.is_done:
            # The LoRA is safe already; its header is written once more when the hashes are there.
            self.reporter.note(f"{path} is saved; hashing the model files for its metadata (a stop leaves them out)")
            write(self.hashes.finish(self.reporter.should_stop))
        self.reporter.checkpoint(path, step=position.step, epoch=position.epoch, is_final=kind == "final")
        every = self.options.save_every_n_steps
        if kind == "step" and (every is None or number % every):
            self.requested.add(number)
        if self.upload is not None:
            self.upload(path, is_final=kind == "final")
        self._remove_superseded(kind, number)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is written, in the form that is asked for, and the metadata that belongs to it.

        Raises `UserError` when the form has no place for what is trained.
        """
        # With no precision asked for, alpha stays the whole number that an untouched --network_alpha is.
        published = self.network.published_state_dict(save_dtype(self.options.save_precision))
        state, added = from_published(published, self.options.lora_form, origin=self.origin, base=self.base)
        return state, {**self.network.file_metadata, **added} if self.options.lora_form == "sd-scripts" else added

    def _remove_superseded(self, kind: CheckpointKind, number: int) -> None:
        options = self.options
        is_epoch = kind == "epoch"
        remove_superseded(
            self.folder,
            options.output_name,
            kind,
            number,
            every=options.save_every_n_epochs if is_epoch else options.save_every_n_steps,
            keep_last=options.save_last_n_epochs if is_epoch else options.save_last_n_steps,
            warn=self.reporter.warning,
            spare=() if is_epoch else self.requested,
        )


def output_dir(options: Options) -> Path:
    if options.output_dir is None:
        raise AssertionError("the checks demand an output folder")
    return options.output_dir


def save_for_good(save: LoraSaver, position: StepPosition, kind: CheckpointKind) -> None:
    """The last save of a run: what the output folder refuses is kept in the data folder, or the temporary one."""
    moment = time.strftime("%Y%m%d-%H%M%S")
    elsewhere = (data_home(), Path(tempfile.gettempdir()) / "fluxgui")
    save_or_rescue(
        lambda folder: dataclasses.replace(save, folder=folder)(position, kind),
        save.folder,
        [place / "rescued" / moment for place in elsewhere],
    )
