"""README: its commands are what CI runs, its options exist with the defaults it gives, its Python compiles."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

import streamcollapse
from streamcollapse.cli.main import app
from tests.families import matrix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_ci_runs_the_two_commands_as_they_stand(name: str) -> None:
    marked = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert marked is not None
    assert "\n" not in marked[1], "one line to copy"
    assert "-m venv" in marked[1]
    assert "-c constraints.txt" in marked[1]
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"command_of\(\) \{.*?\n\}", script, re.DOTALL)
    assert function is not None
    extracted = subprocess.run(
        ["bash", "-c", f"{function[0]}\ncommand_of {name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert extracted.stdout == marked[1] + "\n"
    assert f'"$(command_of {name})"' in script


def test_every_command_line_is_accepted() -> None:
    lines = [line.split("#")[0].strip() for block in _blocks("bash") for line in block.splitlines()]
    verbs = [shlex.split(line)[1:] for line in lines if line.startswith("streamcollapse ")]
    assert len(verbs) >= 6
    for verb, *arguments in verbs:
        COMMANDS[verb].make_context(verb, arguments, resilient_parsing=False)


def test_the_table_of_options_is_complete_and_right() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in README.splitlines() if line.startswith("| `--")]
    documented = {re.split(r"[`,/]", names.strip("`"))[0]: (paper, default) for names, paper, default in rows}
    options = {p.opts[0]: p for p in COMMANDS["prune"].params if p.opts[0].startswith("--")}
    assert documented.keys() == options.keys() - {"--out"}
    letters = {name: p.opts[1][1] for name, p in options.items() if len(p.opts) > 1}
    for name, (paper, default) in documented.items():
        if name in letters:
            assert paper == letters[name]
        actual = options[name].default
        if isinstance(shown := options[name].show_default, str) and shown.isdigit():
            actual = shown
        expected = {
            "off": False,
            "keep": False,
            "all layers": None,
            "the strategy's": None,
            "as far as T allows": None,
            "greedy, laco with C or I": None,
            "what is free, less a tenth": None,
            "beside the output, until it is done": None,
        }.get(default, default)
        assert str(actual) == str(expected), name


def test_its_python_compiles_and_names_what_exists() -> None:
    (block,) = _blocks("python")
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(streamcollapse, alias.name) for alias in node.names)


def test_the_table_of_families_is_what_is_tested() -> None:
    table = README.partition("<!-- families -->\n\n")[2].partition("\n\n")[0] + "\n"
    assert table == matrix(), "print(tests.families.matrix()) gives the new one"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
