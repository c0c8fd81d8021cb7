"""The import rules of the house, read from the code, and what importing must not do."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from profiler.sweep_config import SweepConfig
from reparam.recipe import Recipe

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "profiler", "cost_models", "reparam", "reports")

# Who may import what of ours. A bare package name allows all of it. command_line is how every
# package speaks to a terminal; model_workloads' classes are shapes of the sweep.
ALLOWED = {
    "kernels": {"kernels"},
    "profiler": {"profiler", "kernels"},
    "cost_models": {
        "cost_models",
        "kernels.forms",
        "kernels.workload",
        "profiler.store",
        "profiler.interleaved",
        "profiler.device",
        "profiler.model_workloads",
        "profiler.sweep_config",
        "profiler.command_line",
        "profiler.whole_file",
    },
    "reparam": {
        "reparam",
        "kernels.forms",
        "kernels.workload",
        "kernels.packing",
        "kernels.torch_ops",
        "kernels.layer_ops",
        "kernels.expert_ops",
        "kernels.launches",
        "profiler.timing",
        "profiler.clock",
        "profiler.samples",
        "profiler.passes",
        "profiler.ratios",
        "profiler.energy",
        "profiler.device",
        "profiler.store",
        "profiler.command_line",
        "profiler.whole_file",
        "profiler.workers",
        "profiler.model_workloads",
        "cost_models.latency_table",
        "cost_models.layer_models",
        "cost_models.overheads",
        "cost_models.work",
        "cost_models.operation_energy",
        "cost_models.advice",
        "cost_models.advice_result",
        "cost_models.conversion_plan",
    },
    "reports": {
        "reports",
        "kernels.forms",
        "kernels.workload",
        "profiler.store",
        "profiler.interleaved",
        "profiler.compare",
        "profiler.device",
        "profiler.samples",
        "profiler.command_line",
        "profiler.whole_file",
        "cost_models.latency_table",
        "cost_models.work",
        "cost_models.fit_result",
        "cost_models.advice_result",
        "cost_models.energy_rules",
        "reparam.results",
        "reparam.ablation_results",
        "reparam.scaling_result",
        "reparam.versus_torch_result",
    },
}
# Who alone may import what of others.
ONLY_IN = {
    "tvm": "kernels",
    "pynvml": "profiler/nvml.py",
    "matplotlib": "reports/plots.py",
    "pickle": None,
}


def _sources():
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_data_flows_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in _imports(path):
            if name.split(".")[0] not in PACKAGES:
                continue
            if name.count(".") == 0 or name in PACKAGES:
                continue
            parts = name.split(".")
            prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
            leads_there = any(rule.startswith(f"{name}.") for rule in ALLOWED[package])
            assert prefixes & ALLOWED[package] or leads_there, f"{path} imports {name}"


@pytest.mark.parametrize(("module", "place"), ONLY_IN.items())
def test_each_outside_library_has_its_room(module, place):
    for path in _sources():
        if any(name.split(".")[0] == module for name in _imports(path)):
            assert place and str(path.relative_to(ROOT)).startswith(place), f"{path}: {module}"


@pytest.mark.parametrize(
    ("module", "ours"), [("forms", set()), ("cpu_flags", set()), ("workload", {"kernels.forms"})]
)
def test_workload_is_standard_library_only(module, ours):
    names = set(_imports(ROOT / "kernels" / f"{module}.py"))
    others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {".".join(name.split(".")[:2]) for name in others} <= ours


def test_packages_are_empty_at_the_top_and_files_are_rooms():
    for path in _sources():
        if path.name == "__init__.py":
            assert path.read_text() == ""
        assert path.name != "utils.py"
        assert len(path.read_text().splitlines()) <= 400, f"{path} is more than one room"


def test_importing_neither_initialises_cuda_nor_needs_a_gpu():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(_sources())
        if path.name != "__init__.py"
    ]
    code = f"import {', '.join(modules)}, torch; assert not torch.cuda.is_initialized()"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("profiler/sweeps/*.toml"), *ROOT.glob("reparam/recipes/*.toml")], ids=str
)
def test_every_shipped_toml_loads(path):
    model = SweepConfig if "sweeps" in path.parts else Recipe
    model.model_validate(tomllib.loads(path.read_text()))


def test_every_package_is_listed_for_installation():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) == found


def test_the_quick_sweep_holds_every_workload_of_the_quick_recipe():
    pytest.importorskip("reparam.recipe_models")
    from reparam.recipe_models import recipe_workloads

    sweep = SweepConfig.model_validate(
        tomllib.loads((ROOT / "profiler/sweeps/quick-cpu.toml").read_text())
    )
    recipe = Recipe.model_validate(
        tomllib.loads((ROOT / "reparam/recipes/digits-quick.toml").read_text())
    )
    assert set(recipe_workloads(recipe)) <= set(sweep.workloads)
