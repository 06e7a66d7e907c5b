from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import llama_config, save_model

SENTENCES = "\n".join(f"Sentence number {n} says that the river {n} flows into the sea." for n in range(60)) + "\n"


@pytest.fixture(scope="session")
def made_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that take about a second to search, and one that is damaged."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        config = llama_config(16, hidden_size=128, intermediate_size=256)
        save_model(config, root / f"m{seed}", seed=seed, gain=2.0)
    shutil.copytree(root / "m0", root / "broken")
    (root / "broken" / "model.safetensors").write_bytes(b"not a checkpoint")
    return root


@pytest.fixture
def base(tmp_path: Path, made_models: Path) -> Path:
    """A directory with the models and calibration samples."""
    shutil.copytree(made_models, tmp_path / "models")
    (tmp_path / "samples.txt").write_text(SENTENCES)
    return tmp_path


def write_jobs(base: Path, jobs: list[dict[str, object]], **common: object) -> Path:
    path = base / "jobs.yaml"
    document = {"out": "out", "calibration": "samples.txt", "compute_dtype": "float32", **common, "jobs": jobs}
    path.write_text(yaml.safe_dump(document))
    return path
