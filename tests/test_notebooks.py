"""The notebooks, executed from top to bottom with their smoke settings."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]


def executed(name, folder, monkeypatch, num_devices: int) -> str:
    """Executes a notebook and returns the text that its cells print."""
    for variable, value in {
        "REC_JAX_SMOKE": "1",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
    }.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_quickstart_trains_tests_and_recommends(tmp_path, monkeypatch):
    output = executed("quickstart", tmp_path, monkeypatch, num_devices=2)
    for expected in ("best at step", "bigram", "expected metric over random orderings", "after the history"):
        assert expected in output


def test_losses_are_equal_on_every_mesh_of_the_notebook(tmp_path, monkeypatch):
    output = executed("meshes", tmp_path, monkeypatch, num_devices=8)
    assert "table sharded by dims" in output and "1,000,000,001 entries" in output


@pytest.mark.parametrize("name", ["quickstart", "meshes"])
def test_notebooks_are_stored_without_outputs(name):
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "pip install" in code[0].source
    assert not any(cell.outputs or cell.execution_count for cell in code)
