"""The verb strategies."""

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json


def strategies(as_json: o.Json = False) -> None:
    """List the strategies of a search and the metrics it may judge by: what each does, where it is from, its cost."""
    from streamcollapse.cli.plans import show_metrics, show_strategies
    from streamcollapse.searches.registry import describe
    from streamcollapse.settings.catalogue import METRICS

    if as_json:
        print_json({"strategies": describe(), "metrics": {name: vars(one) for name, one in METRICS.items()}})
    else:
        show_strategies()
        show_metrics()
