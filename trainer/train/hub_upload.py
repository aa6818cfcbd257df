"""Upload of saved LoRAs and states to the Hugging Face hub. It never ends a training, and the token is never shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from trainer.schema.options import Options


class HubClient(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def create_repo(self, repo_id: str, *, repo_type: str | None, private: bool, exist_ok: bool) -> Any: ...

    def upload_file(
        self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> Any: ...

    def upload_folder(
        self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> Any: ...


class HubUploader:
    """Uploads files and folders one after the other; `is_async` does so in a thread while training goes on.

    The repository is made when it is absent, private unless asked otherwise; one that is there is left as it is.
    """

    def __init__(
        self,
        client: HubClient,
        repo_id: str,
        *,
        repo_type: str | None = None,
        folder: str | None = None,
        is_private: bool = True,
        is_async: bool = False,
        secret: str | None = None,
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._client = client
        self._repo_id = repo_id
        self._repo_type = repo_type
        self._folder = (folder or "").strip("/")
        self._is_private = is_private
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") if is_async else None
        self._secret = secret
        self._note = note
        self._warn = warn
        self._pending = deque[tuple[Path, Future[str | None]]]()
        self._is_there = False

    @classmethod
    def from_options(
        cls, options: Options, *, note: Callable[[str], None], warn: Callable[[str], None]
    ) -> HubUploader | None:
        """None when no repository is given. Without a token the hub's own login counts."""
        if options.huggingface_repo_id is None:
            return None
        from huggingface_hub import HfApi  # noqa: PLC0415 - only for runs that upload

        return cls(
            HfApi(token=options.huggingface_token),
            options.huggingface_repo_id,
            repo_type=options.huggingface_repo_type,
            folder=options.huggingface_path_in_repo,
            is_private=options.huggingface_repo_visibility != "public",
            is_async=options.async_upload,
            secret=options.huggingface_token,
            note=note,
            warn=warn,
        )

    def __call__(self, path: Path, *, is_final: bool) -> None:
        """Uploads the LoRA `path`; the final one always before this returns. Waits for the uploads before, whose files
        the next clean-up may remove."""
        self.wait()
        if self._executor is None or is_final:
            self._tell(path, self._upload(path))
        else:
            self._pending.append((path, self._executor.submit(self._upload, path)))

    def state(self, path: Path) -> None:
        """Uploads the state folder `path`, behind what is on its way. (Its LoRA was uploaded just before, which waited
        for everything older.)"""
        if self._executor is None:
            self._tell(path, self._upload(path))
        else:
            self._pending.append((path, self._executor.submit(self._upload, path)))

    def wait(self) -> None:
        """Until nothing is on its way."""
        while self._pending:
            path, future = self._pending.popleft()
            self._tell(path, future.result())

    def close(self) -> None:
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()

    def _upload(self, path: Path) -> str | None:
        """None, or what went wrong."""
        try:
            if not self._is_there:
                self._client.create_repo(
                    self._repo_id, repo_type=self._repo_type, private=self._is_private, exist_ok=True
                )
                self._is_there = True
            in_repo = f"{self._folder}/{path.name}" if self._folder else path.name
            repo_id, repo_type, message = self._repo_id, self._repo_type, f"Upload {path.name}"
            if path.is_dir():
                self._client.upload_folder(
                    folder_path=str(path),
                    path_in_repo=in_repo,
                    repo_id=repo_id,
                    repo_type=repo_type,
                    commit_message=message,
                )
            else:
                self._client.upload_file(
                    path_or_fileobj=str(path),
                    path_in_repo=in_repo,
                    repo_id=repo_id,
                    repo_type=repo_type,
                    commit_message=message,
                )
        except Exception as error:  # noqa: BLE001 - network, hub and their libraries fail in many ways; none ends a run
            return f"{type(error).__name__}: {error}"
        return None

    def _tell(self, path: Path, failure: str | None) -> None:
        if failure is None:
            self._note(f"uploaded {path.name} to {self._repo_id}")
            return
        reason = without_secret(failure, self._secret)
        self._warn(f"{path.name} was not uploaded to {self._repo_id}; it is kept here: {reason}")


def without_secret(text: str, secret: str | None) -> str:
    return text.replace(secret, "***") if secret else text
