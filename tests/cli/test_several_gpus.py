"""The script that compares training on several GPUs, in a group of one process on a CPU, with stand-ins for graphs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tape import Tape

from swinaccel.runtime.graphs import capture

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import several_gpus

OPTIONS = ["--device", "cpu", "--small", "--batch", "2", "--classes", "5", "--steps", "2", "--timed", "1"]


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
    monkeypatch.setitem(several_gpus.SMALL, "depths", (2, 1))
    for name, variant in several_gpus.VARIANTS.items():  # backwards of 16 bits are not for the stand-ins
        dtype = torch.bfloat16 if name == several_gpus.EXACT else torch.float32
        monkeypatch.setitem(several_gpus.VARIANTS, name, variant._replace(dtype=dtype))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_every_variant_is_the_original(tmp_path, capsys):
    rows = several_gpus.work(several_gpus.parse([*OPTIONS, "--json", str(tmp_path / "rows.json")]))
    assert [row["variant"] for row in rows] == list(several_gpus.VARIANTS)
    assert not [row for row in rows if "error" in row]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    for row in rows:
        variant = several_gpus.VARIANTS[row["variant"]]
        (rank,) = row["ranks"]
        assert row["within"] is not False
        assert row["ranks_agree"]
        assert rank["accelerated"] == (3 if variant.is_accelerated else 0)
        assert rank["calls"] == (3 * 6 if variant.is_accelerated else 0)
        assert not rank["calls_original"]
        # Three backwards and three steps, of which all but the first are replays.
        assert rank["replays"] == (5 if variant.graphs and "DDP" in variant.made else 0)
        assert any("FSDP2 shards it" in reason for reason in rank["reasons"]) == (
            variant.graphs and "FSDP2" in variant.made
        )
    text = capsys.readouterr().out
    assert "rank 0: 3 accelerated, 0 original, 0 of 18 calls original, 1 graphs, 5 replays" in text
    assert text.count("within the noise") == sum(row["within"] is True for row in rows) == len(rows) - 3


@pytest.mark.usefixtures("group")
def test_what_fails_is_a_row_and_time_ends(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(several_gpus, "run", broken)
    assert several_gpus.work(several_gpus.parse([*OPTIONS, "--only", "nothing"]))[0]["error"] == "RuntimeError: no room"
    assert several_gpus.work(several_gpus.parse([*OPTIONS, "--seconds", "-1"])) == []
    assert "the time is up" in capsys.readouterr().out


def test_verdicts():
    def found(losses, gradient, norms=(1.0, 1.0)):
        ranks = [{"norm": one, "accelerated": 1, "calls": 0, "reasons": []} for one in norms]
        return several_gpus.Found(torch.tensor(losses), torch.tensor(gradient), 1.0, ranks)

    runs = {
        several_gpus.ORIGINAL: found([[1.0, 2.0]], [1.0, 0.0]),
        several_gpus.EXACT: found([[1.0, 2.01]], [1.0, 0.01]),
        "near": found([[1.01, 2.0]], [1.0, 0.015]),
        "other losses": found([[1.0, 2.03]], [1.0, 0.0]),
        "another gradient": found([[1.0, 2.0]], [1.03, 0.0], (1.0, 2.0)),
    }
    rows = {name: several_gpus.judged(name, runs) for name in runs}
    verdicts = {name: row["within"] for name, row in rows.items()}
    assert list(verdicts.values()) == [None, None, True, False, False]
    assert "NOT WITHIN THE NOISE  RANKS HAVE DIFFERENT GRADIENTS" in several_gpus.told(rows["another gradient"])
    assert rows["near"]["ranks_agree"]
