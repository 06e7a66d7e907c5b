"""Repairs as a part of prune and apply: what is written, what plans say of it, and what can be done with such plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from streamcollapse import Plan, RunSettings, SearchOptions, apply, perplexity, prune, resume, search, verify
from streamcollapse.cli.main import app
from streamcollapse.errors import BudgetError, CalibrationError, NothingLearnedError, OptionError, PlanError
from streamcollapse.jobs import lessons, repair
from streamcollapse.jobs.apply import run_apply
from streamcollapse.jobs.planning import compose_plans, export_plan, make_plan
from streamcollapse.jobs.prepare import prepare_apply
from streamcollapse.merge.plan import PLAN_FILE, PlanLayer
from streamcollapse.progress import Event, LayerDone, PhaseStarted, StepLearned, WarningRaised
from streamcollapse.repair import fits
from streamcollapse.repair.climb import plan_climb
from streamcollapse.run.heal_plan import Course
from streamcollapse.run.held_out import unjudged_text
from streamcollapse.run.memory_plan import plan_memory
from streamcollapse.run.refits import refits_file
from streamcollapse.settings.run import Calibration, Compute, EvaluationText, Judging, Repair, Streaming
from streamcollapse.storage.staging import work_of
from tests.checkpoints import BUNDLED

DROP = SearchOptions(strategy="block-influence", target_layers=20)
NO_VERDICT = RunSettings(judging=Judging(verdict=False))


def settings(text: Path, method: str = "linear") -> RunSettings:
    return RunSettings(Compute("cpu", "float32"), judging=Judging(verdict=False), repair=Repair(method, text, 2048))


@pytest.fixture(scope="module")
def trained() -> Path:
    """The model that ships: what random weights lose by a cut cannot be given back."""
    return BUNDLED


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fit.txt"
    path.write_text(unjudged_text()[:12_000])
    return path


@pytest.fixture(scope="module")
def repaired(trained: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repaired") / "out"
    found = prune(trained, out, DROP, settings=settings(text))
    assert found.plan.repair is not None
    assert found.plan.repair.is_kept
    return out


def test_it_is_the_cut_model_but_for_what_its_plan_says(trained: Path, repaired: Path, tmp_path: Path) -> None:
    plan = Plan.load(repaired)
    cut = replace(plan, layers=tuple(PlanLayer(layer.base, layer.mix) for layer in plan.layers), repair=None)
    apply(trained, cut, tmp_path / "cut", settings=NO_VERDICT)
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "cut", repaired))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    said = {f"model.layers.{n}.{suffix}" for n, layer in enumerate(plan.layers) for suffix in layer.refits}
    assert changed == said
    assert said
    AutoModelForCausalLM.from_pretrained(repaired)


def test_its_loss_falls_on_text_that_it_was_not_fitted_to(repaired: Path) -> None:
    record = json.loads((repaired / PLAN_FILE).read_text())["repair"]
    assert record["loss_after"] < record["loss_before"]
    assert all(layer["after"] < layer["before"] for layer in record["layers"] if layer["how"])
    assert record["tokens"] > record["held_out_tokens"] > 0


def test_verify_and_perplexity_know_such_plans(trained: Path, repaired: Path, text: Path) -> None:
    assert verify(repaired, trained).recomputed > 0
    how = EvaluationText(text, max_tokens=200)
    run = RunSettings(Compute("cpu", "float32"))
    by_plan = perplexity(trained, how, plan=Plan.load(repaired), settings=run)
    assert by_plan.nll == perplexity(repaired, how, settings=run).nll


def test_a_plan_alone_has_its_tensors_beside_it(trained: Path, text: Path, repaired: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    search(trained, DROP, settings=settings(text), save_as=path)
    assert refits_file(path).is_file()
    apply(trained, Plan.load(path), tmp_path / "later", settings=NO_VERDICT)
    one, other = (load_file(out / "model.safetensors") for out in (tmp_path / "later", repaired))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_tensors_that_are_lost_or_changed_are_named(trained: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    search(trained, DROP, settings=settings(text), save_as=path)
    tensors = load_file(refits_file(path))
    save_file({name: tensor + 1.0 for name, tensor in tensors.items()}, refits_file(path))
    with pytest.raises(PlanError, match="is not what the plan says"):
        apply(trained, Plan.load(path), tmp_path / "out")
    refits_file(path).unlink()
    with pytest.raises(PlanError, match="is not beside it"):
        apply(trained, Plan.load(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repair_that_is_known_is_not_made_again(trained: Path, text: Path, tmp_path: Path) -> None:
    run = replace(settings(text), streaming=Streaming(work_dir=tmp_path / "work"))
    phases: list[list[str]] = []
    for name in ("one", "other"):
        said: list[Event] = []
        prune(trained, tmp_path / name, DROP, settings=run, listener=said.append)
        phases.append([event.name for event in said if isinstance(event, PhaseStarted)])
    assert [("repair" in found) for found in phases] == [True, False]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "work" / "refits" / next((tmp_path / "work" / "refits").iterdir()).name).write_bytes(b"damaged")
    said = []
    prune(trained, tmp_path / "third", DROP, settings=run, listener=said.append)
    assert any(isinstance(event, PhaseStarted) and event.name == "repair" for event in said)
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert all(torch.equal(one[name], third[name]) for name in one)


def test_memory_that_is_short_changes_no_bit_of_a_fit_by_adam(trained: Path, text: Path, tmp_path: Path) -> None:
    """Hidden states in files, nothing resident: the same tensors."""
    outs = []
    for budget in (None, "160MiB"):
        run = replace(settings(text, "local"), streaming=Streaming(ram_budget=budget))
        outs.append(prune(trained, tmp_path / f"{budget}", DROP, settings=run).out)
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_magnitudes_change_the_layers_above_cuts_alone(trained: Path, text: Path, tmp_path: Path) -> None:
    """Each by a factor; kept only where the loss falls, as with every repair."""
    how, said = SearchOptions(strategy="block-influence", target_layers=12), list[Event]()
    found = prune(trained, tmp_path / "out", how, settings=settings(text, "magnitude"), listener=said.append).plan
    assert found.repair is not None
    assert [layer.position for layer in found.repair.layers] == [*range(plan_climb(found.layers, 24).mended[0] + 1, 12)]
    assert all(layer.how is not None and layer.how.startswith("magnitude") for layer in found.repair.layers)
    assert found.repair.loss_after is not None
    assert found.repair.loss_before is not None
    assert found.repair.is_kept == (found.repair.loss_after < found.repair.loss_before)
    scaled = [n for n, layer in enumerate(found.layers) if layer.refits]
    assert scaled == ([layer.position for layer in found.repair.layers] if found.repair.is_kept else [])
    verify(tmp_path / "out", trained)


def test_auto_ends_with_the_divergence_of_the_whole(trained: Path, text: Path, tmp_path: Path) -> None:
    """The layers below cuts alone change, and the loss falls further than by the fits of single layers."""
    how = SearchOptions(strategy="block-influence", target_layers=12)
    said: list[Event] = []
    found = prune(trained, tmp_path / "auto", how, settings=settings(text, "auto"), listener=said.append).plan
    local = prune(trained, tmp_path / "local", how, settings=settings(text, "local")).plan
    assert found.repair is not None
    assert local.repair is not None
    assert all(layer.how is not None and layer.how.endswith("end to end") for layer in found.repair.layers)
    repairs = [one for one in said if isinstance(one, PhaseStarted | LayerDone)]
    starts = [n for n, one in enumerate(repairs) if isinstance(one, PhaseStarted)]
    begin = next(n for n in starts if getattr(repairs[n], "name", None) == "repair")
    visits = next(n for n in starts if n > begin) - begin - 1
    assert visits == getattr(repairs[begin], "total_steps", None), "what the bar is drawn by"
    changed = [n for n, layer in enumerate(found.layers) if layer.refits]
    assert changed == [layer.position for layer in found.repair.layers] == plan_climb(found.layers, 24).mended
    assert found.repair.loss_after is not None
    assert local.repair.loss_after is not None
    assert found.repair.loss_after < local.repair.loss_after
    assert "end to end" in [event.name for event in said if isinstance(event, PhaseStarted)]
    assert verify(tmp_path / "auto", trained).recomputed > 0


def test_auto_ends_in_the_same_bytes_after_a_break(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamcollapse.jobs.healing._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("streamcollapse.jobs.healing._SAVE_SHARE", float("inf"))
    shipped = Repair("auto", tokens=4096)
    how = RunSettings(Compute("cpu", "float32"), judging=Judging(verdict=False), repair=shipped)
    drop = replace(DROP, target_layers=12)
    whole = prune(trained, tmp_path / "whole", drop, settings=how).out
    out = tmp_path / "broken"

    def breaking(event: Event) -> None:
        if isinstance(event, StepLearned) and event.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume with"):
        prune(trained, out, drop, settings=how, listener=breaking)
    seen: list[int] = []
    resume(work_of(out), listener=lambda e: seen.append(e.number) if isinstance(e, StepLearned) else None)
    assert seen[0] == 3, "the step that was broken off"
    one, other = (load_file(path / "model.safetensors") for path in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_layer_that_was_fitted_before_a_break_is_not_fitted_again(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, begun = fits.local_fit, list[int]()
    drop, how = replace(DROP, target_layers=12), settings(text, "local")
    whole = prune(trained, tmp_path / "whole", drop, settings=how)
    assert whole.plan.repair is not None
    positions = [layer.position for layer in whole.plan.repair.layers]
    assert len(positions) >= 2

    def breaking(layer: Any, before: float) -> Any:
        begun.append(layer.base)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return fit(layer, before)

    monkeypatch.setattr(fits, "local_fit", breaking)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt, match="resume with"):
        prune(trained, out, drop, settings=how)
    resume(work_of(out))
    bases = [whole.plan.layers[position].base for position in positions]
    assert begun == [*bases[:2], *bases[1:]], "the one that was broken off is begun again, the one before it is not"
    assert Plan.load(out).layers == whole.plan.layers
    assert Plan.load(out).repair == whole.plan.repair
    begun.clear()
    cut = replace(whole.plan, layers=tuple(PlanLayer(x.base, x.mix) for x in whole.plan.layers), repair=None)
    out = tmp_path / "applied"
    with pytest.raises(KeyboardInterrupt, match="resume with"):
        apply(trained, cut, out, settings=how)
    resume(work_of(out))
    assert begun == [*bases[:2], *bases[1:]]
    assert Plan.load(out).layers == whole.plan.layers


def test_a_rate_that_learns_nothing_is_followed_by_a_smaller_one(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    train = repair.trained_below_cuts

    def first_in_vain(run: Any, how: Any, *more: Any) -> Plan:
        tried.append(how.healing.largest_rate)
        if len(tried) == 1:
            raise NothingLearnedError("nothing was learned")
        return train(run, how, *more)

    monkeypatch.setattr(repair, "trained_below_cuts", first_in_vain)
    drop = replace(DROP, target_layers=12)
    found = prune(trained, tmp_path / "out", drop, settings=settings(text, "auto")).plan
    assert tried == [0.005, 0.0015]
    assert found.repair is not None
    assert all(layer.how is not None and layer.how.endswith("end to end") for layer in found.repair.layers)


def test_adapters_are_trained_where_there_is_no_memory_for_whole_layers(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their product is in the matrices of the layers below cuts alone, and the loss falls further than without."""
    plan = lessons.plan_healing

    def short(job: Any, teacher: Any, course: Course, streaming: Streaming) -> Any:
        if course.whole:
            raise BudgetError("heal needs 9 GiB of RAM, and the budget is 1 GiB")
        return plan(job, teacher, course, streaming)

    monkeypatch.setattr(lessons, "plan_healing", short)
    how, said = SearchOptions(strategy="block-influence", target_layers=12), list[Event]()
    found = prune(trained, tmp_path / "out", how, settings=settings(text, "auto"), listener=said.append).plan
    local = prune(trained, tmp_path / "local", how, settings=settings(text, "local")).plan
    warned = [event.text for event in said if isinstance(event, WarningRaised)]
    assert any("get adapters of rank 64" in line for line in warned)
    assert found.repair is not None
    assert local.repair is not None
    assert all((layer.how or "").endswith("end to end, by adapters of rank 64") for layer in found.repair.layers)
    assert [n for n, layer in enumerate(found.layers) if layer.refits] == plan_climb(found.layers, 24).mended
    assert found.repair.loss_after is not None
    assert local.repair.loss_after is not None
    assert found.repair.loss_after < local.repair.loss_after
    assert verify(tmp_path / "out", trained).recomputed > 0


