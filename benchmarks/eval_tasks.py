"""Make tasks of lm-evaluation-harness from text that ships and that no search sees (real_models.held_out).

    python benchmarks/eval_tasks.py DIR [--count 100]

``continuation_KIND``: which of four pieces of a text goes on after a passage; the others are from elsewhere in the same
text. ``cloze_KIND``: the last word of a sentence or a line. ``count`` questions of each task and kind, the same for the
same count. Whether a model is any good shows in them only as far as a
guess shows it; they are made to compare sizes of one model, and to measure.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_models import held_out

GIVEN, ASKED, CHOICES = 40, 12, 4  # words of a passage and of what may follow; pieces that may
BEFORE = 300  # characters before a word that is to be found
SEED = 0
CONTINUATION = """task: continuation_{kind}
output_type: multiple_choice
doc_to_text: "{{{{given}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
CLOZE = """task: cloze_{kind}
output_type: loglikelihood
doc_to_text: "{{{{given}}}}"
doc_to_target: "{{{{word}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
SHARED = """test_split: test
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
metadata: {{version: 1}}
"""


def continuations(text: str, count: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    """Passages, each with four pieces that may follow."""
    words = [found.span() for found in re.finditer(r"\s*\S+", text)]
    starts = range(0, len(words) - GIVEN - ASKED, GIVEN + ASKED)

    def piece(first: int, length: int) -> str:
        return text[words[first][0] : words[first + length - 1][1]]

    for start in sorted(dice.sample(starts, min(count, len(starts)))):
        others = dice.sample([other for other in starts if other != start], CHOICES - 1)
        choices = [piece(one + GIVEN, ASKED) for one in (start, *others)]
        right = choices[0]
        dice.shuffle(choices)
        yield {"given": piece(start, GIVEN), "choices": choices, "answer": choices.index(right)}


def clozes(text: str, count: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    """Last words of sentences and lines, each to be found after the characters before it."""
    ends = [found.span(1) for found in re.finditer(r"(\s\w{3,})(?:\s?[.:]\s|\n)", text) if found.start() > BEFORE]
    for first, last in sorted(dice.sample(ends, min(count, len(ends)))):
        yield {"given": text[first - BEFORE : first], "word": text[first:last]}


def make_tasks(place: Path, count: int) -> list[str]:
    """Task files and their data in ``place``; the names of the tasks."""
    place.mkdir(parents=True, exist_ok=True)
    names = []
    for kind, text in held_out().items():
        dice = random.Random(SEED)
        for title, form, questions in (
            ("continuation", CONTINUATION, continuations(text, count, dice)),
            ("cloze", CLOZE, clozes(text, count, dice)),
        ):
            name, file = f"{title}_{kind}", (place / f"{title}_{kind}.jsonl").resolve()
            file.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
            (place / f"{name}.yaml").write_text(form.format(kind=kind) + SHARED.format(file=file), encoding="utf-8")
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="DIR")
    parser.add_argument("--count", type=int, default=100)
    given = parser.parse_args()
    print(",".join(make_tasks(given.place, given.count)))


if __name__ == "__main__":
    main()
