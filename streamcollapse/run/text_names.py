"""Names of texts: of files, of all that a pattern matches, of datasets of the Hub. Imports nothing that takes long."""

from __future__ import annotations

from pathlib import Path

from streamcollapse.errors import CalibrationError

HUB = "hub:"


def is_of_hub(name: str | Path) -> bool:
    """Whether ``name`` is that of a dataset of the Hub, hub:org/name[/config][:split[:column]]."""
    return str(name).startswith(HUB)


def absolute(name: str | Path) -> str:
    """``name`` from wherever it is asked for."""
    return str(name) if is_of_hub(name) else str(Path(name).absolute())


def short(name: str | Path) -> str:
    """``name`` as records have it: without directories."""
    return str(name) if is_of_hub(name) else str(name).rpartition("/")[2]


def matching(pattern: str | Path) -> list[Path]:
    """The files that ``pattern`` names, in order. Raises CalibrationError where there are none."""
    path = Path(pattern)
    if path.is_file() or not any(sign in str(pattern) for sign in "*?["):
        return [path]
    start = Path(path.anchor)
    found = sorted(one for one in start.glob(str(path.relative_to(start) if path.anchor else path)) if one.is_file())
    if not found:
        raise CalibrationError(f"{pattern}: no file matches it")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises CalibrationError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start})") from error
