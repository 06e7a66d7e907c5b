"""The work directory of a job that makes an output: kept while the job is not done, whatever ends it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from streamcollapse.errors import StreamCollapseError, printable
from streamcollapse.run.workdir import WorkDirectory
from streamcollapse.storage.locks import claimed
from streamcollapse.storage.staging import lock_of, partial_of


class Request(Protocol):
    """A job as it was asked for."""

    @property
    def out(self) -> Path:
        """The directory to make."""
        ...

    @property
    def work_dir(self) -> Path:
        """Where the run keeps what it finds out."""
        ...

    @property
    def for_good(self) -> bool:
        """Whether the work directory is there for other runs too, and stays when this one is done."""
        ...

    def run(self) -> dict[str, Any]:
        """What tells two runs on the same source apart, as JSON types."""
        ...

    def document(self) -> dict[str, Any]:
        """Everything that ``resume`` needs, as JSON types."""
        ...


@contextmanager
def kept_directory(asked: Request, key: Mapping[str, Any], passing: bool = False) -> Iterator[WorkDirectory]:
    """The work directory of the job ``asked`` for, which alone now makes its output.

    A directory that is not there ``for_good`` is removed at the end of the run. A run that fails leaves it, if anything
    was found out, and its error says how to go on; not so one that is ``passing``, since its caller removes all of it.
    Raises OutputError.
    """
    directory = WorkDirectory(asked.work_dir, key)
    with closing(directory):
        try:
            with claimed(lock_of(asked.out), str(asked.out)):
                directory.begin(asked.run(), asked.document())
                try:
                    yield directory
                except BaseException:
                    if not directory.is_worth_keeping():
                        shutil.rmtree(partial_of(asked.out), ignore_errors=True)
                    raise
            if asked.for_good:
                directory.mark("complete")
        except (StreamCollapseError, OSError, KeyboardInterrupt) as error:
            if passing:
                pass
            elif directory.is_worth_keeping():
                again = f"progress saved; resume with: streamcollapse resume {printable(directory.path)}"
                error.args = (f"{error}; {again}" if str(error) else again,)
            elif not asked.for_good:
                directory.remove()
            raise
        if not asked.for_good:  # last of all: while it is there, a run that was killed knows how far it had come
            directory.remove()
