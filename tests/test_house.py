"""The house: folders are layers, imports point downward, files and functions stay small."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import streamcollapse
from streamcollapse.cli.main import app

ROOT = Path(streamcollapse.__file__).parent
# Bottom first. A module may import from its own layer and from those before it.
LAYERS = [
    ["errors", "units", "settings", "progress"],
    ["storage"],
    ["arch"],
    ["merge"],
    ["resources"],
    ["stream"],
    ["forward"],
    ["run"],
    ["searches", "repair", "healing", "evaluation"],
    ["output"],
    ["jobs"],
    ["batches"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__"))


def _layer(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    if _layer(path) == "data":
        return
    level = LEVEL[_layer(path)]
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("streamcollapse."):
                target = module.split(".")[1]
                assert LEVEL[target] <= level, f"line {node.lineno}: {_layer(path)} imports {module}, which lies above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 320
    tree = ast.parse(text)
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "a file opens with its contract"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 70, f"{node.name} is asking to be two functions"
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and node in tree.body:
            assert ast.get_docstring(node), f"{node.name} has no docstring"  # type: ignore[arg-type]


def test_no_code_runs_from_a_pickle_and_nothing_is_evaluated() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("unsafe_load",), path
        assert "torch.load(" not in path.read_text(), path


# What messages said before there were plainer words, and names that are gone.
RETIRED = (
    "passed over",
    "kept apart",
    "broken off",
    "found out",
    "on their way",
    "go on with",
    "goes on with",
    "goes on from",
    "works here",
    "makes no difference",
    "all of them numbers",
)
# what a declaration calls the other half of a switch
DECLARED_FLAGS = ("--keep-norms", "--no-original", "--no-rescale", "--no-verdict", "--no-samples")
RETIRED_NAMES = {
    *re.findall(
        r"\w+",
        """CollapseOptions CollapseState
        KeptLayers Odds Belief Nearness Passage Preview Means Asked AskedConversion Again
        ConvertAgain WorkPlace Allotment Work Room Unit Began Told Ended Tell kept_place kept_directory search_place
        passing_place take_up was_renaming for_good settle understand allotment least_allotment plain_allotment allot
        from_cache apart together takes not_taken does want offer speed_apart""",
    )
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_retired_words_are_not_said_any_more(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for line, said in _said(tree, docstrings=_layer(path) == "cli"):  # a verb's docstring is its help
        assert not [word for word in RETIRED if word in said], f"line {line}: {said[:80]}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            assert node.name not in RETIRED_NAMES
        if isinstance(node, ast.arg):
            assert node.arg not in RETIRED_NAMES, f"line {node.lineno}"


def test_no_two_public_classes_have_one_name() -> None:
    found = [node for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    names = [node.name for node in found if not node.name.startswith("_")]
    assert sorted(names) == sorted(set(names))


def test_few_files_are_tiny() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in ROOT.rglob("*.py")}
    tiny = [name for name, count in lines.items() if 0 < count < 40]
    assert len(tiny) <= 7, tiny


@pytest.mark.parametrize("path", [p for p in FILES if _layer(p) != "cli"], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_names_settings_not_options_of_the_command_line(path: Path) -> None:
    for line, said in _said(ast.parse(path.read_text())):
        assert said in DECLARED_FLAGS or not re.search(r"--[a-z]| --$", said), f"line {line}: {said[:80]}"


def _said(tree: ast.Module, docstrings: bool = False) -> Iterator[tuple[int, str]]:
    """The strings of a file with their lines, on one line each; ``docstrings`` among them or not."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    left_out = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _documented(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (docstrings or id(node) not in left_out):
            yield node.lineno, " ".join(node.value.split())


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_takes_more_than_seven_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and _layer(path) != "cli":  # a verb's parameters are its options
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            assert count <= 7, f"line {node.lineno}: {node.name} takes {count}"


def test_each_verb_has_a_file_of_its_own() -> None:
    verbs = {path.stem for path in (ROOT / "cli" / "verbs").glob("*.py")} - {"__init__"}
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert verbs == commands
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "prepare", "prepare_heal"}
    # strategies and demo have no job of their own; plan's and batch's are called after what they make; repair and what
    # is kept of it, healing, what it learns from and the time that is expected are a part of others
    parts = {"planning", "repair", "repair_journal", "healing", "lessons", "expected"}
    assert jobs - parts == commands - {"strategies", "demo", "plan", "batch"}


def test_every_verb_is_a_function_of_few_arguments() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert verbs - {"demo", "plan", "strategies"} <= set(streamcollapse.__all__)
    assert {"make_plan", "compose_plans", "export_plan"} <= set(streamcollapse.__all__)
    for name in streamcollapse.__all__:
        public = getattr(streamcollapse, name)
        if not isinstance(public, type):
            assert len(inspect.signature(public).parameters) <= 5, name
