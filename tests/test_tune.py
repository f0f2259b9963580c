"""Tuning: what is measured, what may win, what is kept, and what of that is believed. The stopwatch is made up."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections import Counter
from dataclasses import replace
from functools import cache

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from test_cli import call, tiny  # noqa: F401
from test_kernels import Case

from swinaccel import bench, bias, ops, tuning
from swinaccel.backends import triton as backend
from swinaccel.backends import tuned

pytestmark = pytest.mark.usefixtures("strict_kernels", "store")

SMALL = Case((2, 2), (4, 2), (1, 1), heads=1, batch=4)
TINY = Case((2, 2), (4, 4), (1, 1), heads=1, batch=2, cosine=True)
LARGE = Case((13, 5), (13, 5), heads=1)
DEVICE = torch.device(TRITON_DEVICE, 0) if TRITON_DEVICE == "cuda" else torch.device("cpu")


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A cache directory of the test's own, and no launch planned before or after."""
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()
    backend.forget_launches()
    yield tmp_path / "cache" / "launches"
    tuned.forget()
    backend.forget_launches()


@pytest.fixture
def job():
    return jobs_of(SMALL)["small"]


def attend(case, train=False):
    qkv, options = case.make(torch.float32, TRITON_DEVICE)
    qkv.requires_grad_(train)
    options["table"].requires_grad_(train)
    out = ops.shifted_window_attention(qkv, case.geometry, **options)
    if train:
        out.square().sum().backward()
        return out, qkv.grad, options["table"].grad
    return (out,)


@cache
def jobs_of(case, train=False):
    """By kernel, what a call asks for; nothing is run."""
    with pytest.MonkeyPatch.context() as patch, tuning.posed() as found:
        patch.setattr(backend._Launch, "__call__", lambda launch, *tensors: tensors[0].data.zero_())
        attend(case, train)
    return {job.kernel: job for job in found.values()}


@pytest.fixture
def unlaunched(monkeypatch):
    """Launches are planned, and launch nothing."""
    monkeypatch.setattr(backend._Launch, "__call__", lambda launch, *tensors: tensors[0].data.zero_())


@pytest.fixture
def quick(monkeypatch):
    """Calls that are planned and give something, but run no kernel."""

    def caller(job):
        def call():
            tuned.launch(job.kernel, job.problem, job.default, job.grad_bias)
            return (torch.ones(2),)

        return call

    monkeypatch.setattr(tuning, "_caller", caller)


def small_model():
    """With windows of 3x3, in two stages."""
    model = helpers.timm_v1(img_size=24, window=3, depths=(1, 1), num_heads=(1, 2), embed_dim=16)
    return model.to(TRITON_DEVICE), torch.randn(1, 3, 24, 24).to(TRITON_DEVICE)


class Stopwatch:
    """Times by a rule of the launch that is planned for a kernel; calls what it is to time."""

    def __init__(self, kernel, rule):
        self.kernel, self.rule, self.launches = kernel, rule, []
        self._choose = None

    def __call__(self, run, device):
        seen = []
        inner = tuned._chooser

        def look(kernel, *rest):
            launch = inner(kernel, *rest)
            if kernel == self.kernel:
                seen.append(launch)
            return launch

        backend.forget_launches()
        with tuned.choosing(look):
            run()
        self.launches.append(seen[-1])
        return self.rule(seen[-1])


def record(launch, before=2.0, after=1.0, **changes):
    return {"parameters": {**tuned.parameters(launch), **changes}, "default_ms": before, "tuned_ms": after}


def written(job, **changes):
    """Where the record of a launch is, which is written."""
    tuned.write(DEVICE, {job.key: record(job.default, **changes)})
    return tuned.path_of(DEVICE, job.key)


def chosen(case, train=False):
    """By kernel, the launches that calls would use, tuned ones included."""
    return {
        kernel: tuned.launch(kernel, job.problem, job.default, job.grad_bias)
        for kernel, job in jobs_of(case, train).items()
    }


# What a model asks for.


