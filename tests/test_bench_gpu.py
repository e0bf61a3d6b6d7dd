"""`make bench-gpu`: what its one file holds, and what it says where there is no accelerator."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.once


def test_tables_that_a_benchmark_prints_become_rows():
    text = "ResNet-20\n\n| arm | ms |\n|---|---|\n| dense | 292 (288, 308) |\n| pruned | 295 |\n\n| x |\n|---|\n| 1 |"
    dense, pruned = {"arm": "dense", "ms": "292 (288, 308)"}, {"arm": "pruned", "ms": "295"}
    assert gpu.tables(text) == [[dense, pruned], [{"x": "1"}]]


def test_one_file_holds_every_part_also_one_that_fails_or_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "accelerator", lambda environment: {"device": "a GPU", "versions": {"backend": "jax"}})
    parts = {
        "prints": (["-c", "print('| a |\\n|---|\\n| 1 |')"], 60),
        "fails": (["-c", "raise SystemExit(3)"], 60),
        "never ends": (["-c", "while True: pass"], 0.5),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", f"--out={tmp_path}/gpu.json"])
    with pytest.raises(SystemExit, match="Not all parts came to their end"):
        gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["where"]["device"] == "a GPU"
    assert [part["exit_code"] for part in report["parts"].values()] == [0, 3, "stopped after 0 s"]
    assert report["parts"]["prints"]["tables"] == [[{"a": "1"}]]


def test_parts_end_in_less_than_ten_minutes():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= gpu.LIMIT < 600


def test_without_an_accelerator_there_is_a_message_and_no_file(monkeypatch):
    def answer(*args, **kwargs):
        return subprocess.CompletedProcess(args, 0, stdout="null\n", stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", answer)
    with pytest.raises(SystemExit, match=r"No accelerator: the jax backend sees processors only.*jax\[cuda12\]"):
        gpu.accelerator({"KERAS_BACKEND": "jax"})
