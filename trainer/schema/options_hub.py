"""Option group: upload to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

from trainer.schema.base import Opt
from trainer.schema.options_model import OptionGroup


class HubOptions(OptionGroup):
    """Where saved LoRAs and states are uploaded to, and taken from; nothing is uploaded without a repository."""

    huggingface_repo_id: Annotated[
        str | None,
        Opt("Repository of the Hugging Face hub that every saved LoRA is uploaded to.", "Repository", "expert"),
    ] = None
    huggingface_repo_type: Annotated[
        str | None, Opt("Kind of that repository: model, dataset or space. Empty: model.", "Kind", "expert")
    ] = None
    huggingface_path_in_repo: Annotated[str | None, Opt("Folder in that repository.", "Folder in it", "expert")] = None
    huggingface_token: Annotated[
        str | None,
        Opt("Access token of the hub; never written anywhere. Empty: its own login, or HF_TOKEN.", "Token", "expert"),
    ] = None
    huggingface_repo_visibility: Annotated[
        str | None, Opt("public, or anything else for private.", "Visibility", "expert")
    ] = None
    save_state_to_huggingface: Annotated[bool, Opt("Upload the saved states as well.", "Upload states", "expert")] = (
        False
    )
    resume_from_huggingface: Annotated[
        bool,
        Opt("--resume is a place on the hub: owner/name/path[:revision[:repo_type]].", "Resume from the hub", "expert"),
    ] = False
    async_upload: Annotated[bool, Opt("Upload while training goes on.", "Upload aside", "expert")] = False
