"""What names and config say of a model is what its code says, or nothing (of each family: tests/test_families.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from streamcollapse import inspect
from streamcollapse.arch.survey import survey
from streamcollapse.errors import StreamCollapseError
from streamcollapse.storage.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 7}, "a layer beyond the 7"),
        ({"num_hidden_layers": 9}, "is missing"),
        ({"hidden_size": 64}, "has shape"),
        ({"vocab_size": 100}, "has shape"),
        ({"model_type": "no_such_model"}, "transformers cannot read it"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "own"}, "`trust_remote_code`"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"architectures": None}, None),
        ({"tie_word_embeddings": None}, None),
    ],
)
def test_what_is_not_as_usual_is_asked_of_the_model(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(llama, directory)
    config = json.loads((directory / "config.json").read_text())
    assert survey(Checkpoint(directory)) is not None
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    assert survey(Checkpoint(directory)) is None
    if message is None:
        assert inspect(directory).num_layers == 8
    else:
        with pytest.raises(StreamCollapseError, match=message):
            inspect(directory)
