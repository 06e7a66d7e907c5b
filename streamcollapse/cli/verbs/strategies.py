"""The verb strategies."""

from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.searches.registry import describe
from streamcollapse.searches.registry import strategies as all_strategies
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.declared import Declared, declared
from streamcollapse.settings.search import SearchOptions


def strategies(as_json: o.Json = False) -> None:
    """List the strategies of a search and the metrics it may judge by: what each does, where it is from, its cost."""
    if as_json:
        print_json({"strategies": describe(), "metrics": {name: vars(one) for name, one in METRICS.items()}})
    else:
        _show_strategies()
        _show_metrics()


def _show_strategies() -> None:
    """What each strategy does, where it is from, what it reads."""
    console, known = plain_console(), declared(SearchOptions)
    for name, strategy in all_strategies().items():
        rows: list[tuple[str, str | Text]] = [("does", strategy.summary), ("source", strategy.source)]
        rows.append(("model reads", strategy.cost))
        chosen = [_option_text(known[key], value) for key, value in strategy.defaults.items()]
        rows.append(("default", " ".join([*filter(None, chosen), f"--calibration {strategy.samples}"])))
        if strategy.needs_target:
            rows.append(("needs", "a target: --target-layers, --target-ratio, --target-memory or --max-loss"))
        console.print(Text(name, "bold"))
        console.print(lines_of([(f"  {key}", value) for key, value in rows]))


def _option_text(setting: Declared, value: object) -> str:
    """``setting`` with ``value`` as it would be typed; nothing for a flag that is off."""
    if isinstance(value, bool):
        return setting.flag if value else ""
    return f"{setting.flag} {value}"


def _show_metrics() -> None:
    """What each metric compares, and where it is from."""
    console = plain_console()
    console.print(Text("metrics, of which 1 is the same", "bold"))
    console.print(lines_of([(f"  {name}", f"{metric.summary} ({metric.source})") for name, metric in METRICS.items()]))
