"""Links in a checkpoint's directory: a stranger's could lead to any file here, which would then be read or copied."""

from __future__ import annotations

from pathlib import Path

from streamcollapse.errors import CheckpointError


def refuse_links_that_leave(directory: Path) -> None:
    """Raise CheckpointError for a file of ``directory``, or of a folder in it, that is a link to somewhere outside.

    The Hub's cache consists of links, from a snapshot to the files of the same model beside it: those may be followed.
    """
    try:
        inside = directory.resolve()
        blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
        for entry in [*directory.iterdir(), *directory.glob("*/*")]:
            if not entry.is_symlink():
                continue
            target = entry.resolve()
            if target.exists() and inside not in target.parents and blobs not in target.parents:
                raise CheckpointError(
                    f"{entry}: is a link to {target}, outside the checkpoint's directory; put the file itself there"
                )
    except (OSError, RuntimeError) as error:  # a loop of links, a directory closed to us
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{directory}: cannot be read: {reason}") from error
