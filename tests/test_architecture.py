"""The shape of the house: who may import whom, read off the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "swinaccel", ROOT / "kernels" / "triton"

# Folders, and modules right in the package, with what each may import. The command line is on top: nobody imports it.
ALLOWED = {
    "__init__": {"api", "auto", "config", "errors", "functional", "nn", "report", "runtime", "verify"},
    "auto": {"api", "config", "layers", "patching", "runtime"},
    "verify": {"api", "config", "report"},
    "nn": {"functional", "spec"},
    "functional": {"backends", "bias", "ops", "spec"},
    "api": {"config", "errors", "families", "layers", "ops", "patching", "report", "runtime", "spec", "trust"},
    "patching": {"config", "families", "layers", "runtime", "spec"},
    "report": {"spec"},
    "trust": {"families", "layers", "ops", "spec"},
    "runtime": {"backends", "bias", "config", "errors", "layers", "ops", "spec", "trust"},
    "families": {"layers", "spec"},
    "bias": {"config", "spec"},
    "ops": {"backends", "config", "errors", "layers", "spec"},
    "backends": {"config", "errors", "kernels", "spec"},
    "spec": set(),
    "errors": set(),
    "layers": set(),
    "config": set(),
}
TOP = {"cli"}
LIBRARIES = ("timm", "torchvision", "transformers", "monai", "mmcv", "mmengine", "mmdet")


def sources(folder):
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path):
    """Return the folder of a module, or its own name if it lies right in the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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
    """Return the folders of the package that a file imports from, by the keys of ALLOWED, without its own."""
    known = {name_of(source) for source in sources(PACKAGE)} | {"kernels"}
    found = {name.split(".")[1] for name in imports(path) if name.startswith("swinaccel.")}
    return (found & known) - {name_of(path)}


def test_every_folder_is_in_the_table():
    assert {name_of(path) for path in sources(PACKAGE)} == set(ALLOWED) | TOP


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_follow_the_arrows(folder):
    found = {path: own_imports(path) for path in sources(PACKAGE) if name_of(path) == folder}
    assert not {
        str(path.relative_to(PACKAGE)): names - ALLOWED[folder]
        for path, names in found.items()
        if names - ALLOWED[folder]
    }


def test_no_arrow_points_back():
    """Each folder imports from folders below it alone."""
    left, placed = dict(ALLOWED), {"kernels"}
    while left:
        free = {name for name, below in left.items() if below <= placed}
        assert free, f"a circle among {sorted(left)}"
        placed |= free
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda path: path.name)
def test_kernels_import_triton_only(path):
    for name in imports(path):
        root = name.split(".")[0]
        own = name.startswith("swinaccel.kernels.")
        assert root == "triton" or own or root in sys.stdlib_module_names, name


def test_only_the_triton_backend_imports_the_kernels():
    importers = {path for path in sources(PACKAGE) if "kernels" in own_imports(path)}
    assert importers
    assert {name_of(path) for path in importers} == {"backends"}
    assert not [path.name for path in importers if "torch" in path.relative_to(PACKAGE / "backends").parts[0]]


def test_only_the_kernels_import_triton():
    importers = [path.name for path in sources(PACKAGE) if any(n.split(".")[0] == "triton" for n in imports(path))]
    assert importers == []


def test_no_file_imports_a_model_library():
    for path in (*sources(PACKAGE), *sources(KERNELS)):
        if path.is_relative_to(PACKAGE) and name_of(path) in TOP:
            continue  # it builds models by name, and imports at that moment
        assert not [name for name in imports(path) if name.split(".")[0] in LIBRARIES], path.name


def test_spec_knows_neither_modules_nor_kernels():
    for path in sources(PACKAGE / "spec"):
        assert not [name for name in imports(path) if name.startswith(("torch.nn.modules", "triton"))], path.name


def test_reference_imports_torch_and_spec_only():
    names = {name.split(".")[0] for name in imports(PACKAGE / "spec" / "reference.py")}
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


def test_one_call_moves_between_few_files():
    """A reader who follows one inference call of a block, in whatever family, opens another file 15 times at most."""
    command = [sys.executable, str(ROOT / "tests" / "host_time.py"), "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    moves = {line[:22].strip(): int(line.split()[-2]) for line in done.stdout.splitlines()}
    assert len(moves) == 8
    assert max(moves.values()) <= 15, moves
