"""The notebooks of docs/: free of outputs, and running from top to bottom in a kernel of their own."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.cpu_compiler import unhurried
from tests.house.scripts import ROOT
from tests.tpu_compiler import skip_without_tpu_compiler

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_free_of_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None and not cell.metadata


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    if path.stem == "reading_a_plan":
        skip_without_tpu_compiler()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=unhurried())
    said = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(said)
