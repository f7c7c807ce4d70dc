"""The benchmark for GPUs runs to its end, as far as a CPU can tell."""

import sys

import forked
import pytest
import torch
from short_runs import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu


@pytest.mark.slow
def test_it_fills_the_cells_of_what_it_measures(tmp_path):
    file = tmp_path / "gpu.md"
    quick = ["--divide=4", "--runs=30", "--epochs=1", "--steps=1", "--train=4", "--eager"]
    chosen = ["--device=cpu", "--detectors", "gfl_tiny", f"--write={file}"]
    done = forked.run(str(ROOT / "benchmarks/gpu.py"), *chosen, *quick, cwd=tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr, done.stderr
    text = file.read_text()
    assert text in done.stdout
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    filled = [row for row in rows if row[0].startswith("| gfl_tiny")]
    assert len(filled) == 2 + 3  # steps, loops; base, pruned and their ratio
    numbers = [cell.strip("| ") for row in filled[:2] for cell in row[1:]]
    assert all(float(number) > 0 for number in numbers)
    empty = [row for row in rows if row[0].startswith("| yolof")]
    assert empty
    assert not any(cell.strip("| ") for row in empty for cell in row[1:])


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--device=cuda"]):
        assert gpu.main(arguments) == 2
        said = capsys.readouterr()
        assert said.err == "no GPU is at hand; to try this script type --device cpu\n"
        assert not said.out
