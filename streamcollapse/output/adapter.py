"""Low-rank adapters as a file of their own, in peft's format, for the checkpoint that was healed."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from streamcollapse.healing.trained import Trained
from streamcollapse.run.opened import Job
from streamcollapse.settings.heal import Healing
from streamcollapse.storage.disk import disk_errors, write_whole

ADAPTER = "adapter"  # the directory in that of the healed checkpoint


def write_adapter(directory: Path, trained: Trained, job: Job, healing: Healing) -> None:
    """Write the adapters of ``trained`` into the new ``directory``; they belong on the checkpoint of ``job``, not on
    the healed one, which has them in its weights. Raises OutputError."""
    prefix = f"base_model.model.{job.architecture.skeleton.layers_path}"
    tensors, modules, transposed = {}, set[str](), False
    for position, adapters in trained.adapters.items():
        for adapter in adapters:
            name = f"{prefix}.{position}.{adapter.module}"
            tensors[f"{name}.lora_A.weight"] = adapter.down.detach().cpu().contiguous()
            tensors[f"{name}.lora_B.weight"] = adapter.up.detach().cpu().contiguous()
            modules.add(f"{position}.{adapter.module}")
            transposed = transposed or adapter.is_transposed
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(job.checkpoint.directory),
        "r": healing.rank,
        "lora_alpha": healing.scale_numerator,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    with disk_errors(directory):
        directory.mkdir()
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    write_whole(directory / "adapter_config.json", json.dumps(config, indent=1) + "\n")
