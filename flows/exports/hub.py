"""Push a folder to the Hugging Face hub: private by default, token from HF_TOKEN only."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sera_core.errors import InputError, SeraError

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_target(repository: str) -> str:
    """Check the repository name and return the token, before anything is written.

    Raises:
        InputError: a bad repository name, or no token in the environment.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InputError(f"--push-to {repository!r}: give ORG/NAME with letters, digits, '.', '-' and '_'")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise InputError(
            "--push-to: no token; set the environment variable HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)"
        )
    return token


def push(folder: Path, repository: str, public: bool, report: Callable[[str], None]) -> str:
    """Create the repository if needed and push the folder in one commit. Returns its URL.

    Raises:
        InputError: the repository exists and is public, but --public was not given.
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
        _create_repository(api, repository, public)
        report(f"pushing to {repository} ({'public' if public else 'private'})")
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Policy, lineage and card by sera-flow"
        )
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise SeraError(
            f"{repository}: the push failed: {_error_line(error, token)}. The folder of --to is complete; "
            "to retry, leave --to out"
        ) from None
    return f"{api.endpoint}/{repository}"


def _create_repository(api: Any, repository: str, public: bool) -> None:
    """Create the repository. An existing one keeps its visibility, so check that before pushing."""
    api.create_repo(repository, private=not public, exist_ok=True)
    if not public and not api.model_info(repository).private:
        raise InputError(
            f"--push-to {repository}: exists and is public; give --public to push there, or use another name"
        )


def _error_line(error: Exception, token: str) -> str:
    """The first line of an error, with the token removed."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].replace(token, "…")
