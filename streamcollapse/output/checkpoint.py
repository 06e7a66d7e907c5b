"""A pruned checkpoint directory, whole: shards, index, config, companion files, plan, report, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamcollapse.arch.config import CONFIG_FILE, ModelConfig, config_text, load_config, pruned_config
from streamcollapse.arch.layout import build_layout
from streamcollapse.arch.skeleton import build_skeleton
from streamcollapse.errors import ModelError
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.view import MergedView
from streamcollapse.output.card import model_card
from streamcollapse.output.files import companion_files, copy_files
from streamcollapse.output.report import save_report
from streamcollapse.progress import Listener, TensorWritten
from streamcollapse.storage.source import TensorSource
from streamcollapse.storage.writer import ShardPlan, disk_errors, write_shards
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream

PLAN_FILE = "streamcollapse_plan.json"
REPORT_FILE = "streamcollapse_report.json"


def write_weights(
    view: MergedView, stream: WeightStream, shards: list[ShardPlan], stage: Path, meter: Meter, listener: Listener
) -> None:
    """Write ``shards`` of ``view`` into ``stage`` with weights from ``stream``, counting bytes.

    Raises OutputError, NonFiniteError, CheckpointError.
    """

    def written(name: str, num_bytes: int) -> None:
        meter.written(num_bytes)
        listener(TensorWritten(name, num_bytes))

    steps = [view.sources_of(name) for shard in shards for name in shard.names]
    with stream.run(steps) as weights_pass:
        write_shards(view.over(weights_pass), shards, stage, stream.device, written, weights_pass.step)


def write_config(stage: Path, source_directory: Path, config: ModelConfig, plan: Plan, with_code: bool) -> None:
    """Write the pruned config and copy tokenizer, licence and (``with_code``) Python files. Raises OutputError."""
    copy_files(companion_files(source_directory, with_code), stage)
    text = config_text(pruned_config(config, [layer.base for layer in plan.layers]))
    with disk_errors(stage / CONFIG_FILE):
        (stage / CONFIG_FILE).write_text(text, encoding="utf-8")


def check_loadable(stage: Path, view: TensorSource, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Raise ModelError unless the model of the config in ``stage`` has the names and shapes of ``view``.

    It has not where the kind of a layer follows from its position by a rule that the config cannot say otherwise.
    """
    try:
        config = load_config(stage, trust_remote_code)
        build_layout(build_skeleton(config, dtype, trust_remote_code), view)
    except ModelError as error:
        raise ModelError(f"the pruned model could not be loaded again: {error}") from error


def write_companions(stage: Path, source_directory: Path, plan: Plan, report: dict[str, Any]) -> None:
    """Write plan, report and model card into ``stage``. Raises OutputError."""
    plan.save(stage / PLAN_FILE)
    save_report(report, stage / REPORT_FILE)
    with disk_errors(stage / "README.md"):
        (stage / "README.md").write_text(model_card(plan, report, source_directory / "README.md"), encoding="utf-8")
