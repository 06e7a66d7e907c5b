from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from streamcollapse.errors import CalibrationError, OptionError
from streamcollapse.run.samples import load_samples, load_tokenizer, opening_tokens, samples_digest, tokenize
from streamcollapse.settings.run import Calibration


def test_the_samples_that_ship_with_the_package_have_names() -> None:
    samples = load_samples(Calibration("sentences"))
    assert len(samples) == 10
    assert all(sample.endswith(".") and sample[0].isupper() for sample in samples)
    passages = load_samples(Calibration("passages"))
    assert len(passages) == 24
    assert min(map(len, passages)) > 700
    assert len({passage[:100] for passage in passages}) == 24
    assert load_samples(Calibration(), "sentences") == samples
    assert load_samples(Calibration(), "passages") == passages


def test_the_passages_are_none_of_the_text_that_quality_is_measured_on(bundled: Path) -> None:
    text = (bundled.parent / "text" / "wiki_eval.txt").read_text(encoding="utf-8")
    scored = AutoTokenizer.from_pretrained(bundled)(text[:90_000], verbose=False)["input_ids"]
    assert len(scored) > 2 * 12_000, "more than benchmarks/quality.py scores"
    assert all(passage[:100] not in text[:90_000] for passage in load_samples(Calibration("passages")))


def test_text_files_have_a_sample_a_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_text("  one \n\ntwo\u2028still two\r\n", encoding="utf-8")
    assert load_samples(Calibration(path)) == ["one", "two\u2028still two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert load_samples(Calibration(tmp_path / "a.txt")) == load_samples(Calibration(tmp_path / "a.jsonl")) == ["one"]


def test_json_lines_keep_their_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo", "id": 1}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    assert load_samples(Calibration(str(path))) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no samples in it; write one sample a line"),
        ("a.txt", b" \n\n", "no samples"),
        ("a.jsonl", b"\n", "no samples"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}', "line 1: no text in it"),
        ("a.jsonl", b'["x"]', "line 1: no text"),
        ("a.jsonl", b'{"text": " "}', "line 1: no text"),
        ("a.JSONL", b'{"text": "\\ud800"}', "line 1: the text has half a surrogate pair"),
        ("a.json", b'[{"text": "x"}]', "give .txt with a sample a line, or .jsonl"),
        ("a.txt", b"\xef\xbb\xbf", "no samples"),
        (None, b"", "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_samples(Calibration(path))


def test_special_tokens_are_the_tokenizer_s_and_samples_are_cut(bundled: Path) -> None:
    tokenizer = load_tokenizer(bundled, trust_remote_code=False)
    (whole,) = tokenize(tokenizer, ["The city was founded."], 512, 4096)
    assert whole[0] == tokenizer.bos_token_id == 0
    assert whole == AutoTokenizer.from_pretrained(bundled)("The city was founded.")["input_ids"]
    assert tokenize(tokenizer, ["The city was founded."], 3, 4096) == [whole[:3]]
    assert opening_tokens(tokenizer) == [0]


def test_tokens_that_the_model_does_not_know(bundled: Path) -> None:
    tokenizer = load_tokenizer(bundled, trust_remote_code=False)
    with pytest.raises(CalibrationError, match="the model's vocabulary has 5; tokenizer and weights do not belong"):
        tokenize(tokenizer, ["The city was founded."], 512, 5)


def test_a_sample_without_tokens() -> None:
    class NoSpecialTokens:
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text.strip()]}

    with pytest.raises(CalibrationError, match="sample 2 has no tokens"):
        tokenize(NoSpecialTokens(), ["a", " "], 512, 4096)
    assert opening_tokens(NoSpecialTokens()) == []


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert "\n" not in str(caught.value)


def test_the_digest_names_the_tokens() -> None:
    assert samples_digest([[1, 2], [3]]) != samples_digest([[1], [2, 3]])
    assert samples_digest([[1, 2], [3]]) == samples_digest([(1, 2), (3,)])


def test_settings_out_of_range() -> None:
    with pytest.raises(OptionError, match="max tokens is 0"):
        Calibration(max_tokens=0)


def test_samples_of_rows_conversations_patterns_and_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "org" / "name"
    place.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(200)]}), place / "train.parquet")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    talks = SimpleNamespace(apply_chat_template=lambda messages, tokenize: f"<user>{messages[0]['content']}")
    assert load_samples(Calibration("*.*"), tokenizer=talks) == ["one", "two", "<user>Why?"]
    assert len(load_samples(Calibration(place / "train.parquet"))) == 200
    assert load_samples(Calibration("hub:org/name")) == [f"row {n}" for n in range(128)]
