"""Documents of files and patterns: each kind of file, and what is wrong with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from streamcollapse.errors import CalibrationError
from streamcollapse.run.text_names import absolute, matching, short
from streamcollapse.run.texts import documents


class Chat:
    """A tokenizer with a template that refuses a conversation that begins with an answer."""

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] != "user":
            raise ValueError("begin with a question")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    write_lines(tmp_path / "b.jsonl", [{"text": "three", "more": 1}, {"messages": TALK}])
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["four", "five"]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"messages": [TALK]}), tmp_path / "d.parquet")
    assert documents(tmp_path / "a.txt", Chat()) == ["one\n\ntwo"]
    everything = ["one\n\ntwo", "three", "<user>Why?<assistant>So.", "four", "five", "<user>Why?<assistant>So."]
    assert documents(f"{tmp_path}/*", Chat()) == everything


def test_patterns_go_into_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["deep/er/z.txt", "deep/y.txt", "x.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    assert sorted(documents(f"{tmp_path}/**/*.txt", Chat())) == sorted(names)
    monkeypatch.chdir(tmp_path)
    assert documents("deep/*.txt", Chat()) == ["deep/y.txt"]
    odd = tmp_path / "what[1].txt"
    odd.write_text("odd")
    assert matching(odd) == [odd], "a name that is there is no pattern"


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", "  \n", "no text in it"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', "line 2: no text in it"),
        ("a.jsonl", '{"text": " "}', "line 1: no text in it"),
        ("a.jsonl", "[1]", "line 1: no text in it"),
        ("a.jsonl", '{"text": "a\\ud800"}', "half a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: the chat template .*begin with"),
        ("a.parquet", b"PAR1 is not all of it", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(name: str, contents: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8", "surrogatepass"))
    with pytest.raises(CalibrationError, match=message) as error:
        documents(path, Chat())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_without_text_says_what_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(CalibrationError, match="no column text or messages in it, only id, body"):
        documents(tmp_path / "t.parquet", Chat())


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        documents(tmp_path / "no.txt", Chat())
    with pytest.raises(CalibrationError, match="no file matches it"):
        documents(f"{tmp_path}/*.txt", Chat())


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a directory of that name for the dataset, which spares the network."""
    place, talk = tmp_path / "org" / "name", tmp_path / "org" / "talk"
    place.mkdir(parents=True)
    talk.mkdir()
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "other": ["x", "y"]}), place / "train.parquet")
    parquet.write_table(pyarrow.table({"messages": [TALK]}), talk / "test.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert documents("hub:org/name", Chat()) == ["one", "two"]
    assert documents("hub:org/name:train:other", Chat()) == ["x", "y"]
    assert documents("hub:org/talk:test", Chat()) == ["<user>Why?<assistant>So."]
    for name, message in (
        ("hub:org/name:train:none", r"^hub:org/name:train:none, row 1: no column none in it, only text, other"),
        ("hub:org/name:dev", r"^hub:org/name:dev: cannot be read: Bad split: dev"),
        ("hub:name", "give hub:org/name"),
        ("hub:org/name:a:b:c", "give hub:org/name"),
    ):
        with pytest.raises(CalibrationError, match=message):
            documents(name, Chat())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"takes datasets: pip install 'streamcollapse\[datasets\]'$"):
        documents("hub:org/name", Chat())


def test_names_of_texts() -> None:
    assert (short("a/b.txt"), short("hub:org/name:test")) == ("b.txt", "hub:org/name:test")
    assert absolute("hub:org/name") == "hub:org/name"
    assert absolute("a.txt") == str(Path.cwd() / "a.txt")
