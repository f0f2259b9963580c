"""SVD factors of the bias: when they are used, how right they are, and that they are never stale."""

from __future__ import annotations

import copy
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
from helpers import TRITON_DEVICE, position_index, table_rows

import swinaccel
from swinaccel import ops
from swinaccel.bias import table as bias
from swinaccel.config import AccelConfig
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry, Section

WINDOW = (9, 8)
TOKENS, HEADS = 72, 1  # one more than a small window; few programs, for the interpreter takes its time
EXACT = 0.9999999  # energy that a bias of rank 16 holds and a random one does not


def smooth_table(window=WINDOW, heads=HEADS, seed=0):
    """Quadratic in the offsets, as trained tables roughly are: its bias has rank 5, exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(*(torch.arange(1 - axis, axis) / axis for axis in window), indexing="ij")
    weights = torch.randn(4, heads, generator=generator)
    terms = torch.stack((rows**2, cols**2, rows, cols), -1).view(-1, 4)
    return 2 * terms @ weights


def random_table(seed=0):
    return torch.randn(table_rows(WINDOW), HEADS, generator=torch.Generator().manual_seed(seed))


def dense(table, window=WINDOW):
    return reference.bias_from_table(table.float(), position_index(window))


def model_with(table):
    model = helpers.torchvision_attention(window=WINDOW, shift=(4, 4), heads=HEADS).to(TRITON_DEVICE)
    with torch.no_grad():
        model.relative_position_bias_table.copy_(table)
    return model.requires_grad_(False)


IMAGE = torch.randn(1, 9, 8, 16, generator=torch.Generator().manual_seed(5)).to(TRITON_DEVICE)


def accelerate(model, **options):
    return swinaccel.accelerate(model, backend="triton", **options)


def form(model):
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == 0
    return entry.bias


def originals(model, x=IMAGE):
    with swinaccel.disabled():
        return model(x)


def factor_options(table, rank=16):
    q, k = bias.factorize(dense(table), rank)
    index = position_index(WINDOW)
    return [part.to(TRITON_DEVICE).contiguous() for part in (q, k, table.float(), index)]


# Factorising.


@pytest.mark.parametrize("rank", [5, 16, 64], ids=lambda rank: f"rank{rank}")
def test_factors_of_enough_rank_are_exact(rank):
    wanted = dense(smooth_table())
    q, k = bias.factorize(wanted, rank)
    assert q.shape == k.shape == (HEADS, TOKENS, rank)
    assert (q @ k.mT - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_factors_have_the_least_error(rank):
    """Eckart and Young: no matrix of that rank is nearer; a subspace iteration must come close to it."""
    torch.manual_seed(1)
    wanted = dense(smooth_table((16, 16)) + 0.05 * torch.randn(31 * 31, HEADS), (16, 16))
    q, k = bias.factorize(wanted, rank)
    best = torch.linalg.svdvals(wanted.double())[:, rank:].square().sum(-1).sqrt()
    found = (wanted.double() - q.double() @ k.double().mT).square().sum((-2, -1)).sqrt()
    assert bool((found <= 1.1 * best + 1e-4).all())


def test_factorising_leaves_random_numbers_alone():
    before = torch.random.get_rng_state()
    bias.factorize(dense(random_table()), 4)
    assert torch.equal(torch.random.get_rng_state(), before)


# The rule.


def test_factors_are_used_where_forced_and_good_enough():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    assert form(model).startswith("factors, rank 16, error ")


def test_reported_error_bounds_the_difference():
    """Of scores, and so of outputs, up to the softmax's own slope."""
    torch.manual_seed(2)
    model = model_with(smooth_table() + 0.02 * torch.randn(table_rows(WINDOW), HEADS))
    exact = originals(model)
    accelerate(model, bias="factors", bias_energy=0.99)
    found = model(IMAGE)
    text = form(model)
    assert text.startswith("factors")
    error = float(text.rpartition(" ")[2])
    assert 0 < error < 0.5
    # A softmax whose scores move by at most e moves each weight by at most a factor exp(2e).
    values = model.proj.weight.abs().sum(1).max() * (IMAGE @ model.qkv.weight.T + model.qkv.bias)[..., -16:].abs().max()
    assert (found - exact).abs().max() <= (torch.tensor(2 * error).exp() - 1) * values + 1e-4
    assert (found - exact).abs().max() > 0


