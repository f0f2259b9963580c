"""The shape of the house: who may import whom, read off the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "swinaccel", ROOT / "kernels" / "triton"

# What a module of the package may import from it. Modules that are not listed are leaves on top (the command line
# and the like), and nothing may import them.
ALLOWED = {
    "__init__": {"api", "config", "dispatch", "functional", "nn", "report", "verify"},
    "layout": set(),
    "api": {"config", "dispatch", "families", "fusion", "patching", "probe", "report", "spec"},
    "config": set(),
    "spec": set(),
    "report": {"spec"},
    "reference": {"spec"},
    "families": {"families", "layout", "spec", "watch"},
    "patching": {"config", "dispatch", "families", "watch"},
    "probe": {"dispatch", "families", "fusion", "harmless", "layout", "reference", "spec", "watch"},
    "dispatch": {"backends.torch", "bias", "config", "fusion", "layout", "ops", "spec", "watch"},
    "fusion": {
        "backends",
        "backends.torch_fusion",
        "backends.triton_fusion",
        "fusion_autograd",
        "fusion_ops",
        "harmless",
        "layout",
        "watch",
    },
    "fusion_ops": {"backends", "backends.triton_fusion"},
    "harmless": {"watch"},
    "fusion_autograd": {"backends", "backends.triton_fusion", "backends.triton_fusion_bwd"},
    "exporting": set(),
    "projections": set(),
    "watch": set(),
    "backends.torch_fusion": set(),
    "backends.triton_fusion": {"backends", "backends.triton", "kernels"},
    "backends.triton_fusion_bwd": {"backends", "backends.triton", "backends.triton_fusion", "kernels"},
    "bias": {"cache", "config", "reference", "spec"},
    "cache": {"config"},
    "ops": {"backends.triton", "config", "reference", "spec"},
    "backends.torch": {"reference", "spec"},
    "backends.triton": {"backends", "backends.tuned", "config", "kernels", "spec"},
    "backends.tuned": {"cache", "config", "kernels"},
    "sequence_ops": {
        "backends",
        "backends.torch_sequence",
        "backends.triton",
        "backends.triton_sequence",
        "config",
        "ops",
    },
    "backends.torch_sequence": {"reference"},
    "backends.triton_sequence": {"backends.triton", "kernels"},
    "factors": {"bias"},
    "backends.torch_windows": {"backends.torch", "backends.torch_sequence", "reference", "spec"},
    "checks": set(),
    "nn": {"checks", "functional"},
    "verify": {"api", "report"},
    "functional": {
        "backends",
        "backends.torch_sequence",
        "backends.torch_windows",
        "backends.triton_sequence",
        "checks",
        "config",
        "factors",
        "ops",
        "reference",
        "sequence_ops",
        "spec",
    },
}
LIBRARIES = ("timm", "torchvision", "transformers", "monai", "mmcv", "mmengine", "mmdet")


def sources(folder):
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path):
    """`swinaccel/backends/torch.py` is backends.torch; all of families/ is families."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "families":
        return "families"
    return ".".join(part for part in parts if part != "__init__" or len(parts) == 1)


def imports(path):
    """Absolute names of everything that a file imports, wherever in it; names imported from a package count too."""
    package = (
        ["swinaccel", *path.relative_to(PACKAGE).parts[:-1]]
        if path.is_relative_to(PACKAGE)
        else ["swinaccel", "kernels"]
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def own_imports(path):
    """Modules of the package that a file imports, by the keys of ALLOWED."""
    known = {name_of(source) for source in sources(PACKAGE)} | {"kernels"}
    found = set()
    for name in imports(path):
        if name == "swinaccel" or name.startswith("swinaccel."):
            parts = name.split(".")[1:]
            candidates = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            found.add(next((candidate for candidate in candidates if candidate in known), name))
    return found


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    name = name_of(path)
    if name in ALLOWED:
        assert own_imports(path) <= ALLOWED[name]
    else:
        assert not any(name in own_imports(other) for other in sources(PACKAGE) if name_of(other) in ALLOWED)


def test_the_table_is_about_what_is_there():
    present = {name_of(path) for path in sources(PACKAGE)}
    assert set(ALLOWED) <= present


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: path.name)
def test_kernels_import_triton_only(path):
    for name in imports(path):
        root = name.split(".")[0]
        own = name.startswith("swinaccel.kernels.")
        assert (
            root == "triton"
            or own
            or name.startswith(("collections", "dataclasses", "functools", "math", "typing", "__future__"))
        ), name


