"""README: its commands are what CI runs, its options exist with the defaults it gives, its Python compiles."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

import streamcollapse
from streamcollapse.cli.main import app
from streamcollapse.settings.declared import declared
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import Calibration, Compute, Judging, Output, Repair, Streaming
from streamcollapse.settings.search import SearchOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
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
    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))]
    blocks = [block for page in pages for block in re.findall(r"```(?:ba)?sh\n(.*?)```", page, re.DOTALL)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    verbs = [shlex.split(line)[1:] for line in lines if line.startswith("streamcollapse ")]
    assert len(verbs) >= 4
    for verb, *arguments in verbs:
        COMMANDS[verb].make_context(verb, arguments, resilient_parsing=False)
    for verb in re.findall(r"`streamcollapse ([a-z]+)", "\n".join(pages)):
        assert verb in COMMANDS, "a verb that a sentence names"


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    made = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert made == PAGES[name](), "python docs/generate.py writes it anew"


def test_the_page_of_options_has_every_option_of_every_verb() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(--[a-z-]+)`", page))
    groups = (SearchOptions, Calibration, Compute, Streaming, Output, Judging, Repair, AlsoHeal)
    settings = {one.flag for group in groups for one in declared(group).values()}
    options = {parameter.opts[0] for parameter in COMMANDS["prune"].params if parameter.opts[0].startswith("--")}
    assert options - {"--out", "--dry-run", "--json", "--trust-remote-code", "--verbose"} == settings <= documented


def test_its_python_compiles_and_names_what_exists() -> None:
    (block,) = _blocks("python")
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(streamcollapse, alias.name) for alias in node.names)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
