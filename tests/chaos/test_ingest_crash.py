"""A crash after every single call that changes the store: the old corpus or the new one, never a mix (R2, R5).

The stages run in this process, one task after the other, so that every call can be counted.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.errors import RunError, UserError
from corpus.manifest import Manifest
from corpus.store import Store
from ingest import pipeline
from ingest.sandbox import SourceDiedError
from ingest.verify import verify
from tests.factories_ingest import Toy, toy_settings, write_toy

pytestmark = pytest.mark.chaos
CHANGES = ("create", "remove")


class CrashError(BaseException):
    """The process is gone: nothing of ours catches this."""


def one_by_one(tasks: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[tuple[int, Any, dict[str, np.ndarray]]]:
    """Stand-in for the cluster: the same contract as `map_tasks`, in this process."""
    for position, task in enumerate(tasks):
        try:
            yield position, *work(task)
        except (UserError, SourceDiedError) as error:
            yield position, error, {}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(pipeline, "map_tasks", one_by_one)
    monkeypatch.setattr(pipeline, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(pipeline, "read_safely", lambda limits, name, function, *arguments: function(*arguments))
    return monkeypatch


class Counted:
    """Counts the calls that change a store, and crashes after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.crash_after: int | None = None
        for name in CHANGES:
            monkeypatch.setattr(Store, name, self._wrap(name, getattr(Store, name)))

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(store: Store, path: str, *arguments: Any) -> Any:
            result = original(store, path, *arguments)
            self.calls.append(f"{name} {path.split('/')[0]}")
            if len(self.calls) == self.crash_after:
                raise CrashError
            return result

        return counted


def content(out: Path, number: int | None = None) -> list[tuple[str, str]]:
    return [(unit.unit_id, unit.sha256) for unit in Manifest.read(Store(out), number).units]


def unnamed(out: Path) -> set[str]:
    """Files of shards, units and cells that the newest manifest does not name."""
    named = {name for unit in Manifest.read(Store(out)).units for name in (unit.shard, unit.record)}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return {name for name in found - named if name.split("/")[0] in {"shards", "units", "cells"}}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Toy]:
    folder = tmp_path_factory.mktemp("sources")
    return [write_toy(folder, "first", num_cells=40, seed=1), write_toy(folder, "second", num_cells=24, seed=2)]


