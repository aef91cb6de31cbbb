"""The shape of the project: who may import whom, where Flax and family names may appear, what is installed."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of the project; a part may always import itself.
PURE: set[str] = set()
ALLOWED = {
    "ses_jax.cem": PURE,
    "ses_jax.wavelet": PURE,
    "ses_jax.sampler": PURE,
    "ses_jax.partition": PURE,
    "ses_jax.resample": PURE,
    "ses_jax.result": PURE,
    "ses_jax.flops": PURE,
    "ses_jax.footprint": {"ses_jax.flops"},
    "ses_jax.devices": PURE,
    "ses_jax.progress": PURE,
    "ses_jax.checkpoint": PURE,
    "ses_jax.models": PURE,
    "ses_jax.convert": {"ses_jax.models", "ses_jax.checkpoint"},
    "ses_jax.hub": {"ses_jax.convert"},
    "ses_jax.pipelines": {"ses_jax.hub", "ses_jax.convert", "ses_jax.models", "ses_jax.partition"},
    "ses_jax.preprocess": {"ses_jax.hub", "ses_jax.resample"},
    "ses_jax.scorers": {"ses_jax.hub", "ses_jax.convert", "ses_jax.models", "ses_jax.preprocess"},
    "ses_jax.mixture": PURE,
    "ses_jax.rewards": {"ses_jax.mixture", "ses_jax.scorers"},
    "ses_jax.config": {"ses_jax.wavelet", "ses_jax.pipelines"},
    "ses_jax.generation": {
        "ses_jax.cem",
        "ses_jax.mixture",
        "ses_jax.partition",
        "ses_jax.sampler",
        "ses_jax.wavelet",
    },
    "ses_jax.memory": PURE,
    "ses_jax.workload": {
        "ses_jax.config",
        "ses_jax.flops",
        "ses_jax.footprint",
        "ses_jax.models",
        "ses_jax.pipelines",
        "ses_jax.preprocess",
        "ses_jax.scorers",
    },
    "ses_jax.planner": {
        "ses_jax.config",
        "ses_jax.devices",
        "ses_jax.footprint",
        "ses_jax.partition",
        "ses_jax.pipelines",
        "ses_jax.workload",
    },
    "ses_jax.records": {"ses_jax.generation"},
    "ses_jax.resume": {"ses_jax.checkpoint", "ses_jax.generation", "ses_jax.result"},
    "ses_jax.tasks": {
        "ses_jax.config",
        "ses_jax.generation",
        "ses_jax.memory",
        "ses_jax.partition",
        "ses_jax.pipelines",
        "ses_jax.rewards",
    },
    "ses_jax.runner": {
        "ses_jax.config",
        "ses_jax.generation",
        "ses_jax.memory",
        "ses_jax.mixture",
        "ses_jax.partition",
        "ses_jax.pipelines",
        "ses_jax.progress",
        "ses_jax.records",
        "ses_jax.result",
        "ses_jax.resume",
        "ses_jax.rewards",
        "ses_jax.tasks",
    },
    "ses_jax.prompts": {"ses_jax.config", "ses_jax.pipelines"},
    "ses_jax.run_folder": {"ses_jax.prompts", "ses_jax.result"},
    "ses_jax.processes": PURE,
    "ses_jax.batch": {
        "ses_jax.config",
        "ses_jax.engine",
        "ses_jax.partition",
        "ses_jax.pipelines",
        "ses_jax.processes",
        "ses_jax.progress",
        "ses_jax.prompts",
        "ses_jax.resume",
        "ses_jax.rewards",
        "ses_jax.run_folder",
    },
    "ses_jax.engine": {
        "ses_jax.config",
        "ses_jax.generation",
        "ses_jax.partition",
        "ses_jax.pipelines",
        "ses_jax.result",
        "ses_jax.resume",
        "ses_jax.rewards",
        "ses_jax.runner",
        "ses_jax.tasks",
    },
}
TOP = {"ses_jax", "ses_jax.cli", "ses_jax.__main__", "ses_jax.convert.__main__"}  # the doors: they may import anything
FAMILIES = {
    "flux1": ("flux1", "flux.1"),
    "qwen_image": ("qwen_image", "qwenimage", "qwen-image"),
    "flux2": ("flux2", "flux.2", "klein"),
    "z_image": ("z_image", "zimage", "z-image"),
}
NETWORK_OF_A_FAMILYS_NAME = "autoencoderklflux2"  # as published configs have it
READS_TORCH_FILES = {"ses_jax.convert.pickles"}  # with torch's own reader where it is installed
NAMES_FAMILIES = {"ses_jax.pipelines", "ses_jax.cli"}  # the registry, and help texts


def modules():
    """Dotted name and parsed source of every module of the project."""
    folders = {"ses_jax": ROOT / "ses_jax", "ses_jax.models": ROOT / "models", "ses_jax.convert": ROOT / "convert"}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield name, path


MODULES = dict(modules())


def imports(path):
    """Every module that a file imports, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name):
    """The part of the table that a module belongs to."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("name", sorted(set(MODULES) - TOP))
def test_imports_point_down(name):
    part = part_of(name)
    used = {part_of(module) for module in imports(MODULES[name]) if module.startswith("ses_jax.")}
    assert used - {part} <= ALLOWED[part], f"{name} may not import {sorted(used - {part} - ALLOWED[part])}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_flax_stays_inside_models_and_torch_outside_everything(name):
    roots = {module.split(".")[0] for module in imports(MODULES[name])}
    assert "flax" not in roots or name.startswith("ses_jax.models")
    assert not roots & {"torch", "diffusers"} - ({"torch"} if name in READS_TORCH_FILES else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_named_only_in_its_own_files(family):
    for name, path in MODULES.items():
        if name.split(".")[-1] == family or name in NAMES_FAMILIES:
            continue
        code = ast.unparse(_without_docstrings(path)).lower().replace(NETWORK_OF_A_FAMILYS_NAME, "")
        assert not any(word in code for word in FAMILIES[family]), f"{name} names the family {family}"


def _without_docstrings(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return tree


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_public_functions_are_documented_and_typed(name):
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree)
    if name.startswith("ses_jax.models"):
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    else:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        arguments = [
            a for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")
        ]
        if node in tree.body and not node.name.startswith("_"):
            assert ast.get_docstring(node) or name == "ses_jax.cli", f"{name}.{node.name}"
            assert all(a.annotation for a in arguments) and node.returns, f"{name}.{node.name}"  # noqa: PT018


def test_packages_in_pyproject_are_those_on_disk():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(config["packages"]) == found


SHADOWED = """
import models, convert
assert models.MINE and convert.MINE
import ses_jax.models.clip, ses_jax.convert.clip
assert "FOREIGN" not in ses_jax.models.__file__ and not hasattr(ses_jax.models, "MINE")
"""


def test_a_users_own_models_folder_shadows_nothing(tmp_path):
    for name in ("models", "convert"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    subprocess.run([sys.executable, "-c", SHADOWED], cwd=tmp_path, check=True)


def test_a_checkout_works_without_being_installed(tmp_path):
    """`-S -I` hides the installed project; only its dependencies and the checkout's root are put back."""
    site = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + {site!r}; "
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        f"sys.path.insert(0, {str(ROOT)!r}); import ses_jax.models.clip as clip; "
        f"assert clip.__file__.startswith({str(ROOT)!r})"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
