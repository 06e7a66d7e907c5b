"""What every result file says of where and when it was measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions and hardware; a CUDA device by name, or that there was none."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not every torch tells
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": capabilities().get("cpu_name"),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not measured: no CUDA device",
    }


def report(name: str, body: dict[str, Any], save: Path | None, threads: int | None = None) -> None:
    """Print the document as the last line of stdout, and write it to ``save`` if there is one."""
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(threads),
        **body,
    }
    if save:
        save.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
