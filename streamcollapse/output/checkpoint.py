"""A pruned checkpoint directory, whole: shards, index, config, companion files, plan, report, card."""

from collections.abc import Callable, Collection
from pathlib import Path

from streamcollapse.arch.architecture import Architecture, check_likeness
from streamcollapse.arch.config import ModelConfig, load_config, pruned_config
from streamcollapse.arch.layout import build_layout
from streamcollapse.arch.skeleton import build_skeleton
from streamcollapse.arch.stored import config_text
from streamcollapse.errors import ModelError
from streamcollapse.merge.plan import PLAN_FILE, Plan
from streamcollapse.merge.view import MergedView
from streamcollapse.output.card import model_card
from streamcollapse.output.files import companion_files, copy_files
from streamcollapse.output.report import Report, save_report
from streamcollapse.progress import Listener, StepDone
from streamcollapse.storage.disk import write_whole
from streamcollapse.storage.index import CONFIG_FILE
from streamcollapse.storage.writer import ShardPlan, Writing, write_shards
from streamcollapse.stream.weights import WeightStream

REPORT_FILE = "streamcollapse_report.json"


def write_weights(
    view: MergedView,
    stream: WeightStream,
    shards: list[ShardPlan],
    stage: Path,
    listener: Listener,
    skip: Collection[str] = (),
    on_shard: Callable[[str, str], None] = lambda name, sha256: None,
) -> None:
    """Write ``shards`` of ``view`` into ``stage`` with weights from ``stream``, counting bytes.

    Those in ``skip`` are there already; ``on_shard`` is told each that has been finished, and its sha256. Raises
    OutputError, NonFiniteError, CheckpointError.
    """

    def written(name: str, num_bytes: int) -> None:
        stream.meter.written(num_bytes)
        listener(StepDone(name, num_bytes))

    left = [shard for shard in shards if shard.file_name not in skip]
    with stream.run([view.sources_of(name) for shard in left for name in shard.names]) as weights_pass:
        source = view.over(weights_pass)
        writing = Writing(written, on_shard, weights_pass.step, skip=skip)
        write_shards(source, shards, stage, stream.device, writing)


def write_config(stage: Path, source_directory: Path, config: ModelConfig, plan: Plan, with_code: bool) -> None:
    """Write the pruned config and copy tokenizer, licence and (``with_code``) Python files. Raises OutputError."""
    copy_files(companion_files(source_directory, with_code), source_directory, stage)
    write_whole(stage / CONFIG_FILE, config_text(pruned_config(config, [layer.base for layer in plan.layers])))


def check_loadable(stage: Path, view: MergedView, source: Architecture, trust_remote_code: bool) -> None:
    """Raise ModelError unless the model of the config in ``stage`` has the names and shapes of ``view``, and layers
    like those of ``source`` that they are made of."""
    try:
        config = load_config(stage, trust_remote_code)
        skeleton = build_skeleton(config, source.weights_dtype, trust_remote_code)
        build_layout(skeleton, view)
        check_likeness(source.skeleton, skeleton, [layer.base for layer in view.layers])
    except ModelError as error:
        raise ModelError(f"the pruned model could not be loaded again: {error}") from error


def write_companions(stage: Path, source_directory: Path, plan: Plan, report: Report) -> None:
    """Write plan, report and model card into ``stage``. Raises OutputError."""
    plan.save(stage / PLAN_FILE)
    save_report(report, stage / REPORT_FILE)
    write_whole(stage / "README.md", model_card(plan, report, source_directory / "README.md"))
