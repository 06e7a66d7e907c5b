"""A text to heal on that is long enough: the manuals of Debian's documentation packages.

    python benchmarks/debian_texts.py FILE.jsonl [PACKAGE ...]

Fetches PACKAGE (debian-reference-en, postgresql-doc-15 unless told otherwise) with ``apt-get download``, and writes a
record for each of its HTML pages: ``text``, and ``where`` it stood. No page is of a kind that real_models.held_out has:
no encyclopedia, no Python. Prints how many characters there are, and their sha256.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("debian-reference-en", "postgresql-doc-15")
LEAST = 1000  # characters of a page
_BLOCKS = {"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br", "td", "th"}
_SILENT = {"script", "style", "head", "nav"}


class _Text(HTMLParser):
    """What a page says, a block a line; lines of listings as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._silent = self._listing = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        self._listing += tag == "pre"
        if tag in _BLOCKS:
            self.said.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in _SILENT
        self._listing -= tag == "pre"
        if tag in _BLOCKS and tag != "br":
            self.said.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent and not self._listing:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if not self.said or self.said[-1].endswith("\n") else data
        if not self._silent:
            self.said.append(data)


def text_of(page: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    lines = (line.rstrip() for line in "".join(parser.said).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line if line.strip() else "" for line in lines)).strip()


def pages(package: str) -> list[tuple[str, str]]:
    """The HTML pages of ``package``: where each stands in it, and its text."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", "-q", package], cwd=place, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(place).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), "files"], cwd=place, check=True)
        root, found = Path(place) / "files", []
        for path in sorted(root.rglob("*.html*")):
            if path.is_file() and not path.is_symlink():
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                found.append((str(path.relative_to(root)), text_of(raw.decode("utf-8", "replace"))))
        return [(where, text) for where, text in found if len(text) >= LEAST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), metavar="PACKAGE")
    given = parser.parse_args()
    seen, digest, characters = set[str](), hashlib.sha256(), 0
    with given.file.open("w", encoding="utf-8") as file:
        for package in given.packages:
            for where, text in pages(package):
                if text not in seen:
                    seen.add(text)
                    digest.update(text.encode())
                    characters += len(text)
                    file.write(json.dumps({"text": text, "where": where}) + "\n")
    print(f"{len(seen)} pages, {characters:,} characters, sha256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
