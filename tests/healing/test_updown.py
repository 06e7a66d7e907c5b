"""Streamed gradients against autograd of the whole pruned model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamcollapse.errors import CheckpointError
from streamcollapse.forward import head
from streamcollapse.forward.batches import Batch, make_batches
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel
from streamcollapse.healing.objective import Judge
from streamcollapse.healing.teacher import Layers, states_above, teacher_states
from streamcollapse.healing.trained import Adapting, Trained, adapted, as_masters
from streamcollapse.healing.updown import Objective, Student
from streamcollapse.merge.plan import original_layers
from streamcollapse.run.opened import Job, open_job
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.locks import FileLease
from streamcollapse.storage.scratch import DiskScratch, Scratch
from streamcollapse.stream.loaders import MappedLoader
from streamcollapse.stream.weights import Limits, WeightStream
from tests.checkpoints import save_model
from tests.families import FAMILIES
from tests.in_memory import find_layers, mixed_model
from tests.streams import plain_stream

CPU = torch.device("cpu")
WORDS, LENGTHS = 40, (24, 24, 17, 24, 9)
GAIN = 3.0  # of random weights: with less, the original and the pruned model hardly differ
TURN = 4  # a step, which says what token is the first that counts
CUT = (2, 3)  # dropped of six layers
LAYERS = tuple(layer for layer in original_layers(6) if layer.base not in CUT)
HEALED = (
    "llama",
    "qwen 3, norms on q and k",
    "gemma 3, two rotary bases",
    "phi 3, packed projections",
    "gpt 2, learned positions, tied",
    "falcon, alibi",
    "mistral, sliding",
    "granite, multipliers",
    "olmo 2, norms after",
    "mixtral, experts",
    "opt, projected embedding",
)

UNTIED = ("llama", "phi 3, packed projections", "gpt neox, renamed head, parallel residual", "mixtral, experts")


def texts(seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, WORDS, (length,), generator=generator).tolist() for length in LENGTHS]


def opened(directory: Path) -> tuple[Job, StreamedModel]:
    job = open_job(directory, RunSettings(Compute("cpu", "float32")))
    return job, job.model(plain_stream(job))


def cut(original: PreTrainedModel) -> PreTrainedModel:
    pruned = mixed_model(original, [(layer.base, dict(layer.mix)) for layer in LAYERS])
    if kinds := getattr(pruned.config, "layer_types", None):
        pruned.config.layer_types = [kinds[layer.base] for layer in LAYERS]
    return pruned


def loss_in_memory(
    loss: str, pruned: PreTrainedModel, original: PreTrainedModel, temperature: float, some: slice = slice(None)
) -> torch.Tensor:
    """The mean over the tokens of all texts, or over ``some`` of each, each run alone."""
    total, count = torch.zeros(()), 0
    for text in texts():
        ids = torch.tensor([text])
        ours = pruned(ids, use_cache=False).logits[0]
        if loss == "nll":
            total = total + functional.cross_entropy(ours[:-1][some], ids[0, 1:][some], reduction="sum")
            count += len(text[:-1][some])
            continue
        with torch.no_grad():
            theirs = (original(ids, use_cache=False).logits[0] / temperature).softmax(-1)
        logs = theirs.log() - (ours / temperature).log_softmax(-1)
        total = total + temperature**2 * (theirs * logs)[some].sum()
        count += len(text[some])
    return total / count


def streamed(job: Job, model: StreamedModel, trained: Trained, judge: Judge, scratch: Scratch | None = None) -> float:
    """The loss, with gradients in the masters."""
    batches = make_batches(texts(), 64)
    scratch = scratch or Scratch()
    states = teacher_states(judge.teacher, batches, (scratch, "teacher"))
    places = [judge.places(batch, TURN) for batch in batches]
    tokens = sum(len(row) for rows in places for row in rows)
    student = Student(model, LAYERS, False, trained, scratch)

    def objective(b: int, left: torch.Tensor, gradient: bool) -> tuple[float, torch.Tensor | None]:
        return judge.loss_of(batches[b], places[b], left, states[b], tokens, gradient)

    found = student.gradients(batches, None, objective)
    assert student.losses(batches, None, objective) == pytest.approx(found, rel=1e-3)
    check_graphs(student, batches, objective, found)
    if student.lowest:
        check_frozen_layers(student, batches, objective, found)
    return found


def check_graphs(student: Student, batches: list[Batch], objective: Objective, loss: float) -> None:
    """Graphs that are kept instead of layers that are run again change no bit."""
    masters = student.trained.tensors
    gradients = {name: master.grad for name, master in masters.items()}
    for master in masters.values():
        master.grad = None
    assert replace(student, keeps_graphs=True).gradients(batches, None, objective) == loss
    for name, master in masters.items():
        assert torch.equal(master.grad, gradients[name]), name


def check_frozen_layers(student: Student, batches: list[Batch], objective: Objective, loss: float) -> None:
    """What the layers below the lowest that is trained make of the text can be kept: no bit is another."""
    masters = student.trained.tensors
    gradients = {name: master.grad for name, master in masters.items()}
    for master in masters.values():
        master.grad = None
    below = Layers(LAYERS[: student.lowest])
    entering = states_above(student.model, below, batches, (student.scratch, "entering"), 64)
    assert student.gradients(batches, entering, objective) == loss
    for name, master in masters.items():
        assert master.grad is not None
        assert torch.equal(master.grad, gradients[name]), name
    assert student.losses(batches, entering, objective) == student.losses(batches, None, objective)


def judge_of(job: Job, model: StreamedModel, loss: str = "kl", temperature: float = 1.0, every: int = 1) -> Judge:
    example = model.record(make_batches(texts(), 64)[:1])[0].hidden_NTD[0, :1]
    one = Head(model, model.head(), job.vocabulary, example)
    return Judge(loss, model, model, (one, one), job.vocabulary, temperature, every)


def whole(model: StreamedModel, position: int) -> dict[str, torch.Tensor]:
    """Every parameter of a layer that can be trained, as a master."""
    view = Student(model, LAYERS, False, Trained()).view()
    names = list(model.layout.stored_whole(LAYERS[position].base))
    with model.onload(view, position) as weights:
        return as_masters({name: weights.parameters[name].clone() for name in names}, names, torch.device("cpu"))


@pytest.mark.parametrize("family", HEALED)
def test_gradients_of_whole_layers_are_those_of_autograd(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=GAIN)
    job, model = opened(directory)
    trained = Trained(whole={position: whole(model, position) for position in (1, 2, 3)})
    loss = streamed(job, model, trained, judge_of(job, model))

    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pruned = cut(original)
    expected = loss_in_memory("kl", pruned, original, 1.0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3)
    for position in (1, 2, 3):
        parameters = dict(find_layers(pruned)[position].named_parameters())
        assert trained.whole[position]
        for name, master in trained.whole[position].items():
            wanted = parameters[name].grad
            assert wanted is not None
            assert float(wanted.abs().max()) > 0.0
            torch.testing.assert_close(master.grad, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-10, rtol=1e-4)


@pytest.mark.parametrize("loss", ["kl", "nll"])
@pytest.mark.parametrize(
    "family", ["llama", "phi 3, packed projections", "gpt neox, renamed head, parallel residual", "mixtral, experts"]
)
def test_gradients_of_norm_and_head_are_those_of_autograd(
    family: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head by a few words at a time."""
    monkeypatch.setattr(head, "PART_BYTES", 4 * 8 * 300)
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=GAIN)
    job, model = opened(directory)
    assert not job.architecture.layout.tied_head
    weights = {name: weight.clone() for name, weight in model.head().items()}
    trained = Trained(whole={3: whole(model, 3)}, head=as_masters(weights, list(weights), torch.device("cpu")))
    example = model.record(make_batches(texts(), 64)[:1])[0].hidden_NTD[0, :1]
    ours, theirs = (Head(model, one, job.vocabulary, example) for one in (weights, model.head()))
    judge = Judge(loss, model, model, (ours, theirs), job.vocabulary, learned=trained.head)
    with torch.no_grad():
        for master in trained.head.values():
            master *= 1.1
    judge.refresh()
    found = streamed(job, model, trained, judge)

    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pruned = cut(original)
    parameters = dict(pruned.named_parameters())
    with torch.no_grad():
        for name in trained.head:
            parameters[name] *= 1.1
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()  # with a head of its own
    expected = loss_in_memory(loss, pruned, original, 1.0)
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-3)
    assert len(trained.head) > 1, "a norm and a matrix"
    for name, master in trained.head.items():
        wanted = parameters[name].grad
        assert wanted is not None
        torch.testing.assert_close(master.grad, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-10, rtol=1e-4)


