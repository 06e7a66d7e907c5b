"""A work directory: refused where it does not belong, forgiving where a run was killed."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from streamcollapse import Compute, Plan, SearchOptions, prune, resume, search
from streamcollapse.errors import CheckpointError, OutputError
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.progress import DecisionMade, Event, LayerDone, PhaseStarted
from streamcollapse.searches import evaluator
from streamcollapse.settings.run import Calibration, RunSettings, Streaming
from tests.checkpoints import edit_tensors

OPTIONS = SearchOptions(layers_per_merge=3, interval=1, threshold=0.6)
FLOAT32 = Compute("cpu", "float32")


def _search(source: Path, work: Path, **options: object) -> object:
    compute = options.pop("compute", FLOAT32)
    settings = RunSettings(compute, streaming=Streaming(work_dir=work), **options)  # type: ignore[arg-type]
    return search(source, OPTIONS, settings=settings)


def test_a_search_is_gone_on_with_by_the_same_command(llama: Path, tmp_path: Path) -> None:
    _search(llama, tmp_path / "work")
    with pytest.raises(OutputError, match="work: belongs to a search; run the same search command again"):
        resume(tmp_path / "work")


def test_another_run_s_directory_is_refused_and_left_alone(llama: Path, llama_bf16: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _search(llama, work)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    samples = tmp_path / "samples.txt"
    samples.write_text("one sample\n")
    with pytest.raises(OutputError, match=r"work: belongs to another run: its source is .*choose another `work_dir`"):
        _search(llama_bf16, work)
    with pytest.raises(OutputError, match="its compute dtype is float32, this one's is bfloat16"):
        _search(llama, work, compute=Compute("cpu", "bfloat16"))
    with pytest.raises(OutputError, match="its calibration is"):
        _search(llama, work, calibration=Calibration(samples))
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_what_is_no_work_directory_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: is not a directory"):
        _search(llama, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="mine: holds other files; choose another `work_dir`"):
        _search(llama, tmp_path / "mine")
    with pytest.raises(OutputError, match="nowhere"):
        _search(llama, tmp_path / "nowhere" / "deep")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_torn_and_damaged_records_are_evaluated_again(llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    plan = _search(llama, work)
    log = work / "journal.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["kind"] == "evaluated"]
    assert all(set(json.loads(line)) == {"kind", "metric", "stack", "similarity", "reason"} for line in lines)
    assert len(lines) > 2
    log.write_text("not json\n" + lines[0] + "\n" + lines[1][:20])
    (work / "reference.json").unlink()
    assert _search(llama, work) == plan
    assert len(log.read_text().splitlines()) >= len(lines) + 1
    assert _search(llama, work) == plan


@pytest.mark.parametrize("damage", ["gone", "short", "zeros", "described wrongly", "not described"])
def test_hidden_states_that_are_not_what_was_written_are_computed_again(
    llama: Path, tmp_path: Path, damage: str
) -> None:
    work = tmp_path / "work"
    plan = _search(llama, work)
    (work / "journal.jsonl").unlink()
    states = work / "boundaries-0"
    size = states.stat().st_size
    if damage == "gone":
        states.unlink()
    elif damage in ("short", "zeros"):
        states.write_bytes(bytes(size if damage == "zeros" else size // 2))
    else:
        (work / "reference.json").write_text("[]" if damage == "not described" else '{"first": 0, "tensors": {}}')
    assert _search(llama, work) == plan
    assert len((work / "journal.jsonl").read_text().splitlines()) > 1


@pytest.mark.parametrize("value", ['"abc"', "NaN", "2.0", "true", "null"])
def test_values_that_no_similarity_has_are_evaluated_again(llama: Path, tmp_path: Path, value: str) -> None:
    work = tmp_path / "work"
    plan = _search(llama, work)
    log = work / "journal.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    keys = [record["stack"] for record in records if record["kind"] == "evaluated"]
    line = '{{"kind": "evaluated", "metric": "cosine", "stack": "{}", "similarity": {}, "reason": null}}\n'
    log.write_text("".join(line.format(key, value) for key in keys))
    assert _search(llama, work) == plan


def test_two_runs_do_not_share_a_directory(llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _search(llama, work)
    with (work / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            OutputError, match="work: in use by another run; wait for it to finish or choose another `work_dir`"
        ):
            _search(llama, work)
    _search(llama, work)


def test_a_dry_run_looks_at_the_directory_and_changes_nothing(llama: Path, llama_bf16: Path, tmp_path: Path) -> None:
    def dry(source: Path, work: Path) -> None:
        streaming = Streaming(work_dir=work)
        prepare_search(source, OPTIONS, RunSettings(FLOAT32, streaming=streaming))

    dry(llama, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _search(llama, tmp_path / "work")
    with pytest.raises(OutputError, match="belongs to another run"):
        dry(llama_bf16, tmp_path / "work")
    with pytest.raises(OutputError, match=r"deep: does not exist|nowhere: does not exist"):
        dry(llama, tmp_path / "nowhere" / "deep")


def test_a_source_that_changes_under_the_run_is_noticed(llama: Path, tmp_path: Path) -> None:
    """Whatever was computed after the change is not believed, and nothing of it is kept."""
    source = shutil.copytree(llama, tmp_path / "source")
    changed: list[Event] = []

    def meddle(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == phase:
            edit_tensors(source, lambda t: t["model.norm.weight"].add_(1))
            changed.append(event)

    for phase, kept in (("reference", False), ("search", True), ("write", True)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was in use; start again"):
            prune(source, tmp_path / "out", OPTIONS, settings=RunSettings(compute=FLOAT32), listener=meddle)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.work").exists() == kept
        if phase == "search":
            records = (tmp_path / ".out.work" / "journal.jsonl").read_text()
            assert "evaluated" not in records
        shutil.rmtree(tmp_path / ".out.work", ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert len(changed) == 3


def test_a_search_that_is_broken_off_goes_on(llama: Path, tmp_path: Path) -> None:
    expected = search(llama, OPTIONS, settings=RunSettings(compute=FLOAT32))
    plan, work = tmp_path / "plan.json", tmp_path / ".plan.json.work"
    evaluated: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, DecisionMade) and not evaluated:
            evaluated.append((work / "journal.jsonl").read_text().count("evaluated"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=rf"progress saved in {work}; run the same command again to resume"):
        search(llama, OPTIONS, settings=RunSettings(compute=FLOAT32), listener=interrupt, save_as=plan)
    assert not plan.exists()
    events: list[Event] = []
    assert (
        search(llama, OPTIONS, settings=RunSettings(compute=FLOAT32), listener=events.append, save_as=plan) == expected
    )
    layers = [type(event).__name__ for event in events].index("DecisionMade")
    assert not any(isinstance(event, LayerDone) for event in events[:layers]), "the first decision was known"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(plan) == expected


def test_what_a_killed_run_left_while_it_tidied_up_goes_and_nothing_of_the_user_s(llama: Path, tmp_path: Path) -> None:
    out, ours, users = tmp_path / "out", tmp_path / ".out.work.gone", tmp_path / "work.gone"
    settings = RunSettings(compute=FLOAT32)
    prune(llama, out, OPTIONS, settings=settings)
    for directory in (ours, users):
        directory.mkdir()
        (directory / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="out: exists"):
        prune(llama, out, OPTIONS, settings=settings)
    assert not ours.exists()
    shutil.rmtree(out)
    prune(llama, out, OPTIONS, settings=replace(settings, streaming=Streaming(work_dir=tmp_path / "work")))
    assert (users / "thesis.txt").read_text() == "all of it"


def test_what_a_round_has_evaluated_is_kept_within_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SearchOptions(strategy="greedy", target_layers=6, rescale=False, effort="thorough")
    settings = RunSettings(FLOAT32, Calibration("sentences"), Streaming(work_dir=tmp_path / "work"))
    plain = search(llama, options, settings=replace(settings, streaming=Streaming()))
    monkeypatch.setattr(evaluator, "SAVE_SECONDS", 0.0)
    asked: list[int] = []
    sweep = evaluator.sweep

    def counted(model: object, stacks: list[object], *rest: object) -> object:
        asked.append(len(stacks))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return sweep(model, stacks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluator, "sweep", counted)
    with pytest.raises(KeyboardInterrupt):
        search(llama, options, settings=settings)
    kept = sum(asked[:3])
    assert 0 < kept < 7, "a part of the first round"
    journal = (tmp_path / "work" / "journal.jsonl").read_text()
    assert journal.count('"kind": "evaluated"') == kept
    asked[:] = [0] * 10
    assert search(llama, options, settings=settings) == plain
    assert sum(asked) == 7 + 6 - kept, "seven in the first round, six in the second"
