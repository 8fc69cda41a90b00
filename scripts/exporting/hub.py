"""Uploading to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from train.config import RunFailed, UserError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_KEPT = "What was exported is kept; the same command with overwrite=true tries again"


def check(repo: str) -> None:
    """Before any work is done. Raises UserError for a name that the hub would refuse, or where
    nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub={repo} is no name of a repository: {error}. Give NAMESPACE/NAME"
        ) from None
    if get_token() is None:
        raise UserError(f"push_to_hub={repo}: nobody is logged in to the hub; {_LOG_IN}")


def push(files: Mapping[str, Path], repo: str, *, private: bool) -> str:
    """Uploads files by their names in the repository, as one commit of a model repository, which is
    made if there is none; returns its address. Raises UserError where that is not allowed,
    RunFailed where the hub cannot be reached."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        if private and api.repo_info(made.repo_id).private is False:
            raise UserError(
                f"push_to_hub={repo} is there and public: private=false uploads to it all the same"
            )
        adding = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(made.repo_id, adding, commit_message="Export of sd-atelier")
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = f"push_to_hub={repo}: the hub refused it ({_first_line(error)})"
        if status in (401, 403):
            raise UserError(f"{why}; {_LOG_IN}") from None
        raise RunFailed(f"{why}. {_KEPT}") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise RunFailed(
            f"push_to_hub={repo}: the hub could not be reached ({_first_line(error)}). {_KEPT}"
        ) from None
    return str(made)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
