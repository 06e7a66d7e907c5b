"""A checkpoint written anew: as safetensors, in another precision, in shards of another size. Streamed, and without
looking at the model: any checkpoint will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcollapse.arch.refusals import refuse_packed
from streamcollapse.arch.stored import CONFIG_FILE, config_text, refuse_quantised, with_dtype
from streamcollapse.errors import ModelError, OptionError, printable
from streamcollapse.output.files import copy_files, every_file_beside
from streamcollapse.output.report import save_report, versions
from streamcollapse.progress import Listener, PhaseStarted, TensorWritten, silent
from streamcollapse.settings import COMPUTE_DTYPES, Output, Streaming
from streamcollapse.storage.cast import CastSource
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.hub import local_directory, local_path
from streamcollapse.storage.index import is_file, read_json
from streamcollapse.storage.locks import claimed
from streamcollapse.storage.source import TensorSource, bytes_by_dtype
from streamcollapse.storage.staging import check_output, lock_of, staged_directory
from streamcollapse.storage.writer import ShardPlan, check_space, disk_errors, plan_shards, write_shards
from streamcollapse.stream.budget import free_ram
from streamcollapse.stream.loaders import MappedLoader
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream

CONVERSION_FILE = "streamcollapse_conversion.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did, or would do: ``before`` and ``after`` map dtype to bytes. ``usage`` is empty if nothing was
    written."""

    source: str
    fingerprint: str
    out: str
    num_tensors: int
    before: dict[str, int]
    after: dict[str, int]
    shards: list[str]
    usage: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return {"format": "streamcollapse.conversion/1", "versions": versions(), **vars(self)}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
    dry_run: bool = False,
    listener: Listener = silent,
) -> Conversion:
    """Write the checkpoint ``source`` as safetensors into the new directory ``out``, with all its small files.

    ``dtype``: float32, bfloat16 or float16 for every floating-point tensor, None for what each is; a tensor whose dtype
    stays keeps its bytes. Memory: a few tensors. Raises StreamCollapseError; ``out`` then does not exist, or is the
    older directory that ``output.overwrite`` would have replaced.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; choose one of {', '.join(COMPUTE_DTYPES)}")
    check_output(Path(out), local_path(source), output.overwrite)
    checkpoint = Checkpoint(local_directory(source, listener))
    config = _config(checkpoint, dtype)
    target = _cast(checkpoint, dtype)
    shards = plan_shards(target, output.max_shard_bytes)
    check_space(Path(out), sum(shard.file_bytes for shard in shards))
    meter = Meter(CPU)
    if not dry_run:
        with claimed(lock_of(Path(out)), printable(out)), staged_directory(Path(out), output.overwrite) as stage:
            copy_files(every_file_beside(checkpoint.directory), checkpoint.directory, stage)
            if config is not None:
                with disk_errors(stage / CONFIG_FILE):
                    (stage / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
            with meter.phase("convert"):
                listener(PhaseStarted("convert", len(target.names)))
                _write(checkpoint, dtype, shards, stage, meter, listener)
            found = _described(source, out, checkpoint, target, shards, meter)
            save_report(found.to_json(), stage / CONVERSION_FILE)
            return found
    return _described(source, out, checkpoint, target, shards, meter)


def _described(
    source: str | Path,
    out: str | Path,
    checkpoint: Checkpoint,
    target: TensorSource,
    shards: Sequence[ShardPlan],
    meter: Meter,
) -> Conversion:
    return Conversion(
        source=str(source),
        fingerprint=checkpoint.fingerprint(),
        out=str(out),
        num_tensors=len(target.names),
        before=bytes_by_dtype(checkpoint),
        after=bytes_by_dtype(target),
        shards=[shard.file_name for shard in shards],
        usage=meter.summary() if meter.phases else {},
    )


def _config(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any] | None:
    """The config with ``dtype`` in it; None where it stays as it is. Raises ModelError for packed weights."""
    if dtype is None:
        return None
    refuse_packed(checkpoint)
    path = checkpoint.directory / CONFIG_FILE
    if not is_file(path):
        return None
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ModelError(f"{printable(path)}: not a JSON object; restore the checkpoint's config.json")
    refuse_quantised(printable(path), raw)
    return with_dtype(raw, dtype)


def _cast(source: TensorSource, dtype: str | None) -> TensorSource:
    return source if dtype is None else CastSource(source, getattr(torch, dtype))


def _write(
    checkpoint: Checkpoint,
    dtype: str | None,
    shards: Sequence[ShardPlan],
    stage: Path,
    meter: Meter,
    listener: Listener,
) -> None:
    loader = MappedLoader(checkpoint, from_cache=checkpoint.num_bytes > free_ram())
    stream = WeightStream(checkpoint, CPU, loader, meter, Streaming().prefetch)

    def written(name: str, num_bytes: int) -> None:
        meter.written(num_bytes)
        listener(TensorWritten(name, num_bytes))

    with stream.run([[name] for shard in shards for name in shard.names]) as weights:
        target = _cast(weights, dtype)
        write_shards(target, shards, stage, CPU, written, weights.step, check=_anything)


def _anything(name: str, tensor: torch.Tensor) -> None:
    """Weights are not looked at: masks with infinities in them are as good as any bytes."""
