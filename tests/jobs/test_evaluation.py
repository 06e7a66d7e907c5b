"""A pruned checkpoint under lm-evaluation-harness, by the words of docs/evaluation.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from streamcollapse import Compute, apply, make_plan, perplexity
from streamcollapse.settings.run import EvaluationText, RunSettings

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
LM_EVAL = os.environ.get("STREAMCOLLAPSE_TEST_LM_EVAL") or shutil.which("lm_eval")


@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed, nor named by STREAMCOLLAPSE_TEST_LM_EVAL")
def test_the_harness_and_we_agree(bundled: Path, tmp_path: Path) -> None:
    text = (bundled.parent / "text" / "wiki_eval.txt").read_text(encoding="utf-8")[:4000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    words = DOCS.read_text(encoding="utf-8")
    task, command = (re.findall(rf"```{kind}\n(.*?)```", words, re.DOTALL)[0] for kind in ("yaml", "sh"))
    (tmp_path / "tasks" / "held_out.yaml").write_text(task)
    apply(bundled, make_plan(bundled, "9-11"), tmp_path / "pruned", settings=RunSettings(compute=Compute("cpu")))
    command = command.replace("llama-2-23l,dtype=bfloat16,max_length=2048", "pruned,dtype=float32,max_length=256")
    asked = [str(LM_EVAL), *shlex.split(command)[1:], "--device", "cpu", "--output_path", "out"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(asked, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["held_out"]["bits_per_byte,none"]
    ours = perplexity(
        tmp_path / "pruned",
        EvaluationText(tmp_path / "text.txt", window=256),
        settings=RunSettings(compute=Compute("cpu", "float32")),
    )
    assert ours.layers == 21
    assert theirs == pytest.approx(ours.bits_per_byte, rel=0.03)