def test_only_the_triton_backend_imports_the_kernels():
    importers = {name_of(path) for path in sources(PACKAGE) if "kernels" in own_imports(path)}
    fusion = {"backends.triton_fusion", "backends.triton_fusion_bwd"}
    assert importers <= {"backends.triton", *fusion, "backends.triton_sequence", "backends.tuned"}


def test_only_the_kernels_import_triton():
    importers = [path.name for path in sources(PACKAGE) if any(n.split(".")[0] == "triton" for n in imports(path))]
    assert importers == []


def test_no_file_imports_a_model_library():
    for path in (*sources(PACKAGE), *sources(KERNELS)):
        if name_of_top(path) in ("cli", "bench"):
            continue  # they build models by name, and import at that moment
        assert not [name for name in imports(path) if name.split(".")[0] in LIBRARIES], path.name


def name_of_top(path):
    return path.relative_to(ROOT).with_suffix("").parts[1]


def test_spec_knows_neither_modules_nor_kernels():
    names = imports(PACKAGE / "spec.py")
    assert not [name for name in names if name.startswith(("torch.nn", "triton"))]


def test_reference_imports_torch_and_spec_only():
    names = {name.split(".")[0] for name in imports(PACKAGE / "reference.py")}
    assert names <= {"__future__", "math", "torch", "swinaccel"}


def test_config_is_the_only_reader_of_the_environment():
    readers = set()
    for path in (*sources(PACKAGE), *sources(KERNELS)):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and node.attr in (
                "environ",
                "getenv",
                "environb",
                "putenv",
            )
            imported = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and any(alias.name in ("environ", "getenv") for alias in node.names)
            )
            if named or imported:
                readers.add(path.name)
    assert readers == {"config.py"}


@pytest.mark.parametrize("path", sources(PACKAGE / "families"), ids=lambda path: path.name)
def test_families_are_short(path):
    assert len(path.read_text().splitlines()) <= 150


def test_kernels_stand_apart():
    """No `__init__.py` right under kernels/: an installed package of that name must win over the folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    body = ast.parse((KERNELS / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


def test_nothing_is_unpickled():
    for path in sources(PACKAGE):
        names = imports(path)
        assert not [name for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")], path.name
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if ast.unparse(call.func) == "torch.load"], path.name


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_silent_and_light():
    code = f"""
import sys
import torch
before = set(sys.modules)
import swinaccel
heavy = {("triton", *LIBRARIES)!r}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set(heavy), new & set(heavy)
assert not torch.cuda.is_initialized()
"""
    done = run(code)
    assert (done.stdout, done.stderr) == ("", "")


def test_accelerating_on_the_torch_backend_needs_no_triton():
    """Where Triton is not installed, plain PyTorch serves."""
    run("""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.modules["triton"] = None
import torch, swinaccel
from torchvision.models.swin_transformer import ShiftedWindowAttention
model = ShiftedWindowAttention(16, [4, 4], [2, 2], 2).eval()
x = torch.randn(1, 8, 8, 16)
with torch.no_grad():
    expected = model(x)
    swinaccel.accelerate(model)
    assert torch.allclose(model(x), expected, atol=1e-5)
entry, = swinaccel.report(model)
assert (entry.calls, entry.fallbacks) == (1, 0), entry
""")


def test_public_names():
    import swinaccel

    wanted = {"accelerate", "restore", "accelerated", "disabled", "plan", "report", "verify"}
    assert wanted <= set(swinaccel.__all__)
    assert all(hasattr(swinaccel, name) for name in swinaccel.__all__)
    assert all(getattr(swinaccel, name).__doc__ for name in swinaccel.__all__)
