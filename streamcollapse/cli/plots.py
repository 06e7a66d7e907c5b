"""Memory over time: a line of blocks in the terminal, a picture with matplotlib where that is installed."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError, OutputError

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


def sparkline(points: Sequence[tuple[float, float]], width: int, unicode: bool = True) -> str:
    """``points`` of (seconds, value) as ``width`` characters: the largest value in each stretch of time, from 0 up."""
    if not points:
        return ""
    marks = _BLOCKS if unicode else _ASCII
    first, last, top = points[0][0], points[-1][0], max(value for _, value in points) or 1.0
    cells = [0.0] * width
    for seconds, value in points:
        position = min(int((seconds - first) / max(last - first, 1e-9) * width), width - 1)
        cells[position] = max(cells[position], value)
    for position in range(1, width):  # a stretch without a sample goes on as before
        cells[position] = cells[position] or cells[position - 1]
    return "".join(marks[min(int(value / top * (len(marks) - 1) + 0.999), len(marks) - 1)] for value in cells)


def check_plot(path: Path) -> None:
    """Raise OptionError, before anything is measured, where a picture could not be drawn or written."""
    _matplotlib()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{path}: a picture is .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path.parent}: does not exist; create it first")


def plot_memory(
    points: Sequence[tuple[float, Mapping[str, int | None]]], phases: Sequence[tuple[str, float]], path: Path
) -> None:
    """Draw each kind of memory (bytes by name) over seconds into ``path``; ``phases`` are names and seconds each
    took."""
    figure, axes = _matplotlib().subplots(figsize=(9, 4), layout="constrained")
    for name in points[0][1] if points else ():
        known = [(seconds, value) for seconds, values in points if (value := values[name]) is not None]
        if known:
            axes.plot([seconds for seconds, _ in known], [value / 1e9 for _, value in known], label=name)
    start = 0.0
    for name, seconds in phases:
        axes.axvspan(start, start + seconds, alpha=0.08, color="black" if len(axes.patches) % 2 else "none")
        axes.text(start + seconds / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center")
        start += seconds
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
    axes.legend()
    _save(figure, path)


def plot_lines(lines: Mapping[str, Sequence[float | None]], labels: tuple[str, str], path: Path) -> None:
    """Draw each of ``lines`` over layers, from 0, into ``path``; ``labels`` of the axes."""
    figure, axes = _matplotlib().subplots(figsize=(9, 4), layout="constrained")
    for name, values in lines.items():
        axes.plot([float("nan") if value is None else value for value in values], label=name, marker=".")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    _save(figure, path)


def plot_merges(rows: Mapping[int, Sequence[float | None]], title: str, path: Path) -> None:
    """Draw the similarity of every merge, size over start, as a heat map into ``path``."""
    width = max(map(len, rows.values()))
    cells = [
        [float("nan") if v is None else v for v in row] + [float("nan")] * (width - len(row)) for row in rows.values()
    ]
    size = (max(0.32 * width, 5.0), 1.2 + 0.45 * len(rows))
    figure, axes = _matplotlib().subplots(figsize=size, layout="constrained")
    image = axes.imshow(cells, aspect="auto", origin="lower", cmap="viridis")
    axes.set(xlabel="first layer of the group", ylabel="layers merged", title=title)
    axes.set_yticks(range(len(rows)), [str(size) for size in rows])
    figure.colorbar(image, label="similarity")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def _matplotlib() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError("pictures need matplotlib: pip install 'streamcollapse[plot]'") from error
    return pyplot
