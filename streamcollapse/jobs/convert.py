"""A checkpoint written anew: as safetensors, in another precision, in shards of another size. Streamed, and without
looking at the model: any checkpoint will do."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamcollapse.arch.stored import config_text, refuse_packed, refuse_quantised, with_dtype
from streamcollapse.errors import ModelError, OptionError
from streamcollapse.output.files import copy_files, every_file_beside
from streamcollapse.output.report import save_report, versions
from streamcollapse.progress import Listener, PhaseStarted, StepDone, silent
from streamcollapse.resources.budget import free_ram
from streamcollapse.resources.meter import Meter, Usage
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.run.request import Request, output_work
from streamcollapse.run.work_directory import FORMAT
from streamcollapse.settings.declared import unknown
from streamcollapse.settings.run import COMPUTE_DTYPES, Output, RunSettings, Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import check_space, write_whole
from streamcollapse.storage.hub import local_directory
from streamcollapse.storage.index import CONFIG_FILE, is_file, is_gguf, read_json
from streamcollapse.storage.source import CastSource, TensorSource, bytes_by_dtype
from streamcollapse.storage.staging import staged_bytes, staged_directory, tidy_up
from streamcollapse.storage.writer import ShardPlan, Writing, plan_shards, write_shards
from streamcollapse.stream.loaders import Loader, MappedLoader, PlainLoader
from streamcollapse.stream.weights import Limits, WeightStream

if TYPE_CHECKING:
    from streamcollapse.arch.gguf import GgufFile

CONVERSION_FILE = "streamcollapse_conversion.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did, or would do: ``before`` and ``after`` map dtype to bytes, ``shards`` file names to sha256.
    ``usage`` is None, and the sha256 are empty, if nothing was written."""

    source: str
    fingerprint: str
    out: str
    num_tensors: int
    before: dict[str, int]
    after: dict[str, int]
    shards: dict[str, str]
    usage: Usage | None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        document = {"format": "streamcollapse.conversion/1", "versions": versions(), **vars(self)}
        return document | {"usage": self.usage or {}}


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion that may begin: everything about it is checked, nothing is written. ``key``: what its finished
    shards belong to; ``config``: the new config, None where it stays as it is; ``found``: what it will come to."""

    request: Request
    opened: Checkpoint | GgufFile
    key: dict[str, Any]
    shards: list[ShardPlan]
    config: dict[str, Any] | None
    found: Conversion
    listener: Listener


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
    listener: Listener = silent,
) -> Conversion:
    """Write the checkpoint ``source``, or the GGUF file, as safetensors into the new directory ``out``, with all its
    small files.

    ``dtype``: float32, bfloat16 or float16 for every floating-point tensor, None for what each is (bfloat16 for a
    quantised GGUF file); a tensor whose dtype stays keeps its bytes. Memory: a few tensors. An interrupted conversion
    resumes. Raises StreamCollapseError; ``out`` then does not exist, or is the older directory that
    ``output.overwrite`` would have replaced.
    """
    return run_convert(prepare_convert(source, out, dtype, output, listener))


def prepare_convert(
    source: str | Path, out: str | Path, dtype: str | None, output: Output, listener: Listener = silent
) -> PreparedConversion:
    """``convert`` of ``source`` into ``out``, checked. Raises what it would raise before it begins."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise OptionError(f"dtype {unknown(dtype, COMPUTE_DTYPES, quoted=True)}")
    if not is_gguf(source):
        check_source(source)
    check_out(source, out, Streaming(), output)
    opened = _open(source, dtype, listener)
    config = None if is_gguf(source) else _config(opened.directory, dtype, opened)
    target = _target(opened, opened, dtype)
    shards = plan_shards(target, output.max_shard_bytes)
    check_space(Path(out), sum(shard.file_bytes for shard in shards) - staged_bytes(Path(out)))
    fingerprint = opened.fingerprint()
    found = Conversion(
        source=str(source),
        fingerprint=fingerprint,
        out=str(out),
        num_tensors=len(target.names),
        before=bytes_by_dtype(opened) if isinstance(opened, Checkpoint) else opened.stored_bytes,
        after=bytes_by_dtype(target),
        shards=dict.fromkeys((shard.file_name for shard in shards), ""),
        usage=None,
    )
    request = Request("convert", opened.directory, Path(out), RunSettings(output=output), dtype=dtype)
    state = opened.state(CONFIG_FILE)
    key = {"format": FORMAT, "source": fingerprint, "source_files": state, "verb": "convert"}
    request.check_work(key)
    return PreparedConversion(request, opened, key, shards, config, found, listener)


