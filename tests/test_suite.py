"""The suite of benchmarks, at tiny sizes on a CPU: rows, notes, files, and their merging."""

from __future__ import annotations

import copy
import json
import textwrap

import pytest
import torch
from test_cli import call, tiny  # noqa: F401

from swinaccel import plots, suite

CPU = torch.device("cpu")
WINDOW = suite.WindowCase("tiny", 2, 8, 2, 4, 2)
COSINE = WINDOW._replace(cosine=True)
SEQUENCE = suite.SequenceCase(64, 2, 16, 16, 2)
ROW = suite.attention_row(WINDOW, "float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Small measurements of the machine, and plots only where a test is about them."""
    monkeypatch.setitem(suite.CEILINGS, False, (2**16, 32, 32))
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(plots, "_draw", lambda *_: [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and on a busy machine wait for them
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plotted():
    """Plots are drawn."""


def failing(setting):
    raise RuntimeError("out of memory\nand much more")


def variants(row):
    return {variant["name"]: variant for variant in row["variants"]}


@pytest.mark.usefixtures("plotted")
def test_end_to_end(tiny, tmp_path):  # noqa: F811
    steps = []
    rows = [
        ROW,
        suite.attention_row(COSINE, "float32", backward=True),
        suite.attention_row(SEQUENCE, "float32", backward=True),
        suite.model_row(f"{tiny}:swin", 2, "float32"),
        suite.model_row(f"{tiny}:swin", 1, "bfloat16", train=True),
    ]
    document = suite.run(tmp_path / "out", rows=rows, rounds=2, progress=lambda *step: steps.append(step))
    assert json.loads((tmp_path / "out" / "suite.json").read_text()) == document
    for row in document["rows"]:
        assert row["note"] is None, row
        assert row["floor"]["memory_ms"] > 0
        assert row["floor"]["matrix_ms"] > 0 or row["section"] == "training"
        for variant in row["variants"]:
            assert variant["error"] is None
            assert 0 < variant["p10_ms"] <= variant["latency_ms"]
            assert variant["difference"] < (1e-4 if row["section"] != "training" else 0.5)
    assert set(variants(document["rows"][0])) == {"eager", "SDPA + mask", "swinaccel"}
    assert set(variants(document["rows"][2])) == {"SDPA + mask", "swinaccel"}
    assert set(variants(document["rows"][3])) == {"original", "SDPA", "accelerated"}
    machine = document["runs"][0]
    assert machine["copy_gb_s"] > 0
    assert machine["matrix_tflop_s"]["float32"] > 0
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]
    text = (tmp_path / "out" / "suite.md").read_text()
    for words in ("## Window attention", "### Forward + backward", "## Whole models, ms per batch", "| swinaccel |"):
        assert words in text
    for name in document["plots"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert {"roofline.png", "models-speed.png", "attention-forward-speed.png"} <= set(document["plots"])
    assert steps[0] == ("measuring what the device can do", 0, 5)
    assert steps[-1][1:] == (4, 5)


def test_floors_are_those_of_the_formulas():
    machine = {"copy_gb_s": 1000.0, "matrix_tflop_s": {"float32": 1.0}}
    setting = suite.Setting(CPU, 1, False)
    forward, both = (suite.measure_windows(setting, WINDOW, "float32", backward) for backward in (False, True))
    assert forward["bytes"] == 2 * 64 * 64 * 4 * 4  # images x tokens x channels x (q, k, v, out) x bytes
    assert forward["flops"] == 2 * 2 * (2 * 4 * 2) * 16**2 * 32  # products x multiply and add x windows x N² x D
    assert both["bytes"] == forward["bytes"] * 11 / 4
    floor = suite._floor(machine, "float32", forward)
    assert floor == {"memory_ms": forward["bytes"] / 1e9, "matrix_ms": forward["flops"] / 1e9}
    assert suite._floor(machine, "float16", forward)["matrix_ms"] is None
    blocks = suite.measure_sequence(setting, SEQUENCE, "float32", False)
    assert blocks["flops"] == 4 * 2 * 16 * 16**2 * (1 + 2 + 2 + 2)


def test_what_fails_is_a_note_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    bad = suite.Row("attention", "forward", "bad", "float32", failing)
    document = suite.run(tmp_path, rows=[bad, ROW], rounds=1, compile=True)
    first, second = document["rows"]
    assert first["note"] == "RuntimeError: out of memory"
    assert first["variants"] == []
    assert second["note"] is None
    assert variants(second)["torch.compile"]["error"] == "RuntimeError: no compiler here"
    assert variants(second)["swinaccel"]["latency_ms"] > 0
    text = (tmp_path / "suite.md").read_text()
    assert "- bad, float32: RuntimeError: out of memory" in text
    assert "torch.compile: RuntimeError: no compiler here" in text


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(setting):
        raise KeyboardInterrupt

    last = suite.Row("sequence", "forward", "endless", "float32", interrupted)
    monkeypatch.setattr(suite, "plan", lambda *_: [ROW, last])
    result = call("bench", "--suite", "--output", tmp_path, "--rounds", 1, "--device", "cpu")
    assert result.exit_code == 130
    assert f"interrupted; what was measured is in {tmp_path}" in result.stderr
    first, second = json.loads((tmp_path / "suite.json").read_text())["rows"]
    assert first["note"] is None
    assert second["note"] == "not run"
    assert "endless, float32: not run" in (tmp_path / "suite.md").read_text()


def test_minutes(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    rows = [suite.Row("attention", "forward", str(n), "float32", failing) for n in range(3)]
    document = suite.run(tmp_path, rows=rows, minutes=1)
    assert document["rows"][0]["note"] == "RuntimeError: out of memory"
    assert document["rows"][2]["note"] == "not run: the 1 minutes were up"


@pytest.mark.usefixtures("plotted")
def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    document = suite.run(tmp_path, rows=[ROW], rounds=1)
    assert "matplotlib is not installed" in document["plots_note"]
    assert "No plots: matplotlib is not installed" in (tmp_path / "suite.md").read_text()
    monkeypatch.undo()
    result = call("bench", "--suite", "--from", tmp_path / "suite.json", "--output", tmp_path / "drawn")
    assert result.exit_code == 0, result.output
    assert "1 rows measured" in result.stdout
    assert (tmp_path / "drawn" / "roofline.png").exists()
    assert "No plots" not in (tmp_path / "drawn" / "suite.md").read_text()


def test_merging():
    row = {"section": "attention", "mode": "forward", "dtype": "float32", "run": 0, "variants": []}
    measured, missing = row | {"name": "one", "note": None, "is": 1}, row | {"name": "one", "note": "not run"}
    one = {"format": plots.FORMAT, "runs": [{"device": "A"}], "rows": [measured]}
    two = {"format": plots.FORMAT, "runs": [{"device": "A"}], "rows": [missing, row | {"name": "two", "note": None}]}
    other = copy.deepcopy(one)
    other["runs"][0]["device"] = "B"
    newer = copy.deepcopy(one)
    newer["rows"][0]["is"] = 2
    merged = plots.merge([one, two, other, newer])
    found = [(r["name"], r["run"], r.get("is")) for r in merged["rows"]]
    assert found == [("one", 3, 2), ("two", 1, None), ("one", 2, 1)]
    assert len(merged["runs"]) == 4


SEEDS = {
    "first/flash_swin_attn/__init__.py": """
        def flash_swin_attn_func(q, k, v, bias, scale):
            return (q @ k.mT * scale + bias).softmax(-1) @ v
    """,
    "second/fwca/__init__.py": """
        import torch
        class FlashWindowCosineAttention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v, logit_scale, bias, mask):
                raise AssertionError("fp16 only")
    """,
    "third/Vision/flash_bias_triton.py": """
        def flash_bias_func(q, k, v, q_bias, k_bias, mask, causal, scale):
            q, k, v, q_bias, k_bias = (t.transpose(1, 2) for t in (q, k, v, q_bias, k_bias))
            return ((q @ k.mT * scale + q_bias @ k_bias.mT + mask).softmax(-1) @ v).transpose(1, 2)
    """,
}


def test_peers_from_their_repositories(tmp_path):
    for name, text in SEEDS.items():
        path = tmp_path / "repos" / name
        path.parent.mkdir(parents=True)
        path.write_text(textwrap.dedent(text))
    rows = [ROW, suite.attention_row(COSINE, "float32"), suite.attention_row(SEQUENCE, "float32")]
    document = suite.run(tmp_path / "out", rows=rows, rounds=1, seed_repos=tmp_path / "repos")
    first, second, third = (variants(row) for row in document["rows"])
    assert first["Flash Window Attention, no mask"]["latency_ms"] > 0
    assert first["Flash Window Attention, no mask"]["difference"] > 0.01
    assert first["FlashBias, rank 16"]["difference"] < 1e-4  # 16 tokens: rank 16 is exact
    assert second["FlashBias, rank 16"]["difference"] < 1e-4
    assert second["Flash Window Attention V2"]["error"] == "AssertionError: fp16 only"
    assert "kernel.SWBA was not found" in third["Bloc-Sliding-Window"]["error"]
    assert plots.best(document["rows"][0], ours=False)["name"] != "Flash Window Attention, no mask"


def test_plans():
    for device in (CPU, torch.device("cuda")):
        full, quick = (suite.plan(device, quick) for quick in (False, True))
        assert len(quick) < len(full)
        keys = [(row.section, row.name, row.mode, row.dtype) for row in full]
        assert len(set(keys)) == len(keys)
        assert {row.dtype for row in suite.plan(device, dtype="float32") if row.section != "training"} == {"float32"}
    assert {row.section for row in full} == set(suite.SECTIONS)
    assert sum(row.section == "attention" for row in full) == 12
    assert full[0].section == "attention"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench",), "give MODEL or --suite"),
        (("bench", "timm:swin", "--suite"), "give MODEL or --suite, and not both"),
        (("bench", "--suite", "--train"), "--train is not for --suite"),
        (("bench", "timm:swin", "--quick"), "--quick is for --suite only"),
        (("bench", "--suite", "--from", "nowhere.json"), "nowhere.json cannot be read"),
        (("bench", "--suite", "--from", "nowhere.json", "--quick"), "--from measures nothing"),
        (("bench", "--suite", "--from", "{tmp}/other.json"), "was not written by bench --suite"),
        (("bench", "--suite", "--only", "kernels"), "only must name sections, which are attention, sequence"),
        (("bench", "--suite", "--only", "models:absent", "--device", "cpu"), "no row of 'models' here has 'absent'"),
        (("bench", "--suite", "--minutes", "-1"), "minutes must be positive"),
        (("bench", "--suite", "--dtype", "int8"), "dtype must be one of"),
        (("bench", "--suite", "--seed-repos", "{tmp}/absent"), "seed_repos must be a folder"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, arguments, words):
    (tmp_path / "other.json").write_text("[]")
    result = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr


def test_json(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "plan", lambda *_: [ROW])
    result = call("bench", "--suite", "--output", tmp_path, "--rounds", 1, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == plots.FORMAT


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_compilers_mode_is_that_of_whole_models(tiny, tmp_path, monkeypatch, mode):  # noqa: F811
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: given.append(mode) or model)
    monkeypatch.setattr(suite, "plan", lambda *_: [ROW, suite.model_row(f"{tiny}:swin", 2, "float32")])
    options = ("--compile", "--compile-mode", mode) if mode else ("--compile",)
    result = call("bench", "--suite", "--output", tmp_path, "--rounds", 1, "--device", "cpu", "--json", *options)
    assert result.exit_code == 0, result.output
    assert given == [mode, mode]
    names = variants(json.loads(result.stdout)["rows"][1])
    assert f"accelerated + torch.compile{f' {mode}' if mode else ''}" in names


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    cases = (WINDOW, COSINE, suite.SequenceCase(1024, 2, 64, 128, 2))
    rows = [suite.attention_row(case, "float16", backward) for case in cases for backward in (False, True)]
    document = suite.run(tmp_path, rows=rows, rounds=3, device="cuda")
    for entry in document["rows"]:
        assert entry["note"] is None, entry
        for variant in entry["variants"]:
            assert variant["error"] is None, variant
            assert variant["timed"] == "CUDA graph"
            assert variant["difference"] < 0.02
            assert variant["peak_memory_mib"] >= 0
