"""The notebook runs from top to bottom, and its stored outputs are those of such a run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune_then_chat.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells: list[Any]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def check_outputs(cells: list[Any]) -> None:
    """What every run shows: a loss that fell, its picture, and answers that became tool calls."""
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = printed(cells)
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", text)[0])
    assert after < before / 4  # 2.36 -> 0.15 or so
    assert text.count('after  \'{"tool": ') >= 2  # of three requests
    assert any("image/svg+xml" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_the_stored_outputs_are_of_one_run_and_small() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_outputs(code_cells(notebook))
    assert NOTEBOOK.stat().st_size < 30_000


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a shared machine may be several times slower
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    words = [sys.executable, "-m", "smidgen", "download", "smollm2-135m"]
    if subprocess.run(words, capture_output=True, check=False).returncode == 2:
        pytest.skip("the model cannot be fetched here")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1400, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell does
    check_outputs(code_cells(notebook))
