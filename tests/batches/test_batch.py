"""Batches by local workers: results equal those of single runs, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streamcollapse import Calibration, Compute, SearchOptions, prune
from streamcollapse.batches.local import machines
from streamcollapse.batches.run import BatchResult, Cluster, batch, planned
from streamcollapse.batches.worker import JobEnded, JobEvent, JobStarted, Machine, Message, Outcome, run_task
from streamcollapse.cli.main import app
from streamcollapse.errors import DeviceError, JobsError, OptionError, OutputError
from streamcollapse.progress import DecisionMade, LayerDone, PhaseStarted
from streamcollapse.settings.run import RunSettings, Streaming
from tests.batches.conftest import write_jobs
from tests.checkpoints import edit_json, edit_tensors

GRID: dict[str, object] = {"source": "models/m*", "C": 3, "I": 1, "T": [0.3, 0.6]}


def statuses(found: BatchResult) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in found.outcomes}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


_SINGLE: dict[str, tuple[bytes, object]] = {}  # of the models and samples that every test begins with


def assert_like_single_runs(base: Path, out: Path) -> None:
    for model in ("m0", "m1"):
        for threshold in (0.3, 0.6):
            name = f"{model}-C3-I1-T{threshold}-sequential-samples-float32"
            if name not in _SINGLE:
                options = SearchOptions(layers_per_merge=3, interval=1, threshold=threshold)
                settings = RunSettings(calibration=Calibration(base / "samples.txt"), compute=Compute("cpu", "float32"))
                prune(base / "models" / model, base / "single" / name, options, settings=settings)
                _SINGLE[name] = weights(base / "single" / name), plan_of(base / "single" / name)
            assert (weights(out / name), plan_of(out / name)) == _SINGLE[name], name


def plan_of(directory: Path) -> object:
    return json.loads((directory / "streamcollapse_plan.json").read_text())


class Killer:
    """Listens, and kills the worker of ``task`` ``times`` over, each time when it says what ``when`` waits for."""

    def __init__(self, task: str, times: int, when: Callable[[object], bool]) -> None:
        self.task, self.left, self.when = task, times, when
        self.pids: dict[str, int] = {}
        self.events: list[Message] = []

    def __call__(self, message: Message) -> None:
        self.events.append(message)
        if isinstance(message, JobStarted):
            self.pids[message.name] = message.pid
        told = isinstance(message, JobEvent) and message.name.startswith(self.task) and self.when(message.event)
        if told and self.left:
            self.left -= 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[message.name], signal.SIGKILL)


def test_a_batch_and_its_repetition(base: Path) -> None:
    convert: dict[str, object] = {"source": ["models/m0", "models/broken"], "verb": "convert", "dtype": "bfloat16"}
    jobs = write_jobs(base, [GRID, convert])
    found = batch(jobs, cluster=Cluster(workers=2))
    tasks = list(statuses(found))
    assert [name for name, status in statuses(found).items() if status != "done"] == ["broken-bfloat16"]
    assert "over the limit" in str(found.outcomes[-1].error)
    assert_like_single_runs(base, base / "out")
    report = json.loads((base / "out" / "batch_report.json").read_text())
    assert report["counts"] == {"done": 5, "failed": 1}
    assert [job["name"] for job in report["jobs"]] == tasks
    assert report["jobs"][0]["options"]["threshold"] == 0.3

    # The second search of a source reads no reference pass.
    reports = [json.loads((base / "out" / name / "streamcollapse_report.json").read_text()) for name in tasks[:2]]
    reading = [{p["name"]: p["bytes_read"] for p in r["usage"]["phases"]} for r in reports]
    assert reading[1]["reference"] < 0.05 * reading[0]["reference"], "rows of the embedding, no layer"

    # A repetition does what is missing, and nothing else.
    before = {p: p.stat().st_mtime_ns for p in (base / "out").rglob("*") if p.is_file() and "T0.3" in str(p)}
    (base / "out" / tasks[1] / "model.safetensors").unlink()
    for file in (base / "out" / tasks[1]).iterdir():
        file.unlink()
    (base / "out" / tasks[1]).rmdir()
    again = batch(jobs)
    assert [o.status for o in again.outcomes] == ["kept", "done", "kept", "kept", "kept", "failed"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert_like_single_runs(base, base / "out")

    # What was missing is repaired: all is done, and what searches kept for each other is gone.
    edit_tensors(base / "models" / "m0", lambda t: t)
    (base / "models" / "broken" / "model.safetensors").write_bytes(weights(base / "models" / "m1"))
    repaired = batch(jobs)
    assert repaired.num_failed == 0
    assert not (base / "out" / ".streamcollapse-batch" / "work").exists()


def here(jobs: Path) -> list[Outcome]:
    """The tasks of ``jobs`` one after the other, in this process."""
    tasks, place = planned(jobs, None, Streaming())
    machine = Machine("cpu", Streaming())
    return [run_task(task, place, machine, lambda event: None) for task in tasks]


def test_a_changed_source_is_done_anew(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "convert"}])
    assert [o.status for o in here(jobs)] == ["done"]
    edit_tensors(base / "models" / "m0", lambda t: t["model.norm.weight"].add_(1))
    assert [o.status for o in here(jobs)] == ["done"]
    assert [o.status for o in here(jobs)] == ["kept"]


def test_a_changed_config_is_done_anew(base: Path) -> None:
    jobs = write_jobs(base, [{**GRID, "source": "models/m0", "T": 0.5}])
    (first,) = here(jobs)
    edit_json(base / "models" / "m0" / "config.json", lambda config: config.update(rms_norm_eps=0.1))
    (second,) = here(jobs)
    assert (first.status, second.status) == ("done", "done")
    config = json.loads((Path(second.out) / "config.json").read_text())
    assert config["rms_norm_eps"] == 0.1


@pytest.mark.parametrize("damage", ["gone", "short", "another byte", "one too many"])
def test_a_damaged_result_is_made_anew(base: Path, damage: str) -> None:
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "convert"}])
    (first,) = here(jobs)
    file = Path(first.out) / "model.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "one too many":
        (Path(first.out) / "model-00009.safetensors").write_text("")
    else:
        file.write_bytes(whole[:1000] if damage == "short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [o.status for o in here(jobs)] == ["done"]
    assert file.read_bytes() == whole
    assert not (Path(first.out) / "model-00009.safetensors").exists()


def test_what_took_a_result_s_place_is_left_alone(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "convert"}])
    (first,) = here(jobs)
    shutil.rmtree(first.out)
    Path(first.out).mkdir()
    (Path(first.out) / "notes.txt").write_text("mine")
    (second,) = here(jobs)
    assert second.status == "failed"
    assert (Path(first.out) / "notes.txt").read_text() == "mine"


def test_two_copies_of_one_model_do_not_hinder_each_other(base: Path) -> None:
    shutil.rmtree(base / "models" / "m1")
    shutil.copytree(base / "models" / "m0", base / "models" / "m1")
    found = batch(write_jobs(base, [GRID]), cluster=Cluster(workers=2))
    assert set(statuses(found).values()) == {"done"}


def test_changed_samples_are_done_anew(base: Path) -> None:
    jobs = write_jobs(base, [{**GRID, "source": "models/m0", "T": 0.5}])
    assert [o.status for o in here(jobs)] == ["done"]
    (base / "samples.txt").write_text("Another sentence.\n")
    assert [o.status for o in here(jobs)] == ["done"]
    (base / "samples.txt").unlink()
    with pytest.raises(JobsError, match="there is no such calibration file"):
        here(jobs)


def test_a_killed_worker_is_replaced_and_goes_on_where_it_was(base: Path) -> None:
    jobs = write_jobs(base, [GRID])
    killer = Killer("m0-C3-I1-T0.3", 1, lambda event: isinstance(event, DecisionMade))
    found = batch(jobs, cluster=Cluster(workers=2), listener=killer)
    assert set(statuses(found).values()) == {"done"}
    assert [o.attempts for o in found.outcomes] == [2, 1, 1, 1]
    assert_like_single_runs(base, base / "out")
    told = [m.event for m in killer.events if isinstance(m, JobEvent) and m.name.startswith("m0-C3-I1-T0.3")]
    second = max(i for i, event in enumerate(told) if event == PhaseStarted("reference", 16))
    search = next(i for i, e in enumerate(told) if i > second and isinstance(e, PhaseStarted) and e.name == "search")
    assert second > 16
    assert not any(isinstance(event, LayerDone) for event in told[second:search]), "no second reference pass"


def test_what_is_evaluated_once_stays_evaluated(base: Path) -> None:
    jobs = write_jobs(base, [{**GRID, "source": "models/m0"}])
    killer = Killer("m0", 2, lambda event: isinstance(event, DecisionMade))
    found = batch(
        jobs,
        cluster=Cluster(retries=5),
        listener=killer,
        settings=RunSettings(streaming=Streaming(work_dir=base / "work")),
    )
    assert set(statuses(found).values()) == {"done"}
    (journal,) = (base / "work").glob("*/journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    stacks = [record["stack"] for record in records if record["kind"] == "evaluated"]
    assert len(stacks) == len(set(stacks)) > 5


def test_what_a_killed_worker_left_is_swept_away(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "convert"}])
    (base / "out" / ".m0-safetensors.partial").mkdir(parents=True)
    (base / "out" / ".m0-safetensors.partial" / "model.safetensors").write_text("half")
    (base / "out" / ".m0-safetensors.lock").write_text("")
    assert [o.status for o in here(jobs)] == ["done"]
    assert sorted(p.name for p in (base / "out").iterdir()) == [".streamcollapse-batch", "m0-safetensors"]


def test_a_job_that_kills_its_worker_fails_alone(base: Path) -> None:
    jobs = write_jobs(base, [GRID])
    killer = Killer("m0-C3-I1-T0.3", 99, lambda event: isinstance(event, PhaseStarted))
    found = batch(jobs, cluster=Cluster(retries=1), listener=killer)
    assert list(statuses(found).values()) == ["failed", "done", "done", "done"]
    assert found.outcomes[0].error == "its worker was ended by SIGKILL (the system may have run out of memory)"
    assert found.outcomes[0].attempts == 2


def test_two_batches_do_not_share_a_directory(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "convert"}])
    refused: list[str] = []

    def second(message: Message) -> None:
        if isinstance(message, JobEnded):
            with pytest.raises(OutputError, match="in use by another batch") as raised:
                batch(jobs)
            refused.append(str(raised.value))

    batch(jobs, listener=second)
    assert refused


def test_what_is_not_ours_stays(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/m*", "verb": "convert"}])
    (base / "out" / "m0-safetensors").mkdir(parents=True)
    (base / "out" / "m0-safetensors" / "thesis.tex").write_text("precious")
    outcomes = here(jobs)
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert "is no result of this program; move it" in str(outcomes[0].error)
    assert (base / "out" / "m0-safetensors" / "thesis.tex").read_text() == "precious"


def test_the_command_line(base: Path) -> None:
    jobs = write_jobs(base, [{"source": "models/*", "verb": "convert"}])
    dry = CliRunner().invoke(app, ["batch", str(jobs), "--dry-run"])
    assert dry.exit_code == 1
    assert "ready    m0-safetensors" in dry.stdout
    assert "1 failed, 2 ready" in dry.stdout
    assert not (base / "out").exists()
    run = CliRunner().invoke(app, ["batch", str(jobs), "--json"])
    assert run.exit_code == 1
    assert json.loads(run.stdout)["counts"] == {"done": 2, "failed": 1}
    assert not run.stderr
    (base / "models" / "broken" / "model.safetensors").write_bytes(weights(base / "models" / "m1"))
    again = CliRunner().invoke(app, ["batch", str(jobs)])
    assert again.exit_code == 0, again.output
    assert "1 done, 2 kept; results in" in again.stdout
    assert "kept   m0-safetensors" in again.stderr


def test_names_are_shown_as_they_are(base: Path) -> None:
    name = f"be ta [b] :smile:{90 * 'x'}"  # wider than a terminal
    (base / "models" / "m0").rename(base / "models" / name)
    jobs = write_jobs(base, [{"source": "models/be*", "verb": "convert"}], out="re[/b]")
    run = CliRunner().invoke(app, ["batch", str(jobs)])
    assert run.exit_code == 0, run.output
    assert f"{name}-safetensors" in run.stdout
    assert "results in " + str(base / "re[/b]") in run.stdout
    assert f"{name}-safetensors" in run.stderr


def test_bad_input_writes_nothing(base: Path) -> None:
    jobs = write_jobs(base, [GRID])
    for arguments, complaint in {
        ("--workers", "0"): "workers is 0",
        ("--retries", "-1"): "retries is -1",
        ("--engine", "slurm"): "engine is 'slurm'; choose one of local, ray",
        ("--ray-address", "x:1"): "pass --engine ray",
        ("--device", "cuda:7"): "device cuda:7",
        ("--ram-budget", "lots"): "'lots' is not a size",
        ("--out", str(base / "models" / "m0")): "is a source as well",
    }.items():
        result = CliRunner().invoke(app, ["batch", str(jobs), *arguments])
        assert result.exit_code == 1, arguments
        assert complaint in result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in base.iterdir()) == ["jobs.yaml", "models", "samples.txt"]
    with pytest.raises(JobsError, match="add out: DIR, or pass `out`"):
        batch(write_jobs(base, [GRID], out=None))


@pytest.mark.skipif(os.name == "nt", reason="signals are those of a Unix")
def test_an_interrupt_leaves_no_half_results(base: Path) -> None:
    jobs = write_jobs(base, [GRID])
    command = [sys.executable, "-m", "streamcollapse", "batch", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    first = next(line for line in process.stderr if not line.startswith("started"))
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "interrupted: " in rest
    assert "Traceback" not in rest
    assert time.monotonic() - start < 10
    assert first.startswith("done")
    assert not (base / "out" / "m1-C3-I1-T0.6-sequential-samples-float32").exists()
    assert {o.status for o in here(jobs)} == {"done", "kept"}
    assert_like_single_runs(base, base / "out")


def test_workers_share_what_there_is() -> None:
    (one,) = machines("cpu", None, 9, Streaming(), trust_remote_code=True)
    assert (one.device, one.threads, one.streaming) == ("cpu", None, Streaming())
    assert one.trust_remote_code
    two = machines("cpu", 2, 9, Streaming(), trust_remote_code=False)
    assert len(two) == 2
    assert two[0] == two[1]
    assert two[0].threads == max((os.cpu_count() or 1) // 2, 1)
    assert isinstance(two[0].streaming.ram_budget, int)
    given = machines("cpu", 3, 2, Streaming(ram_budget="2GB"), trust_remote_code=False)
    assert [m.streaming.ram_budget for m in given] == ["2GB", "2GB"], "no more workers than there is work"
    with pytest.raises(OptionError, match="workers is 0"):
        machines("cpu", 0, 9, Streaming(), trust_remote_code=False)
    with pytest.raises(DeviceError, match="cuda:99"):
        machines("cuda:99", 1, 9, Streaming(), trust_remote_code=False)


def test_each_device_gets_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (80 * 10**9, 80 * 10**9))
    found = machines("auto", None, 9, Streaming(), trust_remote_code=False)
    assert [m.device for m in found] == ["cuda:0", "cuda:1", "cuda:2"]
    assert {m.streaming.vram_budget for m in found} == {None}
    crowded = machines("auto", 6, 9, Streaming(), trust_remote_code=False)
    assert [m.device for m in crowded] == ["cuda:0", "cuda:1", "cuda:2"] * 2
    assert {m.streaming.vram_budget for m in crowded} == {36 * 10**9}
