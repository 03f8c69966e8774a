"""The architecture, read from the imports: who may import whom, and what `import pvae` loads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers import lines_of, python

import pvae

ROOT = Path(pvae.__file__).parent
GROUND = {"errors", "networks", "distributions", "flows", "datasets", "testing", "evidence.weights", "evidence.pareto"}
PARTS = {"priors", "likelihoods", "posteriors"}
MODELS = {"vae", "conditional", "semi_supervised", "hierarchical", "masked", "autoencoder"}
REPORTS = {"diagnostics", "io_arviz", "plots", "estimator", "explorer"}
# What each folder may import beside errors and itself.
NEEDS = {"persistence": set(), "runtime": set(), "data": {"runtime"}, "capture": {"runtime"}}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Modules of pvae that a file imports anywhere, by their name inside pvae."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.removeprefix("pvae.") for name in names if name.startswith("pvae.")}
    return found & MODULES.keys()


def inside(*folders: str) -> set[str]:
    return {name for name in MODULES if name.partition(".")[0] in folders}


def allowed(name: str) -> set[str]:
    folder = name.partition(".")[0]
    if name in GROUND:
        return {"errors"} | ({"evidence.pareto"} if name == "evidence.weights" else set())
    if folder in NEEDS:
        return {"errors"} | inside(folder, *NEEDS[folder])
    if folder in PARTS:
        return {"errors", "networks", "distributions", "flows"} | inside("runtime")
    if folder == "composite":
        return {"errors", "networks", *PARTS} | inside("persistence", "runtime", "data")
    if folder == "parts":
        return {"errors", "networks", *PARTS}
    if folder in MODELS:
        own = {"conditional"} if name == "semi_supervised" else set()
        return {"errors", "networks", "composite", "parts", *PARTS, *own} | inside("runtime", "data")
    if folder == "svi":
        return {"errors"} | inside("svi", "capture", "data", "runtime", "persistence")
    if folder == "evidence":
        return {"errors", "distributions"} | inside("evidence", "capture", "data", "runtime")
    if folder in REPORTS:
        return (MODULES.keys() - inside(*REPORTS) - {"__init__"}) | inside(folder)
    raise AssertionError(f"pvae/{name}: say in this test which layer it belongs to")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"__init__"}))
def test_a_module_imports_only_what_its_layer_may(name):
    assert imported(MODULES[name]) <= allowed(name)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"__init__"}))
def test_folders_are_used_by_their_faces(name):
    """Inside of a folder its modules import one another; from outside there is its ``__init__``."""
    others = {other for other in imported(MODULES[name]) if other.partition(".")[0] != name.partition(".")[0]}
    assert not {other for other in others if "." in other} - {"evidence.proposals"}


ALONE = ("losses", "objectives", "schedules", "traces", "verification", "elbos", "step", "passes", "validation", "run")


@pytest.mark.parametrize("name", [f"svi.{name}" for name in ALONE])
def test_what_is_of_one_process_does_not_mention_others(name):
    text = MODULES[name].read_text()
    assert not any(word in text for word in ("Processes", "world_size", "is_main", ".rank", "dist."))


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith(("svi", "evidence"))))
def test_only_two_files_trace_programs(name):
    handles = re.search(r"import poutine|pyro\.poutine", MODULES[name].read_text())  # errors may speak of it
    assert bool(handles) == (name in {"evidence.traces", "svi.traces"})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_exports(name):
    tree = ast.parse(MODULES[name].read_text())
    names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert "__all__" in names
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("name", sorted(n for n, path in MODULES.items() if path.name != "__init__.py"))
def test_a_module_needs_at_most_eight_others(name):
    """A folder's face counts as one; so does what is imported from it. Faces themselves only hand on."""
    modules = imported(MODULES[name])
    assert len(modules - {m.rpartition(".")[0] for m in modules if "." in m}) <= 8


def test_modules_stay_small():
    too_long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not too_long


@pytest.fixture(scope="module")
def loaded():
    """The modules that ``import pvae`` loads."""
    return lines_of(python("import sys, pvae; print(*sys.modules)"))[0].split()


def test_import_loads_nothing_heavy(loaded):
    packages = {name.split(".")[0] for name in loaded}
    assert not packages & {"arviz", "matplotlib", "torchvision", "scipy", "sklearn", "xarray"}


def test_import_does_not_load_the_compiler(loaded):
    assert "torch._inductor.compile_fx" not in loaded


def test_the_face_is_complete():
    assert all(hasattr(pvae, name) for name in pvae.__all__)
    assert len(pvae.__all__) <= 40
