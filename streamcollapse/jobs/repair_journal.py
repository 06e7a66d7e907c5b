"""What a work directory keeps of a repair: each layer that was fitted, as it is, and the repaired plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch

from streamcollapse.errors import OutputError, PlanError
from streamcollapse.merge.plan import Plan, PlanLayer
from streamcollapse.merge.view import refit_name
from streamcollapse.repair.layer import Matrices
from streamcollapse.repair.mend import Known, Mended
from streamcollapse.run.opened import Run
from streamcollapse.run.refits import find_stored, store_refits
from streamcollapse.run.work_directory import FITS, REPAIR, TemporaryWork, WorkDirectory, read_document, write_document

_REFITS = "refits"  # the directory of tensors
_CPU = torch.device("cpu")


class RepairJournal:
    """Of the repair of ``plan`` that ``key`` names, in ``work``: a kill loses the fit that is under way. What is kept
    for another repair, or is damaged, counts for nothing."""

    def __init__(self, run: Run, work: TemporaryWork, plan: Plan, key: dict[str, Any]) -> None:
        self._run, self._work, self._plan, self._key = run, work, plan, key
        self._directory = work.path / _REFITS
        self._fits = self._kept()

    def whole(self) -> Plan | None:
        """The repaired plan, if that is complete and its tensors are there."""
        try:
            found = Plan.from_json(self._read(REPAIR)["plan"])
        except (PlanError, KeyError):
            return None
        if not find_stored(self._run.job, self._directory, found.layers):
            return None
        return replace(found, origin=self._plan.origin)

    def complete(self, result: Plan) -> None:
        """The repair has come to ``result``."""
        self._write(REPAIR, {"plan": json.loads(json.dumps(result.to_json()))})

    def known(self, position: int) -> Known | None:
        """What the layer at ``position`` was fitted to, if it was."""
        for mended, refits in self._fits:
            layer = PlanLayer(self._plan.layers[position].base, {}, refits)
            if mended.position == position and find_stored(self._run.job, self._directory, [layer]):
                read = self._run.job.overlay.read
                return Known(mended, refits, {name: read(refit_name(d), _CPU) for name, d in refits.items()})
        return None

    def keep(self, mended: Mended, matrices: Matrices) -> dict[str, str]:
        """A layer was fitted: the digests of its ``matrices``."""
        refits = store_refits(self._run.job, self._directory, matrices)
        self._fits = [*(one for one in self._fits if one[0].position != mended.position), (mended, refits)]
        self._write(FITS, {"layers": [{"mended": asdict(one), "refits": digests} for one, digests in self._fits]})
        return refits

    def _kept(self) -> list[tuple[Mended, dict[str, str]]]:
        try:
            return [(Mended(**one["mended"]), dict(one["refits"])) for one in self._read(FITS).get("layers", [])]
        except (KeyError, TypeError, ValueError):
            return []

    def _read(self, name: str) -> dict[str, Any]:
        path = self._work.path / name
        if not isinstance(self._work, WorkDirectory) or not path.is_file():
            return {}
        try:
            document = read_document(path)
        except OutputError:
            return {}
        return document if document.get("key") == self._key else {}

    def _write(self, name: str, document: dict[str, Any]) -> None:
        if isinstance(self._work, WorkDirectory):
            write_document(self._work.path / name, {"key": self._key, **document})