class TestJobs:
    @pytest.mark.parametrize(
        ("case", "train", "kernels"),
        [
            (SMALL, False, {"small"}),
            (LARGE, False, {"large"}),
            (SMALL, True, {"small", "small_backward"}),
            (LARGE, True, {"large", "query", "key", "bias"}),
        ],
    )
    def test_of_a_call(self, case, train, kernels):
        assert set(jobs_of(case, train)) == kernels

    def test_keys_tell_problems_apart(self):
        changes = ({}, {"shift": ()}, {"cosine": True}, {"size": (5, 2)}, {"batch": 9})
        keys = {jobs_of(replace(SMALL, **change))["small"].key for change in changes}
        assert len(keys | {jobs_of(SMALL, train=True)["small"].key}) == 6

    def test_batches_count_by_powers_of_two(self):
        four, seven, eight = (jobs_of(replace(SMALL, batch=batch))["small"].key for batch in (4, 7, 8))
        assert four == seven != eight

    def test_of_a_model(self, unlaunched):
        model, example = small_model()
        jobs = tuning.collect(model, (example,), backend="triton", measurable=True)
        assert Counter(job.kernel for job in jobs) == {"small": len(jobs)}
        trained = tuning.collect(model, (example,), backend="triton", measurable=True, train=True)
        assert {job.kernel for job in trained} == {"small", "small_backward"}
        assert {job.key for job in jobs} < {job.key for job in trained}
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_model_that_asks_for_nothing(self, monkeypatch):
        monkeypatch.delenv("SWINACCEL_STRICT")
        with pytest.raises(RuntimeError, match="poses no problem to the Triton kernels: it holds no window attention"):
            tuning.collect(torch.nn.Linear(2, 2), (torch.ones(1, 2),), measurable=True)


# The search.


@pytest.mark.usefixtures("quick")
class TestSearch:
    def test_the_fastest_launch_wins(self, job):
        watch = Stopwatch("small", lambda launch: 1.0 if launch.num_stages == 2 else 2.0)
        found = tuning.search(job, watch)
        assert found.error is None
        assert found.tuned == {**tuned.parameters(job.default), "num_stages": 2}
        assert (found.default_ms, found.tuned_ms, found.speedup) == (2.0, 1.0, 2.0)
        assert found.tried == len(set(watch.launches))
        assert watch.launches[0] == job.default

    def test_a_search_walks(self):
        """Two steps away from the default, through one that is a little better."""
        job = jobs_of(LARGE)["large"]
        better = {job.default.num_warps: 10.0, job.default.num_warps // 2: 9.0, job.default.num_warps // 4: 5.0}
        found = tuning.search(job, Stopwatch("large", lambda launch: better.get(launch.num_warps, 20.0)))
        assert found.tuned == {**tuned.parameters(job.default), "num_warps": job.default.num_warps // 4}

    @pytest.mark.parametrize(("gain", "wins"), [(0.02, False), (0.04, True)])
    def test_small_gains_are_not_kept(self, job, gain, wins):
        found = tuning.search(job, Stopwatch("small", lambda one: 1 - gain * (one.num_warps != job.default.num_warps)))
        assert (found.tuned is not None) == wins

    def test_luck_is_not_kept(self):
        """A launch that was fast once, but not against the default in turns."""
        times = iter([2.0, 1.0])
        assert tuning.search(jobs_of(SMALL)["small"], lambda run, device: next(times, 2.0)).tuned is None

    @pytest.mark.parametrize("wrong", [1.01, float("nan"), float("inf")])
    def test_other_results_are_skipped(self, job, monkeypatch, wrong):
        """A launch may be as fast as it likes, if it is wrong."""

        def caller(job):
            def call():
                launch = tuned.launch(job.kernel, job.problem, job.default)
                return (torch.tensor([1.0, 1.0 if launch == job.default else wrong]), torch.empty(0), None)

            return call

        monkeypatch.setattr(tuning, "_caller", caller)
        found = tuning.search(job, Stopwatch("small", lambda launch: 2.0 if launch == job.default else 1.0))
        assert found.tuned is None
        assert found.tried == 1
        assert set(found.skipped) == {"other results"}

    def test_failing_launches_are_skipped(self, job, monkeypatch):

        def caller(job):
            def call():
                if tuned.launch(job.kernel, job.problem, job.default).num_warps != job.default.num_warps:
                    raise RuntimeError("out of resource: shared memory")
                return (torch.ones(2),)

            return call

        monkeypatch.setattr(tuning, "_caller", caller)
        found = tuning.search(job, Stopwatch("small", lambda launch: 0.5 + (launch == job.default)))
        assert found.skipped["RuntimeError"] > 0
        assert found.tuned["num_warps"] == job.default.num_warps

    def test_a_failing_default_is_an_outcome(self):
        def broken(run, device):
            raise RuntimeError("no clock\nhere")

        assert tuning.search(jobs_of(SMALL)["small"], broken).error == "RuntimeError: no clock"

    @pytest.mark.parametrize("kernel", tuned.KERNELS)
    def test_neighbours(self, kernel):
        job = jobs_of(SMALL if kernel.startswith("small") else LARGE, train=True)[kernel]
        near = tuning.neighbours(job, job.default)
        assert 2 <= len(near) <= 13
        assert len(set(near)) == len(near)
        assert job.default not in near


@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [TINY, LARGE], ids=["small", "large"])
def test_other_launches_compute_the_same(case, train):
    """Posed for real: the problem that was found, with other launches for all of its kernels."""
    jobs = jobs_of(case, train)
    job = jobs[
        "small_backward" if train and case is TINY else "query" if train else "small" if case is TINY else "large"
    ]
    found, seen = [], {}

    def default(kernel, problem, default, grad_bias):
        seen[kernel] = problem
        return default

    def other(kernel, problem, default, grad_bias):
        return tuning.neighbours(jobs[kernel], default)[-1]

    for chooser in (default, other):
        with tuning._fresh(default):
            call = tuning._caller(job)
        with tuning._fresh(chooser):
            found.append(tuning._results(call))
    assert seen[job.kernel] == job.problem
    assert bench.difference(*found) <= tuning._tolerance(job.problem)


# From tuning to calls.


def test_winners_serve_from_the_next_call(store):
    expected = attend(SMALL, train=True)
    job = jobs_of(SMALL, train=True)["small"]
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=1)})
    backend.forget_launches()
    assert chosen(SMALL, train=True)["small"].num_warps == 1
    for one, other in zip(attend(SMALL, train=True), expected, strict=True):
        torch.testing.assert_close(one, other)
    planned = [one for one in backend._launches.values() if isinstance(one, backend._Forward)]
    assert [one.attention.options["num_warps"] for one in planned] == [1]
    assert chosen(SMALL)["small"] == jobs_of(SMALL)["small"].default  # inference was not tuned