def test_a_budget_between_both_is_told_as_adapters(trained: Path, text: Path, tmp_path: Path) -> None:
    """The memory table has what will be done: whole layers by default, adapters in a little less than these take."""
    plan = search(trained, replace(DROP, target_layers=12))

    def last_step(budget: int | None) -> dict[str, int]:
        run = replace(settings(text, "auto"), streaming=Streaming(ram_budget=None if budget is None else str(budget)))
        needs = prepare_apply(trained, plan, tmp_path / "out", run).memory.needs
        return {need.what: need.num_bytes for need in needs if need.phase == "end to end"}

    roomy = last_step(None)
    trained_whole = roomy["what is trained, gradients and moments"]
    least = sum(roomy.values()) - roomy["hidden states between layers"] - trained_whole // 4
    tight = last_step(least)
    assert "adapters, gradients and moments" in tight
    assert sum(tight.values()) <= least


def test_what_there_is_no_memory_for_is_left_out(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*given: Any) -> None:
        raise BudgetError("heal needs 9 GiB of RAM, and the budget is 1 GiB")

    monkeypatch.setattr("streamcollapse.jobs.repair.lessons_of_cuts", short)
    said: list[Event] = []
    found = prune(trained, tmp_path / "out", DROP, settings=settings(text, "auto"), listener=said.append).plan
    warned = [event.text for event in said if isinstance(event, WarningRaised)]
    assert any("not trained end to end: heal needs 9 GiB of RAM" in line for line in warned)
    assert found.repair is not None
    assert found.repair.is_kept
    assert not any("end to end" in (layer.how or "") for layer in found.repair.layers)


