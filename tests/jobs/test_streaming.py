"""How weights are streamed changes no bit of a result: look-ahead, prefetch, I/O mode, what stays, what is spilled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import streamcollapse
from streamcollapse import Compute, Plan, SearchOptions, apply, prune, search
from streamcollapse.errors import BudgetError
from streamcollapse.forward import stored as stored_layers
from streamcollapse.jobs import prepare as jobs
from streamcollapse.run import memory_plan
from streamcollapse.run.needs import Demand, MemoryPlan, least, workload_of
from streamcollapse.settings.run import Judging, RunSettings, Streaming
from streamcollapse.storage.placed import Overlay
from tests.checkpoints import llama_config, save_model

FLOAT32 = Compute("cpu", "float32")
RULES = ["sequential", "rdsc", "mean", "first", "best"]


@pytest.fixture
def allotted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every following run spend memory as the call says, whatever there is."""

    def give(**changes: Any) -> None:
        def plan_memory(job: Any, samples: Any, streaming: Streaming, options: Any) -> MemoryPlan:
            work = workload_of(job.checkpoint, job.architecture.survey, job.placement, Demand(8), samples)
            choice = replace(least(work, streaming, False), candidates=streaming.lookahead or 5, **changes)
            return replace(choice, io=memory_plan.choose_io(job, streaming.io, choice))

        monkeypatch.setattr(jobs, "plan_memory", plan_memory)

    return give


def _variations() -> list[tuple[Streaming, dict[str, Any]]]:
    """Every value of each setting, in combinations that have each pair of neighbouring values at least once."""
    settings = itertools.cycle(itertools.product((0, 1, 2, 7), (1, 4, 50, None)))
    memory = itertools.cycle([(0, True, 0), (3, False, 0), (8, True, 0), (0, False, 1), (5, True, 200_000)])
    found = []
    for io, _ in itertools.product(("mmap", "pread", "direct", "auto"), range(3)):
        (prefetch, lookahead), (resident, spill, slot_bytes) = next(settings), next(memory)
        streaming = Streaming(lookahead, prefetch, io)
        choice = {"resident_layers": resident, "spill": spill, "slot_bytes": slot_bytes, "drop_after_use": resident < 8}
        found.append((streaming, choice))
    return found


@pytest.mark.parametrize(("rule", "dtype"), [*((rule, "float32") for rule in RULES), ("mean", "bfloat16")])
def test_no_bit_of_the_search_depends_on_how_weights_are_streamed(
    llama_bf16: Path, rule: str, dtype: str, allotted: Any
) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=0.55, rule=rule, merge_norms=rule == "mean")
    compute = Compute("cpu", dtype)
    plain = search(llama_bf16, options, settings=RunSettings(compute=compute, streaming=Streaming(1, 0, "mmap")))
    assert plain.search is not None
    assert len({d.similarity for d in plain.search.decisions}) > 2
    for streaming, choice in _variations():
        allotted(**choice)
        assert search(llama_bf16, options, settings=RunSettings(compute=compute, streaming=streaming)) == plain, (
            streaming,
            choice,
        )


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("rule", ["sequential", "mean"])
def test_no_byte_of_the_output_does_either(llama_bf16: Path, tmp_path: Path, rule: str, io: str, allotted: Any) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=0.55, rule=rule)
    prune(
        llama_bf16,
        tmp_path / "plain",
        options,
        settings=RunSettings(streaming=Streaming(1, 0, "mmap"), compute=FLOAT32),
    )
    for number, resident in enumerate((0, 4)):
        allotted(resident_layers=resident, drop_after_use=True)
        out = tmp_path / str(number)
        prune(llama_bf16, out, options, settings=RunSettings(streaming=Streaming(4, 2, io), compute=FLOAT32))
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_layers_are_rounded_to_their_own_dtype_only(
    llama: Path, tmp_path: Path, dtype: str, norms: bool, allotted: Any
) -> None:
    options = SearchOptions(layers_per_merge=2, interval=2, threshold=-1.0, rule="mean", merge_norms=norms)
    allotted()
    pruned = prune(
        llama, tmp_path / "whole", options, settings=RunSettings(compute=Compute("cpu", dtype), streaming=Streaming(1))
    )
    apply(llama, pruned.plan, tmp_path / "applied", settings=RunSettings(compute=FLOAT32))
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "applied/model.safetensors").read_bytes()


def test_without_space_nothing_is_stored_and_the_result_is_the_same(
    llama: Path, tmp_path: Path, allotted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SearchOptions(layers_per_merge=2, interval=2, threshold=-1.0, rule="mean")
    allotted()
    stored: list[str] = []
    add = Overlay.add
    monkeypatch.setattr(Overlay, "add", lambda self, name, place: (stored.append(name), add(self, name, place)))
    with_space = search(llama, options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(1)))
    assert stored
    stored.clear()
    monkeypatch.setattr(stored_layers.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert search(llama, options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(1))) == with_space
    assert not stored


