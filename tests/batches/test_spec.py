"""Files of jobs: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.batches import spec
from streamcollapse.batches.spec import Jobs, read_jobs
from streamcollapse.batches.tasks import Convert, Prune, chains_of
from streamcollapse.errors import JobsError
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import Calibration, Repair
from tests.methods import method


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("models/a", "models/b", "models/notes", "other/a"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("models/a", "models/b", "other/a"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "models" / "file").write_text("")
    (tmp_path / "samples.txt").write_text("A sample.\n")
    return tmp_path


def jobs_of(base: Path, document: Any) -> Jobs:
    (base / "jobs.yaml").write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return read_jobs(base / "jobs.yaml")


def test_strategies_and_targets_are_settings_like_others(base: Path) -> None:
    found = jobs_of(
        base,
        """
        jobs:
          - source: models/a
            strategy: [laco, greedy, angular]
            target_layers: [6, 5]
          - source: models/a
            strategy: greedy
            rule: [first, "first,mean"]
            target_ratio: 0.25
          - source: models/a
            strategy: rule-based
            I: 4
        """,
    )
    greedy = method(strategy="greedy", target_layers=6)
    assert found.tasks[2].work == Prune(greedy, Calibration("passages"), "auto")
    assert found.tasks[0].work == Prune(method(strategy="laco", target_layers=6), Calibration("sentences"), "auto")
    assert [t.name.removeprefix("a-") for t in found.tasks] == [
        "C4-I2-N6-sequential",
        "C4-I2-N5-sequential",
        "greedy-N6-first",
        "greedy-N5-first",
        "angular-N6",
        "angular-N5",
        "greedy-ratio0.25-first",
        "greedy-ratio0.25-first+mean",
        "rule-based-C4-I4-sequential",
    ]


def test_repairs_and_healing_are_settings_like_others(base: Path) -> None:
    (base / "texts").mkdir()
    (base / "texts" / "one.txt").write_text("Words.")
    found = jobs_of(
        base,
        """
        jobs:
          - {source: models/a, strategy: angular, target_layers: 6}
          - {source: models/b, strategy: angular, target_layers: 6, repair: linear, repair_text: texts/one.txt,
             heal: true, heal_text: "texts/*.txt", heal_tokens: 5000}
        """,
    )
    plain, mended = (task.work for task in found.tasks)
    assert isinstance(plain, Prune)
    assert isinstance(mended, Prune)
    assert plain.also_heal == AlsoHeal()
    assert mended.repair == Repair("linear", str(base / "texts" / "one.txt"))
    assert mended.also_heal == AlsoHeal(True, str(base / "texts" / "*.txt"), 5000)
    assert {"repair", "also_heal"} & found.tasks[0].settings().keys() == set(), "as before there were any"
    assert found.tasks[1].settings()["also_heal"]["tokens"] == 5000


def test_sources_times_settings(base: Path) -> None:
    found = jobs_of(
        base,
        """
        out: results
        calibration: samples.txt
        T: 0.7
        jobs:
          - source: models/*
            C: [3, 4]
            rule: [sequential, mean]
          - source: [org/name@main, other/a]
            threshold: 1
            lowest: 5
            calibration: null
            compute-dtype: float32
          - source: models/a
            verb: convert
            dtype: [float16, null]
            max_shard_size: 1GB
        """,
    )
    assert found.out == base / "results"
    samples = Calibration(str(base / "samples.txt"))
    expected = [
        (str(base / "models" / model), Prune(method(layers, threshold=0.7, rule=rule), samples, "auto"))
        for model in ("a", "b")
        for layers in (3, 4)
        for rule in ("sequential", "mean")
    ]
    other = Prune(method(lowest=5, threshold=1.0), Calibration("passages"), "float32")
    expected += [("org/name@main", other), (str(base / "other" / "a"), other)]
    assert [(t.source, t.work) for t in found.tasks if t.verb == "prune"] == expected
    assert [(t.work, t.max_shard_size) for t in found.tasks if t.verb == "convert"] == [
        (Convert("float16"), "1GB"),
        (Convert(None), "1GB"),
    ]
    names = [t.name for t in found.tasks]
    assert names[:2] == ["models-a-C3-I2-T0.7-sequential-samples", "models-a-C3-I2-T0.7-mean-samples"]
    assert "org-name-main-greedy-T1-first-L5-float32" in names
    assert "models-a-float16" in names
    assert "models-a-safetensors" in names


def test_names_are_short_where_that_tells_apart(base: Path) -> None:
    found = jobs_of(base, {"jobs": [{"source": ["models/a", "models/b", "org/c"]}]})
    assert [t.name.partition("-")[0] for t in found.tasks] == ["a", "b", "c"]


def test_names_tell_metrics_scales_and_rounds_apart(base: Path) -> None:
    grid = {"strategy": "greedy", "target_layers": 5, "metric": ["kl", "nll"], "rescale": [False, True]}
    found = jobs_of(base, {"jobs": [{"source": "models/a", **grid, "merges_per_round": [1, 2]}]})
    names = [t.name for t in found.tasks]
    assert len({*names}) == 8
    assert names[0] == "a-greedy-N5-first", "what is not the default of the strategy is told"
    assert names[-1] == "a-greedy-N5-first-nll-rescaled-2at-once"


def test_names_tell_repairs_apart(base: Path) -> None:
    found = jobs_of(base, {"jobs": [{"source": "models/a", "target_layers": 5, "repair": ["none", "auto"]}]})
    assert [t.name for t in found.tasks] == [f"a-greedy-N5-first-repair-{how}" for how in ("none", "auto")]
    assert found.tasks[0].settings() != found.tasks[1].settings()


def test_samples_are_files_patterns_and_datasets(base: Path) -> None:
    names = ["hub:org/wiki-2.0:train", "hub:org/wiki-2.0:test", "*.txt", "samples.txt"]
    found = jobs_of(base, {"jobs": [{"source": "models/a", "strategy": "laco", "T": 0.5, "calibration": names}]})
    works = [task.work for task in found.tasks]
    assert all(isinstance(work, Prune) for work in works)
    files = [work.calibration.file for work in works if isinstance(work, Prune)]
    assert files == [*names[:2], str(base / "*.txt"), str(base / "samples.txt")]
    for task, said in zip(found.tasks, ("-wiki-2.0_train", "-wiki-2.0_test", "-_", "-samples"), strict=True):
        assert task.name.endswith(said), task.name


def test_the_same_job_twice_is_one(base: Path) -> None:
    found = jobs_of(
        base, {"jobs": [{"source": "models/*"}, {"source": "models/a"}, {"source": "./models/../models/a"}]}
    )
    assert [Path(t.source).name for t in found.tasks] == ["a", "b"]


def test_what_goes_together(base: Path) -> None:
    found = jobs_of(
        base,
        {
            "jobs": [
                {"source": "models/*", "C": [2, 3], "merge_norms": [False, True]},
                {"source": "models/*", "verb": "convert"},
            ]
        },
    )
    chains = [[t.name for t in chain] for chain in chains_of(found.tasks)]
    assert chains == [
        ["a-C2-I2-T0.65-sequential", "a-C3-I2-T0.65-sequential"],
        ["a-C2-I2-T0.65-sequential-norms", "a-C3-I2-T0.65-sequential-norms"],
        ["b-C2-I2-T0.65-sequential", "b-C3-I2-T0.65-sequential"],
        ["b-C2-I2-T0.65-sequential-norms", "b-C3-I2-T0.65-sequential-norms"],
        ["a-safetensors"],
        ["b-safetensors"],
    ]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("jobs: [", r"not YAML at line 1"),
        ("\x00", "not YAML"),
        ("- 1", "needs a list of jobs"),
        ("jobs: [{source: models/a, T: 0.5, T: 0.6}]", "not YAML at line 1: T is there twice"),
        ("jobs: []", "needs a list of jobs"),
        ("jobs: {source: a}", "needs a list of jobs"),
        ("jobs: !!python/object/apply:os.system ['id']", "not YAML at line 1: could not determine a constructor"),
        ("jobs: [3]", "job 1: needs a source"),
        ("jobs: [{source: []}]", "job 1: needs a source"),
        ("jobs: [{rule: mean}]", "job 1: needs a source"),
        ("jobs: [{source: models/a}, {source: 3}]", "job 2: source is 3, not a path"),
        ("jobs: [{source: nowhere}]", "nowhere: does not exist, and is no id on the Hub"),
        ("jobs: [{source: 'nowhere/*'}]", "no directory with a config.json matches"),
        (
            "jobs: [{source: models/a, treshold: 1}]",
            "setting treshold is unknown; did you mean threshold. choose one of .*threshold",
        ),
        ("jobs: [{source: models/a, dtype: float32}]", "setting dtype is unknown"),
        ("jobs: [{source: models/a, verb: convert, C: 3}]", "setting C is unknown; choose one of dtype, max_shard"),
        ("jobs: [{source: models/a, verb: quantise}]", "verb quantise is unknown; choose one of prune, convert,"),
        ("jobs: [{source: models/a, C: 3, layers_per_merge: 4}]", "is given twice"),
        ("jobs: [{source: models/a, C: 3.5}]", r"layers per merge \(C\) is 3.5; it must be a valid integer"),
        ("jobs: [{source: models/a, C: yes}]", r"layers per merge \(C\) is True"),
        ("jobs: [{source: models/a, T: high}]", r"threshold \(T\) is 'high'"),
        ("jobs: [{source: models/a, T: []}]", "threshold is an empty list"),
        ("jobs: [{source: models/a, T: [[0.5]]}]", r"threshold \(T\) is \[0.5\]"),
        ("jobs: [{source: models/a, merge_norms: 1}]", "merge norms is 1; it must be a valid boolean"),
        ("jobs: [{source: models/a, T: 2}]", r"job 1: threshold \(T\) is 2.0"),
        ("jobs: [{source: models/a, target_layers: x}]", "target layers is 'x'; give how many stay"),
        ("jobs: [{source: models/a, target_ratio: true}]", "target ratio is True; it must be a valid number"),
        ("jobs: [{source: models/a, strategy: angular}]", "goes on until a target"),
        ("jobs: [{source: models/a, rule: bset}]", "rule 'bset' is unknown"),
        ("jobs: [{source: models/a, max_tokens: 0}]", "max tokens is 0"),
        ("jobs: [{source: models/a, compute_dtype: int8}]", "compute dtype is 'int8'; choose one of"),
        ("jobs: [{source: models/a, max_shard_size: big}]", "'big' is not a size"),
        ("jobs: [{source: models/a, verb: convert, dtype: int8}]", "dtype 'int8' is unknown"),
        ("jobs: [{source: models/a, calibration: none.txt}]", "there is no such calibration file"),
        ("treshold: 1\njobs: [{source: models/a}]", "setting treshold is unknown"),
        ("jobs: [{source: models/a, heal: true, heal_text: none.txt}]", "there is no such text to heal on"),
        ("out: 3\njobs: [{source: models/a}]", "out is 3"),
        ("jobs: [{source: models/a, max_shard_size: [1GB, 2GB]}]", "two jobs would write a-greedy"),
        ("jobs: [{source: models/a, T: &a [&b [*b]]}]", r"threshold \(T\) is"),
    ],
)
def test_bad_files(base: Path, document: str, complaint: str) -> None:
    with pytest.raises(JobsError, match=complaint) as raised:
        jobs_of(base, document)
    assert "\n" not in str(raised.value)
    assert "jobs.yaml" in str(raised.value)


def test_too_much(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "MOST_TASKS", 100)
    grid = {"C": list(range(2, 12)), "I": list(range(1, 11)), "L": list(range(1, 11))}
    with pytest.raises(JobsError, match="more than 100 settings; split the file"):
        jobs_of(base, {"jobs": [{"source": "models/a", **grid}]})
    with pytest.raises(JobsError, match="more than 100 results; split the file"):
        jobs_of(base, {"jobs": [{"source": "models/*", **grid, "L": [1]}]})
    (base / "jobs.yaml").write_text("#" * 2_000_000)
    with pytest.raises(JobsError, match="is larger than 1000000 bytes"):
        read_jobs(base / "jobs.yaml")
    with pytest.raises(JobsError, match="cannot be read: No such file"):
        read_jobs(base / "none.yaml")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["source", "verb", "C", "T", "rule", "calibration", "max_tokens", "dtype", "highest", "H"])


@given(st.fixed_dictionaries({"jobs": st.lists(st.dictionaries(keys, anything), max_size=2)}) | anything)
def test_whatever_a_file_holds_it_is_jobs_or_an_error(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = tmp_path_factory.mktemp("spec") / "jobs.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8", errors="replace")
    try:
        read_jobs(path)
    except JobsError as error:
        assert "\n" not in str(error)  # noqa: PT017
