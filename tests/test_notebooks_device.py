"""The notebooks run from first to last cell where there is a GPU: on a pretended CUDA device."""

from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot
from pretend_cuda import pretend_cuda

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = [p for p in sorted(FOLDER.glob("[0-9]*.ipynb")) if not p.stem.endswith("kernels")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where each notebook finds the zoos and spaces of those before it."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_to_its_end(path, built, monkeypatch):
    monkeypatch.chdir(built)
    for name, value in {"PRESET": "smoke", "SEED": "0", "DATA": "", "BACKEND": "torch"}.items():
        monkeypatch.setenv(f"NETSPACE_{name}", value)  # Triton needs a device that is real
    pyplot.switch_backend("agg")
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}
    with pretend_cuda():
        for number, source in enumerate(cells, 1):
            exec(compile(source, f"{path.stem}, code cell {number}", "exec"), names)
            pyplot.close("all")
    assert names["data"].train.x.is_cuda if "data" in names else True
    assert (built / f"build/smoke-digits-seed0/results/{path.stem}.json").exists()
