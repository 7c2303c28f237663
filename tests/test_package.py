"""The ground: one pinned set everywhere, and a package that imports from outside the checkout."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def pins(lines):
    found = re.findall(r"^(?:\s*- )?([\w.-]+)==([^\s;]+)", lines, re.MULTILINE)
    return {name_of(name): version for name, version in found}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())
ENVIRONMENT = pins((ROOT / "environment.yml").read_text())
REQUIRED = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]


def test_every_dependency_is_pinned_and_conda_pins_the_same():
    assert {name_of(r) for r in REQUIRED} == set(ENVIRONMENT)
    assert {name: CONSTRAINTS.get(name) for name in ENVIRONMENT} == ENVIRONMENT


def test_pins_satisfy_what_pyproject_asks_for():
    from packaging.requirements import Requirement

    for text in REQUIRED:
        requirement = Requirement(text)
        assert requirement.specifier.contains(CONSTRAINTS[name_of(text)]), text


def test_the_tested_pair_is_pinned():
    assert (CONSTRAINTS["torch"], CONSTRAINTS["triton"]) == ("2.13.0", "3.7.1")


@pytest.mark.parametrize(
    "module", ["", ".zoo", ".kernels", ".shapes", ".tutorial", ".tutorial.chapters"], ids=str
)
def test_the_installed_package_imports_from_outside_the_checkout(module, tmp_path):
    code = f"import sys, netspace_lite{module} as m; print(m.__name__, 'sympy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    # with sympy comes PyTorch's compiler, which takes seconds to import
    assert done.stdout.strip() == f"netspace_lite{module} False", done.stderr


def test_every_package_is_installed_with_its_data():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {p.parent.relative_to(ROOT) for p in (ROOT / "netspace_lite").rglob("__init__.py")}
    found = {".".join(path.parts) for path in found} | {"netspace_lite.kernels"}
    assert set(setuptools["packages"]) == found
    assert (ROOT / "netspace_lite/tutorial/presets.toml").exists()
    assert setuptools["package-data"]["netspace_lite.tutorial"] == ["*.toml"]


def test_kernels_is_no_top_level_module(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None"


def test_the_readme_names_the_two_commands_and_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert "make tutorial" in readme
    assert "make test" in readme
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert notebook.name in readme