@pytest.mark.usefixtures("quick", "unlaunched")
def test_run_keeps_winners(store):
    model, example = small_model()
    told = []
    watch = Stopwatch("small", lambda launch: 1.0 + launch.num_warps)
    outcomes = tuning.run(model, (example,), backend="triton", timer=watch, progress=lambda *args: told.append(args))
    assert all(one.tuned["num_warps"] < one.default["num_warps"] for one in outcomes)
    assert set(tuned.read(DEVICE)) == {one.key for one in outcomes}
    assert {(total) for _, _, total in told} == {len(outcomes)}
    tuning.run(model, (example,), backend="triton", timer=lambda run, device: 1.0)
    assert tuned.read(DEVICE) == {}, "a default that is no longer beaten returns"


def test_files_are_read_once(job, store, monkeypatch, unlaunched):
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=1)})
    reads = []
    plain = tuned._document
    monkeypatch.setattr(tuned, "_document", lambda path: reads.append(path) or plain(path))
    for batch in (4, 5, 6):
        attend(Case((2, 2), (4, 2), (1, 1), heads=1, batch=batch))
    assert len(reads) == 1


def test_nothing_is_hashed_where_nothing_is_tuned(store, monkeypatch, unlaunched):
    monkeypatch.setattr(tuned, "environment", None)
    attend(SMALL)
    assert not store.exists()


def test_another_device_is_assumed_untuned(job, store, monkeypatch, unlaunched):
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=1)})
    monkeypatch.setattr(backend, "shared_memory_override", 65536)
    attend(SMALL)
    planned = [one for one in backend._launches.values() if isinstance(one, backend._Forward)]
    assert [one.attention.options["num_warps"] for one in planned] == [job.default.num_warps]


