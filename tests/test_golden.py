"""What searches decided and what was written, recorded before the code above them was rebuilt: none of it may change.

    STREAMCOLLAPSE_GOLDEN=record python -m pytest -n0 tests/test_golden.py     writes tests/golden/ anew
    STREAMCOLLAPSE_GOLDEN=exact  python -m pytest tests/test_golden.py         compares every bit of every similarity

Without either, similarities may differ by what another processor's kernels make of them; layers, decisions and the
digests of the weights may not. Everything goes through the command line, which is what users' scripts hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse import Plan
from streamcollapse.cli.main import app
from tests.checkpoints import BUNDLED

HERE = Path(__file__).parent / "golden"
MODE = os.environ.get("STREAMCOLLAPSE_GOLDEN", "")
TOLERANCE = 0.0 if MODE == "exact" else 2e-4
SAMPLES = (
    "The river rises in the hills to the north of the town and flows south to the sea.",
    "She was elected to the council in 1921 and served until the end of the war.",
    "The album was recorded in two weeks and released the following spring to good reviews.",
)
CASES = {
    "laco-sequential": "--strategy laco -C 4 -I 2 -T 0.9",
    "laco-rdsc": "--strategy laco -C 3 -I 1 -T 0.2 --rule rdsc --rdsc-scale 0.25",
    "laco-mean-norms": "-C 3 -I 1 -T 0.8 --rule mean --merge-norms",
    "laco-first": "--strategy laco -C 4 -I 1 -T 0.85 --rule first -L 3 -H 20",
    "laco-best": "--strategy laco -C 3 -I 2 -T 0.9 --rule best --rdsc-scale 0.25,1",
    "laco-target": "--strategy laco --target-ratio 0.2 --rule mean",
    "laco-kl": "--strategy laco -T 0.7 --metric kl --rescale",
    "laco-cka": "--strategy laco -T 0.95 --metric cka-linear",
    "greedy": "--target-layers 21 --effort thorough --rescale",
    "greedy-standard": "--target-layers 21 --rescale",
    "greedy-threshold": "--strategy greedy -T 0.8 --no-rescale -L 2 -H 22 --effort thorough",
    "greedy-rules": "--strategy greedy --target-layers 22 --rule sequential,mean --metric token-cosine "
    "--merges-per-round 2 --effort thorough --rescale",
    "greedy-nll": "--strategy greedy --target-ratio 0.08 --metric nll --no-rescale --effort thorough",
    "rule-based": "--strategy rule-based -C 3 -I 2 --target-layers 18",
    "rule-based-mean": "--strategy rule-based -C 2 -I 3 -L 5 --rule mean",
    "block-influence": "--strategy block-influence --target-layers 18",
    "block-influence-scales": "--strategy block-influence --target-ratio 0.1 --rescale",
    "angular": "--strategy angular --target-ratio 0.25",
}


def _weights(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors*"))}


def _run(directory: Path, arguments: str) -> dict[str, Any]:
    samples, out = directory / "samples.txt", directory / "out"
    samples.write_text("\n".join(SAMPLES) + "\n", encoding="utf-8")
    given = arguments.split()
    given += ["--calibration", str(samples), "--max-tokens", "16", "--device", "cpu", "--compute-dtype", "float32"]
    given += ["--repair", "none"]
    result = CliRunner().invoke(app, ["prune", str(BUNDLED), "--out", str(out), *given, "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads((out / "streamcollapse_plan.json").read_text(encoding="utf-8"))
    return {"arguments": arguments, "plan": plan, "weights": _weights(out)}


def _close(ours: Any, theirs: Any, where: str) -> None:
    """Equal, but for similarities, which may be ``TOLERANCE`` apart."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            _close(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            _close(*pair, f"{where}[{number}]")
    elif isinstance(theirs, float) and (".similarity" in where or ".tried" in where or ".threshold" in where):
        assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=0.0), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("case", CASES)
def test_decisions_plans_and_weights_stay_what_they_were(case: str, tmp_path: Path) -> None:
    found, path = _run(tmp_path, CASES[case]), HERE / f"{case}.json"
    if MODE == "record":
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _close(found, json.loads(path.read_text(encoding="utf-8")), case)


@pytest.mark.parametrize("case", CASES)
def test_plans_of_before_are_read_and_written_as_they_are(case: str) -> None:
    recorded = json.loads((HERE / f"{case}.json").read_text(encoding="utf-8"))["plan"]
    assert json.loads(json.dumps(Plan.from_json(recorded).to_json())) == recorded