def test_apply_plans_the_memory_of_a_repair(trained: Path, text: Path, tmp_path: Path) -> None:
    plan = search(trained, DROP)
    outs = []
    for budget in (None, "160MiB"):
        run = replace(settings(text, "local"), streaming=Streaming(ram_budget=budget))
        prepared = prepare_apply(trained, plan, tmp_path / f"{budget}", run)
        assert {need.phase for need in prepared.memory.needs} == {"repair", "write"}
        outs.append(run_apply(prepared).out)
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    run = replace(settings(text, "local"), streaming=Streaming(ram_budget="40MiB"))
    with pytest.raises(BudgetError, match="repair needs"):
        prepare_apply(trained, plan, tmp_path / "no", run)


def test_a_search_leaves_no_temporary_file(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}")
    assert search(trained, DROP, settings=settings(text, "auto")).repair is not None
    assert list(tmp_path.iterdir()) == []


def test_what_no_plan_can_say_is_refused(trained: Path, repaired: Path, text: Path, tmp_path: Path) -> None:
    plan = Plan.load(repaired)
    with pytest.raises(PlanError, match="was repaired: no merge"):
        export_plan(trained, plan, "mergekit")
    with pytest.raises(PlanError, match="repaired already"):
        apply(trained, plan, tmp_path / "out", settings=settings(text))
    whole = {n: layer for n, layer in enumerate(plan.layers) if layer.refits}
    number = next(iter(whole))
    scaled = replace(
        plan,
        num_source_layers=plan.num_layers,
        layers=tuple(PlanLayer(n, {n: 0.5 if n == number else 1.0}) for n in range(plan.num_layers)),
        repair=None,
    )
    scaled.save(tmp_path / "second.json")
    with pytest.raises(PlanError, match="was repaired; apply the first"):
        compose_plans(repaired / PLAN_FILE, tmp_path / "second.json")