def test_a_tuned_launch_that_fails_gives_way_to_the_default(store, monkeypatch, caplog):
    expected = attend(TINY, train=True)
    jobs = jobs_of(TINY, train=True)
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=1) for job in jobs.values()})
    backend.forget_launches()
    plain = backend._Launch.__call__

    def fails(launch, *tensors):
        if launch.options.get("num_warps") == 1:
            raise RuntimeError("out of resource: shared memory")
        plain(launch, *tensors)

    monkeypatch.setattr(backend._Launch, "__call__", fails)
    for one, other in zip(attend(TINY, train=True), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not ops.has_failures()
    assert "default launches serve now" in caplog.text


# The store.


def test_files_are_private(job, store):
    path = written(job)
    assert path.parent == store
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    assert [entry.name for entry in store.iterdir()] == [path.name]


def test_writing_adds(store):
    small, large = jobs_of(SMALL)["small"], jobs_of(LARGE)["large"]
    tuned.write(DEVICE, {small.key: record(small.default)})
    tuned.write(DEVICE, {large.key: record(large.default)})
    assert set(tuned.read(DEVICE)) == {small.key, large.key}
    tuned.write(DEVICE, {small.key: None})
    assert set(tuned.read(DEVICE)) == {large.key}


def test_processes_that_write_at_once_lose_nothing(store, monkeypatch):
    """One that began before another wrote, and ends after it."""
    small, large = jobs_of(SMALL)["small"], jobs_of(LARGE)["large"]
    replace = os.replace

    def interrupted(source, target):
        monkeypatch.setattr(os, "replace", replace)
        written(large)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    written(small)
    assert set(tuned.read(DEVICE)) == {small.key, large.key}


def test_a_write_that_fails_leaves_what_was(job, store, monkeypatch):
    path = written(job)
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        written(job, num_warps=1)
    assert path.read_bytes() == before
    assert [entry.name for entry in store.iterdir()] == [path.name]


@pytest.mark.parametrize("changed", ["gpu", "capability", "triton", "kernels"])
def test_another_environment_is_another_file(job, store, monkeypatch, changed):
    path = written(job)
    place = {**tuned.environment(DEVICE), changed: "another"}
    monkeypatch.setattr(tuned, "environment", lambda device: place)
    assert tuned.path_of(DEVICE, job.key) != path
    assert tuned.read(DEVICE) == {}
    os.rename(path, tuned.path_of(DEVICE, job.key))
    assert tuned.read(DEVICE) == {}, "a file that was renamed is not believed either"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2}', "\x00" * 100, "[" * 50_000, "[" * 100_000, '{"format": 99, "key": ""}'],
    ids=["empty", "torn", "list", "null", "short", "zeros", "deep", "large", "format"],
)
def test_a_corrupt_file_is_as_if_absent(job, store, text, unlaunched):
    path = written(job, num_warps=1)
    path.write_text(text)
    assert chosen(SMALL)["small"] == job.default
    attend(SMALL)
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=1)})
    assert chosen(SMALL)["small"].num_warps == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_warps": value} for value in (3, 0, 64, "4", 4.0, True, None, -4)),
        *({"num_stages": value} for value in (0, 100)),
        *({"images": value} for value in (0, 1 << 40)),
        {"block_n": 64},  # a power of two, but not this window's
        {"block_n": 17},
        {"block_d": 32},
        {"unknown": 1},
    ],
    ids=str,
)
def test_parameters_that_are_none_are_as_if_absent(job, store, changes):
    found = record(job.default, **{"num_warps": 1, **changes})
    path = written(job, **{"num_warps": 1, **changes})
    assert json.loads(path.read_text())["record"] == found
    assert chosen(SMALL)["small"] == job.default


def test_records_that_are_none_are_as_if_absent(job, store):
    good = record(job.default, num_warps=1)
    missing = {**good, "parameters": {"num_warps": 1}}
    for bad in (3, [], {}, missing, {**good, "tuned_ms": "fast"}, {**good, "default_ms": -1}, {**good, "more": 1}):
        tuned.write(DEVICE, {job.key: bad})
        assert chosen(SMALL)["small"] == job.default, bad


