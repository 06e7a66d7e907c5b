"""A file of jobs (YAML): sources times settings, as tasks. Everything in it is checked before anything is done.

out: pruned
calibration: samples.txt
jobs:
  - source: checkpoints/*
    layers_per_merge: [3, 4]
    threshold: [0.65, 0.75]
  - source: org/name@revision
    verb: convert
    dtype: bfloat16
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from streamcollapse.batch.tasks import Convert, Prune, Task
from streamcollapse.errors import JobsError, OptionError, printable
from streamcollapse.settings import COMPUTE_DTYPES, SAMPLES, Calibration, Compute, Output
from streamcollapse.storage.hub import is_hub_id
from streamcollapse.strategy.catalogue import STRATEGIES
from streamcollapse.strategy.collapse import CollapseOptions

MOST_TASKS = 10_000
_MOST_BYTES = 1_000_000
_LETTERS = {"C": "layers_per_merge", "I": "interval", "L": "lowest", "H": "highest", "T": "threshold"}
_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(CollapseOptions)},  # None and "": the strategy's
    "calibration": None,
    "max_tokens": Calibration().max_tokens,
    "compute_dtype": Compute().dtype,
    "dtype": None,
    "max_shard_size": str(Output().max_shard_size),
}
_OF_CONVERT = {"dtype", "max_shard_size"}
_OF_PRUNE = _DEFAULTS.keys() - {"dtype"}
_MAY_BE_NOTHING = {name for name, default in _DEFAULTS.items() if default is None}
_LIKE = _DEFAULTS | asdict(CollapseOptions()) | {"highest": 32, "target_layers": 24, "target_ratio": 0.25}
_GLOB = "*?["


@dataclass(frozen=True)
class Jobs:
    """What a file of jobs asks for: ``out`` is where, None if the file does not say."""

    tasks: tuple[Task, ...]
    out: Path | None


def read_jobs(path: Path) -> Jobs:
    """The tasks of the file ``path``, in its order. Relative paths in it start at its own directory.

    Raises JobsError for anything that is not as it must be, naming the job.
    """
    document, base = _load(path), path.resolve().parent
    where = printable(path)
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list) or not document["jobs"]:
        raise JobsError(f"{where}: needs a list of jobs under the key jobs, each with a source")
    out = document.get("out")
    if out is not None and not isinstance(out, str):
        raise JobsError(f"{where}: out is {printable(out)}, not a directory's name")
    common = {key: value for key, value in document.items() if key not in ("jobs", "out")}
    wanted: dict[tuple[str, Prune | Convert, str], None] = {}
    for number, job in enumerate(document["jobs"], 1):
        try:
            for source, work, shard_size in _expand(job, common, base):
                wanted[source, work, shard_size] = None
                if len(wanted) > MOST_TASKS:
                    raise JobsError(f"more than {MOST_TASKS} results; split the file")
        except (JobsError, OptionError) as error:
            raise JobsError(f"{where}: job {number}: {error}") from error
    return Jobs(_named(list(wanted), where), None if out is None else base / out)


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: the second one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise JobsError(f"{printable(path)}: is larger than {_MOST_BYTES} bytes, no file of jobs")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise JobsError(f"{printable(path)}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        said = getattr(error, "problem", None) or type(error).__name__
        raise JobsError(f"{printable(path)}: not YAML{line}: {printable(said)}") from error


def _expand(job: Any, common: Mapping[str, Any], base: Path) -> Iterator[tuple[str, Prune | Convert, str]]:
    """Each source of ``job`` with each of its settings."""
    if not isinstance(job, dict) or "source" not in job:
        raise JobsError("needs a source")
    verb = job.get("verb", "prune")
    if verb not in ("prune", "convert"):
        raise JobsError(f"verb is {printable(verb)}; choose prune or convert")
    known = _OF_PRUNE if verb == "prune" else _OF_CONVERT
    own = _settings({key: value for key, value in job.items() if key not in ("source", "verb")}, known)
    shared = {k: v for k, v in _settings(common, _DEFAULTS.keys()).items() if k in known}
    grid = {**shared, **own}
    sources = [found for given in _listed(job["source"]) for found in _sources(given, base)]
    if not sources:
        raise JobsError("needs a source")
    works = []
    for values in itertools.product(*grid.values()):
        chosen = {name: _DEFAULTS[name] for name in known} | dict(zip(grid, values, strict=True))
        works.append((_work(verb, chosen, base), str(chosen["max_shard_size"])))
        if len(works) > MOST_TASKS:
            raise JobsError(f"more than {MOST_TASKS} settings; split the file")
    for source in sources:
        for work, shard_size in works:
            yield source, work, shard_size


def _settings(given: Mapping[Any, Any], known: Any) -> dict[str, Any]:
    """``given`` under the settings' own names, with lists for grids."""
    settings: dict[str, Any] = {}
    for key, value in given.items():
        name = _LETTERS.get(key, str(key).replace("-", "_"))
        if name not in known:
            raise JobsError(f"setting {printable(key)} is unknown; choose from {', '.join(sorted(known))}")
        if name in settings:
            raise JobsError(f"setting {printable(key)} is given twice")
        values = _listed(value)
        if not values or not all(_fits(name, v) for v in values):
            raise JobsError(f"{name} is {printable(value)}; it needs a value like {_LIKE[name] or 'a name'}")
        settings[name] = values
    return settings


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fits(name: str, value: Any) -> bool:
    """Whether ``value`` has the type that the setting ``name`` needs; YAML reads 0.7 as a number and yes as a flag."""
    like = _LIKE[name]
    if value is None:
        return name in _MAY_BE_NOTHING
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    if isinstance(like, float):
        return isinstance(value, int | float)
    if name == "max_shard_size":
        return isinstance(value, int | str)
    return isinstance(value, str) if like is None else type(value) is type(like)


