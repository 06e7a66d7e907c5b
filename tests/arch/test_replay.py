from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse.arch import skeleton as replay
from streamcollapse.arch.architecture import load_architecture
from streamcollapse.arch.skeleton import DecoderStack, LayerCall
from streamcollapse.errors import ModelError
from streamcollapse.storage.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.AcceleratorError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), RuntimeError),
        (RuntimeError("shapes do not match"), ModelError),
    ],
)
def test_what_a_device_reports_is_not_taken_for_a_fault_of_the_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, kind: type[Exception]
) -> None:
    def fail(*call: Any) -> Any:
        raise error

    stack = DecoderStack(load_architecture(Checkpoint(llama)).skeleton)
    monkeypatch.setattr(replay.Substitute, "holding", fail)
    with pytest.raises(kind):
        stack.run(0, {}, torch.zeros(1, 2, 32), LayerCall((), {}, False))
    with pytest.raises(kind):
        stack.record({}, torch.zeros(1, 2, dtype=torch.int64))