def test_a_composed_plan_brings_what_was_fitted_anew(trained: Path, text: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    search(trained, DROP, settings=settings(text), save_as=first)
    pruned = apply(trained, Plan.load(first), tmp_path / "pruned", settings=NO_VERDICT).out
    make_plan(pruned, drop="0").save(tmp_path / "second.json")
    asked = [
        "plan",
        "compose",
        str(first),
        str(tmp_path / "second.json"),
        "--plan",
        str(tmp_path / "deep" / "both.json"),
    ]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    whole = apply(trained, Plan.load(tmp_path / "deep" / "both.json"), tmp_path / "one", settings=NO_VERDICT).out
    twice = apply(pruned, Plan.load(tmp_path / "second.json"), tmp_path / "two", settings=NO_VERDICT).out
    one, other = (load_file(out / "model.safetensors") for out in (whole, twice))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_nothing_is_done_where_nothing_was_cut(trained: Path, text: Path, tmp_path: Path) -> None:
    plan = make_plan(trained, drop="3")
    layers = tuple(PlanLayer(n, {n: 1.0 if n else 0.9}) for n in range(plan.num_source_layers))
    said: list[Event] = []
    scaled = replace(plan, layers=layers)
    found = apply(trained, scaled, tmp_path / "out", settings=settings(text), listener=said.append)
    assert plan_climb(layers, len(layers)).steps == ()
    assert not any(layer.refits for layer in found.plan.layers)
    assert any(isinstance(event, WarningRaised) and "no layers were cut out" in event.text for event in said)


def test_a_repair_that_makes_the_loss_worse_is_dropped(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamcollapse.jobs import repair

    def spoiled(method: str, block: int | None) -> Any:
        def fit(layer: Any, before: float) -> Any:
            name = next(name for name in layer.writable if name.endswith("down_proj.weight"))
            return layer.but({name: -3.0 * layer.weights.parameters[name]}), "spoiled", before / 2

        return fit

    monkeypatch.setattr(repair, "fit_by", spoiled)
    said: list[Event] = []
    found = prune(trained, tmp_path / "out", DROP, settings=settings(text), listener=said.append)
    assert found.plan.repair is not None
    assert not found.plan.repair.is_kept
    assert not any(layer.refits for layer in found.plan.layers)
    assert any(isinstance(event, WarningRaised) and "not repaired: the loss" in event.text for event in said)


def test_bad_input(trained: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(CalibrationError, match="too short for a repair"):
        prune(trained, tmp_path / "out", DROP, settings=settings(short))
    with pytest.raises(OptionError, match="repair"):
        Repair("magic")
    assert not (tmp_path / "out").exists()


GREEDY = SearchOptions(strategy="greedy", target_layers=22)
SENTENCES = Calibration("sentences", 32)


# nothing is said of a repair, but of how much text
USUAL = RunSettings(Compute("cpu", "float32"), SENTENCES, judging=Judging(verdict=False), repair=Repair(tokens=2048))


def test_greedy_search_prunes_with_a_repair_where_nobody_says_otherwise(trained: Path, tmp_path: Path) -> None:
    found = prune(trained, tmp_path / "out", GREEDY, settings=USUAL).plan
    asked = replace(USUAL, repair=Repair("auto", tokens=2048))
    expected = prune(trained, tmp_path / "asked", GREEDY, settings=asked).plan
    assert found.repair is not None
    assert (found.repair, found.layers) == (expected.repair, expected.layers)
    quick = prune(trained, tmp_path / "quick", GREEDY.but(effort="quick"), settings=USUAL).plan
    dropped = prune(trained, tmp_path / "dropped", DROP, settings=USUAL).plan
    plain = search(trained, GREEDY, settings=USUAL)
    written = apply(trained, plain, tmp_path / "written", settings=USUAL).plan
    assert [plan.repair for plan in (quick, dropped, plain, written)] == [None] * 4


def test_a_text_to_repair_on_means_a_repair(trained: Path, text: Path, tmp_path: Path) -> None:
    found = prune(trained, tmp_path / "out", DROP, settings=replace(USUAL, repair=Repair(file=text, tokens=2048))).plan
    assert found.repair is not None
    assert (found.repair.method, found.repair.text) == ("auto", text.name)


def test_a_repair_that_nobody_asked_for_is_left_out_where_memory_is_short(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(job: Any, samples: Any, streaming: Streaming, demand: Any) -> Any:
        if demand.repair is not None:
            raise BudgetError("memory: 1 GB may be used, repair needs 2 GB")
        return plan_memory(job, samples, streaming, demand)

    monkeypatch.setattr("streamcollapse.jobs.prepare.plan_memory", short)
    said: list[Event] = []
    judged = replace(USUAL, judging=Judging())
    found = prune(trained, tmp_path / "out", GREEDY, settings=judged, listener=said.append)
    assert found.plan.repair is None
    assert found.report["held_out"] is not None, "the verdict, for which there is room, stays"
    warned = [event.text for event in said if isinstance(event, WarningRaised)]
    assert "no repair, which is no reason to refuse the job: memory: 1 GB may be used, repair needs 2 GB" in warned
    with pytest.raises(BudgetError, match="repair needs"):
        prune(trained, tmp_path / "asked", GREEDY, settings=replace(judged, repair=Repair("auto", tokens=2048)))
    assert not (tmp_path / "asked").exists()


def test_a_repair_that_nobody_asked_for_is_left_out_where_there_is_no_text_for_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any) -> None:
        raise CalibrationError("no tokens of it are words of the model")

    monkeypatch.setattr("streamcollapse.jobs.prepare.fit_text", none)
    said: list[Event] = []
    assert prune(trained, tmp_path / "out", GREEDY, settings=USUAL, listener=said.append).plan.repair is None
    assert "no repair: no tokens of it are words of the model" in [e.text for e in said if isinstance(e, WarningRaised)]
    with pytest.raises(CalibrationError):
        prune(trained, tmp_path / "asked", GREEDY, settings=replace(USUAL, repair=Repair("auto")))
