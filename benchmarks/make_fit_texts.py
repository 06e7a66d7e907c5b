"""Make the code and documentation that ship with the package to be learned from, by repairs and by healing.

    python benchmarks/make_fit_texts.py FOLDER

Pieces of PIECE characters of packages that are installed beside this one, under licences that let them be passed on, as
many of each kind as COUNT says: code (Python, C and C++ headers) and documentation (the long descriptions of packages,
and the longest docstring of a module).
Nothing of Python's own library or documentation, which judge (real_models.held_out), and of no package that copies
parts of them. Writes code_and_documentation.jsonl, a record for each piece, and code_and_documentation.md, which says
where they are from. The same packages in the same versions give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

# By licence; all ask that the notice stays, which the second file is.
LICENCES = {
    "Apache-2.0": "aiohttp huggingface-hub msgpack pyarrow ray safetensors tokenizers transformers accelerate datasets",
    "BSD-2-Clause": "Pygments xxhash",
    "BSD-3-Clause": "click contourpy fsspec h5py httpx idna Jinja2 joblib MarkupSafe mpmath networkx numpy pandas "
    "protobuf psutil scikit-learn scipy sympy torch",
    "MIT": "annotated-types anyio attrs filelock fonttools gguf h11 iniconfig jsonschema markdown-it-py mdurl pluggy "
    "pydantic pyparsing pytest PyYAML referencing rich ruff shellingham six tomli typer urllib3",
}
PIECE, COUNT, MOST_OF_ONE = 1800, 60, 4
HEADERS = 18  # of the pieces of code
OTHERS = ("test", "third", "vendor", "_distutils")  # in the names of files that are not taken
SEED = 0


@dataclass(frozen=True)
class Piece:
    """``text`` of a ``kind``, which is ``of`` a package in a version, and there in a file."""

    kind: str
    of: str
    file: str
    licence: str
    text: str


def installed() -> Iterator[tuple[str, Distribution]]:
    """The packages that are here, with their licences."""
    for licence, names in LICENCES.items():
        for name in names.split():
            try:
                yield licence, distribution(name)
            except ModuleNotFoundError:
                continue


def cut(text: str, dice: random.Random) -> str | None:
    """A piece of ``text`` that begins with a line; None where it is too short, or no text to read."""
    others = sum(not (" " <= c <= "~" or c in "\n\t") for c in text)
    if len(text) < 1.2 * PIECE or others > 0.01 * len(text) or max(map(len, text.split("\n"))) > 600:
        return None
    begin = text.find("\n", dice.randrange(len(text) - PIECE)) + 1
    piece = re.sub(r"\b(pypi|anaconda)\.org\b", "example.org", text[begin : begin + PIECE])  # names no registry
    return piece if len(piece) > PIECE // 2 else None


def description(text: str) -> str:
    """What METADATA has after its fields."""
    return text.partition("\n\n")[2]


def docstring(text: str) -> str:
    """The longest docstring of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
    return max(found, key=len, default="")


def pieces(kind: str, suffixes: tuple[str, ...], count: int, taken: Callable[[str], str] = str) -> list[Piece]:
    """``count`` pieces of what is ``taken`` of the files that end so, from as many packages as there are, in turn."""
    dice, by_package = random.Random(f"{SEED} {kind} {suffixes}"), list[list[Piece]]()
    for licence, package in installed():
        names = sorted(str(file) for file in package.files or [] if str(file).endswith(suffixes))
        files = [name for name in names if not any(other in name for other in OTHERS)]
        found = list[Piece]()
        for file in dice.sample(files, min(len(files), 400)):
            if len(found) == MOST_OF_ONE:
                break
            text = Path(str(package.locate_file(file))).read_text(encoding="utf-8", errors="replace")
            if (piece := cut(taken(text), dice)) is not None:
                found.append(Piece(kind, f"{package.name} {package.version}", file, licence, piece))
        by_package.append(found)
    in_turn = [found[n] for n in range(MOST_OF_ONE) for found in by_package if n < len(found)]
    return in_turn[:count]


def copyright_of(package: Distribution, licence: str) -> str:
    """The first line of a package's licence that names who has the copyright; of Apache's, which names nobody, and
    where there is none, its authors."""
    licences = [] if licence.startswith("Apache") else [file for file in package.files or [] if "LICEN" in str(file)]
    for file in sorted(map(str, licences)):
        path = Path(str(package.locate_file(file)))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            if re.match(r"\W*copyright\b.*\d{4}", line, re.IGNORECASE):
                return line.strip(" #*/").replace("|", "/")
    return package.metadata["Author"] or package.metadata["Author-email"] or "its authors"


def notice(found: list[Piece]) -> str:
    """Where the pieces are from, in Markdown."""
    lines = ["# Where the pieces of code_and_documentation.jsonl are from", ""]
    lines += ["Made by benchmarks/make_fit_texts.py. Each piece is some 1,800 characters of a file of the package.", ""]
    lines += ["| package | licence | its notice | files |", "|---|---|---|---|"]
    notices = {f"{one.name} {one.version}": copyright_of(one, licence) for licence, one in installed()}
    for of in sorted({piece.of for piece in found}, key=str.lower):
        ours = [piece for piece in found if piece.of == of]
        files = ", ".join(f"`{'METADATA' if one.file.endswith('METADATA') else one.file}`" for one in ours)
        lines.append(f"| {of} | {ours[0].licence} | {notices[of]} | {files} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    code = pieces("code", (".py",), COUNT - HEADERS) + pieces("code", (".h", ".hpp", ".pxd"), HEADERS)
    random.Random(SEED).shuffle(code)
    described = pieces("documentation", ("METADATA",), COUNT, description)
    described += pieces("documentation", (".py",), COUNT - len(described), docstring)
    random.Random(SEED).shuffle(described)
    found = [*code, *described]
    lines = [json.dumps(asdict(piece)) + "\n" for piece in found]
    (folder / "code_and_documentation.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "code_and_documentation.md").write_text(notice(found), encoding="utf-8")
    for kind in ("code", "documentation"):
        ours = [piece for piece in found if piece.kind == kind]
        packages = len({piece.of for piece in ours})
        print(f"{kind}: {len(ours)} pieces of {packages} packages, {sum(len(p.text) for p in ours):,} characters")


if __name__ == "__main__":
    main()