def test_a_first_run_that_crashes_anywhere_is_finished_by_the_next(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    settings = toy_settings(toys, entries_per_unit=1_000)
    counted = Counted(in_process)
    pipeline.run(settings, str(tmp_path / "whole"))
    expected, calls = content(tmp_path / "whole"), counted.calls
    assert calls.count("create manifests") == 1
    assert {call.split()[1] for call in calls} == {
        "cells",
        "genes",
        "shards",
        "units",
        "runs",
        "reports",
        "manifests",
    }
    published = calls.index("create manifests") + 1
    for crash in range(1, len(calls) + 1):
        out = tmp_path / f"crash-{crash}"
        counted.calls, counted.crash_after = [], crash
        with pytest.raises(CrashError):
            pipeline.run(settings, str(out))
        if crash < published:
            with pytest.raises(UserError, match="no corpus here"):
                Manifest.read(Store(out))
        else:
            assert content(out) == expected
        counted.crash_after = None
        pipeline.run(settings, str(out))
        assert content(out) == expected
        assert Manifest.numbers(Store(out)) == [1]
        assert not unnamed(out)
    assert not [check for check in verify(str(out)) if check.faults]


def test_an_addition_that_crashes_anywhere_leaves_the_old_corpus_or_the_new(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    counted = Counted(in_process)

    def start(out: Path) -> Manifest:
        counted.crash_after = None
        pipeline.run(toy_settings(toys[:1], entries_per_unit=1_000), str(out))
        counted.calls = []
        return Manifest.read(Store(out))

    def add(out: Path, old: Manifest) -> None:
        pipeline.run(toy_settings(toys[1:], entries_per_unit=1_000), str(out), frozen=old)

    old = start(tmp_path / "whole")
    add(tmp_path / "whole", old)
    expected, calls = content(tmp_path / "whole"), counted.calls
    before = content(tmp_path / "whole", 1)
    assert expected[: len(before)] == before
    published = calls.index("create manifests") + 1
    for crash in range(1, len(calls) + 1):
        out = tmp_path / f"crash-{crash}"
        old = start(out)
        counted.crash_after = crash
        with pytest.raises(CrashError):
            add(out, old)
        assert content(out) == (before if crash < published else expected)
        counted.crash_after = None
        add(out, old)
        assert content(out) == expected
        assert content(out, 1) == before
        assert Manifest.numbers(Store(out)) == [1, 2]


def test_a_shard_changed_between_two_runs_stops_the_second(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    settings = toy_settings(toys, entries_per_unit=1_000)
    counted = Counted(in_process)
    pipeline.run(settings, str(tmp_path / "whole"))
    last_unit = len(counted.calls) - 1 - counted.calls[::-1].index("create units")
    counted.calls, counted.crash_after = [], last_unit + 1
    with pytest.raises(CrashError):
        pipeline.run(settings, str(tmp_path / "out"))
    shard = next((tmp_path / "out/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    counted.crash_after = None
    with pytest.raises(RunError, match=rf"{shard.name}: was changed since it was written"):
        pipeline.run(settings, str(tmp_path / "out"))
    assert not Manifest.numbers(Store(tmp_path / "out"))
    shard.unlink()
    pipeline.run(settings, str(tmp_path / "out"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_source_that_changes_under_the_run_is_refused(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    path = write_toy(tmp_path / "sources", "moving", num_cells=30, seed=1).path
    settings = toy_settings([], sources=[{"uri": str(path)}])
    touched = pipeline.plan(settings)
    path.touch()  # a new time alone is no change
    pipeline.run(settings, str(tmp_path / "touched"))
    assert len(touched) == 1

    def changed(units: Sequence[Any], *arguments: Any) -> Any:
        write_toy(tmp_path / "sources", "moving", num_cells=30, seed=9)
        return original(units, *arguments)

    original = pipeline.cut
    in_process.setattr(pipeline, "cut", changed)
    with pytest.raises(UserError, match=r"moving\.h5ad: was changed while it was ingested"):
        pipeline.run(settings, str(tmp_path / "out"))
    assert not (tmp_path / "out/manifests").exists()


@pytest.mark.parametrize("damage", ["truncated", "dies"])
def test_a_bad_source_is_set_aside_only_when_allowed(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch, damage: str
) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(toys[1].path.read_bytes())
    if damage == "truncated":
        bad.write_bytes(bad.read_bytes()[:4_000])
    else:
        direct = pipeline.read_safely

        def die(limits: Any, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            if name == str(bad) and function is pipeline.extract_unit:
                raise SourceDiedError(f"{name}: its reader died 2 times (killed by SIGSEGV)")
            return direct(limits, name, function, *arguments)

        in_process.setattr(pipeline, "read_safely", die)
    settings = toy_settings([], sources=[{"uri": str(toys[0].path)}, {"uri": str(bad)}])
    error = RunError if damage == "dies" else UserError
    with pytest.raises(error, match=r"bad\.h5ad: .*\(--allow-quarantine goes on without\)"):
        pipeline.run(settings, str(tmp_path / "strict"))
    assert not (tmp_path / "strict/manifests").exists()
    report = pipeline.run(settings, str(tmp_path / "out"), allow_quarantine=True)
    manifest = Manifest.read(Store(tmp_path / "out"))
    assert set(report.datasets) == {unit.dataset_id for unit in manifest.units} == {"first"}
    assert set(report.quarantined) == set(manifest.quarantined) == {"bad"}
    assert str(bad) in manifest.quarantined["bad"]
    assert f"NOT in the corpus: bad: {manifest.quarantined['bad']}" in report.lines()
    assert not unnamed(tmp_path / "out")
    assert pipeline.run(settings, str(tmp_path / "out"), allow_quarantine=True) == report
    assert Manifest.numbers(Store(tmp_path / "out")) == [1]
    # Nothing but bad sources is no corpus, whatever is allowed.
    with pytest.raises(error, match=r"bad\.h5ad"):
        pipeline.run(toy_settings([], sources=[{"uri": str(bad)}]), str(tmp_path / "none"), allow_quarantine=True)


def test_a_source_that_was_mended_is_no_longer_missing(
    toys: list[Toy], tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "second.h5ad"
    bad.write_bytes(toys[1].path.read_bytes()[:4_000])
    sources = [{"uri": str(toys[0].path)}, {"uri": str(bad)}]
    out = str(tmp_path / "out")
    pipeline.run(toy_settings([], sources=sources), out, allow_quarantine=True)
    first = Manifest.read(Store(out))
    assert set(first.quarantined) == {"second"}
    bad.write_bytes(toys[1].path.read_bytes())
    pipeline.run(toy_settings([], sources=sources[1:]), out, frozen=first)
    assert Manifest.read(Store(out)).quarantined == {}
