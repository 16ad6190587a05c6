"""A folder on the Hugging Face hub: private unless asked otherwise; the token from the environment alone."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sera_core.errors import InputError, SeraError

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_target(repository: str) -> str:
    """The token for a push, before anything is written.

    Raises:
        InputError: no repository's name, or no token in the environment.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InputError(f"--push-to {repository!r}: give ORG/NAME, of letters, digits, '.', '-' and '_'")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise InputError(
            "--push-to: no token; put one that may write into the environment variable HF_TOKEN "
            "(https://huggingface.co/settings/tokens)"
        )
    return token


def push(folder: Path, repository: str, public: bool, tell: Callable[[str], None]) -> str:
    """Make the repository if there is none, and put the folder into it in one commit; returns its address.

    Raises:
        InputError: the repository exists and is public, and that was not asked for.
        SeraError: the hub refused or could not be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    token = check_target(repository)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="sera-flow")
    try:
        _make(api, repository, public)
        tell(f"pushing to {repository} ({'public' if public else 'private'})")
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Policy, lineage and card by sera-flow"
        )
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise SeraError(
            f"{repository}: the hub did not take it: {_said(error, token)}. What --to wrote is whole; to try "
            "again leave --to out"
        ) from None
    return f"{api.endpoint}/{repository}"


def _make(api: Any, repository: str, public: bool) -> None:
    """A repository that exists keeps who may see it, so that is looked at before anything is sent."""
    api.create_repo(repository, private=not public, exist_ok=True)
    if not public and not api.model_info(repository).private:
        raise InputError(
            f"--push-to {repository}: exists and is public; give --public to push there, or another name"
        )


def _said(error: Exception, token: str) -> str:
    """The first line of an error, without the token whatever the library put into it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].replace(token, "…")
