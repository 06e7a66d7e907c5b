"""Healing that trains final norm and head as well: what of it plans, verify, perplexity and other verbs know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamcollapse import Healing, Plan, SearchOptions, apply, compare, heal, perplexity, prune, verify
from streamcollapse.errors import OptionError, PlanError
from streamcollapse.forward.continuation import continuations
from streamcollapse.jobs.planning import compose_plans
from streamcollapse.merge.composing import compose
from streamcollapse.merge.plan import PLAN_FILE, PlanLayer, original_layers
from streamcollapse.run.held_out import unjudged_text
from streamcollapse.run.opened import open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.settings.run import Comparing, EvaluationText
from tests.checkpoints import BUNDLED, llama_config, save_model
from tests.jobs.test_heal import DROP, QUIET, SHORT
from tests.streams import plain_stream

OUTSIDE = {"model.norm.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a text, a pruned model, and what became of it with its last two layers and its head trained."""
    directory = tmp_path_factory.mktemp("head")
    (directory / "text.txt").write_text(unjudged_text()[:12_000])
    prune(BUNDLED, directory / "pruned", DROP, settings=QUIET)
    how = replace(SHORT, file=directory / "text.txt", train="last:2+head", rate=1e-3)
    heal(directory / "pruned", directory / "healed", how, settings=QUIET)
    return directory


def test_norm_and_head_change_as_the_plan_says(place: Path) -> None:
    before, after = (load_file(place / name / "model.safetensors") for name in ("pruned", "healed"))
    plan = Plan.load(place / "healed")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert plan.layers[-1].after.keys() == {f"/{name}" for name in OUTSIDE}
    assert changed >= OUTSIDE
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in changed - OUTSIDE} == {"18", "19"}
    assert plan.heal is not None
    assert plan.heal.after < plan.heal.before
    assert "last:2+head" in plan.heal.in_words()
    AutoModelForCausalLM.from_pretrained(place / "healed")


def test_it_brings_more_than_without_the_head(place: Path, tmp_path: Path) -> None:
    how = replace(SHORT, file=place / "text.txt", train="last:2", rate=1e-3)
    without = heal(place / "pruned", tmp_path / "out", how, settings=QUIET).plan.heal
    with_head = Plan.load(place / "healed").heal
    assert without is not None
    assert with_head is not None
    assert with_head.before == without.before
    assert with_head.after < without.after


def test_every_verb_computes_with_it(place: Path) -> None:
    """A plan with another head beside one without, in one walk."""
    pruned, healed, how = place / "pruned", place / "healed", EvaluationText(place / "text.txt", max_tokens=200)
    plan = Plan.load(healed)
    expected = perplexity(healed, how, settings=QUIET).nll
    assert perplexity(pruned, how, plan=plan, settings=QUIET).nll == expected
    assert perplexity(pruned, how, settings=QUIET).nll != expected
    assert verify(healed, pruned).recomputed > 0
    job, alone = open_job(pruned, QUIET), open_job(healed, QUIET)
    use_plan(job, plan)
    prompts = [[5, 6, 7], [8, 9]]
    ours = continuations(job.model(plain_stream(job, job.overlay)), plan.layers, False, prompts, 4)
    assert ours == continuations(alone.model(plain_stream(alone)), original_layers(20), False, prompts, 4)
    together = compose_plans(pruned / PLAN_FILE, healed / PLAN_FILE)
    again = apply(BUNDLED, together, place / "again", settings=QUIET).out
    one, other = (load_file(out / "model.safetensors") for out in (again, healed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = [model.nll for model in compare([pruned, again], conditions=Comparing(BUNDLED), settings=QUIET).models]
    expected_now = compare([again], conditions=Comparing(BUNDLED), settings=QUIET).models
    assert [found[0], found[2]] == [model.nll for model in expected_now]
    assert found[1] != found[2]


def test_a_second_plan_keeps_the_head_without_the_top_layer(place: Path) -> None:
    first = Plan.load(place / "healed")
    second = Plan("healed", 20, "0" * 64, original_layers(20)[:19])
    assert compose(first, second).layers[-1].after == first.layers[-1].after
    scaled = replace(second, layers=(*original_layers(20)[:19], PlanLayer(19, {19: 1.1})))
    with pytest.raises(PlanError, match="mixes layer 19, which was repaired"):
        compose(first, scaled)


def test_what_cannot_be_is_refused(place: Path, tmp_path: Path) -> None:
    tied = save_model(llama_config(tie_word_embeddings=True), tmp_path / "tied")
    by_influence = SearchOptions(strategy="block-influence", target_layers=6)
    pruned = prune(tied, tmp_path / "pruned", by_influence, settings=QUIET)
    how = replace(SHORT, teacher=tied, file=place / "text.txt", train="last:2+head")
    with pytest.raises(OptionError, match=r"the head of this model is its embedding.*`train=last:2`"):
        heal(pruned.out, tmp_path / "out", how, settings=QUIET)
    with pytest.raises(OptionError, match=r"leave \+head out"):
        Healing(BUNDLED, train="cuts+head", loss="mse")
    with pytest.raises(OptionError, match=r"the last three with \+head too"):
        Healing(BUNDLED, train="lora+head")
    plan, job = Plan.load(place / "healed"), open_job(place / "pruned", QUIET)
    top = replace(plan.layers[-1], refits={**plan.layers[-1].refits, "/model.embed_tokens.weight": "0" * 64})
    with pytest.raises(PlanError, match=r"embed_tokens.weight was fitted anew, but is the embedding"):
        use_plan(job, replace(plan, layers=(*plan.layers[:-1], top)))
    below = replace(plan.layers[0], refits=plan.layers[-1].after)
    with pytest.raises(PlanError, match="no such tensor there"):
        use_plan(job, replace(plan, layers=(below, *plan.layers[1:])))
