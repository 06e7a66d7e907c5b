from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import streamcollapse
from streamcollapse import Plan, SearchOptions
from streamcollapse.cli.main import app
from streamcollapse.cli.screen import _View, memory_shown, strip
from streamcollapse.cli.status import Minutes, Status
from streamcollapse.cli.verbs import demo
from streamcollapse.progress import (
    CandidatesDone,
    CandidateStarted,
    DecisionMade,
    LayerDone,
    PhaseStarted,
    RoundStarted,
    StackChanged,
    TimeExpected,
)

RUN = ["--device", "cpu", "--compute-dtype", "float32"]
METHOD = ["-C", "3", "-I", "1", "-T", "0.7", "--rule", "sequential"]


def _invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def test_prune_and_its_halves_agree(llama: Path, tmp_path: Path) -> None:
    whole = _invoke("prune", str(llama), "--out", str(tmp_path / "whole"), *METHOD, *RUN)
    assert "8 -> " in whole.stdout
    assert re.search(rf"^pruned model +{re.escape(str(tmp_path / 'whole'))}$", whole.stdout, re.MULTILINE)
    assert whole.stderr == "", "nothing of the live view on a pipe"
    _invoke("search", str(llama), "--plan", str(tmp_path / "plan.json"), *METHOD, *RUN)
    _invoke("apply", str(llama), str(tmp_path / "plan.json"), "--out", str(tmp_path / "halves"), "--device", "cpu")
    one, other = (tmp_path / d / "model.safetensors" for d in ("whole", "halves"))
    assert one.read_bytes() == other.read_bytes()
    assert 1 < Plan.load(tmp_path / "plan.json").num_layers < 8


def test_json_is_one_document_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    pruned = _invoke("prune", str(llama), "--out", out, *METHOD, *RUN, "--json")
    assert pruned.stderr == ""
    report = json.loads(pruned.stdout)
    assert report["out"] == out
    assert report["layers"]["before"] == 8
    found = json.loads(_invoke("search", str(llama), "--plan", plan, *METHOD, *RUN, "--json").stdout)
    assert found == json.loads(Path(plan).read_text())
    again = json.loads(_invoke("apply", str(llama), plan, "--out", out, "--overwrite", "--json").stdout)
    assert again["parameters"] == report["parameters"]


def test_inspect(llama_bf16: Path) -> None:
    found = json.loads(_invoke("inspect", str(llama_bf16), *RUN, "--json").stdout)
    tensors: dict[str, Any] = {}
    for shard in llama_bf16.glob("*.safetensors"):
        tensors |= load_file(shard)
    layer = sum(t.nbytes for n, t in tensors.items() if ".layers.3." in n)
    total = sum(t.nbytes for t in tensors.values())
    assert found["family"] == "LlamaForCausalLM"
    assert found["num_layers"] == 8
    assert found["layer_bytes"] == [layer] * 8
    assert found["num_bytes"] == total == found["outside_bytes"] + 8 * layer
    assert found["dtypes"] == {"bfloat16": total}
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["num_tensors"] == len(tensors)
    assert found["tied_embeddings"] is False
    assert found["peak_bytes"] > 2 * layer, "a layer in float32"
    assert found["strategy"] == "greedy"
    assert any("logits" in need["what"] for need in found["needs"]), "what the default judges by needs the head"
    text = _invoke("inspect", str(llama_bf16), *RUN).stdout
    for expected in ("LlamaForCausalLM (llama)", "not tied", "cpu in float32", "pruning by greedy, the default, needs"):
        assert expected in text


