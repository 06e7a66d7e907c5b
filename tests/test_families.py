"""Every family end to end (the streamed pass alone: forward/test_reference.py): searched like the in-memory search,
written so that transformers loads it whole and generates with a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import SearchOptions, prune
from streamcollapse.arch.architecture import load_architecture
from streamcollapse.arch.survey import survey
from streamcollapse.forward.batches import make_batches
from streamcollapse.forward.reference import reference_pass
from streamcollapse.merge.rules import RULES
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Calibration, Compute, RunSettings
from streamcollapse.storage.checkpoint import Checkpoint
from tests.checkpoints import VOCABULARY, save_model
from tests.families import CHECKS, FAMILIES, MORE_FAMILIES
from tests.formats import as_torch
from tests.in_memory import in_memory_search
from tests.streams import plain_stream

TEXTS = [
    "The river rises in the hills and runs east.",
    "A ship sailed.",
    "In the year of the war, the old town burned.",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(FAMILIES[request.param](), tmp_path_factory.mktemp("family") / "model", gain=3.0)


@pytest.mark.parametrize("name", CHECKS["from PyTorch files"])
def test_pytorch_files_give_the_same(name: str, tmp_path: Path) -> None:
    config = (FAMILIES | MORE_FAMILIES)[name]()
    directory = save_model(config, tmp_path / "model", gain=2.0)
    stored = as_torch(directory, tmp_path / "torch", shards=2)
    options = SearchOptions(layers_per_merge=4, interval=1, threshold=-1.0, rule="mean")
    plans = [
        prune(
            source, tmp_path / f"out-{source.name}", options, settings=RunSettings(compute=Compute("cpu", "float32"))
        ).plan
        for source in (directory, stored)
    ]
    assert plans[0].layers == plans[1].layers
    assert plans[0].search == plans[1].search
    one, two = (load_file(tmp_path / f"out-{d.name}" / "model.safetensors") for d in (directory, stored))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)


def token_ids(directory: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_more_families_are_streamed_and_pruned(name: str, tmp_path: Path) -> None:
    directory = save_model(MORE_FAMILIES[name](), tmp_path / "model", gain=2.0)
    check_survey(directory)
    check_reference(directory)
    options = SearchOptions(layers_per_merge=4, interval=1, threshold=-1.0)
    result = prune(directory, tmp_path / "out", options, settings=RunSettings(compute=Compute("cpu", "float32")))
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert pruned.config.num_hidden_layers == result.plan.num_layers
    assert result.plan.search is not None
    assert any(decision.accepted or decision.reason for decision in result.plan.search.decisions)


def test_a_survey_is_what_the_model_says(family: Path) -> None:
    check_survey(family)


def check_survey(directory: Path) -> None:
    """What names and config say of the model, where they are as usual, is what its own code says."""
    checkpoint = Checkpoint(directory)
    model, quick = load_architecture(checkpoint).survey, survey(checkpoint)
    assert model.embedding
    assert model.vocabulary == VOCABULARY
    if quick is not None:
        assert [set(names) for names in quick.layers] == [set(names) for names in model.layers]
        assert {*quick.outside} == {*model.outside}
        assert replace(quick, layers=[], outside=[]) == replace(model, layers=[], outside=[])


def check_reference(family: Path) -> None:
    """The streamed pass against the model's own forward, at every boundary."""
    samples = token_ids(family)
    job = open_job(family, RunSettings(Compute("cpu", "float32")))
    batches = make_batches(samples)
    reference = reference_pass(job.model(plain_stream(job)), batches, range(job.num_layers))
    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    for batch, last, boundaries in zip(batches, reference.last_hidden, reference.boundaries, strict=True):
        for row, length in enumerate(batch.lengths):
            with torch.inference_mode():
                ids = batch.input_ids_NT[row : row + 1, :length]
                own = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for index in range(job.num_layers):
                torch.testing.assert_close(boundaries[index][row, :length], own[index][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(last[row, :length], own[-1][0], atol=1e-5, rtol=1e-5)


def families_and_rules() -> list[tuple[str, str]]:
    """Every family by two rules in turn, and two families by every one: a rule knows nothing of families."""
    rules, thorough = list(RULES), ("llama", "mixtral, experts")
    turns = [(name, rules[(2 * number + n) % len(rules)]) for number, name in enumerate(FAMILIES) for n in (0, 1)]
    return sorted({*turns, *((name, rule) for name in thorough for rule in rules)})


@pytest.mark.parametrize(("family", "rule"), families_and_rules(), indirect=["family"])
def test_a_prune_equals_the_search_in_memory(family: Path, rule: str, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("\n".join(TEXTS) + "\n")
    for threshold in (0.999, 0.8, 0.3, -1.0):
        expected = in_memory_search(family, TEXTS, c=3, i=1, threshold=threshold, rule=rule)
        accepted = [decision[3] for decision in expected.decisions]
        if any(accepted) and not all(accepted):
            break
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=threshold, rule=rule)
    out = tmp_path / "out"
    result = prune(
        family,
        out,
        options,
        settings=RunSettings(calibration=Calibration(str(calibration)), compute=Compute("cpu", "float32")),
    )
    assert result.plan.search is not None
    ours = [(d.l, d.merged, d.similarity, d.accepted) for d in result.plan.search.decisions]
    assert [d[:2] + d[3:] for d in ours] == [d[:2] + d[3:] for d in expected.decisions]
    for mine, theirs in zip(ours, expected.decisions, strict=True):
        assert mine[2] == (None if theirs[2] is None else pytest.approx(theirs[2], abs=1e-5))
    pruned, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = expected.model.state_dict()
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, own[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    ids = torch.tensor([token_ids(family)[0]])
    pruned.eval()
    with_cache = pruned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    without = pruned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[1] > ids.shape[1]
