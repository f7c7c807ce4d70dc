"""The notebooks run on the runs beside them, and carry little with them."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
MOST_OUTPUT = 200_000  # bytes that a notebook's stored outputs may have
MOST_RUNS = 1_000_000  # bytes of the committed runs


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_and_draws(file):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": NOTEBOOKS}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = ["application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs]
    assert sum(figures) >= 2
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stored_outputs_are_small_and_text_explains(file):
    cells = json.loads(file.read_text())["cells"]
    assert len(json.dumps([cell.get("outputs", []) for cell in cells])) < MOST_OUTPUT
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds[0] == "markdown"
    assert 2 * kinds.count("markdown") >= kinds.count("code")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runs_are_read_as_files_and_reports_only(file):
    cells = json.loads(file.read_text())["cells"]
    code = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    ours = [line for line in code if line.startswith(("from ldt", "import ldt"))]
    assert ours
    assert all(line.startswith(("from ldt.report", "from ldt.runs")) for line in ours)


def test_the_committed_runs_are_small_and_name_no_place():
    files = [file for file in (NOTEBOOKS / "runs").rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) < MOST_RUNS
    assert not [file for file in files if file.suffix in (".ckpt", ".png")]
    texts = [file.read_text() for file in files if file.suffix in (".yaml", ".json", ".csv")]
    assert not [text for text in texts if any(p in text for p in ("/home/", "/root/", "/tmp/"))]
