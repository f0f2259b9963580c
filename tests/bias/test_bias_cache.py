"""Factors on disk: computed once, private, and of no harm whatever becomes of their records and folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import warnings

import helpers
import pytest
import safetensors.torch
import torch
from bias_tables import EXACT, HEADS, IMAGE, WINDOW, accelerate, form, model_with, originals, random_table, smooth_table
from helpers import position_index

from swinaccel import ops
from swinaccel.bias import table as bias
from swinaccel.config import AccelConfig
from swinaccel.spec.window import Geometry, Section


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """One entry for each time that factors are computed."""
    calls, make = [], bias._make
    monkeypatch.setattr(bias, "_make", lambda *args: calls.append(1) or make(*args))
    return calls


def use(table=None):
    bias.forget()  # as a new process would begin
    model = accelerate(model_with(smooth_table() if table is None else table), bias="factors", bias_energy=EXACT)
    found = model(IMAGE)
    helpers.assert_close(found, originals(model))
    return form(model)


def records(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_factors_are_computed_once(folder, made):
    first = use()
    assert use() == first
    assert len(made) == 1
    (record,) = records(folder)
    assert record.suffix == ".safetensors"
    use(smooth_table(seed=7))
    assert len(made) == 2
    assert len(records(folder)) == 2


def test_refusals_are_remembered_too(folder, made):
    assert use(random_table()) == use(random_table()) == "table"
    assert len(made) == 1


def test_records_are_private(folder):
    use()
    (record,) = records(folder)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700


def factors_of(table, source, dtype, energy=EXACT):
    bias.forget()
    index, config = position_index(WINDOW), AccelConfig(bias="factors", bias_energy=energy)
    section = Section(
        Geometry(WINDOW, WINDOW), HEADS, 16, None, None, None,
        table=lambda: table, table_shape=tuple(table.shape), index=index, sources=(source,),
    )  # fmt: skip
    return bias.factors(section, config, dtype)


def saved(change):
    """A record like the one that is there, whose factors are what `change` makes of them."""

    def damage(path):
        content = safetensors.torch.load_file(path)
        made = {name: change(tensor).contiguous() for name, tensor in content.items()}
        safetensors.torch.save_file(made, path, metadata={"rank": "16"})

    return damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes(byte ^ 0xFF for byte in whole[20:40]) + whole[40:])


def linked(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int32, torch.bool)

DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "no-tensors": lambda path: path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "),
    "unknown-dtype": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"')),
    "a-terabyte": lambda path: os.truncate(path, 1 << 40),
    "cut": cut,
    "flipped": flipped,
    "other-names": lambda path: safetensors.torch.save_file({"a": torch.ones(1)}, path),
    "other-shape": saved(lambda one: one[:, :4]),
    "other-rank": saved(lambda one: one[..., :7]),
    "no-rank": saved(lambda one: one.flatten()),
    "scalar": saved(lambda one: one.sum()),
    "nan": saved(lambda one: one.where(one != one.max(), torch.nan)),
    "infinity": saved(lambda one: one.where(one != one.max(), torch.inf)),
    **{str(dtype).split(".")[-1]: saved(lambda one, dtype=dtype: one.to(dtype)) for dtype in DTYPES},
    "link": linked,
    "pipe": a_pipe,
    "others-may-write": lambda path: path.chmod(0o606),
    "group-may-write": lambda path: path.chmod(0o620),
}


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and permissions of POSIX")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_of_no_use_is_made_anew(folder, made, damage, caplog):
    table = smooth_table()
    first = factors_of(table, table, torch.float32)
    (record,) = records(folder)
    whole = record.read_bytes()
    for _ in range(2):
        DAMAGE[damage](record)
        second = factors_of(table, table, torch.float32)
        assert torch.equal(second.q, first.q)
        assert torch.equal(second.k, first.k)
        assert not record.is_symlink()
        assert record.read_bytes() == whole
        assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert len(made) == 3
    assert caplog.text.count(record.name) == 1, "it is said once"
    factors_of(table, table, torch.float32)
    assert len(made) == 3, "and serves again"


def test_a_record_of_no_use_fails_no_kernel(folder):
    first = use()
    (record,) = records(folder)
    for damage in ("bfloat16", "complex64", "float8_e4m3fn", "a-terabyte"):
        DAMAGE[damage](record)
        assert use() == first
    assert not ops.has_failures()


@pytest.mark.parametrize(
    "change", [lambda k: k + 1.0, lambda k: 1.01 * k, torch.zeros_like], ids=["all", "a bit", "none"]
)
@pytest.mark.parametrize("energy", [EXACT, None], ids=["energy", "rounding"])
def test_record_that_does_not_keep_the_rule_is_a_miss(folder, made, energy, change):
    """Well-formed and not what was computed, as after a flipped bit."""
    table = smooth_table()
    first = factors_of(table, table, torch.bfloat16, energy)
    (record,) = records(folder)
    whole, content = record.read_bytes(), safetensors.torch.load_file(record)
    content["k"] = change(content["k"])
    safetensors.torch.save_file(content, record, metadata={"rank": "16"})
    second = factors_of(table, table, torch.bfloat16, energy)
    assert (second.rank, second.error) == (first.rank, first.error)
    assert len(made) == 2
    assert record.read_bytes() == whole


def test_tables_made_in_other_ways_from_the_same_share_no_record(folder, made):
    """SwinV2's table is 16 · sigmoid of what an MLP gives; Swin2SR's is what it gives."""
    source = smooth_table()
    for _ in range(2):
        for table in (source, 16 * torch.sigmoid(source)):
            found = factors_of(table, source, torch.float32)
            assert found.error < 1e-2 * table.abs().max()
    assert len(made) == 2
    assert len(records(folder)) == 2


def a_file_in_place_of_the_folder(path, monkeypatch):
    path.parent.parent.mkdir()
    path.parent.write_text("no folder")


def a_folder_in_place_of_the_record(path, monkeypatch):
    (path / "in it").mkdir(parents=True)


def a_linked_folder(path, monkeypatch):
    (path.parent.parent.parent / "target").mkdir()
    path.parent.parent.mkdir()
    path.parent.symlink_to(path.parent.parent.parent / "target")


def a_folder_of_all(path, monkeypatch):
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)


def a_folder_of_another(path, monkeypatch):
    path.parent.mkdir(parents=True)
    owner = path.parent.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)


def a_full_disk(path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def a_folder_that_cannot_be_written(path, monkeypatch):
    def closed(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", f"{path.parent}/random")

    monkeypatch.setattr(tempfile, "mkstemp", closed)


def a_folder_that_vanishes(path, monkeypatch):
    def vanish(source, target, replace=os.replace):
        shutil.rmtree(path.parent)
        replace(source, target)

    monkeypatch.setattr(os, "replace", vanish)


OBSTACLES = (
    a_file_in_place_of_the_folder,
    a_folder_in_place_of_the_record,
    a_linked_folder,
    a_folder_of_all,
    a_folder_of_another,
    a_full_disk,
    a_folder_that_cannot_be_written,
    a_folder_that_vanishes,
)


@pytest.mark.skipif(os.name != "posix", reason="links, limits and permissions of POSIX")
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda one: one.__name__.replace("_", "-"))
def test_nothing_can_be_kept(folder, made, monkeypatch, obstacle):
    """Factors serve all the same, with one warning that says what to do, and nothing half written is left."""
    table = smooth_table()
    place = bias._record_path((table, position_index(WINDOW)), table, torch.float32, EXACT)
    undo = obstacle(place, monkeypatch)
    try:
        with warnings.catch_warnings(record=True) as caught:
            found = [factors_of(table, table, torch.float32).rank for _ in range(2)]
    finally:
        if undo is not None:
            undo()
    assert found == [16, 16]
    assert len(made) == 2
    (warning,) = (str(one.message) for one in caught)
    assert "Results are right without a cache" in warning
    assert "set SWINACCEL_CACHE_DIR to a folder that you can write to" in warning
    assert [path for path in records(folder.parent) if path.suffix == ".part"] == []


def test_numbers_without_a_cache(folder):
    folder.mkdir()
    (folder / "factors").write_text("no folder")
    with pytest.warns(UserWarning, match="not usable"):
        assert use().startswith("factors")


def test_record_appears_in_one_step(folder, monkeypatch):
    """It is complete under another name in the same folder before it gets its own."""
    seen, replace = [], os.replace

    def watched(source, target):
        seen.append((os.path.dirname(source) == os.path.dirname(target), os.path.getsize(source), target.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    use()
    (record,) = records(folder)
    assert seen == [(True, record.stat().st_size, False)]


def test_energy_beyond_fp32_is_no_energy(folder):
    """Squares of numbers that fp32 holds may be infinite in it, of which any share is infinite."""
    table = random_table()
    expected, found = (factors_of(scale * table, scale * table, torch.float32, 0.9) for scale in (1.0, 1e25))
    assert found.rank == expected.rank > 16
    largest = 3e38 * table.sign()
    assert factors_of(largest, largest, torch.float32, 0.9) is None
