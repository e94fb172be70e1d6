"""Upload of a published folder to the Hugging Face Hub."""

from __future__ import annotations

import logging
import os

from gemma4_tpu.errors import UserError
from gemma4_tpu.export.checks import TOKEN
from gemma4_tpu.redact import redact

log = logging.getLogger(__name__)


def push_to_hub(folder: str, repository: str) -> str:
    """Uploads `folder` to `repository` (private if new) with the token in `HF_TOKEN`; returns its address.

    Raises:
      UserError: the Hub refused or can't be reached; no message contains the token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload by gemma4-tpu")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = redact(str(error)).splitlines()[0]
        raise UserError(f"push_to_hub={repository}: {reason}; the complete model is in {folder}") from None
    log.info("uploaded to %s", repository)
    return str(commit)
