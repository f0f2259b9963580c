"""AOTInductor's packages hold the kernels: what the compiler gets in an operator's place, and that it is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE

import swinaccel
from swinaccel.backends.triton import devices
from swinaccel.backends.triton.traced import traced_launch
from swinaccel.ops import block, position, sequence, window
from swinaccel.spec.reference import shift_mask
from swinaccel.spec.window import Geometry

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent.parent


def random(*shape, dtype=torch.float16):
    return torch.randn(shape, device=TRITON_DEVICE).to(dtype)


def windows(window, mask=False, cosine=False, for_backward=False, apart=False):
    """Arguments of the operator for a padded, shifted image."""
    tokens, side, axes = window**2, 2 * window - 1, {"device": TRITON_DEVICE}
    qkv = [random(3, side, side, 32) for _ in range(3)] if apart else [random(3, side, side, 96), None, None]
    table, index = random((2 * window - 1) ** 2, 2), torch.randint((2 * window - 1) ** 2, (tokens, tokens), **axes)
    geometry = Geometry((side, side), (window, window), (window // 2,) * 2, False)
    masks = shift_mask(geometry, -100.0).to(TRITON_DEVICE) if mask else None
    logit_scale = random(2, dtype=torch.float32) if cosine else None
    sizes = 2, [window] * 2, [window // 2] * 2, False
    return *qkv, table, index, random(96), masks, logit_scale, None, *sizes, -100.0, 0.3, 0.0, for_backward, None


def rest(channels, post_norm):
    rows, norm = [random(2, 49, channels) for _ in range(2)], [random(channels) for _ in range(4)]
    layers = random(4 * channels, channels), random(4 * channels), random(channels, 4 * channels), random(channels)
    return *rows, *norm[:2], 1e-5, *norm[2:], 1e-6, *layers, post_norm


CASES = {
    "small windows": ("shifted_window_attention", window._operator, lambda: windows(4)),
    "large windows": ("shifted_window_attention", window._operator, lambda: windows(9)),
    "a mask": ("shifted_window_attention", window._operator, lambda: windows(9, mask=True)),
    "cosines": ("shifted_window_attention", window._operator, lambda: windows(4, cosine=True)),
    "for the backward": ("shifted_window_attention", window._operator, lambda: windows(9, for_backward=True)),
    "q, k and v apart": ("shifted_window_attention", window._operator, lambda: windows(4, apart=True)),
    "pre-norm": ("after_attention", block._traced, lambda: rest(256, False)),
    "post-norm": ("after_attention", block._traced, lambda: rest(256, True)),
    "in one": ("after_attention", block._traced, lambda: rest(32, False)),
    "sequences": (
        "sequence_attention",
        sequence._traced,
        lambda: (*[random(1, 2, 40, 16)] * 3, *[None] * 3, True, 0, 0, 0.2),
    ),
    "a table": (
        "position_table",
        position.backend.position_table,
        lambda: tuple(random(*shape, dtype=torch.float32) for shape in ((49, 2), (64, 2), (64,), (3, 64))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_inside_computes_what_the_operator_does(case, monkeypatch):
    """With `wrap_triton`'s launches made at once: kernels, tensors and numbers are the operator's own."""
    monkeypatch.setattr("swinaccel.kernels.traced.copied", lambda kernel: kernel)
    launched = []
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: launched.append(kernel) or kernel)
    name, inside, arguments_of = CASES[case]
    arguments = arguments_of()
    expected = getattr(torch.ops.swinaccel, name)(*arguments)
    assert not launched
    found = inside(*arguments, bound=traced_launch)
    assert launched
    pairs = [(expected, found)] if isinstance(expected, torch.Tensor) else zip(expected, found, strict=True)
    for one, other in pairs:
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        torch.testing.assert_close(other, one, rtol=0, atol=2e-3 if devices.has_copy_engine(one.device) else 0)


def test_programs_hold_kernels_where_a_package_is_made_of_them():
    """Of fake tensors on a GPU: what AOTInductor gets, and what the kernels write to, read off the copied sources."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "fake_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the package calls sequence_attention, and needs Python and swinaccel: only the number" in done.stderr
    assert done.stderr.count("the package calls") == 1
    found = json.loads(done.stdout)

    def kernels(*names):
        return {"operators": [], "kernels": [[*one] for one in names]}

    attention = "_window_attention_fwd_small_kernel"
    symbol = found["any batch"]["kernels"][0][1][1]
    assert not symbol.isdigit()
    for case in ("rest, post-norm", "rest in one"):
        for kernel in found[case]["kernels"]:
            assert not kernel[1][0].isdigit()
            kernel[1][0] = "any"
    table = "_position_table_kernel", ["34", "2", "1"], ["table_ptr"]
    dense = "_expand_bias_kernel", ["24", "2", "1"], ["dense_ptr"]
    bounded = *dense[:2], ["dense_ptr", "largest_ptr"]
    check = "_check_mask_kernel", ["4", "32", "1"], ["mask_differs_ptr"]
    large = "_window_attention_fwd_kernel", ["768", "1", "1"], ["out_ptr"]
    norm = "_norm_kernel", ["any", "1", "1"], ["out_ptr"]
    assert found == {
        "doubles": [],
        "small": kernels(*[(attention, ["8", "8", "1"], ["out_ptr"])] * 2),
        "exported": {"operators": ["swinaccel.shifted_window_attention.default"] * 2, "kernels": []},
        "any batch": kernels(*[(attention, ["8", symbol, "1"], ["out_ptr"])] * 2),
        "large": kernels(table, bounded, large, table, check, dense, large),
        "rest": kernels(
            ("_norm_kernel", ["49", "1", "1"], ["out_ptr", "total_ptr"]),
            ("_gelu_kernel", ["196", "1", "1"], ["out_ptr"]),
        ),
        "rest, post-norm": kernels(norm, ("_gelu_kernel", ["any", "1", "1"], ["out_ptr"]), norm),
        "rest in one": kernels(("_mlp_kernel", ["any", "1", "1"], ["out_ptr"])),
        "any length": {"operators": ["swinaccel.sequence_attention.default"], "kernels": []},
        "sequence": kernels(("_sequence_attention_fwd_kernel", ["8", "1", "1"], ["lse_ptr", "out_ptr"])),
    }  # fmt: skip


