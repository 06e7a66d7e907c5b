"""Steps of healing against the same steps by peft in memory; and going on from what was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from streamcollapse.forward.batches import make_batches
from streamcollapse.healing.learn import Lesson, Progress, Schedule, State, Watch, learn, order
from streamcollapse.healing.objective import Judge
from streamcollapse.healing.teacher import teacher_states
from streamcollapse.healing.trained import Adapting, Trained, adapted, step_unit
from streamcollapse.healing.updown import Student
from streamcollapse.storage.scratch import Scratch
from tests.checkpoints import save_model
from tests.families import FAMILIES
from tests.healing.test_updown import GAIN, LAYERS, WORDS, cut, judge_of, opened, whole

RANK, ALPHA = 3, 6.0
SCHEDULE = Schedule(steps=10, rate=3e-3, warm_up=3, clip=0.01, every=4)
A_STEP = 2  # texts
COUNT = 8
LENGTH = 24


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, WORDS, (LENGTH,), generator=generator).tolist() for _ in range(COUNT)]


def parts(directory: Path) -> tuple[Student, Judge, Lesson]:
    """Adapters on a pruned model; the last two texts are held out."""
    job, model = opened(directory)
    batches = make_batches(texts(), A_STEP * LENGTH)
    states = teacher_states(model, batches, (Scratch(), "teacher"))
    trained = adapted(model, LAYERS, range(len(LAYERS)), Adapting(RANK, ALPHA))
    lesson = Lesson(batches, states, [[n] for n in range(len(batches) - 1)], [len(batches) - 1])
    return Student(model, LAYERS, False, trained), judge_of(job, model), lesson


def watch(save: Callable[[Progress, State], None] = lambda progress, masters: None) -> Watch:
    return Watch(lambda progress: None, save)


def by_peft(directory: Path, trained: Trained, lesson: Lesson) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Every adapter after the steps of SCHEDULE, and the losses."""
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", lora_dropout=0.0)
    pruned = get_peft_model(cut(original), config).eval()
    masters = {
        name.split("layers.")[-1].split("h.")[-1]: parameter
        for name, parameter in pruned.named_parameters()
        if "lora" in name
    }
    with torch.no_grad():
        for position, adapters in trained.adapters.items():
            for adapter in adapters:
                masters[f"{position}.{adapter.module}.lora_A.default.weight"].copy_(adapter.down)
    ours = [parameter for parameter in pruned.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(ours, lr=SCHEDULE.rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(SCHEDULE.steps):
        ids = lesson.batches[lesson.steps[order(step, len(lesson.steps))][0]].input_ids_NT
        with torch.no_grad():
            theirs = original(ids, use_cache=False).logits.log_softmax(-1)
        logs = pruned(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        loss = (theirs.exp() * (theirs - logs)).sum() / ids.numel()
        adam.param_groups[0]["lr"] = SCHEDULE.rate_at(step)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours, SCHEDULE.clip)
        adam.step()
        losses.append(loss.item())
    named = {
        name.replace("lora_A.default.weight", "down").replace("lora_B.default.weight", "up"): value.detach()
        for name, value in masters.items()
    }
    return named, losses


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt 2, learned positions, tied"])
def test_ten_steps_are_those_of_peft(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=GAIN)
    student, judge, lesson = parts(directory)
    expected, losses = by_peft(directory, student.trained, lesson)
    last: list[State] = []
    progress = learn(student, judge, lesson, SCHEDULE, Progress(), watch(lambda p, masters: last.append({**masters})))
    assert progress.losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    assert last[-1].keys() == expected.keys()
    for name, master in last[-1].items():
        torch.testing.assert_close(master, expected[name], atol=1e-5, rtol=1e-3)
    assert [*progress.judged] == [0, 4, 8, 10]
    best = min(progress.judged.values())
    assert progress.best_loss == best
    assert student.losses([lesson.batches[-1]], None, _alone(judge, lesson)) == pytest.approx(best, rel=1e-6)


def _alone(judge: Judge, lesson: Lesson) -> Callable[[int, torch.Tensor, bool], tuple[float, torch.Tensor | None]]:
    batch, states = lesson.batches[-1], lesson.teacher
    assert states is not None
    places = judge.places(batch, 0)
    tokens = sum(map(len, places))
    return lambda b, left, gradient: judge.loss_of(batch, places, left, states[-1], tokens, gradient)


def test_what_goes_on_from_what_was_saved_ends_in_the_same_bytes(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    saved: dict[int, tuple[Progress, State]] = {}

    def save(progress: Progress, masters: State) -> None:
        copied = {name: tensor.clone() for name, tensor in progress.moments.items()}
        kept = replace(progress, moments=copied, losses=[*progress.losses], judged={**progress.judged})
        saved[progress.step] = kept, {name: master.clone() for name, master in masters.items()}

    student, judge, lesson = parts(directory)
    whole = learn(student, judge, lesson, SCHEDULE, Progress(), watch(save))
    for step in (3, 4):
        again, judge, lesson = parts(directory)
        progress, masters = saved[step]
        again.trained.put(masters)
        found = learn(again, judge, lesson, SCHEDULE, replace(progress, losses=[*progress.losses]), watch())
        assert (found.losses, found.judged, found.best_step) == (whole.losses, whole.judged, whole.best_step)
        for name, master in again.trained.tensors.items():
            assert torch.equal(master, student.trained.tensors[name])


def test_it_stops_where_it_gets_no_better(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    student, judge, lesson = parts(directory)
    schedule = replace(SCHEDULE, rate=3.0, clip=1e9, every=1, patience=2)  # far too fast
    progress = learn(student, judge, lesson, schedule, Progress(), watch())
    assert progress.best_step == 0
    assert (progress.step, progress.stopped) == (2, "no better for 2 judgements")
    assert all(
        float(master.detach().abs().max()) == 0.0 for n, master in student.trained.tensors.items() if n[-3:] == ".up"
    )


def test_it_stops_with_the_best_where_a_loss_is_not_finite(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN)
    student, judge, lesson = parts(directory)
    assert lesson.teacher is not None
    with torch.inference_mode():
        for number in lesson.steps[order(2, len(lesson.steps))]:
            lesson.teacher[number].fill_(float("nan"))
    progress = learn(student, judge, lesson, SCHEDULE, Progress(), watch())
    assert (progress.step, progress.stopped) == (2, "the loss of step 3 is not finite")
    assert progress.best_step == 0
    assert all(bool(torch.isfinite(master).all()) for master in student.trained.tensors.values())


def test_whole_tensors_step_in_units_of_their_size(tmp_path: Path) -> None:
    """Adam's first step moves each number by the learning rate: here a hundredth of its tensor's root mean square."""
    student, judge, lesson = parts(save_model(FAMILIES["llama"](), tmp_path / "m", gain=GAIN))
    trained = Trained(whole={1: whole(student.model, 1)})
    before = {name: master.detach().clone() for name, master in trained.tensors.items()}
    after: State = {}
    once = Schedule(steps=1, rate=0.01, warm_up=1, clip=1e9, every=1)
    keep = watch(lambda progress, masters: after.update({name: m.clone() for name, m in masters.items()}))
    learn(replace(student, trained=trained), judge, lesson, once, Progress(), keep)
    assert before.keys() == after.keys()
    for name, was in before.items():
        moved = (after[name] - was).abs().max()
        assert float(moved) == pytest.approx(0.01 * float(was.square().mean().sqrt()), rel=0.02), name


def largest_singular_value(matrix: torch.Tensor) -> float:
    """By power iteration: within a few percent, from below."""
    vector = torch.ones(matrix.shape[1])
    for _ in range(40):
        vector = matrix.T @ (matrix @ vector)
        vector /= vector.norm()
    return float((matrix @ vector).norm())


def test_wide_matrices_are_stepped_by_less() -> None:
    """A step in which all numbers agree is no larger a part of a wide matrix than of the widest that steps in full."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for rows, columns in ((1536, 576), (4096, 1536)):
        matrix = 0.02 * torch.randn(rows, columns, generator=generator)
        step = torch.full_like(matrix, step_unit(matrix))
        parts[rows] = largest_singular_value(step) / largest_singular_value(matrix)
    assert step_unit(torch.full((1536, 576), 0.02)) == pytest.approx(0.02), "in full"
    assert parts[4096] == pytest.approx(parts[1536], rel=0.05)
    assert step_unit(torch.full((9000,), 3.0)) == pytest.approx(3.0), "no matrix"
    assert 0 < step_unit(torch.zeros(8, 8)) < 1e-3, "so that zeros can be learned from"