def test_looking_ahead_reads_less(llama: Path, tmp_path: Path, allotted: Any) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=1.0)
    allotted()
    read = {}
    for nodes in (1, 16):
        pruned = prune(
            llama, tmp_path / str(nodes), options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(nodes))
        )
        read[nodes] = next(p["bytes_read"] for p in pruned.report["usage"]["phases"] if p["name"] == "search")
    layer = sum(t.nbytes for n, t in load_file(llama / "model.safetensors").items() if ".layers.0." in n)
    # T = 1 rejects all: a sweep that goes to the end reads layers 1 to 8 once (and final norms), shorter ones come
    # before it while rejects are not yet expected; five suffixes read 3 + 4 + 5 + 6 + 7. A merged layer is its last
    # follower and the norms of its base.
    assert read[16] < 13 * layer
    assert 15 * layer < read[1] < 27 * layer


def test_resident_layers_are_read_once_in_the_whole_job(llama: Path, tmp_path: Path, allotted: Any) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=1.0)
    layer = sum(t.nbytes for n, t in load_file(llama / "model.safetensors").items() if ".layers.0." in n)
    for io in ("mmap", "pread"):
        read = {}
        for resident in (0, 8):
            allotted(resident_layers=resident)
            out = tmp_path / f"{io}{resident}"
            pruned = prune(llama, out, options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(1, 2, io)))
            phases = pruned.report["usage"]["phases"]
            read[resident] = {p["name"]: p["bytes_read"] for p in phases}
        assert read[8]["reference"] == read[0]["reference"]
        assert read[8]["search"] < layer / 10 < read[0]["search"]
        assert read[8]["write"] == pytest.approx(read[0]["write"] - 8 * layer, abs=layer / 10)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source, options = (
        save_model(llama_config(intermediate_size=16384), tmp_path / "m"),
        SearchOptions(strategy="laco"),
    )
    with pytest.raises(
        BudgetError, match=r"2 kB may be used, .* needs .*weights in flight.*`ram_budget=(\d+)MiB`"
    ) as error:
        prune(
            source,
            tmp_path / "out",
            options,
            settings=RunSettings(FLOAT32, streaming=Streaming(ram_budget=2000), judging=Judging(verdict=False)),
        )
    assert not (tmp_path / "out").exists()
    smallest = int(str(error.value).rsplit("=", 1)[1].removesuffix("MiB`"))
    assert smallest > 20
    with pytest.raises(BudgetError):
        search(
            source, options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(ram_budget=f"{smallest - 1}MiB"))
        )
    found = search(
        source, options, settings=RunSettings(compute=FLOAT32, streaming=Streaming(ram_budget=f"{smallest}MiB"))
    )
    assert found == search(source, options, settings=RunSettings(compute=FLOAT32))


def test_a_second_search_reads_only_what_is_new(llama_bf16: Path, tmp_path: Path) -> None:
    def run(threshold: float, work: str | None, **changes: Any) -> tuple[Plan, dict[str, int]]:
        options = SearchOptions(layers_per_merge=3, interval=1, threshold=threshold, rule="mean", **changes)
        streaming = Streaming(2, work_dir=None if work is None else tmp_path / work)
        pruned = prune(
            llama_bf16,
            tmp_path / f"{work}{threshold}{changes}",
            options,
            settings=RunSettings(compute=FLOAT32, streaming=streaming),
        )
        return pruned.plan, {p["name"]: p["bytes_read"] for p in pruned.report["usage"]["phases"]}

    first, cold = run(0.3, "work")
    assert first == run(0.3, None)[0]
    layer = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    assert cold["reference"] > 8 * layer
    again, warm = run(0.3, "work", rdsc_scale=1.0)
    assert again == first
    assert warm["search"] == 0, "everything was known"
    assert warm["reference"] < layer, "no layer was read"
    other, some = run(0.8, "work")
    assert other == run(0.8, None)[0]
    assert other.layers != first.layers
    assert some["reference"] < layer
    lowest, _ = run(0.3, "work", lowest=2)
    assert lowest == run(0.3, None, lowest=2)[0]


def test_while_layers_run_the_heap_is_as_large_as_their_activations(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def steady_heap(activations: int = 0) -> bool:
        asked.append(activations)
        return False

    monkeypatch.setattr("streamcollapse.resources.device.steady_heap", steady_heap)
    (tmp_path / "text.txt").write_text("The river was long and slow. " * 20, encoding="utf-8")
    runs = [
        lambda: prune(llama, tmp_path / "out", SearchOptions(strategy="laco"), settings=RunSettings(compute=FLOAT32)),
        lambda: streamcollapse.similarity(llama, SearchOptions(strategy="laco"), settings=RunSettings(compute=FLOAT32)),
        lambda: streamcollapse.perplexity(llama, tmp_path / "text.txt", settings=RunSettings(compute=FLOAT32)),
    ]
    for run in runs:
        asked.clear()
        run()
        times = len(asked) // 2  # for the search, and for the verdict
        assert times in (1, 2), "once for the layers, and back"
        assert asked == [asked[0], 0] * times
        assert asked[0] > 0
