"""The notebook runs from top to bottom, without torch, and is kept without outputs."""

from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_search.ipynb"
# A module of None can't be imported, and counts as not installed.
QUICK = "steps=2, height=64, width=64"
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = sys.modules['diffusers'] = None\n"


def test_notebook_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_notebook_runs_without_torch(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = WITHOUT_TORCH + first.source
    for cell in notebook.cells:
        cell.source = cell.source.replace("budget=20", f"budget=3, population=2, elites=1, preview_steps=2, {QUICK}")
        cell.source = cell.source.replace("noise=result.noise[None])", f"noise=result.noise[None], {QUICK})")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    text = "".join(output.get("text", "") for output in outputs)
    assert "reward of the preview" in text
    assert "largest difference" in text
