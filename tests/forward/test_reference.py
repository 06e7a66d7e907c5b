"""The streamed forward pass against the model's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from streamcollapse.arch.skeleton import DecoderStack
from streamcollapse.errors import ModelError, NonFiniteError
from streamcollapse.forward.batches import CALL_COST, call_tokens, make_batches
from streamcollapse.forward.reference import Reference, reference_pass
from streamcollapse.progress import LayerDone
from streamcollapse.run.opened import Job, open_job
from streamcollapse.settings.run import Compute, RunSettings
from tests.checkpoints import VOCABULARY, edit_tensors, save_llama, save_model
from tests.families import FAMILIES
from tests.streams import plain_stream


def random_samples(lengths: tuple[int, ...] = (23, 12, 7, 1)) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=g).tolist() for length in lengths]


def reference_of(
    directory: Path, samples: list[list[int]], dtype: str = "float32", **batch: int
) -> tuple[Job, Reference]:
    job = open_job(directory, RunSettings(Compute("cpu", dtype)))
    batches = make_batches(samples, **batch)
    return job, reference_pass(job.model(plain_stream(job)), batches, range(job.num_layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_equals_the_model_s_own_forward(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0)
    samples = random_samples()
    job, reference = reference_of(directory, samples)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    head = job.model(plain_stream(job)).head()
    for row, sample in enumerate(samples):
        with torch.inference_mode():
            output = model(torch.tensor([sample]), output_hidden_states=True, use_cache=False)
        for index in range(job.num_layers):
            ours = reference.boundary(index)[0][row, : len(sample)]
            torch.testing.assert_close(ours, output.hidden_states[index][0], atol=1e-5, rtol=1e-5)
        ours = reference.last_hidden[0][row, : len(sample)]
        torch.testing.assert_close(ours, output.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        logits = job.model(plain_stream(job)).logits(head, _top(job, reference, row=0, length=23))
        expected = model(torch.tensor([samples[0]]), use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def _top(job: Job, reference: Reference, row: int, length: int) -> torch.Tensor:
    """What leaves the top layer for one sample, from the boundary below it."""
    model, view, last = job.model(plain_stream(job)), job.original(), job.num_layers - 1
    hidden = reference.boundary(last)[0]
    with model.onload(view, last) as weights:
        return model.run(last, weights, hidden, reference.calls[0][last])[row : row + 1, :length]


def test_bfloat16_equals_the_model_s_own_forward_bit_for_bit(bundled: Path) -> None:
    """One sample, so that both run in calls of the same shape."""
    samples = random_samples((23,))
    _, reference = reference_of(bundled, samples, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(samples), output_hidden_states=True, use_cache=False).hidden_states[-1]
    assert torch.equal(reference.last_hidden[0], expected)


def test_batches_do_not_change_what_a_sample_sees(llama: Path) -> None:
    samples = random_samples()
    _, together = reference_of(llama, samples)
    _, apart = reference_of(llama, samples, max_tokens=1)
    assert [len(b.lengths) for b in together.batches] == [4]
    assert [len(b.lengths) for b in apart.batches] == [1, 1, 1, 1]
    for row, sample in enumerate(samples):
        torch.testing.assert_close(
            together.last_hidden[0][row, : len(sample)], apart.last_hidden[row][0], atol=1e-5, rtol=1e-5
        )


def test_batches_respect_the_limit() -> None:
    samples = [[1] * n for n in (3, 4, 9, 2, 2)]
    batches = make_batches(samples, max_tokens=8)
    assert [b.lengths for b in batches] == [(9,), (4, 3), (2, 2)]
    assert batches[1].input_ids_NT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_only_the_boundaries_that_are_asked_for_are_kept(llama: Path) -> None:
    job, whole = reference_of(llama, random_samples())
    batches = make_batches(random_samples())
    part = reference_pass(job.model(plain_stream(job)), batches, range(2, 5))
    assert part.boundaries[0].shape == (3, 4, 23, 32)
    for layer_index in (2, 3, 4):
        assert torch.equal(part.boundary(layer_index)[0], whole.boundary(layer_index)[0])
    nothing = reference_pass(job.model(plain_stream(job)), batches, range(0))
    assert torch.equal(nothing.last_hidden[0], whole.last_hidden[0])


def test_each_layer_is_read_once_and_told(llama: Path) -> None:
    events: list[Any] = []
    job = open_job(llama, RunSettings(Compute("cpu", "float32")), events.append)
    with job.meter.phase("reference"):
        reference_pass(job.model(plain_stream(job)), make_batches(random_samples()), range(8))
    assert [e.layer_index for e in events if isinstance(e, LayerDone)] == list(range(8))
    layer = sum(job.checkpoint.info(n).num_bytes for n in job.architecture.layout.layer_names(0))
    final_norm = job.checkpoint.info("model.norm.weight").num_bytes
    assert [e.num_bytes for e in events] == [layer] * 7 + [layer + final_norm]
    layers = sum(job.checkpoint.info(n).num_bytes for i in range(8) for n in job.architecture.layout.layer_names(i))
    rows = len({0, *(token for sample in random_samples() for token in sample)})  # 0 pads
    norm, row = job.checkpoint.info("model.norm.weight").num_bytes, 32 * 4
    assert job.meter.phases[0].bytes_read == layers + rows * row + 2 * norm, "embedding by rows, no head"


def test_a_layer_s_weights_live_in_the_file_or_in_one_slot(llama_bf16: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        job = open_job(llama_bf16, RunSettings(Compute("cpu", dtype)))
        model, view = job.model(plain_stream(job)), job.original()
        pointers = []
        for position in (0, 1):
            with model.onload(view, position) as weights:
                assert {w.dtype for w in weights.stored.values()} == {job.placement.dtype}
                for suffix, weight in weights.stored.items():
                    stored = job.checkpoint.read(f"model.layers.{position}.{suffix}", torch.device("cpu"))
                    assert torch.equal(weight, stored.to(weight.dtype))
                    assert (weight.data_ptr() == stored.data_ptr()) == (dtype == "bfloat16")
                pointers.append({s: w.data_ptr() for s, w in weights.stored.items()})
                with pytest.raises(AssertionError, match="the slot is in use"), model.onload(view, 2):
                    pass
        assert (pointers[0] == pointers[1]) == (dtype == "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    directory = save_llama(tmp_path / "m", num_layers=3)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = value

    edit_tensors(directory, damage)
    with pytest.raises(NonFiniteError, match=r"tensor model.layers.1.mlp.up_proj.weight has 1 NaN or infinite"):
        reference_of(directory, random_samples())


def test_overflow_of_the_compute_dtype_is_told_apart_from_damage(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m", num_layers=3)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = 1e5

    edit_tensors(directory, enlarge)
    with pytest.raises(NonFiniteError, match=r"up_proj.weight overflow float16; pass `compute_dtype=float32`"):
        reference_of(directory, random_samples(), "float16")

    def enlarge_states(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e4)
        tensors["model.layers.1.mlp.gate_proj.weight"].fill_(3e4)

    edit_tensors(directory, enlarge_states)
    with pytest.raises(NonFiniteError, match="hidden states after layer 1 overflow float16"):
        reference_of(directory, random_samples(), "float16")


def test_layers_that_share_more_than_hidden_states_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_job(llama, RunSettings(Compute("cpu", "float32")))
    decoder = job.architecture.skeleton.decoder

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.zeros(*input_ids.shape, 32)
        previous = None
        for layer in decoder.layers:
            previous, hidden = hidden, layer(hidden, residual=previous)
        return (hidden,)

    monkeypatch.setattr(decoder, "forward", forward)
    with pytest.raises(ModelError, match="layers see the output of layers other than the one below"):
        DecoderStack(job.architecture.skeleton).record({}, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("wrap", ["tensor", "tuple"])
def test_layers_may_be_called_by_name_and_return_tuples(
    llama: Path, monkeypatch: pytest.MonkeyPatch, wrap: str
) -> None:
    job = open_job(llama, RunSettings(Compute("cpu", "float32")))
    decoder = job.architecture.skeleton.decoder

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.zeros(*input_ids.shape, 32)
        for index, layer in enumerate(decoder.layers):
            output = layer(hidden_states=hidden, mask=index)
            hidden = output[0] if wrap == "tuple" else output
        return (hidden,)

    monkeypatch.setattr(decoder, "forward", forward)
    recording = DecoderStack(job.architecture.skeleton).record({}, torch.zeros(2, 3, dtype=torch.int64))
    assert recording.hidden_NTD.shape == (2, 3, 32)
    assert [call.kwargs for call in recording.calls] == [{"mask": i} for i in range(8)]
    assert all(call.hidden_by_name and call.args == () for call in recording.calls)


def test_layers_that_return_something_else_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_job(llama, RunSettings(Compute("cpu", "float32")))
    decoder = job.architecture.skeleton.decoder

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = torch.zeros(*input_ids.shape, 32)
        for layer in decoder.layers:
            hidden = layer(hidden)["hidden"]
        return (hidden,)

    monkeypatch.setattr(decoder, "forward", forward)
    with pytest.raises(ModelError, match="not supported"):
        DecoderStack(job.architecture.skeleton).record({}, torch.zeros(2, 3, dtype=torch.int64))


def test_who_shares_a_call() -> None:
    samples = [[1] * length for length in (40, 9, 31, 29, 8, 40)]
    assert [b.lengths for b in make_batches(samples, max_tokens=160)] == [(40, 40, 31, 29), (9, 8)]
    assert [b.lengths for b in make_batches(samples, max_tokens=80)] == [(40, 40), (31, 29), (9, 8)]
    assert [b.lengths for b in make_batches([[1] * 40, [1] * 8], max_tokens=160)] == [(40, 8)], "32 of padding"
    assert [b.lengths for b in make_batches([[1] * 99, [1] * 8], max_tokens=200)] == [(99,), (8,)], "91 of padding"
    assert [b.lengths for b in make_batches([[1] * 99, [1] * 99], max_tokens=50)] == [(99,), (99,)], "one row at least"
    assert (call_tokens(28_672), call_tokens(14_336), call_tokens(64), call_tokens(100_000)) == (256, 512, 2048, 256)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([100, 256, 2048]))
def test_no_other_way_to_share_calls_costs_less(lengths: list[int], most: int) -> None:
    longest_first = sorted(lengths, reverse=True)

    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * group[0] + CALL_COST for group in groups)

    def cut(at: tuple[bool, ...]) -> list[list[int]]:
        groups = [[longest_first[0]]]
        for length, fresh in zip(longest_first[1:], at, strict=True):
            if fresh:
                groups.append([])
            groups[-1].append(length)
        return groups

    ways = [cut(at) for at in itertools.product([False, True], repeat=len(lengths) - 1)]
    allowed = [way for way in ways if all(len(g) == 1 or len(g) * g[0] <= most for g in way)]
    batches = make_batches([[1] * length for length in lengths], max_tokens=most)
    assert [list(b.lengths) for b in batches] in allowed
    assert cost([list(b.lengths) for b in batches]) == min(map(cost, allowed))