@pytest.mark.parametrize("family", HEALED)
def test_gradients_of_adapters_are_those_of_their_product(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=GAIN)
    job, model = opened(directory)
    trained = adapted(model, LAYERS, range(len(LAYERS)), Adapting(rank=3, alpha=6.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, master in trained.tensors.items():
            if name.endswith(".up"):
                master.copy_(0.02 * torch.randn(master.shape, generator=generator))
    loss = streamed(job, model, trained, judge_of(job, model, temperature=2.0))

    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pruned = cut(original)
    layers = find_layers(pruned)
    with torch.no_grad():
        for position in range(len(LAYERS)):
            for adapter in trained.adapters[position]:
                weight = layers[position].get_submodule(adapter.module).weight
                change = 2.0 * adapter.up @ adapter.down
                weight += (
                    change.T if type(layers[position].get_submodule(adapter.module)).__name__ == "Conv1D" else change
                )
    expected = loss_in_memory("kl", pruned, original, 2.0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    for position in range(len(LAYERS)):
        assert trained.adapters[position]
        for adapter in trained.adapters[position]:
            by_weight = layers[position].get_submodule(adapter.module).weight.grad
            by_weight = by_weight.T if adapter.is_transposed else by_weight
            down, up = 2.0 * adapter.up.detach().T @ by_weight, 2.0 * by_weight @ adapter.down.detach().T
            torch.testing.assert_close(adapter.down.grad, down, atol=1e-5 * float(down.abs().max()) + 1e-9, rtol=1e-3)
            torch.testing.assert_close(adapter.up.grad, up, atol=1e-5 * float(up.abs().max()) + 1e-9, rtol=1e-3)


@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_the_other_losses(loss: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    job, model = opened(directory)
    trained = Trained(whole={3: whole(model, 3)})
    found = streamed(job, model, trained, judge_of(job, model, loss))
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pruned = cut(original)
    if loss == "nll":
        expected = loss_in_memory("nll", pruned, original, 1.0)
    else:
        parts = []
        for text in texts():
            ours, theirs = (one.model(torch.tensor([text]), use_cache=False)[0][0] for one in (pruned, original))
            parts.append((ours - theirs.detach()).square().sum(-1) / theirs.detach().square().sum(-1))
        expected = torch.cat(parts).mean()
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-3)
    parameters = dict(find_layers(pruned)[3].named_parameters())
    for name, master in trained.whole[3].items():
        wanted = parameters[name].grad
        assert wanted is not None
        torch.testing.assert_close(master.grad, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-10, rtol=1e-4)


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_the_loss_of_one_in_three_tokens(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a few words at a time."""
    monkeypatch.setattr(head, "PART_BYTES", 4 * 8 * 300)
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    job, model = opened(directory)
    trained = Trained(whole={3: whole(model, 3)})
    found = streamed(job, model, trained, judge_of(job, model, loss, every=3))
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pruned = cut(original)
    expected = loss_in_memory(loss, pruned, original, 1.0, slice(TURN % 3, None, 3))
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-3)
    parameters = dict(find_layers(pruned)[3].named_parameters())
    for name, master in trained.whole[3].items():
        wanted = parameters[name].grad
        assert wanted is not None
        torch.testing.assert_close(master.grad, wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-10, rtol=1e-4)


def test_states_on_the_disk_change_no_bit(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    (tmp_path / "scratch").mkdir()
    found = []
    for scratch in (Scratch(), DiskScratch(tmp_path / "scratch")):
        job, model = opened(directory)
        trained = adapted(model, LAYERS, range(len(LAYERS)), Adapting(rank=2, alpha=2.0))
        streamed(job, model, trained, judge_of(job, model), scratch)
        found.append({name: master.grad for name, master in trained.tensors.items()})
    assert any((tmp_path / "scratch").iterdir())
    for name, gradient in found[0].items():
        assert gradient is not None
        assert torch.equal(gradient, found[1][name])


def test_a_file_that_is_about_to_change_is_seen_while_graphs_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN), RunSettings(Compute("cpu", "float32")))
    loader = MappedLoader(job.overlay, False)
    model = job.model(WeightStream(job.source, CPU, loader, job.meter, Limits(1)))
    trained = adapted(model, LAYERS, range(len(LAYERS)), Adapting(rank=2, alpha=2.0))
    student = Student(model, LAYERS, False, trained, keeps_graphs=True)
    batches = make_batches(texts(), 64)

    def objective(b: int, left: torch.Tensor, gradient: bool) -> tuple[float, torch.Tensor | None]:
        monkeypatch.setattr(FileLease, "is_wanted_back", lambda lease: True)  # after all layers are loaded
        return 0.0, torch.ones_like(left)

    with pytest.raises(CheckpointError, match="change"):
        student.gradients(batches, None, objective)


def test_the_batches_are_padded() -> None:
    batches: list[Batch] = make_batches(texts(), 64)
    assert any(len(set(batch.lengths)) > 1 for batch in batches)
