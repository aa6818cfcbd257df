"""Makes the sample pictures of a run: every prompt, each with its own seed, through the LoRA as it is now."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.model.autoencoder import AutoEncoder
from trainer.model.chroma import Chroma
from trainer.model.transformer import Transformer
from trainer.schema.base import UserError
from trainer.train.conditioning import TextInputs, TextSource
from trainer.train.latents_phase import autoencoder_dtype
from trainer.train.objective import predict_velocity
from trainer.train.prompt_file import texts_of
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.sample_prompts import SamplePrompt
from trainer.train.sampling import draw_sample, sample_file_name, save_picture
from trainer.train.step_position import StepPosition

_SEED_BITS = 31
CHROMA_GUIDANCE = 0.0
"""What Chroma was made with; its samples are steered by the two-pass guidance alone."""


class SampleMaker:
    """Holds what sampling needs besides the moment. Does nothing without prompts.

    `prompts` gives those of the moment, and `prepare_texts` is told all their texts before the first picture.
    `autocast` is the transformer's mixed precision, `autocast_in` that of a model in the given format. `free_memory` is
    called after a picture that could not be made.
    """

    def __init__(
        self,
        prompts: Callable[[], Sequence[SamplePrompt]],
        *,
        model: Transformer,
        network: nn.Module,
        autoencoder: Callable[[], AutoEncoder],
        text: TextSource,
        autocast: Callable[[], AbstractContextManager[object]],
        autocast_in: Callable[[torch.dtype], AbstractContextManager[object]],
        device: torch.device,
        folder: Path,
        output_name: str | None,
        reporter: Reporter,
        prepare_texts: Callable[[Sequence[str]], None] = lambda _texts: None,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self._prompts = prompts
        self._prepare_texts = prepare_texts
        self._free_memory = free_memory
        self._model = model
        self._network = network
        self._autoencoder = autoencoder
        self._text = text
        self._autocast = autocast
        self._autocast_in = autocast_in
        self._device = device
        self._folder = folder
        self._output_name = output_name
        self._reporter = reporter

    def __call__(self, position: StepPosition, is_epoch_end: bool) -> None:
        """All prompts once. The network is left in evaluation mode: dropout has no place in a picture.

        What goes wrong is a warning, whatever it is, and the other pictures are made all the same; only `StopRequested`
        gets through.
        """
        prompts = self._prompts()
        if not prompts:
            self._reporter.warning("no sample is made: there are no sample prompts")
            return
        self._reporter.phase("sampling")
        self._network.eval()
        if not self._succeeds("no sample was made", lambda: self._prepare_texts(texts_of(prompts))):
            return
        total = sum(prompt.num_steps for prompt in prompts)
        done = 0
        for index, prompt in enumerate(prompts):
            seed = secrets.randbits(_SEED_BITS) if prompt.seed is None else prompt.seed
            make = partial(self._make_one, prompt, seed, index, position, is_epoch_end, done, total)
            self._succeeds(f"sample {index + 1} was not made", make)
            done += prompt.num_steps

    def _succeeds(self, what: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except StopRequested:
            raise
        except UserError as error:
            self._reporter.warning(f"{what}: {error}")
        except torch.OutOfMemoryError as error:
            self._reporter.warning(
                f"{what}: the device ran out of memory ({str(error).strip().splitlines()[0]}). Make samples smaller, such as "
                "--w 512 --h 512 behind the prompt, or raise blocks_to_swap; the training goes on"
            )
        except Exception as error:  # noqa: BLE001 - no picture is worth a training, out of memory least of all
            self._reporter.warning(f"{what}: {type(error).__name__}: {error}")
        else:
            return True
        self._free_memory()
        return False

    def _make_one(
        self,
        prompt: SamplePrompt,
        seed: int,
        index: int,
        position: StepPosition,
        is_epoch_end: bool,
        done: int,
        total: int,
    ) -> None:
        with torch.no_grad():
            text = self._text([prompt.prompt])
            negative = self._text([prompt.negative_prompt]) if prompt.uses_negative_prompt else None

        def predict(noisy: Tensor, timesteps: Tensor, text: TextInputs, guidance_scale: float, /) -> Tensor:
            with self._autocast():
                return predict_velocity(self._model, noisy, timesteps, text, guidance_scale)

        def progress(step: int, _steps: int) -> None:
            self._reporter.progress(done + step, total)

        if prompt.guidance_scale is None and isinstance(self._model, Chroma):
            prompt = replace(prompt, guidance_scale=CHROMA_GUIDANCE)
        picture = draw_sample(
            prompt,
            seed=seed,
            predict=predict,
            decode=self._decode,
            text=text,
            negative_text=negative,
            is_schnell=self._model.params.is_schnell,
            device=self._device,
            progress=progress,
            check_commands=self._reporter.check_stop,
        )
        name = sample_file_name(
            self._output_name,
            step=position.step,
            epoch=position.epoch if is_epoch_end else None,
            index=index,
            moment=time.time(),
            seed=prompt.seed,
        )
        path = self._folder / name
        save_picture(path, picture)
        self._reporter.sample(
            path, step=position.step, epoch=position.epoch, prompt=prompt.prompt, index=index, seed=seed
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """With the autoencoder on the device for just this long when it waits in main memory."""
        autoencoder = self._autoencoder()
        home = next(autoencoder.parameters()).device
        try:
            autoencoder.to(self._device)
            with self._autocast_in(autoencoder_dtype(autoencoder)):
                return autoencoder.decode(latents)
        finally:
            autoencoder.to(home)
