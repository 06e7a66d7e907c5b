"""Fixtures: checkpoints made in code, the bundled model, and the switch for tests that need a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it, before torch is imported

import signal
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.checkpoints import BUNDLED, save_llama

logging.disable_progress_bar()

# Programs that tests send signals to inherit what this one ignores, as a job in the background or under nohup does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def bundled() -> Path:
    return BUNDLED


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers in float32, in one file. Never written to."""
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers in bfloat16, in several shards. Never written to."""
    out = tmp_path_factory.mktemp("llama_bf16") / "model"
    return save_llama(out, dtype=torch.bfloat16, max_shard_size="300KB")


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is about how well a probe measures."""
    monkeypatch.setattr("streamcollapse.run.timing.LEAST_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def _short_verdicts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts on a few tokens: hundreds of tests make results, and few of them are about verdicts."""
    if not request.module.__name__.endswith("test_held_out"):
        monkeypatch.setattr("streamcollapse.run.held_out.held_out_tokens", lambda vocabulary: 64)
