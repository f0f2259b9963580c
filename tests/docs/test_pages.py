"""The Python blocks of the documentation run, and what it links to in this repository exists."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "_generated"} & set(page.parts)]
BLOCKS = re.compile(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)", re.MULTILINE | re.DOTALL)
SNIPPETS = {str(page.relative_to(ROOT)): BLOCKS.findall(page.read_text()) for page in PAGES}
SOURCE = re.compile(
    r"https://(?:github\.com|raw\.githubusercontent\.com)/swinaccel/swinaccel/(?:blob/)?main/([^)\s#]+)"
)


def test_there_are_snippets():
    assert sum(map(len, SNIPPETS.values())) > 25


@pytest.mark.parametrize("page", [page for page, blocks in SNIPPETS.items() if blocks])
def test_snippets_run(page, monkeypatch, tmp_path):
    """One after the other, in one namespace. On a page's CPU: what needs GPUs stands in blocks of another kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes minutes
    torch.manual_seed(0)
    namespace: dict = {"__name__": "__main__"}
    with torch.set_grad_enabled(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(SNIPPETS[page], 1):
            if page in ("README.md", "docs/index.md") and number == 1:
                block = "import swinaccel"  # its model is the reader's
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_this_repository_lead_somewhere(page):
    assert [path for path in SOURCE.findall(page.read_text()) if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_its_links_are_absolute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert [target for target in re.findall(r"\]\((.*?)\)", text) if not target.startswith("https://")] == []


def test_the_notebook_runs(monkeypatch, capsys):
    """Its code cells, without the one that installs; none keeps an output, which would be of another machine.

    One image and one round say what four and ten would.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]
    sources = ["".join(cell["source"]) for cell in cells]
    for given, fewer in (("torch.randn(4,", "torch.randn(1,"), ("rounds=10", "rounds=1")):
        assert sum(given in source for source in sources) == 1
        sources = [source.replace(given, fewer) for source in sources]
    assert sources.pop(0).startswith("%pip install")
    namespace: dict = {"__name__": "__main__"}
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"quickstart.ipynb, cell {number}", "exec"), namespace)
    assert namespace["times"].report.is_effective
    assert "12 of 12 window attentions accelerated" in capsys.readouterr().out
