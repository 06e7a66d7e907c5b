"""The verb inspect."""

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json
from streamcollapse.run.first_checks import check_source


@o.grouped
def inspect(source: o.Source, settings: o.Computing, as_json: o.Json = False) -> None:
    """Say what SOURCE is and what pruning it would need in memory; reads headers only."""
    check_source(source)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.inspect import inspect as run

    found = run(source, settings=settings)
    print_json(found.to_json()) if as_json else tables.show_inspection(found)
