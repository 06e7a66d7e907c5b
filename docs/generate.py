"""Writes the pages of the documentation that are made from the code: options, strategies, families.

    python docs/generate.py          writes docs/options.md, docs/strategies.md, docs/families.md

A test holds the pages to what this makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from streamcollapse.cli.pages import options_page, strategies_page  # noqa: E402
from tests.families import page as families_page  # noqa: E402

PAGES = {"options.md": options_page, "strategies.md": strategies_page, "families.md": families_page}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