def _work(verb: str, chosen: Mapping[str, Any], base: Path) -> Prune | Convert:
    Output(chosen["max_shard_size"])
    if verb == "convert":
        if chosen["dtype"] not in (None, *COMPUTE_DTYPES):
            raise OptionError(f"dtype {chosen['dtype']!r} is unknown; choose one of {', '.join(COMPUTE_DTYPES)}")
        return Convert(chosen["dtype"])
    Compute(dtype=chosen["compute_dtype"])
    numbers = {"threshold": float(chosen["threshold"]), "rdsc_scale": float(chosen["rdsc_scale"])}
    options = {field.name: chosen[field.name] for field in fields(CollapseOptions)} | numbers
    method = CollapseOptions(**options)
    file = chosen["calibration"] or STRATEGIES[method.strategy].samples
    if file not in SAMPLES:
        file = str(base / file)
        if not Path(file).is_file():
            raise JobsError(f"{printable(file)}: there is no such calibration file")
    return Prune(method, Calibration(file, chosen["max_tokens"]), chosen["compute_dtype"])


def _sources(given: Any, base: Path) -> list[str]:
    """The checkpoints that ``given`` means: a directory, a pattern, or an id on the Hub."""
    if not isinstance(given, str) or not given:
        raise JobsError(f"source is {printable(given)}, not a path, a pattern or an id on the Hub")
    path = os.path.join(base, os.path.expanduser(given))  # noqa: PTH111, PTH118 - patterns are no paths
    if os.path.lexists(path):
        return [os.path.normpath(path)]
    if any(mark in given for mark in _GLOB):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        found = [os.path.normpath(match) for match in matches if (Path(match) / "config.json").is_file()]
        if not found:
            raise JobsError(f"{printable(given)}: no directory with a config.json matches")
        return found
    if is_hub_id(given):
        return [given]
    raise JobsError(f"{printable(path)}: does not exist, and is no id on the Hub")


def _named(wanted: Sequence[tuple[str, Prune | Convert, str]], where: str) -> tuple[Task, ...]:
    short = _short_names([source for source, _, _ in wanted])
    tasks: dict[str, Task] = {}
    for source, work, shard_size in wanted:
        name = f"{short[source]}-{_label(work)}"
        if name in tasks:
            raise JobsError(f"{where}: two jobs would write {printable(name)}; give them different settings or files")
        tasks[name] = Task(name, source, work, shard_size)
    return tuple(tasks.values())


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """The last part of each source's name, or as many more as tell them apart."""
    parts = {source: source.replace("@", "-").rstrip("/").split("/") for source in dict.fromkeys(sources)}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {source: "-".join(filter(None, split[-depth:])) for source, split in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _label(work: Prune | Convert) -> str:
    """The settings in a name: the paper's letters and the rule, and what else is not the default."""
    if isinstance(work, Convert):
        return work.dtype or "safetensors"
    options, default = work.options, CollapseOptions()
    parts = [options.strategy] if options.strategy != "laco" else []  # which its letters say
    takes = STRATEGIES[options.strategy].takes
    if "layers_per_merge" in takes:
        parts += [f"C{options.layers_per_merge}", f"I{options.interval}"]
    if options.target_layers is not None:
        parts.append(f"N{options.target_layers}")
    elif options.target_ratio is not None:
        parts.append(f"ratio{options.target_ratio:g}")
    elif "threshold" in takes:
        parts.append(f"T{options.threshold:g}")
    if STRATEGIES[options.strategy].rule is not None:
        parts.append(options.rule.replace(",", "+"))
    parts += [options.metric] if options.metric != (STRATEGIES[options.strategy].metric or "cosine") else []
    parts += [f"scale{options.rdsc_scale:g}"] if options.rdsc_scale != default.rdsc_scale else []
    parts += [f"L{options.lowest}"] if options.lowest != default.lowest else []
    parts += [f"H{options.highest}"] if options.highest is not None else []
    parts += ["norms"] if options.merge_norms else []
    if options.rescale != STRATEGIES[options.strategy].rescale:
        parts.append("rescaled" if options.rescale else "unscaled")
    parts += [f"{options.merges_per_round}at-once"] if options.merges_per_round > 1 else []
    file = work.calibration.file
    parts += [Path(file).stem] if file is not None and file != STRATEGIES[options.strategy].samples else []
    parts += [f"{work.calibration.max_tokens}tokens"] if work.calibration.max_tokens != Calibration().max_tokens else []
    parts += [work.compute_dtype] if work.compute_dtype != "auto" else []
    return "-".join(parts)
