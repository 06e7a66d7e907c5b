"""What bench_prune makes of its runs, on numbers one can check by hand."""

from __future__ import annotations

import pytest


def decision(similarity: float, accepted: bool = True) -> dict:
    return {"l": 4, "merged": 3, "similarity": similarity, "accepted": accepted}


def run(seconds: float, anonymous: int, parts: dict, **more) -> dict:
    return {"job_seconds": seconds, "peak_rss": 9 * anonymous, "peak_anonymous_rss": anonymous, "parts": parts, **more}


@pytest.fixture
def runs():
    ours = [run(s, 100, {"pass": 2.0, "search": 1.0, "write": 1.0}, decisions=[decision(0.7)]) for s in (5.0, 4.0, 9.0)]
    return {
        "streamcollapse": ours,
        "streamcollapse passes": [run(9.0, 90, {"pass": 3.0}, passes=[3.0, 1.0, 2.0, 9.0])],
        "accelerate": [run(9.0, 90, {"pass": 4.0}, passes=[4.0, 3.2, 3.0, 2.0])],
        "authors": [run(60.0, 450, {"search": 50.0}, decisions=[decision(0.75)])],
        "streamcollapse apply": [run(3.0, 90, {"write": 1.0})],
        "mergekit": [run(6.0, 120, {"write": 0.9, "flush": 0.3})],
        "copy": [{"parts": {"write": 0.7}}],
    }


def test_targets_are_ratios_of_medians(runs):
    from verdict import judged, medians

    targets = {t["target"]: (round(t["found"], 2), t["met"]) for t in judged(medians(runs), "tinyllama-1.1b", 22)}
    assert targets == {
        "job: times faster than the authors' procedure": (12.5, True),
        "whole process, with Python's start: times faster": (12.0, None),
        "job: times less memory than the authors' procedure": (4.5, False),
        "pass: times faster than accelerate's disk offload": (1.5, True),
        "first pass of a process: times faster": (1.33, None),
        "write: times as fast as mergekit": (1.2, True),
        "write: times as fast as a plain copy": (0.7, False),
    }
    assert all(t["met"] is None for t in judged(medians(runs), "tiny", 8))


def test_decisions_are_compared_over_all_runs(runs):
    from verdict import compared_decisions

    same = compared_decisions(runs)
    assert (same["same"], same["candidates"]) == (True, 1)
    assert same["largest_difference"] == pytest.approx(0.05)
    runs["authors"][0]["decisions"] = [decision(0.6, accepted=False)]
    assert compared_decisions(runs) == {"same": False, "candidates": 1, "largest_difference": None}
    assert compared_decisions({"streamcollapse": runs["streamcollapse"]}) is None