def test_a_full_rank_table_stays_a_table():
    model = model_with(random_table())
    exact = originals(model)
    accelerate(model, bias="factors", bias_energy=EXACT)
    helpers.assert_close(model(IMAGE), exact)
    assert form(model) == "table"


def test_energy_decides():
    """The looser the rule, the smaller the rank that meets it."""
    table = smooth_table() + 0.3 * random_table()
    ranks = []
    for energy in (0.5, 0.995, EXACT):
        model = accelerate(model_with(table), bias_energy=energy)
        model(IMAGE)
        ranks.append(int(form(model).split()[2].rstrip(",")) if form(model) != "table" else TOKENS)
    assert ranks == sorted(ranks)
    assert ranks[0] == 16
    assert ranks[-1] == TOKENS


@pytest.mark.parametrize("energy", [0.9, 0.995])
def test_factors_hold_the_energy_they_promise(energy):
    table = smooth_table() + 0.2 * random_table()
    wanted = dense(table)
    q, k = bias._make(wanted, torch.float32, energy)
    assert q.shape[-1]
    missed = (wanted - q.float() @ k.float().mT).square().sum((-2, -1))
    assert bool((missed <= (1 - energy) * 1.001 * wanted.square().sum((-2, -1))).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_err_no_more_than_rounding_the_bias(dtype):
    """The rule without an energy: indistinguishable from the bias in the compute dtype, or no factors."""
    wanted = dense(smooth_table())
    q, k = bias._make(wanted, dtype, None)
    if q.shape[-1]:
        error = (wanted - q.float() @ k.float().mT).abs().max()
        assert error <= wanted.abs().max() * torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16:  # coarse enough for what the factors' own fp16 rounds
        assert q.shape[-1] == 16
    assert bias._make(dense(random_table()), dtype, None)[0].shape[-1] == 0


def test_table_is_never_factors():
    model = accelerate(model_with(smooth_table()), bias="table", bias_energy=None)
    model(IMAGE)
    assert form(model) == "table"


def test_small_windows_keep_the_table():
    model = helpers.torchvision_attention(window=(8, 8), heads=HEADS).to(TRITON_DEVICE).requires_grad_(False)
    accelerate(model, bias="factors", bias_energy=0.5)
    model(torch.randn(1, 8, 8, 16, device=TRITON_DEVICE))
    assert form(model) == "table"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_factors_are_used_on_request_only(dtype):
    model = accelerate(model_with(smooth_table()).to(dtype))
    model(IMAGE.to(dtype))
    assert form(model) == "table"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_that_are_not_finite_are_not_factorised(value):
    table = smooth_table()
    table[0, 0] = value
    model = accelerate(model_with(table), bias="factors", bias_energy=0.9)
    model(IMAGE)
    assert form(model) == "table"


def test_training_does_not_use_factors():
    model = accelerate(model_with(smooth_table()).requires_grad_(True), bias="factors", bias_energy=EXACT)
    out = model(IMAGE)
    out.sum().backward()
    assert model.relative_position_bias_table.grad is not None
    (entry,) = swinaccel.report(model)
    assert not (entry.bias or "").startswith("factors")


# In the kernel.


@pytest.mark.parametrize("shift", [(0, 0), (4, 4)], ids=["plain", "shifted"])
@pytest.mark.parametrize("rank", [16, 32])
def test_factors_in_the_kernel(rank, shift, poisoned):
    table = smooth_table()
    qkv = torch.randn(1, 10, 16, 48).to(TRITON_DEVICE)
    options = {
        "num_heads": HEADS,
        "table": table.to(TRITON_DEVICE),
        "index": position_index(WINDOW).to(TRITON_DEVICE),
        "scale": 0.25,
    }
    geometry = Geometry((10, 16), WINDOW, shift)
    found = window_ops.shifted_window_attention(qkv, geometry, **options, factors=factor_options(table, rank))
    assert not ops.has_failures()
    helpers.assert_close(found.cpu().double(), helpers.oracle(qkv, geometry, **options))


@pytest.mark.parametrize("what", ["table", "one-entry", "index", "nan", "shape"])
def test_stale_factors_in_the_kernel_are_not_used(what, poisoned):
    known = smooth_table()
    table, index = known.clone(), position_index(WINDOW)
    if what == "table":
        table = random_table()
    elif what == "one-entry":
        table[-1, -1] += 3.0
    elif what == "index":
        index = index.flip(0)
    qkv = torch.randn(1, 9, 16, 48).to(TRITON_DEVICE)
    geometry = Geometry((9, 16), WINDOW, (4, 4))
    options = {
        "num_heads": HEADS,
        "table": table.to(TRITON_DEVICE),
        "index": index.to(TRITON_DEVICE),
        "scale": 0.25,
    }
    factors = factor_options(known)
    if what == "nan":
        factors[2][0, 0] = float("nan")
    elif what == "shape":
        factors[2] = factors[2][:-1].contiguous()
    found = window_ops.shifted_window_attention(qkv, geometry, **options, factors=factors)
    assert not ops.has_failures()
    helpers.assert_close(found.cpu().double(), helpers.oracle(qkv, geometry, **options))


# Edits, by whatever means.


def in_place(table):
    table.copy_(random_table(1))


def through_data(table):
    table.data.copy_(random_table(1))


def through_data_one_entry(table):
    table.data[len(table) // 2] += 4.0  # that of a token with itself


def through_numpy(table):
    table.detach().cpu().numpy()[...] = random_table(1).numpy()


def foreach(table):
    torch._foreach_lerp_([table.data], [random_table(1).to(table.device)], 0.9)


def optimizer(kind, **options):
    def edit(table):
        table.requires_grad_(True)
        table.grad = random_table(1).to(table.device)
        getattr(torch.optim, kind)([table], lr=0.5, **options).step()
        table.grad = None
        table.requires_grad_(False)

    return edit


EDITS = {
    "in-place": in_place,
    "data": through_data,
    "data-one-entry": through_data_one_entry,
    "foreach-data": foreach,
    "sgd": optimizer("SGD"),
    "sgd-fused": optimizer("SGD", fused=True),
    "adam-fused": optimizer("Adam", fused=True),
    "adamw-fused": optimizer("AdamW", fused=True),
}
if TRITON_DEVICE == "cpu":
    EDITS["numpy"] = through_numpy


@pytest.mark.parametrize("edit", EDITS)
def test_output_follows_the_live_table(edit):
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    before = model(IMAGE)
    assert form(model).startswith("factors")
    EDITS[edit](model.relative_position_bias_table)
    expected = originals(model)
    assert helpers.difference(before, expected) > 1e-4
    for _ in range(2):
        helpers.assert_close(model(IMAGE), expected)


def test_output_follows_the_live_index():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    before = model(IMAGE)
    model.relative_position_index.data.copy_(model.relative_position_index.flip(0))
    expected = originals(model)
    assert helpers.difference(before, expected) > 1e-3
    helpers.assert_close(model(IMAGE), expected)


def test_output_follows_a_new_parameter():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    model.relative_position_bias_table = torch.nn.Parameter(random_table(3).to(TRITON_DEVICE), False)
    helpers.assert_close(model(IMAGE), originals(model))


def test_output_follows_load_state_dict():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    model.load_state_dict(model_with(smooth_table(seed=4)).state_dict())
    helpers.assert_close(model(IMAGE), originals(model))
    assert form(model).startswith("factors")


def test_cosine_position_mlp_is_followed():
    """V2's table comes from an MLP, and all of it is watched."""
    model = helpers.torchvision_attention(window=WINDOW, heads=HEADS, v2=True).to(TRITON_DEVICE).requires_grad_(False)
    accelerate(model, bias="factors", bias_energy=0.99)
    model(IMAGE)
    for parameter in model.cpb_mlp.parameters():
        parameter.data.mul_(-1.5)
        expected, found = originals(model), model(IMAGE)
        exact = form(model) == "table"
        helpers.assert_close(found, expected, 2e-5 if exact else 0.1)


def test_copies_do_not_share_factors():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    twin = copy.deepcopy(model)
    twin.relative_position_bias_table.data.copy_(random_table(6))
    helpers.assert_close(twin(IMAGE), originals(twin))
    helpers.assert_close(model(IMAGE), originals(model))


def test_factors_do_not_keep_a_model_alive():
    import gc
    import weakref

    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    table = weakref.ref(model.relative_position_bias_table)
    del model
    gc.collect()
    assert table() is None


# On disk.


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
