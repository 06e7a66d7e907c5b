"""A batch on Ray in a process of its own (Ray leaves threads and open files behind): kills one worker on the way."""

from __future__ import annotations

import json
import os
import sys

from streamcollapse.batches.run import Cluster, batch
from streamcollapse.batches.worker import JobEvent, JobStarted
from streamcollapse.progress import DecisionMade, LayerDone, PhaseStarted
from streamcollapse.settings.run import Compute, RunSettings
from tests.batches.test_batch import Killer


def main(jobs: str, task: str) -> None:
    killer = Killer(task, 1 if task else 0, lambda event: isinstance(event, DecisionMade))
    found = batch(
        jobs, cluster=Cluster("ray", workers=2), settings=RunSettings(compute=Compute("cpu")), listener=killer
    )
    read: list[int] = []  # layers in each reference pass of the sources of that task
    for message in killer.events:
        if isinstance(message, JobEvent) and task and message.name.startswith(task[:2]):
            if isinstance(message.event, PhaseStarted) and message.event.name == "reference":
                read.append(0)
            elif isinstance(message.event, PhaseStarted):
                read.append(-1000)
            elif isinstance(message.event, LayerDone):
                read[-1] += 1
    print(
        json.dumps(
            {
                "statuses": [o.status for o in found.outcomes],
                "attempts": [o.attempts for o in found.outcomes],
                "pids": len({m.pid for m in killer.events if isinstance(m, JobStarted)}),
                "driver": os.getpid(),
                "references": [layers for layers in read if layers >= 0],
            }
        )
    )


main(sys.argv[1], sys.argv[2])