@pytest.mark.parametrize(
    ("kernel", "changes", "holds"),
    [
        ("large", {"images": 2}, True),
        ("large", {"images": 3}, False),
        ("query", {"images": 2}, False),
        ("bias", {"images": 4}, False),
        *(("large", {"max_registers": value}, value in (128, None)) for value in (128, None, 20, 256, "128")),
    ],
    ids=str,
)
def test_parameters_of_large_windows(store, kernel, changes, holds):
    """One or two images in the forward, as many as the default has in the backward; registers within bounds."""
    job = jobs_of(LARGE, train=True)[kernel]
    tuned.write(DEVICE, {job.key: record(job.default, num_warps=2, **changes)})
    assert (chosen(LARGE, train=True)[kernel].num_warps == 2) == holds


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_that_others_may_write_are_not_believed(job, store, tmp_path):
    path = written(job, num_warps=1)
    path.chmod(0o622)
    tuned.forget()
    assert chosen(SMALL)["small"] == job.default
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    tuned.forget()
    assert chosen(SMALL)["small"] == job.default


def test_a_folder_that_is_a_link_is_not_written(job, store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    store.parent.mkdir()
    store.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        tuned.write(DEVICE, {job.key: record(job.default)})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_unusable_cache_directory_means_defaults(store, monkeypatch, tmp_path, unlaunched):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        attend(SMALL)
        attend(LARGE)
        bias.cache.keep(bias.cache.folder_of("factors") or tmp_path / "file" / "factors" / "record", b"")
    (warning,) = (str(one.message) for one in caught if "swinaccel" in str(one.message))
    assert warning.startswith("swinaccel: SWINACCEL_CACHE_DIR=")


# The command.


def test_tuning_needs_a_gpu(tiny):  # noqa: F811
    result = call("tune", f"{tiny}:swin", "--device", "cpu")
    assert result.exit_code == 2
    assert "needs a GPU; this model is on cpu" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("timm:x", "--list"), ("timm:x", "--clear"), ("--list", "--clear")])
def test_one_thing_at_a_time(arguments):
    result = call("tune", *arguments)
    assert result.exit_code == 2
    assert "one of MODEL, --list and --clear" in result.stderr


@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="with a GPU there is a way to measure")
@pytest.mark.usefixtures("quick", "unlaunched")
def test_the_command(tiny, store, monkeypatch):  # noqa: F811
    def on_cpu(model, inputs, **options):
        return original(model, inputs, **{**options, "measurable": True})

    original = tuning.collect
    monkeypatch.setattr(tuning, "collect", on_cpu)
    monkeypatch.setattr(tuning, "graph_timer", Stopwatch("small", lambda launch: 1.0 + launch.num_warps))
    place = (f"{tiny}:swin", "--device", "cpu", "--batch", "1")

    def document(*arguments):
        result = call("tune", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    planned = document(*place, "--dry-run")["problems"]
    assert planned
    assert all(row["tuned"] is None for row in planned)
    found = document(*place)
    assert [row["key"] for row in found["problems"]] == [row["key"] for row in planned]
    assert all(row["speedup"] > 1 and row["tuned"] for row in found["problems"])
    again = document(*place, "--dry-run")["problems"]
    assert [row["tuned"] for row in again] == [row["tuned"] for row in found["problems"]]
    (listed,) = document("--list")["tuned"]
    assert listed["gpu"] == "Triton's interpreter"
    assert set(listed["launches"]) == {row["key"] for row in planned}
    for arguments, words in (
        (place, "launches are tuned"),
        ((*place, "--dry-run"), "num_warps="),
        (("--list",), "Triton's interpreter"),
    ):
        result = call("tune", *arguments)
        assert result.exit_code == 0, result.output
        assert words in result.stdout
    assert document("--clear")["removed"] == len(planned)
    assert document("--list")["tuned"] == []


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case((7, 7), (56, 56), (3, 3), heads=3, dim=32, batch=16),
        Case((16, 16), (64, 64), (8, 8), heads=3, dim=32, batch=4),
    ],
    ids=str,
)
def test_a_search_on_the_device(case):
    for job in jobs_of(case, train=True).values():
        found = tuning.search(job, tuning.graph_timer)
        assert found.error is None
        assert found.default_ms > 0
        assert found.tried > 3