def test_a_dry_run_writes_nothing_and_says_what_would_be(llama: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    command = ["prune", str(llama), "--out", str(out), *METHOD, *RUN, "--dry-run"]
    text = _invoke(*command).stdout
    assert "5 at most" in text
    assert "nothing was written" in text
    preview = json.loads(_invoke(*command, "--json").stdout)
    assert preview["most_candidates"] == 5
    assert preview["samples"] == 10
    real = json.loads(_invoke("prune", str(llama), "--out", str(out), *METHOD, *RUN, "--json").stdout)
    assert preview["smallest_output"] <= real["bytes"]["after"] <= preview["largest_output"] == real["bytes"]["before"]
    _invoke("search", str(llama), "--plan", str(plan), *METHOD, *RUN, "--dry-run")
    assert not plan.exists()
    _invoke("search", str(llama), "--plan", str(plan), *METHOD, *RUN)
    second = tmp_path / "second"
    preview = json.loads(_invoke("apply", str(llama), str(plan), "--out", str(second), "--dry-run", "--json").stdout)
    assert preview["smallest_output"] == preview["largest_output"] == real["bytes"]["after"]
    assert not second.exists()


def test_perplexity(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The river was long and the valley was wide. " * 20)
    command = ["perplexity", str(llama), "--text", str(tmp_path / "text.txt"), *RUN, "--window", "32"]
    score = json.loads(_invoke(*command, "--json").stdout)
    assert score["window"] == 32
    assert f"{score['perplexity']:.4f}" in _invoke(*command).stdout
    shorter = json.loads(_invoke(*command, "--max-tokens", "50", "--json").stdout)
    assert shorter["tokens"] == 50


def test_the_demo(tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 to 18 layers by the default strategy, and the same as JSON in the same place, with less to search."""
    out, text = tmp_path / "demo", (bundled.parent / demo.TEXT).read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:20_000], encoding="utf-8")  # a tenth of the demo's own
    monkeypatch.setattr(demo, "TEXT", str(tmp_path / "text.txt"))
    shown = _invoke("demo", "--out", str(out), *RUN).stdout
    assert "greedy, ratio 0.25, rule first, metric kl\n" in shown
    assert "positions 2-3: similarity 0.9829, merged" in shown
    assert "■" * 24 in shown
    assert "■■32■■22■■2■■■■■■■" in shown
    assert f"The pruned model is in {out}\n" in shown
    before, after = (line.split() for line in shown.splitlines() if line.startswith(("before", "after")))
    assert before[2:5] == ["24", "22", "MB"]
    assert after[2] == "18"
    assert float(before[-1]) == pytest.approx(112.17, abs=0.05)
    assert float(after[-1]) == pytest.approx(133.07, abs=0.1)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 18
    monkeypatch.setattr(demo, "DEMO_OPTIONS", SearchOptions(target_layers=22, rescale=False))
    document = json.loads(_invoke("demo", "--out", str(out), *RUN, "--json").stdout)
    assert document["layers"] == {"before": 24, "after": 22}
    assert document["perplexity"]["before"]["perplexity"] < document["perplexity"]["after"]["perplexity"]


def test_the_demo_replaces_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    (tmp_path / "mine" / "streamcollapse_report.json").write_text('{"source": {"name": "my model"}}')
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "mine")])
    assert result.exit_code == 1
    assert "exists" in result.stderr
    assert (tmp_path / "mine" / "precious").read_text() == "x"


def _options() -> str:
    """Every verb with its options and defaults, a line each."""
    lines = []
    verbs: dict[str, Any] = {}
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        verbs |= {f"{name} {sub}": one for sub, one in getattr(verb, "commands", {}).items()} or {name: verb}
    for verb in sorted(verbs):
        for parameter in verbs[verb].params:
            names = " ".join([*parameter.opts, *parameter.secondary_opts])
            required = "required" if parameter.required else f"default {parameter.default}"
            lines.append(f"{verb}: {names} ({required})")
    return "\n".join(lines) + "\n"


def test_the_option_list_is_frozen() -> None:
    golden = Path(__file__).parent / "options.txt"
    assert _options() == golden.read_text(), "an option changed: if on purpose, update tests/cli/options.txt and README"


def test_help_names_the_paper_s_letters_and_both_readings_of_rdsc() -> None:
    text = " ".join(_invoke("prune", "--help").stdout.replace("│", " ").split())
    for expected in ("C: layers", "I: layers", "L: lowest", "H: layer", "T: keep", "Eq. (1)", "released code"):
        assert expected in text


def test_version() -> None:
    assert _invoke("--version").stdout.startswith("streamcollapse 0.")


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = "import sys, streamcollapse.cli.main; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_strip_shows_merged_and_tested_cells() -> None:
    text = strip((1, 4, 1, 12), tested=range(2, 4))
    assert text.plain == "■4■+"
    assert [str(s.style) for s in text.spans] == ["blue", "bold white on magenta", "black on yellow", "black on yellow"]
    assert strip((1, 1), unicode=False).plain == "##"


def drawn(view: _View) -> list[str]:
    """The lines of ``view`` on a wide terminal."""
    console = Console(width=100, file=io.StringIO())
    console.print(view)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_live_view_follows_the_events() -> None:
    seconds = 0.0
    view = _View(unicode=True, clock=lambda: seconds)

    def lines() -> list[str]:
        return drawn(view)

    view.listen(PhaseStarted("reference", 4))
    view.listen(LayerDone(0, 4, 1000, 2.0, 1.5))
    view.listen(LayerDone(1, 4, 1000, 2.0, 1.5))
    seconds = 2.0
    assert re.match(r"reference  ━{12}.{12} layer 2/4  2 kB  reading  2.00 s *$", lines()[0])
    view.listen(PhaseStarted("search"))
    view.listen(StackChanged((1, 1, 1, 1)))
    view.listen(CandidateStarted(2, 1, 0.5))
    assert lines()[-1].strip() == "layer 1"
    assert [str(s.style) for s in view._stack_line().spans if "yellow" in str(s.style)] == ["black on yellow"] * 2
    view.listen(DecisionMade(2, 1, 0.75, True))
    view.listen(StackChanged((1, 2, 1)))
    assert "■2■  4 -> 3 layers" in lines()[-2]
    assert lines()[-1].strip() == "layer 1: 0.7500 > T = 0.5, merged  1 of 1 merged"
    view.listen(CandidateStarted(1, 1, 0.5))
    assert lines()[-1].endswith("next: layer 0")
    view.listen(DecisionMade(1, 1, 0.25, False))
    assert "layer 0: 0.2500 <= T = 0.5, rejected  1 of 2 merged" in lines()[-1]
    view.listen(DecisionMade(1, 1, None, False, "reason"))
    assert "layer 0: skipped  1 of 3 merged" in lines()[-1]
    assert all(len(line) <= 80 for line in lines())
    assert lines()[0].startswith("reference  " + "━" * 24 + " 2 kB  2.00 s")


def test_the_live_view_counts_rounds_candidates_and_tries() -> None:
    view = _View(unicode=True, clock=lambda: 0.0)
    view.listen(PhaseStarted("search"))
    view.listen(RoundStarted(3, 8, 20))
    view.listen(LayerDone(1, 4, 0, 2.0, 0.0))
    view.listen(CandidatesDone(4, 0.5))
    view.listen(CandidatesDone(1, 0.25))
    view.listen(CandidatesDone(5, None))
    assert drawn(view)[0].startswith("search     " + "━" * 7 + "╸" + " " * 16 + " layer 2/4  computing  0.00 s")
    assert drawn(view)[1].strip() == "round 3 of at most 8: 10 of at most 20 candidates, best 0.5000"
    view.listen(PhaseStarted("scales"))
    assert drawn(view)[1].startswith("scales  ")
    view.listen(RoundStarted(2, None, 9))
    assert drawn(view)[2].strip() == "round 2: 0 of at most 9 candidates"
    view.listen(RoundStarted(5, threshold=0.7031))
    assert drawn(view)[2].strip() == "try 5: threshold 0.7031"


def test_what_remains_is_told_by_what_was_expected_and_corrected_by_what_was_measured() -> None:
    seconds = 0.0
    status = Status(lambda: seconds)
    status.listen(TimeExpected((("reference", ((100.0, 0.0),)), ("search", ((200.0, 20.0), (100.0, 10.0))))))
    assert status.remaining is None, "nothing has begun"
    status.listen(PhaseStarted("reference", 4))
    assert status.remaining == pytest.approx(400)
    for index in range(4):
        status.listen(LayerDone(index, 4, 0))
    seconds = 240.0  # slower than expected
    assert status.remaining == pytest.approx(300 * (240 + 40) / (100 + 40))
    status.listen(PhaseStarted("search"))
    status.listen(RoundStarted(1, 2, 30))
    status.listen(CandidatesDone(10, 0.5))
    assert status.remaining == pytest.approx(200 * (240 + 40) / (200 + 40))
    assert status.line().endswith("0.00 s, about 4 minutes left")
    status.listen(CandidatesDone(20, 0.5))  # more than expected: nearly done, never over
    assert status.remaining == pytest.approx(110 * (240 + 40) / (290 + 40))
    status.listen(RoundStarted(3, 2, 30))
    assert status.remaining == pytest.approx(0)


def test_what_an_earlier_run_has_done_makes_no_job_seem_faster() -> None:
    seconds = 0.0
    status = Status(lambda: seconds)
    status.listen(TimeExpected((("reference", ((100.0, 0.0),)), ("search", ((200.0, 20.0), (100.0, 10.0))))))
    status.listen(PhaseStarted("search"))  # the reference was kept, and what the first round has evaluated
    status.listen(RoundStarted(1, 2, 20))
    seconds = 1.0
    status.listen(RoundStarted(2, 2, 10))
    assert status.remaining == pytest.approx(100, rel=0.1)
    status.listen(CandidatesDone(5, 0.5))
    seconds = 101.0  # twice as slow as expected
    assert status.remaining == pytest.approx(50 * (101 + 40) / (50 + 40))


def test_a_phase_of_known_length_says_what_remains_of_it_by_itself() -> None:
    seconds = 0.0
    status = Status(lambda: seconds)
    status.listen(PhaseStarted("perplexity", 8))
    status.listen(LayerDone(0, 8, 0))
    seconds = 2.0
    assert status.remaining is None, "too early to tell"
    seconds = 30.0
    status.listen(LayerDone(1, 8, 0))
    assert status.remaining == pytest.approx(90)
    assert status.at()[-1] == "30.0 s, about 2 minutes left"


def test_there_is_a_line_a_minute_where_there_is_no_terminal() -> None:
    seconds, written = 0.0, list[str]()
    minutes = Minutes(written.append, lambda: seconds)
    minutes.listen(PhaseStarted("search"))
    for number in range(1, 30):
        seconds = 7.0 * number
        minutes.listen(RoundStarted(number, 40, 20))
        minutes.listen(LayerDone(3, 24, 0, 7.0, 0.0))
    assert written == [
        "search, round 9 of at most 40: 0 of at most 20 candidates, layer 4/24, computing, 1 min 03 s",
        "search, round 18 of at most 40: 0 of at most 20 candidates, layer 4/24, computing, 2 min 06 s",
        "search, round 27 of at most 40: 0 of at most 20 candidates, layer 4/24, computing, 3 min 09 s",
    ]


def test_the_live_view_is_drawn_on_a_terminal_only(llama: Path, tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "streamcollapse",
        "prune",
        str(llama),
        "--out",
        str(tmp_path / "out"),
        *METHOD,
        *RUN,
    ]
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=secondary, env=environment)
    os.close(secondary)
    drawn = b""
    while True:
        try:
            piece = os.read(primary, 4096)
        except OSError:  # Linux reports the closed terminal so
            break
        if not piece:
            break
        drawn += piece
    stdout, _ = process.communicate(timeout=60)
    os.close(primary)
    assert process.returncode == 0
    assert "reference" in drawn.decode()
    assert "■" in drawn.decode()
    assert b"\x1b" not in stdout, "the result itself is plain text on a pipe"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_in_one_line(bundled: Path, tmp_path: Path, number: int, code: int) -> None:
    text = tmp_path / "long.txt"
    text.write_text((bundled.parent / "text" / "wiki_eval.txt").read_text() * 10)
    command = [sys.executable, "-m", "streamcollapse", "perplexity", str(bundled), "--text", str(text), *RUN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(6)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr.decode().startswith("interrupted: ")
    assert b"Traceback" not in stderr
    assert stdout == b""


def test_every_public_name_is_there() -> None:
    assert set(streamcollapse.__all__) <= set(dir(streamcollapse))
    for name in streamcollapse.__all__:
        assert getattr(streamcollapse, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        streamcollapse.nonsense  # noqa: B018


def test_warnings_are_said_where_there_is_no_terminal_too(llama: Path, tmp_path: Path) -> None:
    asked = ["search", str(llama), "--plan", str(tmp_path / "plan.json"), "--strategy", "laco", "--target-layers", "7"]
    shown = _invoke(*asked, *RUN, "--json")
    assert "warning: no threshold gives exactly 7 layers: using 8 (T = " in shown.stderr
    assert json.loads(shown.stdout)["layers"]


def test_a_dry_run_says_by_which_method(llama: Path, tmp_path: Path) -> None:
    asked = ["search", str(llama), "--plan", str(tmp_path / "plan.json"), "--dry-run", *RUN]
    assert "greedy, T=0.65, rule first, metric kl\n" in _invoke(*asked).stdout
    assert "greedy, T=0.65, rule first, metric kl, then scales" in _invoke(*asked, "--rescale").stdout
    assert re.search(r"repair +linear, on \d+ tokens: encyclopedia", _invoke(*asked, "--repair", "linear").stdout)
    assert "laco, C=3 I=1, T=0.7, rule sequential, metric cosine\n" in _invoke(*asked, *METHOD).stdout
    assert "ignored      interval (I) = 3" in _invoke(*asked, "--strategy", "greedy", "-I", "3").stdout
    options = json.loads(_invoke(*asked, "--target-ratio", "0.05", "--json").stdout)["options"]
    assert (options["strategy"], options["target_ratio"]) == ("greedy", 0.05)


def test_for_what_memory_is_held_is_said_where_it_is_asked_or_nearly_too_much(llama: Path, tmp_path: Path) -> None:
    asked = ["search", str(llama), "--plan", str(tmp_path / "plan.json"), "--dry-run", *RUN]
    short, long = _invoke(*asked).stdout, _invoke(*asked, "-v").stdout
    assert re.search(r"^time +[a-z].+ \(reference .+, search .+, exchanges .+\)$", short, re.MULTILINE)
    assert re.search(r"^memory +at most [0-9.]+ MB of [0-9.]+ GB memory$", short, re.MULTILINE)
    assert "weights in flight" not in short
    assert "weights in flight" in long
    needs = [("search", "states", 80, "ram"), ("search", "weights", 6, "ram"), ("write", "tensors", 20, "ram")]
    assert isinstance(memory_shown(needs, {"ram": 100}, verbose=False), Table)
    assert str(memory_shown(needs, {"ram": 102}, verbose=False)) == "memory     at most 86 B of 102 B memory"
    assert isinstance(memory_shown(needs, {"ram": 102}, verbose=True), Table)
    on_device = [*needs, ("search", "states", 90, "vram")]
    assert isinstance(memory_shown(on_device, {"ram": 102, "vram": 100}, verbose=False), Table)
