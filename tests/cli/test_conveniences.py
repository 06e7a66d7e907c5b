"""Small things that people expect of a command line."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import streamcollapse
from streamcollapse import Plan, Streaming, make_plan
from streamcollapse.cli.main import app
from streamcollapse.errors import OptionError, PlanError
from streamcollapse.merge.plan import original_layers

LACO = ["-C", "3", "-I", "1", "-T", "0.3", "--device", "cpu"]


def test_the_package_says_its_version() -> None:
    assert streamcollapse.__version__ == version("streamcollapse")


def test_shells_can_complete() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize("budget", ["8", 8, " 16 "])
def test_a_budget_without_a_unit_is_asked_about(budget: str | int) -> None:
    with pytest.raises(OptionError, match=rf"did you mean {str(budget).strip()}GiB\?"):
        Streaming(ram_budget=budget)
    assert Streaming(ram_budget=2_000_000_000).ram_budget == 2_000_000_000


def test_parents_of_an_output_are_made(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "c"
    dry = CliRunner().invoke(app, ["prune", str(llama), "--out", str(out), *LACO, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "a").exists()
    done = CliRunner().invoke(app, ["prune", str(llama), "--out", str(out), *LACO])
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.parent.iterdir()] == ["c"]
    converted = CliRunner().invoke(app, ["convert", str(llama), "--out", str(tmp_path / "x" / "y")])
    assert converted.exit_code == 0, converted.output
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, ["prune", str(llama), "--out", str(tmp_path / "file" / "out"), *LACO])
    assert refused.exit_code == 1
    assert "is not a directory; choose another --out" in refused.stderr


def test_a_plan_that_changes_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="changes nothing"):
        make_plan(llama)
    made = make_plan(llama, "7")
    same = Plan(made.source_name, 8, made.fingerprint, original_layers(8))
    same.save(tmp_path / "plan.json")
    done = CliRunner().invoke(app, ["apply", str(llama), str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "the plan changes nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_card_and_report_name_what_a_plan_by_hand_drops(llama: Path, tmp_path: Path) -> None:
    made = make_plan(llama, "2,5-6", ["0-1:mean"])
    out = streamcollapse.apply(llama, made, tmp_path / "out").out
    words = "ayers 2, 5-6 dropped; layer 0 is a mix of 0-1"
    assert words in (out / "README.md").read_text()
    assert words in json.loads((out / "streamcollapse_report.json").read_text())["options"]["changes"]


def test_errors_are_json_where_json_is_asked_for(llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prune", str(tmp_path / "no"), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "CheckpointError"
    assert error["message"].endswith("does not exist")
    assert done.stderr == f"error: {error['message']}\n"
    plain = CliRunner().invoke(app, ["prune", str(tmp_path / "no"), "--out", str(tmp_path / "out")])
    assert plain.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "some", "--bogus"], "No such option: --bogus"),
        (["prune"], "Missing argument 'SOURCE'."),
        (["plan", "make", "some"], "Missing option '--plan'."),
        (["nosuch"], "No such command 'nosuch'."),
    ],
)
def test_mistakes_in_options_are_json_as_well(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UsageError"
    assert error["message"].startswith(message)
    plain = CliRunner().invoke(app, arguments)
    assert (plain.exit_code, plain.stdout) == (2, "")


def test_bench_without_options_is_quick(llama: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(llama), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"]["options"]["search"].get("strategy", "laco") == "laco"
