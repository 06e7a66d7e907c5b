"""The Hub through the real client, against a small Hub of our own: what is fetched, and what is said when it cannot
be."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamcollapse import Compute, SearchOptions, convert, inspect, prune
from streamcollapse.errors import CheckpointError
from streamcollapse.progress import Event, PhaseStarted, StepDone, silent
from streamcollapse.settings.run import RunSettings
from streamcollapse.storage.hub import is_hub_id, local_directory
from tests.checkpoints import save_llama
from tests.formats import as_torch
from tests.hub import COMMIT, Hub, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning")  # the client keeps its connections


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub" / "org").mkdir(parents=True)
    with serve(tmp_path / "hub") as running:
        point_at(monkeypatch, running.url, tmp_path / "cache")
        yield running


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)


def repository(hub: Hub, name: str = "org/small", shard_size: str = "5GB") -> Path:
    directory = save_llama(hub.root / name, num_layers=4, max_shard_size=shard_size)
    for beside in ("README.md", "LICENSE", "own_code.py", ".gitattributes", "flax_model.msgpack", "model.gguf"):
        (directory / beside).write_text(f"this is {beside}")
    (directory / "original").mkdir()
    (directory / "original" / "consolidated.00.pth").write_text("large")
    return directory


def test_only_what_is_needed_is_fetched(hub: Hub) -> None:
    source = repository(hub, shard_size="40kB")
    (source / "pytorch_model.bin").write_text("the same weights once more")
    (source / "spare.safetensors").write_text("not in the index")
    events: list[Event] = []
    found = local_directory("org/small", events.append)
    assert found.name == COMMIT
    fetched = {p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file()}
    shards = {p.name for p in source.glob("model-*.safetensors")}
    assert len(shards) > 2
    small = {"README.md", "LICENSE", "own_code.py", "config.json", "generation_config.json"}
    assert fetched == shards | small | {"model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    assert hub.fetched() == fetched
    assert events[0] == PhaseStarted("fetch", len(fetched))
    sizes = {e.name: e.num_bytes for e in events if isinstance(e, StepDone)}
    assert sizes == {name: (source / name).stat().st_size for name in fetched}
    hub.requests.clear()
    assert local_directory("org/small@main", silent) == found
    assert not hub.fetched(), "all of it is in the cache"


def test_pytorch_files_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    as_torch(save_llama(tmp_path / "safe", num_layers=2), hub.root / "org" / "old", shards=2)
    found = local_directory("org/old", silent)
    assert sorted(p.name for p in found.glob("*.bin*")) == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]


def test_the_verbs_take_an_id(hub: Hub, tmp_path: Path) -> None:
    source = repository(hub)
    options, compute = SearchOptions(layers_per_merge=2, threshold=-1.0), Compute("cpu", "float32")
    remote = prune("org/small@v1", tmp_path / "a", options, settings=RunSettings(compute=compute))
    local = prune(source, tmp_path / "b", options, settings=RunSettings(compute=compute))
    assert remote.plan.source_name == "org/small"
    assert remote.plan.layers == local.plan.layers
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert "base_model: org/small" in (tmp_path / "a" / "README.md").read_text()
    assert not (tmp_path / "a" / "own_code.py").exists()
    assert inspect("org/small").num_layers == 4
    convert("org/small", tmp_path / "c")
    assert (tmp_path / "c" / "own_code.py").is_file()


def test_what_the_hub_says_no_to(hub: Hub) -> None:
    repository(hub)
    hub.gated.add("org/closed")
    (hub.root / "org" / "gguf").mkdir()
    (hub.root / "org" / "gguf" / "model.gguf").write_text("")
    for source, complaint in {
        "org/none": "neither a directory here nor a model on the Hub",
        "org/small@v9": "the Hub has no such revision of org/small",
        "org/closed": "accept the model's terms on the Hub",
        "org/gguf": "a GGUF file",
    }.items():
        with pytest.raises(CheckpointError, match=complaint):
            local_directory(source, silent)


def test_without_a_connection_the_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub)
    found = local_directory("org/small", silent)
    assert local_directory("org/small@v1", silent) == found
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert local_directory("org/small", silent) == found
    assert local_directory(f"org/small@{COMMIT}", silent) == found
    with pytest.raises(CheckpointError, match=r"org/other: no directory here, .* the Hub cannot be reached"):
        local_directory("org/other", silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_directory("org/small", silent) == found
    with pytest.raises(CheckpointError, match=r"org/other: no directory here, .* offline mode is on"):
        local_directory("org/other", silent)
    (found / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"org/small: the Hub's cache lacks model\.safetensors"):
        local_directory("org/small", silent)


def test_a_directory_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub)
    shutil.copytree(hub.root / "org" / "small", tmp_path / "here" / "org" / "small")
    monkeypatch.chdir(tmp_path / "here")
    assert local_directory("org/small", silent) == Path("org/small")
    assert not hub.requests


@pytest.mark.parametrize(
    ("source", "on_the_hub"),
    [
        ("org/name", True),
        ("org/name@refs/pr/3", True),
        ("meta-llama/Llama-2-7b-hf", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("a/b/c", False),
        ("../name", False),
        ("org/", False),
        ("org/name@", False),
        ("örg/name", False),
        ("org/name\n", False),
    ],
)
def test_what_is_an_id(source: str, on_the_hub: bool) -> None:
    assert is_hub_id(source) is on_the_hub


def test_the_command_line(hub: Hub, tmp_path: Path) -> None:
    repository(hub)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "streamcollapse", "inspect", "org/small", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert json.loads(done.stdout)["num_layers"] == 4
    command[-2] = "org/none"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = json.loads(done.stdout)["error"]["message"]
    assert message.startswith("org/none: neither a directory here nor a model on the Hub")
    command.remove("--json")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: org/none: neither a directory here nor a model on the Hub")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_not_a_missing_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamcollapse.storage.hub.hf_hub_download", full)
    with pytest.raises(CheckpointError, match="cannot be fetched into the Hub's cache: No space left on device"):
        local_directory("org/small", silent)
