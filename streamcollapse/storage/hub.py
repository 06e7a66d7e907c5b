"""Checkpoints on the Hugging Face Hub: ``org/name`` or ``org/name@revision``. What is needed of one is fetched into the
Hub's own cache, where other tools find it too."""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# That of the library which connects: a class of its own, and of another library in each version.
from huggingface_hub.errors import HTTPError as HubHTTPError  # type: ignore[attr-defined]

from streamcollapse.errors import CheckpointError
from streamcollapse.progress import Listener, PhaseStarted, StepDone
from streamcollapse.storage.index import (
    CONFIG_FILE,
    FORMATS,
    HUB_ID,
    SINGLE_FILE,
    find_shards,
    is_beside,
    is_file,
    is_hub_id,
    shards_of_index,
    what_is_there,
)

_MOST_SAID = 120  # characters of what the client says
_CACHE_IS_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_TIMEOUT_SECONDS = 10.0


def local_directory(source: str | Path, listener: Listener) -> Path:
    """The directory of ``source``, fetched first if it ``is_hub_id``: weights in one format, and the small files.

    Without a connection, what is in the cache, if it is whole. Raises CheckpointError.
    """
    match = HUB_ID.fullmatch(str(source))
    if match is None or not is_hub_id(source):
        return Path(source)
    repo, revision, name = match["repo"], match["revision"], str(source)
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
        found = [sibling.rfilename for sibling in info.siblings or []]
        directory = _fetch(repo, str(info.sha), found, listener)
        _note_revision(repo, revision, found)
        return directory
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: accept the model's terms on the Hub, then log in (hf auth login)") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the Hub has no such revision of {repo}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name}: neither a directory here nor a model on the Hub; for a private one, log in (hf auth login)"
        ) from error
    except (HubHTTPError, OSError) as error:
        number = (error.errno if isinstance(error, OSError) else None) or 0
        if number in _CACHE_IS_AT_FAULT:
            said = os.strerror(number)
            raise CheckpointError(f"{name}: cannot be fetched into the Hub's cache: {said}") from error
        return _cached(repo, revision, name, error)


def _note_revision(repo: str, revision: str | None, found: Sequence[str]) -> None:
    """Have the cache know the commit of ``revision``, which a file fetched by its commit does not tell it."""
    if CONFIG_FILE in found:
        with contextlib.suppress(HubHTTPError, OSError):  # missed only without a connection
            hf_hub_download(repo, CONFIG_FILE, revision=revision)


def _fetch(repo: str, commit: str, found: Sequence[str], listener: Listener) -> Path:
    def fetch(file: str) -> Path:
        return Path(hf_hub_download(repo, file, revision=commit))

    shards = _shards(repo, found, fetch)
    small = [file for file in found if is_beside(file)]
    files = [*small, *shards]
    listener(PhaseStarted("fetch", len(files)))
    path = Path()
    for file in files:  # one after the other: the client splits large files itself, and an interrupt ends it at once
        path = fetch(file)
        listener(StepDone(file, path.stat().st_size))
    return Path(str(path).removesuffix(files[-1]))


def _shards(repo: str, found: Sequence[str], fetch: Callable[[str], Path]) -> list[str]:
    """The files with weights among ``found``, and their index."""
    for single, index in FORMATS:
        if single in found:
            return [single]
        if index in found:
            return [index, *sorted(set(shards_of_index(fetch(index)).values()))]
    raise CheckpointError(f"{repo}: {what_is_there(found)}")


def _cached(repo: str, revision: str | None, name: str, error: Exception) -> Path:
    offline = isinstance(error, OfflineModeIsEnabled)
    said = next(iter(str(error).splitlines()), type(error).__name__)[:_MOST_SAID]
    reason = "offline mode is on (HF_HUB_OFFLINE)" if offline else f"the Hub cannot be reached ({said})"
    config = try_to_load_from_cache(repo, CONFIG_FILE, revision=revision)
    if not isinstance(config, str):
        raise CheckpointError(f"{name}: no directory here, not in the Hub's cache, and {reason}") from error
    directory = Path(config).parent
    try:
        shards, _ = find_shards(directory)
    except CheckpointError:
        shards = [SINGLE_FILE]
    missing = [shard for shard in shards if not is_file(directory / shard)]
    if missing:
        raise CheckpointError(
            f"{name}: the Hub's cache lacks {missing[0]}, and {reason}; connect and run it again"
        ) from error
    return directory
