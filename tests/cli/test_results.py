"""The command that makes the published tables, at tiny sizes on a CPU: rows, notes, files."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_cli import tiny  # noqa: F401

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import attention
import measure
import tables

CPU = torch.device("cpu")
WINDOW = attention.Windows("tiny", 2, 8, 2, 4, 2)
COSINE = WINDOW._replace(cosine=True)
SEQUENCE = attention.Sequence(64, 2, 16, 16, 2)
ROW = measure.Row(WINDOW, "float32")
SETTING = measure.Setting(CPU, rounds=1)
MACHINE = {
    "device": "CPU", "host": "here", "versions": {"torch": "2"}, "begun": "now", "rounds": 1,
    "fp32_products": "highest", "copy_gb_s": 1000.0, "matrix_tflop_s": {"float32": 1.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No measurement of the machine but where a test is about it, and one thread."""
    if "described" not in request.fixturenames:
        monkeypatch.setattr(measure, "describe", lambda *_: MACHINE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and on a busy machine wait for them
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def described():
    """The machine is measured."""


def variants(row):
    return {variant["name"]: variant for variant in row["variants"]}


@pytest.mark.usefixtures("described")
def test_end_to_end(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    rows = [
        ROW,
        measure.Row(COSINE, "float32", True),
        measure.Row(SEQUENCE, "float32", True),
        measure.Row(measure.Model(f"{tiny}:swin", 2), "float32"),
        measure.Row(measure.Model(f"{tiny}:swin", 1), "bfloat16", True),
    ]
    monkeypatch.setattr(measure, "plan", lambda is_cuda: rows)
    assert measure.main([str(tmp_path), "--device", "cpu", "--rounds", "2"]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
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
    assert document["machine"]["copy_gb_s"] > 0
    assert document["machine"]["matrix_tflop_s"]["float32"] > 0
    assert document["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    text = (tmp_path / "results.md").read_text()
    for words in ("## Window attention", "### Forward + backward", "## Whole models, ms per batch", "| swinaccel |"):
        assert words in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"attention-forward-speedup.png", "models-inference-speedup.png"} <= set(pictures)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text for name in pictures)
    assert capsys.readouterr().out.splitlines()[4].startswith("5 of 5: training training: ")


def test_floors_are_those_of_the_formulas():
    def row(case, backward):
        return measure.measure_attention(SETTING, case, "float32", backward)

    forward, both = row(WINDOW, False), row(WINDOW, True)
    assert forward["bytes"] == 2 * 64 * 64 * 4 * 4  # images x tokens x channels x (q, k, v, out) x bytes
    assert forward["flops"] == 2 * 2 * (2 * 4 * 2) * 16**2 * 32  # products x multiply and add x windows x N² x D
    assert both["bytes"] == forward["bytes"] * 11 / 4
    floor = measure.floor(MACHINE, "float32", forward)
    assert floor == {"memory_ms": forward["bytes"] / 1e9, "matrix_ms": forward["flops"] / 1e9}
    assert row(SEQUENCE, False)["flops"] == 4 * 2 * 16 * 16**2 * (1 + 2 + 2 + 2)


def test_what_fails_is_a_note_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(measure, "measure_model", broken)
    rows = [measure.Row(measure.Model("bad", 1), "float32"), ROW]
    first, second = measure.run(tmp_path, rows, measure.Setting(CPU, 1, compile=True))["rows"]
    assert first["note"] == "RuntimeError: no compiler here"
    assert first["variants"] == []
    assert second["note"] is None
    assert variants(second)["torch.compile"]["error"] == "RuntimeError: no compiler here"
    assert variants(second)["swinaccel"]["latency_ms"] > 0
    tables.main([str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert "- bad, B1, float32: RuntimeError: no compiler here" in text
    assert "torch.compile: RuntimeError: no compiler here" in text


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_model", interrupted)
    monkeypatch.setattr(measure, "plan", lambda is_cuda: [ROW, measure.Row(measure.Model("endless", 1), "float32")])
    with pytest.raises(KeyboardInterrupt):
        measure.main([str(tmp_path), "--rounds", "1", "--device", "cpu"])
    first, second = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert first["note"] is None
    assert second["note"] == "not run"
    assert "endless, B1, float32: not run" in (tmp_path / "results.md").read_text()


def test_the_time_is_up(tmp_path):
    (row,) = measure.run(tmp_path, [ROW], measure.Setting(CPU, 1, deadline=0.0))["rows"]
    assert row["note"] == "not run: the time was up"


def test_a_failure_of_a_kernel_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.ops, "has_failures", lambda: True)
    assert (
        measure.run(tmp_path, [ROW], SETTING)["rows"][0]["note"] == "a kernel of swinaccel failed, and PyTorch stood in"
    )


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    measure.run(tmp_path, [ROW], SETTING)
    tables.main([str(tmp_path)])
    assert "no plots: " in capsys.readouterr().err
    assert "| swinaccel |" in (tmp_path / "results.md").read_text()


def test_losses_and_other_outputs_are_said():
    one = {"latency_ms": 1.0, "p10_ms": 1.0, "peak_memory_mib": None, "error": None, "timed": "CUDA graph"}
    shown = [
        one | {"name": "SDPA", "difference": 0.0},
        one | {"name": "accelerated", "latency_ms": 2.0, "difference": "inf"},
    ]
    row = {"section": "models", "mode": "inference", "name": "net", "dtype": "float32", "note": None, "variants": shown}
    text = tables.markdown({"machine": MACHINE, "rows": [row | {"fallbacks": 3, "report": "1 of 2"}]})
    assert "| 0.50x |" in text
    assert "- net, float32, accelerated: its output differs from the first column's by inf" in text
    assert "- net, float32: 3 calls of accelerated attention ran the original; 1 of 2" in text


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
    rows = [ROW, measure.Row(COSINE, "float32"), measure.Row(SEQUENCE, "float32")]
    document = measure.run(tmp_path, rows, measure.Setting(CPU, 1, seed_repos=tmp_path / "repos"))
    first, second, third = (variants(row) for row in document["rows"])
    assert first["Flash Window Attention, no mask"]["latency_ms"] > 0
    assert first["Flash Window Attention, no mask"]["difference"] > 0.01
    assert first["FlashBias, rank 16"]["difference"] < 1e-4  # 16 tokens: rank 16 is exact
    assert second["FlashBias, rank 16"]["difference"] < 1e-4
    assert second["Flash Window Attention V2"]["error"] == "AssertionError: fp16 only"
    assert "kernel.SWBA was not found" in third["Bloc-Sliding-Window"]["error"]
    first["Flash Window Attention, no mask"]["latency_ms"] = 1e-9  # it computes less, and is no peer
    assert tables.best(document["rows"][0], ours=False) > 1e-9


@pytest.mark.parametrize("is_cuda", [False, True])
def test_plans(is_cuda):
    rows = [row.entry() for row in measure.plan(is_cuda)]
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    assert {row["section"] for row in rows} == set(tables.SECTIONS) - (set() if is_cuda else {"training"})
    assert sum(row["section"] == "attention" for row in rows) == 12
    assert rows[0]["section"] == "attention"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "nothing"), "no row matches 'nothing'"),
        (("--seed-repos", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        measure.main([str(tmp_path), "--device", "cpu", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    cases = (WINDOW, COSINE, attention.Sequence(1024, 2, 64, 128, 2))
    rows = [measure.Row(case, "float16", backward) for case in cases for backward in (False, True)]
    machine = MACHINE | {"matrix_tflop_s": {"float16": 1.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "describe", lambda *_: machine)
        document = measure.run(tmp_path, rows, measure.Setting(torch.device("cuda", 0), 3, compile=True))
    for entry in document["rows"]:
        assert entry["note"] is None, entry
        for variant in entry["variants"]:
            assert variant["error"] is None, variant
            assert variant["timed"] == "CUDA graph"
            assert variant["difference"] < 0.02
            assert variant["peak_memory_mib"] >= 0
