"""The shape of the project: who may import whom, where Flax and family names may appear, what is installed."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import beartype
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float

from ses_jax.searchers import wavelet

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]

# The rooms of the house, from the top: which rooms each may import from, and its modules, also from the top, so that
# imports inside a room point down too.
ROOMS: dict[str, tuple[set[str], list[str]]] = {
    "ses_jax.shell": (
        {
            f"ses_jax.{room}"
            for room in ("studio", "batch", "planner", "engine", "exports", "rewards", "pipelines", "loading")
        },
        ["commands", "options", "doctor", "dry_run", "words", "errors"],
    ),
    "ses_jax.studio": ({"ses_jax.engine"}, ["page", "sessions"]),
    "ses_jax.batch": (
        {"ses_jax.engine", "ses_jax.rewards", "ses_jax.pipelines", "ses_jax.loading", "ses_jax.report"},
        ["run", "progress", "run_folder", "prompts", "processes"],
    ),
    "ses_jax.planner": (
        {"ses_jax.engine", "ses_jax.rewards", "ses_jax.pipelines", "ses_jax.loading", "ses_jax.models"},
        [
            *(
                "plan",
                "tables",
                "advice",
                "need",
                "compilation",
                "workload",
                "footprint",
                "buffers",
                "splits",
                "hlo",
                "topologies",
            ),
            "devices",
        ],
    ),
    "ses_jax.engine": (
        {f"ses_jax.{room}" for room in ("searchers", "rewards", "pipelines", "loading", "exports", "report")},
        [
            "search",
            "output",
            "models",
            "runner",
            "finals",
            "generations",
            "hosted",
            "identity",
            "ahead",
            "outline",
            "tasks",
            "base",
            "cases",
            "kept",
            "resume",
            "result",
            "lock",
            "stopping",
            "repeat",
            "saved",
            "watching",
            "records",
            "cost",
            "generation",
            "looks",
            "gradients",
            "previews",
            "config",
            "placement",
            "settings",
            "program",
            "denoising",
            "fidelity",
            "evaluations",
            "progress",
            "memory",
            "flops",
            "files",
        ],
    ),
    "ses_jax.exports": (
        {"ses_jax.pipelines", "ses_jax.loading"},
        [
            *("export", "comfyui", "noises", "pictures"),
            *("flux1", "flux2", "qwen_image", "z_image", "layouts"),
        ],
    ),
    "ses_jax.report": (set(), ["page", "gallery", "html", "charts", "curves", "grid"]),
    "ses_jax.searchers": (
        set(),
        [
            "registry",
            "evosax",
            "gradient",
            "ses",
            "zero_order",
            "best_of_n",
            "searcher",
            "space",
            "options",
            "cem",
            "elites",
            "wavelet",
        ],
    ),
    "ses_jax.rewards": (
        {"ses_jax.loading", "ses_jax.convert", "ses_jax.models"},
        ["spec", "device_parts", "reward", "scorers", "preprocess", "resample", "mixture", "images", "host", "meaning"],
    ),
    "ses_jax.pipelines": (
        {"ses_jax.loading", "ses_jax.convert", "ses_jax.models"},
        ["registry", "flux1", "flux2", "qwen_image", "z_image", "schedule", "guidance", "sampler", "base"],
    ),
    "ses_jax.loading": (
        {"ses_jax.convert", "ses_jax.models"},
        [
            "hub",
            "tokenizers",
            "folder",
            "network",
            "configs",
            "adapters",
            "lora_files",
            "checkpoint",
            "rows",
            "formats",
            "partition",
            "programs",
            "compiler",
        ],
    ),
    "ses_jax.convert": (
        {"ses_jax.models"},
        [
            *("flux1", "flux2", "qwen_image", "z_image", "autoencoder_kl_bn", "autoencoder_kl", "qwen_vae"),
            *("decoder_lm", "t5", "clip", "open_clip", "blip", "score_head", "mmdit"),
            *(
                "dialects",
                "files",
                "pickles",
                "gguf",
                "lora",
                "names",
                "engine",
                "arrays",
                "damage",
                "matching",
                "table",
            ),
        ],
    ),
    "ses_jax.models": (
        set(),
        [
            *("flux1", "flux2", "qwen_image", "z_image", "mmdit", "decoder_lm", "t5", "blip", "clip"),
            *("autoencoder_kl_bn", "autoencoder_kl", "qwen_vae", "score_head"),
            *("attention", "splash", "convolution", "layers", "quantized", "params", "target", "config"),
        ],
    ),
}
DOORS = {"ses_jax", "ses_jax.cli", "ses_jax.__main__", "ses_jax.convert.__main__"}  # they may import anything
FAMILIES = {
    "flux1": ("flux1", "flux.1"),
    "qwen_image": ("qwen_image", "qwenimage", "qwen-image"),
    "flux2": ("flux2", "flux.2", "klein"),
    "z_image": ("z_image", "zimage", "z-image"),
}
NETWORK_OF_A_FAMILYS_NAME = "autoencoderklflux2"  # as published configs have it
READS_TORCH_FILES = {"ses_jax.convert.pickles"}  # with torch's own reader where it is installed
NAMES_FAMILIES = {"ses_jax.pipelines", "ses_jax.pipelines.registry", "ses_jax.cli"}  # the registry, and help texts


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


def room_of(name):
    """The room that a module stands in."""
    return ".".join(name.split(".")[:2])


def test_every_module_has_its_place():
    """Only the face and the shell stand outside a room, and the table lists each module once."""
    listed = [f"{room}.{module}" for room, (_, modules) in ROOMS.items() for module in modules]
    assert sorted(listed) == sorted(set(MODULES) - DOORS - set(ROOMS))


@pytest.mark.parametrize("name", sorted(set(MODULES) - DOORS))
def test_imports_point_down(name):
    room = room_of(name)
    allowed, order = ROOMS[room]
    used = {module for module in imports(MODULES[name]) if module in MODULES and module != name}
    outside = {room_of(module) for module in used} - {room}
    assert outside <= allowed, f"{name} may not import {sorted(outside - allowed)}"
    inside = {module.rpartition(".")[2] for module in used - set(ROOMS) if room_of(module) == room}
    above = inside - set(order[order.index(name.rpartition(".")[2]) + 1 :]) if inside else set()
    assert not above, f"{name} may not import {sorted(above)}, which stand above it"


def test_rooms_stand_on_rooms():
    """No room may import from one above it, so there is no circle."""
    order = list(ROOMS)
    for room, (allowed, _) in ROOMS.items():
        assert allowed <= set(order[order.index(room) + 1 :]), room


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"ses_jax.convert", "ses_jax.models"}))
def test_a_room_says_what_stands_in_it(room):
    said = ast.get_docstring(ast.parse(MODULES[room].read_text()))
    assert all(module in said for module in ROOMS[room][1])


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


def test_annotations_are_checked():
    """By what pytest's options install; `conftest` leaves out what has nothing to compare."""
    square, oblong = np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(jaxtyping.TypeCheckError):
        wavelet.half(np.zeros(4, np.float32))
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)

    def alike(x: Float[np.ndarray, "n n"] | None, more: dict[str, Float[np.ndarray, "n *m"]]) -> int:
        return len(more)

    assert checked(alike)(square, {"a": oblong}) == 1
    for arguments in ((oblong, {}), (square, {"a": oblong.T}), (square, {"a": 1})):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(alike)(*arguments)

    def plain(x: int | None) -> int:
        return x

    assert checked(plain)(1) == 1
    for wrong in ("1", None):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(plain)(wrong)


