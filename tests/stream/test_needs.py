"""What a run needs in memory, by hand, and how a budget is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamcollapse.errors import BudgetError, OptionError
from streamcollapse.forward.batches import Batch
from streamcollapse.merge.mixing import mixing_bytes
from streamcollapse.resources import budget as budgets
from streamcollapse.resources.budget import Budget, budget_for, free_ram
from streamcollapse.run import needs
from streamcollapse.run.memory_plan import spend
from streamcollapse.run.needs import Demand, Workload, least, peak_bytes, workload_of
from streamcollapse.run.opened import open_job
from streamcollapse.run.samples import Samples
from streamcollapse.settings.run import Compute, RunSettings, Streaming

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "LIBRARIES", 0)
    monkeypatch.setattr(needs, "DEVICE_LIBRARIES", 0)


# 80 layers of 1000, converted to 2000; 10 bytes of hidden states at each of 76 boundaries
WORK = Workload(80, layer=1000, slot=2000, converted=True, state=10, boundaries=76, activations=50, tensor=300)


def test_work_follows_from_the_shapes(llama_bf16: Path) -> None:
    lengths = [(30, 30), (40,)]
    samples = Samples([Batch(torch.zeros(len(rows), rows[0], dtype=torch.int64), rows) for rows in lengths], "")
    # q and o 32x32, k and v 16x32, three of 48x32, two norms of 32: all multiples of 64 bytes
    parameters = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    for dtype in (torch.float32, torch.bfloat16):
        job = open_job(llama_bf16, RunSettings(Compute("cpu", str(dtype).removeprefix("torch."))))
        work = workload_of(job.checkpoint, job.architecture.survey, job.placement, Demand(boundaries=5), samples)
        assert (work.num_layers, work.layer, work.slot) == (8, 2 * parameters, dtype.itemsize * parameters)
        assert work.converted == (dtype == torch.float32)
        assert (work.state, work.boundaries, work.tensor) == (100 * 32 * dtype.itemsize, 5, 2 * 48 * 32)
        assert work.activations == 60 * (6 * 32 + 4 * 48) * dtype.itemsize


def test_the_least_on_a_cpu_by_hand() -> None:
    found = least(WORK, Streaming(), on_device=False)
    sums = {p: sum(n.num_bytes for n in found.needs if n.phase == p) for p in ("reference", "search", "write")}
    assert sums == {
        "reference": 3000 + 2000 + 20 + 50 + 20,  # three layers in flight, one converted, states, activations, spill
        "search": 3000 + 2000 + 40 + 50 + 20 + 0,
        "write": 900 + 300,
    }
    assert peak_bytes(found.needs) == 5110
    assert peak_bytes(least(WORK, Streaming(prefetch=0), on_device=False).needs) == 3110


def test_a_budget_is_spent_in_order() -> None:
    with pytest.raises(BudgetError, match=r"search needs 5110 bytes .*weights in flight 3 kB"):
        spend(WORK, Budget(5109), Streaming())
    choice = spend(WORK, Budget(5110), Streaming())
    assert (choice.spill, choice.candidates, choice.resident_layers, choice.drop_after_use) == (True, 1, 0, True)
    choice = spend(WORK, Budget(5300), Streaming())
    assert (choice.spill, choice.candidates, choice.resident_layers) == (True, 5, 0)  # a quarter of what is left
    choice = spend(WORK, Budget(20_000), Streaming())
    assert (choice.spill, choice.candidates, choice.resident_layers) == (False, 354, 10)
    choice = spend(WORK, Budget(200_000), Streaming())
    assert (choice.resident_layers, choice.drop_after_use) == (80, False)
    assert choice.resident(80) == range(80)
    for ram in (5110, 5300, 20_000, 200_000):
        choice = spend(WORK, Budget(ram), Streaming())
        assert peak_bytes(choice.needs) <= ram


def test_a_merge_of_several_layers_holds_them_all() -> None:
    whole = least(replace(WORK, window=4), Streaming(), on_device=False)
    assert peak_bytes(whole.needs) == 5110 + 3 * 1000


def test_a_look_ahead_that_was_asked_for_is_not_reduced() -> None:
    assert spend(WORK, Budget(20_000), Streaming(lookahead=200)).candidates == 200
    with pytest.raises(BudgetError, match=r"hidden states of 200 candidates 2.03 kB"):
        spend(WORK, Budget(6000), Streaming(lookahead=200))


def test_a_device_has_a_budget_of_its_own() -> None:
    # RAM: three pinned slots and boundaries; VRAM: three slots, a layer, states, activations
    choice = spend(WORK, Budget(3000 + 760, vram=3000 + 2000 + 50 + 50), Streaming(lookahead=1))
    assert (choice.spill, choice.resident_layers) == (True, 0)
    assert peak_bytes(choice.needs, "vram") == 5100
    with pytest.raises(BudgetError, match=r"GPU memory: 5099 bytes may be used.* `vram_budget=1MiB`"):
        spend(WORK, Budget(10_000, vram=5099), Streaming(lookahead=1))
    with pytest.raises(BudgetError, match=r"^memory: .*pinned slots 3 kB.*`ram_budget=1MiB`"):
        spend(WORK, Budget(3019, vram=10_000), Streaming(lookahead=1))
    choice = spend(WORK, Budget(10_000, vram=25_100), Streaming(lookahead=1))
    assert (choice.resident_layers, choice.spill) == (20, False)


def test_what_a_device_holds_besides_layers_is_counted() -> None:
    work = replace(WORK, embedding=90_000, mixing=400)
    found = least(work, Streaming(lookahead=1), on_device=True)
    sums = {
        p: sum(n.num_bytes for n in found.needs if (n.phase, n.memory) == (p, "vram"))
        for p in ("embedding", "search", "write")
    }
    assert sums == {"embedding": 90_000 + 2000 + 10, "search": 5100 + 400, "write": 6 * 300 + 400 + 90_000}
    with pytest.raises(BudgetError, match=r"GPU memory: .*write needs .*the embedding or the head, whole 90 kB"):
        spend(work, Budget(10_000, vram=50_000), Streaming(lookahead=1))


def test_what_mixing_makes_is_bounded_by_its_pieces() -> None:
    assert mixing_bytes(1000, torch.bfloat16) == 1000 * (4 + 4 + 2)
    assert mixing_bytes(10**9, torch.bfloat16) == mixing_bytes(10**10, torch.bfloat16) == (1 << 24) * 10
    assert mixing_bytes(10, torch.float64) == 10 * 24


def test_what_the_user_says_is_taken_and_else_what_is_free() -> None:
    assert budget_for(Streaming(ram_budget="2GiB"), CPU) == Budget(2 << 30)
    found = budget_for(Streaming(), CPU)
    assert found.vram is None
    assert 0 < found.ram < free_ram()
    with pytest.raises(OptionError, match="VRAM budget is 1GiB, but this run computes on the CPU"):
        budget_for(Streaming(vram_budget="1GiB"), CPU)


def test_of_a_device_also_what_this_process_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    found = budget_for(Streaming(), cuda)
    assert (found.vram, found.vram_limit) == (1350, None)
    found = budget_for(Streaming(vram_budget="2GiB"), cuda)
    assert (found.vram, found.vram_limit) == (2 << 30, 2 << 30)


def test_a_control_group_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = tmp_path / "cgroup"
    monkeypatch.setattr(budgets, "_MEMBERSHIP", membership)
    monkeypatch.setattr(budgets, "_CGROUPS", tmp_path / "fs")
    machine = free_ram()

    def write(folder: Path, limit: tuple[str, str], usage: tuple[str, str], stat: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit[0]).write_text(limit[1])
        (folder / usage[0]).write_text(usage[1])
        (folder / "memory.stat").write_text(stat)

    membership.write_text("5:cpu,cpuacct:/\n4:memory:/jobs/one\n0::/\n")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write(tmp_path / "fs/memory", (v1[0], str(2**63 - 4096)), (v1[1], "9999"), "")
    write(
        tmp_path / "fs/memory/jobs",
        (v1[0], "9000000"),
        (v1[1], "2000000"),
        "total_inactive_file 0\ntotal_active_file 0",
    )
    assert free_ram() == 7_000_000
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 300000\ntotal_active_file 50000\n"
    write(tmp_path / "fs/memory/jobs/one", (v1[0], "5000000"), (v1[1], "4000000"), stat)
    assert free_ram() == 1_350_000

    membership.write_text("0::/jobs/two\n")
    v2 = ("memory.max", "memory.current")
    write(tmp_path / "fs/jobs", (v2[0], "max\n"), (v2[1], "5\n"), "")
    assert free_ram() == pytest.approx(machine, rel=0.2)
    write(tmp_path / "fs/jobs/two", (v2[0], "800000\n"), (v2[1], "200000\n"), "inactive_file 1000\nactive_file 0\n")
    assert free_ram() == 601_000
    membership.unlink()
    assert free_ram() == pytest.approx(machine, rel=0.2)
