"""Coverage-guided fuzzing of everything that parses a stranger's bytes, with atheris (libFuzzer for Python).

    pip install -c constraints.txt -e '.[fuzz]'
    python tests/fuzz/fuzz.py header|index|pickle|torchfile|jobs [--runs N] [--seed S]

A finding is an exception outside the error tree, an error of more than one line, an input that takes over a second, a
file opened that is not the input, or an import, a process or a call of code that the input brought about. Memory is
that of the whole process: over 100 MB more at the end than after the first thousand inputs is a finding too.
The corpus in tests/fuzz/corpus is where it starts; what it finds on the way is thrown away. Prints one JSON document;
the numbers that were run are in tests/fuzz/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import encodings
import importlib
import io
import json
import os
import pkgutil
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("header", "index", "pickle", "torchfile", "jobs")
MOST_SECONDS = 1.0
MOST_GROWTH_BYTES = 100_000_000
_FORBIDDEN = ("import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect")


def target(kind: str, path: Path) -> Callable[[bytes], None]:
    """What parses bytes of ``kind``; those that read files read ``path``, which holds the bytes."""
    from streamcollapse.batches.spec import read_jobs
    from streamcollapse.errors import StreamCollapseError
    from streamcollapse.storage import torchfile
    from streamcollapse.storage.header import read_header
    from streamcollapse.storage.index import shards_of_index
    from streamcollapse.storage.pickles import PickleError, read_pickle

    parse: dict[str, Callable[[bytes], Any]] = {
        "header": lambda data: read_header(path),
        "index": lambda data: shards_of_index(path),
        "pickle": lambda data: read_pickle(io.BytesIO(data), torchfile._may_name),
        "torchfile": lambda data: torchfile.read_torch_header(path),
        "jobs": lambda data: read_jobs(path),
    }

    def run(data: bytes) -> None:
        try:
            parse[kind](data)
        except PickleError:
            if kind != "pickle":
                raise
        except StreamCollapseError as error:
            if "\n" in str(error):
                raise ValueError(f"an error of several lines: {error!r}") from error

    return run


def fuzz(kind: str, runs: int, seed: int, corpus: Path) -> None:
    """In a process of its own, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["streamcollapse.storage", "streamcollapse.batches.spec", "pickletools"]):
        handle = os.memfd_create("input")
        path = Path(f"/proc/self/fd/{handle}")
        parse = target(kind, path)
    state = {"watching": False, "count": 0, "memory": 0}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not state["watching"]:
            return
        if event in _FORBIDDEN or (event == "open" and str(arguments[0]) != str(path)):
            state["watching"] = False
            raise AssertionError(f"{event} {arguments[0]!r}")

    sys.addaudithook(watch)
    for module in pkgutil.iter_modules(encodings.__path__, "encodings."):  # or they would be imported when first met
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
    for file in sorted(corpus.iterdir()):  # other imports and caches of the first time
        one(parse, handle, file.read_bytes())

    def test(data: bytes) -> None:
        state["watching"] = True
        start = time.perf_counter()
        one(parse, handle, data)
        seconds = time.perf_counter() - start
        state["watching"] = False
        assert seconds < MOST_SECONDS, f"took {seconds:.1f} s"
        state["count"] += 1
        if state["count"] in (1000, runs):
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - state["memory"]
            assert state["count"] == 1000 or grown < MOST_GROWTH_BYTES, f"memory grew by {grown} bytes"
            state["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={tempfile.gettempdir()}/", str(corpus)], test)
    atheris.Fuzz()


def one(parse: Callable[[bytes], None], handle: int, data: bytes) -> None:
    """One input."""
    os.ftruncate(handle, 0)
    os.pwrite(handle, data, 0)
    parse(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        fuzz(given.kind, given.runs, given.seed, given.inside)
        return
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus"
        corpus.mkdir()
        for file in (CORPUS / given.kind).iterdir():
            (corpus / file.name).write_bytes(file.read_bytes())
        command = [sys.executable, __file__, given.kind, "--inside", str(corpus)]
        command += ["--runs", str(given.runs), "--seed", str(given.seed)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        found = len(list(corpus.iterdir()))
    document = {
        "target": given.kind,
        "runs": int(counted[1]) if counted else 0,
        "seconds": round(time.perf_counter() - start, 1),
        "corpus": found,
        "exit": done.returncode,
        "said": (done.stdout[-1500:] + done.stderr[-500:]) if done.returncode else "",
    }
    print(json.dumps(document))
    sys.exit(1 if done.returncode or not counted else 0)


if __name__ == "__main__":
    main()