def undefined_names(folder):
    """What ruff finds, without the names in shapes of jaxtyping, for which the rule is off elsewhere."""
    command = ["ruff", "check", "--isolated", "--no-cache", "--select", "F821", "--target-version", "py311"]
    command = [sys.executable, "-m", *command, "--output-format", "json", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    places = [
        (x["filename"], x["location"]["row"], x["location"]["column"], x["message"]) for x in json.loads(ran.stdout)
    ]
    shapes = {file: list(_shapes(ast.parse(Path(file).read_text()))) for file in {file for file, *_ in places}}
    return [
        f"{file}:{row}: {message}"
        for file, row, column, message in places
        if not any(first < (row, column) <= last for first, last in shapes[file])
    ]


def _shapes(tree):
    """Where annotations such as `Float[Array, "b c"]` have their strings: first and last `(row, column)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and hasattr(jaxtyping, node.value.id):
            for part in node.slice.elts[1:] if isinstance(node.slice, ast.Tuple) else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def test_no_name_is_undefined(tmp_path):
    assert undefined_names(ROOT) == []
    lines = ("from jaxtyping import Float", 'def f(x: Float[int, "b c"]) -> "Nothing":', "    return gone + x")
    (tmp_path / "some.py").write_text("\n".join(lines))
    found = sorted(line.rpartition("some.py:")[2] for line in undefined_names(tmp_path))
    assert found == ["2: Undefined name `Nothing`", "3: Undefined name `gone`"]


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