LOADS = """
import sys, torch
print("opens", flush=True)
run = torch._inductor.aoti_load_package(sys.argv[1])
for name in sys.argv[2:]:
    x, expected = torch.load(name)
    print("runs", len(x), flush=True)
    found = run(x)
    torch.cuda.synchronize()
    print("compares", flush=True)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
assert not [name for name in sys.modules if name.startswith("swinaccel")]
print("loaded", flush=True)
"""


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_packages_run_where_swinaccel_is_not(version, tmp_path):
    build, window = (helpers.timm_v1, 7) if version == "v1" else (helpers.timm_v2, 12)
    side = 8 * window
    model = build(img_size=side, window=window, depths=(2,), num_heads=(2,), embed_dim=64).cuda().half().eval()
    swinaccel.accelerate(model)
    images = [torch.randn(batch, 3, side, side, device="cuda", dtype=torch.float16) for batch in (4, 1, 7)]
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    files = [str(tmp_path / f"{len(x)}.pt") for x in images]
    with torch.no_grad():
        for x, file in zip(images, files, strict=True):
            torch.save((x, model(x)), file)
        program = torch.export.export(model, (images[0],), dynamic_shapes=sizes)
    path = str(tmp_path / "model.pt2")
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    except Exception as error:
        if "cuda.h: No such file" in str(error):
            pytest.skip("AOTInductor needs CUDA's headers here")
        raise
    command = [sys.executable, "-X", "faulthandler", "-c", LOADS, path, *files]  # a crash says where it was, too
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = f"return code {done.returncode}, got to: {done.stdout.split()}\n{done.stderr}"
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["loaded"]), told