def run_convert(prepared: PreparedConversion) -> Conversion:
    """``convert`` as ``prepared``."""
    request, found, opened = prepared.request, prepared.found, prepared.opened
    out = request.out
    with output_work(request, prepared.key) as work:
        if work.has_finished(out):
            tidy_up(out)
            return replace(found, shards=work.shards())
        with staged_directory(out, request.settings.output.overwrite) as stage:
            finished = work.reuse_shards(stage)
            _write_small_files(prepared, stage)
            usage = _write(prepared, stage, finished, work.shard_done)
            found = replace(found, shards=work.shards(), usage=usage)
            save_report(found.to_json(), stage / CONVERSION_FILE)
            opened.check_unchanged()
            work.publishing()
    return found


def _open(source: str | Path, dtype: str | None, listener: Listener) -> Checkpoint | GgufFile:
    if not is_gguf(source):
        return Checkpoint(local_directory(source, listener))
    from streamcollapse.arch.gguf import GgufFile  # imports transformers, which any other conversion does without

    return GgufFile(Path(source), None if dtype is None else getattr(torch, dtype))


def _write_small_files(prepared: PreparedConversion, stage: Path) -> None:
    opened = prepared.opened
    if not isinstance(opened, Checkpoint):
        opened.write_small_files(stage)
        return
    copy_files(every_file_beside(opened.directory), opened.directory, stage)
    if prepared.config is not None:
        write_whole(stage / CONFIG_FILE, config_text(prepared.config))


def _config(directory: Path, dtype: str | None, source: TensorSource) -> dict[str, Any] | None:
    """The config with ``dtype`` in it; None where it stays as it is. Raises ModelError for packed weights."""
    if dtype is None:
        return None
    refuse_packed(source)
    path = directory / CONFIG_FILE
    if not is_file(path):
        return None
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object; restore the checkpoint's config.json")
    refuse_quantised(str(path), raw)
    return with_dtype(raw, dtype)


def _target(opened: Checkpoint | GgufFile, source: TensorSource, dtype: str | None) -> TensorSource:
    """``source``, the tensors of ``opened``, in ``dtype``; those of a GGUF file are so already."""
    as_is = dtype is None or not isinstance(opened, Checkpoint)
    return source if as_is else CastSource(source, getattr(torch, str(dtype)))


def _write(
    prepared: PreparedConversion, stage: Path, finished: Collection[str], on_shard: Callable[[str, str], None]
) -> Usage:
    """Write the shards that are not ``finished``; returns what it took."""
    meter, opened, listener = Meter(CPU), prepared.opened, prepared.listener
    left = [name for shard in prepared.shards if shard.file_name not in finished for name in shard.names]
    loader: Loader = PlainLoader(opened, CPU)
    if isinstance(opened, Checkpoint):
        loader = MappedLoader(opened, drop_after_use=opened.num_bytes > free_ram())
    stream = WeightStream(opened, CPU, loader, meter, Limits(Streaming().prefetch))

    def written(name: str, num_bytes: int) -> None:
        meter.written(num_bytes)
        listener(StepDone(name, num_bytes))

    with meter.phase("convert"):
        listener(PhaseStarted("convert", len(left)))
        with stream.run([[name] for name in left]) as weights:
            writing = Writing(written, on_shard, weights.step, _anything, finished)
            write_shards(_target(opened, weights, prepared.request.dtype), prepared.shards, stage, CPU, writing)
    return meter.summary()


def _anything(name: str, tensor: torch.Tensor) -> None:
    """Weights are not looked at: masks with infinities in them are as good as any bytes."""
