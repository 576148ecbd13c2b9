"""Data flows one way: no room of the package imports what it may not.

`fit` -> optimizer -> recorder -> trajectory -> reverse -> outer -> callback -> reports
"""

import ast
import sys
from pathlib import Path

import pytest

import keras_drmad

PACKAGE = Path(keras_drmad.__file__).parent

# What each room may import: other rooms | what is installed. The standard library is free.
ROOMS = {
    "domains": "| numpy tensorflow",
    "hyperparameters": "domains | keras numpy",
    "rules": "| tensorflow",
    "arguments": "hyperparameters | keras",
    "places": "arguments hyperparameters | keras",
    "sums": "| tensorflow",
    "schedules": "| keras numpy tensorflow",
    "saving": "| keras numpy tensorflow",
    "export": "schedules | keras numpy",
    "base_optimizer": (
        "arguments export hyperparameters places rules saving schedules sums "
        "| keras numpy tensorflow"
    ),
    "hyperparameter_files": "base_optimizer hyperparameters saving | keras numpy",
    "optimizers": "arguments base_optimizer hyperparameters rules schedules | keras tensorflow",
    "trajectories": "| tensorflow",
    "batches": "| keras tensorflow",
    "pooling": "| tensorflow",
    "normalization": "pooling | keras tensorflow",
    "tunable": "| keras",
    "layers": "domains tunable | keras",
    "objectives": "tunable | keras tensorflow",
    "losses": "domains objectives tunable | keras numpy",
    "sample_weights": "losses tunable | keras numpy tensorflow",
    "initial_scale": "hyperparameters places | keras numpy tensorflow",
    "recorder": "batches objectives trajectories | keras tensorflow",
    "curvature": "normalization objectives sums | tensorflow",
    "graphs": "| tensorflow",
    "linearize": "graphs | tensorflow",
    "halves": "batches linearize | tensorflow",
    "steps": "batches curvature rules trajectories | tensorflow",
    "reverse": "batches halves steps sums trajectories | tensorflow",
    "compilation": "objectives | keras tensorflow",
    "settings": "trajectories | numpy",
    "step_checks": (
        "graphs normalization objectives optimizers pooling steps trajectories | keras tensorflow"
    ),
    "estimator": (
        "base_optimizer batches compilation curvature normalization objectives optimizers "
        "recorder reverse settings step_checks steps trajectories | keras numpy tensorflow"
    ),
    "fidelity": "estimator objectives settings trajectories | keras numpy",
    "restart": "objectives | keras tensorflow",
    "hyper_data": "objectives tunable | keras numpy tensorflow",
    "outer": "domains tunable | keras numpy tensorflow",
    "checks": (
        "base_optimizer curvature hyperparameters normalization objectives optimizers tunable "
        "| keras tensorflow"
    ),
    "layer_calls": "graphs | keras numpy tensorflow",
    "derivatives": "curvature normalization objectives | numpy tensorflow",
    "layer_tests": "derivatives layer_calls | keras numpy tensorflow",
    "inspection": (
        "base_optimizer batches checks derivatives layer_calls layer_tests optimizers "
        "trajectories | keras numpy tensorflow"
    ),
    "records": "| numpy",
    "history_files": "records | numpy",
    "progress": "| keras",
    "reports": "history_files progress records | numpy",
    "tensorboard": "reports | numpy tensorflow tensorboard",
    "plots": "reports | numpy matplotlib",
    "search_space": "estimator hyperparameters initial_scale outer reports | keras",
    "tuning_run": (
        "estimator fidelity objectives outer reports restart saving search_space "
        "| keras numpy tensorflow"
    ),
    # Wiring: both may import every room below them.
    "callback": (
        "checks curvature estimator fidelity hyper_data hyperparameters initial_scale "
        "normalization objectives outer recorder reports sample_weights search_space settings "
        "tensorboard "
        "trajectories tuning_run | keras"
    ),
    "verify": (
        "callback checks estimator fidelity hyper_data objectives optimizers outer reports "
        "settings trajectories | keras numpy tensorflow"
    ),
}
NAMES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(name: str) -> tuple[set[str], set[str]]:
    """The rooms and the installed packages that a room imports, within functions as well."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py: rooms are imported by their full names"
            whole = node.module == "keras_drmad"
            found |= {f"keras_drmad.{a.name}" for a in node.names} if whole else {node.module}
    parts = [module.split(".") for module in found]
    rooms = {[*p, "__init__"][1] for p in parts if p[0] == "keras_drmad"}
    installed = {p[0] for p in parts if p[0] != "keras_drmad"}
    return rooms, installed - set(sys.stdlib_module_names)


def reached(name: str) -> set[str]:
    """The rooms that a room depends on, directly or through others."""
    found: set[str] = set()
    new = {name}
    while new:
        new = set().union(*(imports(room)[0] for room in new)) - found
        found |= new
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_room_imports_what_it_may(name):
    assert name in ROOMS, f"{name}.py is a new room: say in the table what it may import"
    for found, allowed in zip(imports(name), ROOMS[name].split("|"), strict=True):
        forbidden = found - set(allowed.split())
        assert not forbidden, f"{name}.py may not import {sorted(forbidden)}"


def test_the_table_names_only_rooms_that_exist():
    assert set(ROOMS) == set(NAMES)


def test_no_room_depends_on_itself():
    assert not [name for name in NAMES if name in reached(name)]


@pytest.mark.parametrize(
    "name, never",
    [
        ("reverse", {"base_optimizer", "callback", "optimizers", "outer", "recorder", "reports"}),
        ("estimator", {"callback", "checks", "fidelity", "outer", "reports"}),
        ("optimizers", {"callback", "estimator", "recorder", "reverse", "trajectories"}),
        ("reports", {"curvature", "estimator", "recorder", "reverse", "trajectories"}),
        ("tensorboard", {"callback", "curvature", "estimator", "recorder", "reverse"}),
        ("plots", {"callback", "curvature", "estimator", "recorder", "reverse"}),
    ],
)
def test_nor_through_another_room(name, never):
    assert not reached(name) & never
