"""The verb inspect."""

from __future__ import annotations

from streamcollapse.cli import options as o
from streamcollapse.cli.derived import grouped
from streamcollapse.cli.screen import print_json
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import Compute, RunSettings


@grouped
def inspect(
    source: o.Source, compute: Compute, as_json: o.Json = False, trust_remote_code: o.TrustRemoteCode = False
) -> None:
    """Say what SOURCE is and what pruning it would need in memory; reads headers only."""
    check_source(source)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.inspect import inspect as run

    found = run(source, settings=RunSettings(compute, trust_remote_code=trust_remote_code))
    print_json(found.to_json()) if as_json else tables.show_inspection(found)
