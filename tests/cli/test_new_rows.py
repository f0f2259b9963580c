"""The script that times attentions of public code beside their originals, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import new_rows
from real_sizes import ROWS

OPTIONS = ["--device", "cpu", "--small", "--rounds", "1"]
CHILD = """
import sys
place = int(sys.argv[1])
if place == 1:
    sys.exit(1)
print('{"place": %d}' % place)
print("ready", flush=True)
sys.stdin.readline()
print("went", place)
"""


DISTINCT = {row.small()._replace(name=""): row for row in ROWS}.values()  # when they are small


@pytest.mark.parametrize("row", DISTINCT, ids=lambda row: row.name)
def test_every_row_is_accelerated(row, monkeypatch):
    monkeypatch.setattr(new_rows, "MODES", {"inference": torch.float32})
    made = new_rows.prepare(row.small(), "inference", new_rows.parse(OPTIONS))
    assert new_rows.is_fast(made.line), made.line
    assert made.line["error"]["original"] == 0.0
    assert made.line["error"]["accelerated"] < 2e-6
    assert made.line["calls"] == (made.line["found"] if row.by_hand is None else 0)


def test_a_row_with_gradients(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(new_rows, "MODES", {"inference": torch.float32, "with gradients": torch.float32})
    document = tmp_path / "rows.json"
    assert new_rows.main([*OPTIONS, "--only", "Uformer, attention, 8", "--json", str(document)]) == 0
    first, second = json.loads(document.read_text())["rows"]
    assert (first["mode"], second["mode"]) == ("inference", "with gradients")
    assert second["error"]["accelerated"] < 1e-5
    assert (second["calls"], second["fallbacks"]) == (1, 0)
    assert second["ms"]["original, called"] > 0
    assert second["ms"]["accelerated, called"] > 0
    assert capsys.readouterr().out.count("Uformer") == 2


def test_what_is_wrong_is_said(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(new_rows, "prepare", broken)
    assert new_rows.main([*OPTIONS, "--only", "HAT"]) == 1
    assert "FAILED: RuntimeError: no room" in capsys.readouterr().out
    assert new_rows.main([*OPTIONS, "--only", "HAT", "--seconds", "-1"]) == 1
    assert "the time was up" in capsys.readouterr().out
    line = {
        "row": "HAT", "mode": "inference", "error": {"original": 0.0, "accelerated": 0.0}, "reasons": ["it is not"],
        "found": 1, "accelerated": 1, "calls": 2, "fallbacks": 0, "kernel_failed": False,
    }  # fmt: skip
    assert new_rows.is_fast(line)
    for change, words in (
        ({"accelerated": 0}, "NOT ACCELERATED: it is not"),
        ({"fallbacks": 2}, "2 of 2 calls RAN THE ORIGINAL: it is not"),
        ({"kernel_failed": True}, "A KERNEL FAILED"),
    ):
        assert not new_rows.is_fast(line | change)
        assert words in new_rows.told(line | change)
        assert words not in new_rows.told(line)


def test_other_gradients_are_far_away():
    exact = [torch.ones(2), torch.ones(3), torch.ones(4), torch.zeros(1)]
    for place in range(3):
        found = [one.clone() for one in exact]
        found[place][0] = 2
        assert new_rows.distance(found, exact) == pytest.approx(len(found[place]) ** -0.5)
    assert new_rows.distance(exact[:2], exact) == float("inf")


def test_processes_go_on_when_all_are_ready():
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(place)], stdin=-1, stdout=-1, text=True)
        for place in range(3)
    ]
    texts = [text.strip() for text in new_rows.in_turn(children, time.time() + 300)]
    assert sorted(texts[:2]) == ['{"place": 0}', '{"place": 2}']
    assert sorted(texts[2:]) == ["went 0", "went 2"]
