"""Checks whether a model or data set is available with the present token."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_session, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hybridrl.models.loading import BUILTIN, HUB_FILES, why_missing

LIMIT_S = 10.0
"""Longest wait for an answer of the hub, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The result of `reach`: whether a model or data set is available."""

    reached: bool
    text: str  # where it is, or why it is not available and what to do


def reach(
    path: str, revision: str | None, *, api: HfApi | None = None, kind: str = "model"
) -> Reach:
    """Look for a model or data set on this disk, in the cache and on the hub.

    Args:
        path: builtin:NAME, a folder, or a name on the hub.
        revision: on the hub; None: the newest.
        api: a client of the hub; None: one for HF_ENDPOINT.
        kind: "model" or "dataset".
    """
    if path.startswith(BUILTIN):
        reason = why_missing(path.removeprefix(BUILTIN))
        return Reach(reached=reason is None, text=reason or "comes with hybridrl")
    if Path(path).exists():
        if kind == "model" and not (Path(path) / "config.json").is_file():
            text = "exists but holds no config.json; give a Hugging Face model folder"
            return Reach(reached=False, text=text)
        return Reach(reached=True, text="is on this disk")
    if path.startswith(("/", "./", "../", "~")):
        return Reach(reached=False, text="there is no such file or folder; correct the path")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return _cached(path, revision, kind)
    return _on_hub(path, revision, api or HfApi(), kind)


def _cached(path: str, revision: str | None, kind: str) -> Reach:
    # The cache has only those files of a model that loading downloads.
    files = list(HUB_FILES) if kind == "model" else None
    try:
        snapshot_download(
            path, revision=revision, repo_type=kind, allow_patterns=files, local_files_only=True
        )
    except HFValidationError as error:
        return Reach(reached=False, text=f"is not a valid name on the hub: {error}")
    except LocalEntryNotFoundError:
        return Reach(
            reached=False, text="is not in the cache here, and HF_HUB_OFFLINE is set; unset it"
        )
    return Reach(reached=True, text="is in the hub's cache here")


def _on_hub(path: str, revision: str | None, api: HfApi, kind: str) -> Reach:
    token = "with the token at hand" if api.token or get_token() else "without a token"
    get_session().timeout = LIMIT_S  # auth_check takes no limit
    try:
        info = api.repo_info(path, revision=revision, repo_type=kind, timeout=LIMIT_S)
        api.auth_check(path, repo_type=kind)
    except GatedRepoError:
        text = (
            f"is gated on the hub and not accessible {token}; accept its terms there and set "
            "HF_TOKEN"
        )
        return Reach(reached=False, text=text)
    except RevisionNotFoundError:
        return Reach(reached=False, text=f"has no revision {revision} on the hub; correct it")
    except RepositoryNotFoundError:
        text = (
            f"is not on the hub, or is private and not accessible {token}; correct the name or set "
            "HF_TOKEN"
        )
        return Reach(reached=False, text=text)
    except HFValidationError as error:
        return Reach(reached=False, text=f"is not a valid name on the hub: {error}")
    except Exception as error:  # the client raises errors of its transport, which have many types
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        cached = _cached(path, revision, kind)
        text = f"the hub does not answer: {first}"
        if cached.reached:  # loading falls back to the cache too
            text = f"is in the hub's cache here, as {text}"
        return Reach(reached=cached.reached, text=text)
    return Reach(reached=True, text=f"is on the hub, at commit {(info.sha or '')[:12]}")
