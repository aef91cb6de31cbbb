"""Noise in the layouts of other programs, pictures that say how they were made, and commands that repeat them."""

import ast
import json
import sys
import types

import numpy as np
import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

import ses_jax
from ses_jax import cli
from ses_jax.engine import repeat
from ses_jax.engine.result import export_noise
from ses_jax.exports import comfyui, export, layouts, noises, pictures
from ses_jax.pipelines.registry import FAMILIES

SHAPE = (4, 6, 8)
CONFIG = {
    "height": 48,
    "width": 64,
    "steps": 4,
    "guidance": 3.0,
    "negative_prompt": None,
    "model": "somebody/model",
    "load": {},
    "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],
}
PROMPT = 'a "red" circle, \u732b'


def noise(count=1, shape=SHAPE):
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_layouts_are_turned_back(batch, channels, rows, columns):
    shape = channels, 2 * rows, 2 * columns
    array = noise(batch, shape)
    for to, back in ((layouts.pack, layouts.unpack), (layouts.patchify, layouts.unpatchify)):
        np.testing.assert_array_equal(back(to(array), shape), array)
        assert back(to(array)[..., :-1], shape) is None
        assert back(array[0, 0], shape) is None


def test_packed_is_as_diffusers_packs():
    """Written a second time, cell by cell."""
    array = noise(2)
    for y, x, c in ((0, 0, 0), (1, 3, 2), (2, 2, 3)):
        cell = array[:, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(2, 4)
        np.testing.assert_array_equal(layouts.pack(array)[:, y * 4 + x, 4 * c : 4 * c + 4], cell)
        np.testing.assert_array_equal(layouts.patchify(array)[:, 4 * c : 4 * c + 4, y, x], cell)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_a_family_is_read_back(family, tmp_path):
    array, module = noise(), layouts.of(family)
    config = CONFIG | {"family": family, "height": 96}  # of FLUX.2: the grid that the network sees
    for given_array in (array[0], array, module.to_latents(array, config), array[:, :, None]):
        np.testing.assert_array_equal(noises.as_noise(given_array, family, SHAPE, 2), np.repeat(array, 2, axis=0))
    export_noise(array[0], {"prompt": PROMPT, "config": config}, "diffusers", tmp_path)
    read = noises.read(tmp_path / "noise.safetensors")
    np.testing.assert_array_equal(noises.as_noise(read, family, SHAPE, 1), array)
    export_noise(array[0], {"prompt": PROMPT, "config": config}, "comfyui", tmp_path)
    read = noises.read(tmp_path / comfyui.LATENT)
    np.testing.assert_array_equal(noises.as_noise(read, family, SHAPE, 1), array)


def test_noise_of_unpacked_flux2_goes_out_patchified():
    config = CONFIG | {"family": "Flux2Pipeline", "height": 48}  # 3 rows of the network, 6 of the autoencoder
    latents = layouts.of("Flux2Pipeline").to_latents(noise(), config)
    assert latents.shape == (1, 16, 3, 4)
    np.testing.assert_array_equal(noises.as_noise(latents, "Flux2Pipeline", SHAPE, 1), noise())


def test_noise_comes_from_arrays_tensors_and_files(tmp_path):
    array = noise()[0]
    np.save(tmp_path / "noise.npy", array)
    save_file({"anything": array}, tmp_path / "one.safetensors")
    save_file({"latents": array, "more": array + 1}, tmp_path / "two.safetensors")
    for source in (array, torch.from_numpy(array), tmp_path / "noise.npy", tmp_path, tmp_path / "two.safetensors"):
        np.testing.assert_array_equal(noises.read(source), array)
    np.testing.assert_array_equal(noises.read(str(tmp_path / "one.safetensors")), array)
    half = torch.from_numpy(array).to(torch.bfloat16)
    np.testing.assert_array_equal(noises.read(half), half.float().numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.npy", "no such file"),
        (lambda path: np.array([1, 2]), "dtype int64"),
        (lambda path: np.array([1.0, np.nan]), "not finite"),
        (lambda path: _written(path / "broken.npy", b"x"), "broken.npy cannot be read"),
        (lambda path: _written(path / "broken.latent", b"x"), "broken.latent cannot be read"),
        (lambda path: _written(path / "noise.txt", b"x"), "noise is a .npy, .safetensors or .latent file"),
    ],
)
def test_what_is_no_noise_is_refused(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        noises.read(make(tmp_path))


def _written(path, content):
    path.write_bytes(content)
    return path


def test_noise_of_another_shape_is_refused_with_those_that_fit():
    with pytest.raises(ValueError, match=r"shape \(3, 4\); .* need \(4, 6, 8\), .* or \(1, 12, 16\) as in diffusers"):
        noises.as_noise(np.zeros((3, 4)), "FluxPipeline", SHAPE, 1)
    with pytest.raises(ValueError, match=r"need \(4, 6, 8\), or \(3, 4, 6, 8\) for 3"):
        noises.as_noise(noise(2), "Toy", SHAPE, 3)


def test_other_programs_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot export to 'a1111'; known: diffusers, comfyui"):
        export.export(noise()[0], PROMPT, CONFIG, "a1111")
    with pytest.raises(ValueError, match="does not say its family: it is of an older version"):
        export.export(noise()[0], PROMPT, CONFIG, "diffusers")
    with pytest.raises(ValueError, match="index=-1 must be at least 0"):
        ses_jax.search("a", index=-1)
    with pytest.raises(ValueError, match="'Toy' has no place in other programs; known: ZImagePipeline"):
        export.export(noise()[0], PROMPT, CONFIG | {"family": "Toy"}, "diffusers")


class Folders(types.ModuleType):
    """What the node takes of ComfyUI."""

    def __init__(self, folder):
        super().__init__("folder_paths")
        self.get_input_directory = lambda: str(folder)
        self.get_annotated_filepath = lambda name: str(folder / name)


def node(monkeypatch, folder):
    """The node of an exported folder, as ComfyUI imports it."""
    monkeypatch.setitem(sys.modules, "folder_paths", Folders(folder))
    names = {"__name__": "ses_noise"}
    exec((folder / "ses_noise" / "__init__.py").read_text(), names)
    return names["NODE_CLASS_MAPPINGS"]["SESNoise"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comfyui_node_gives_the_noise_as_its_sampler_asks(family, tmp_path, monkeypatch):
    """SamplerCustomAdvanced calls `generate_noise({"samples": ...})`, reads `seed`, and takes sigmas as a tensor."""
    config = CONFIG | {"family": family, "height": 96}
    export_noise(noise()[0], {"prompt": PROMPT, "config": config}, "comfyui", tmp_path)
    kind = node(monkeypatch, tmp_path)
    assert kind.INPUT_TYPES()["required"]["latent"] == ([comfyui.LATENT],)
    assert kind.RETURN_TYPES == ("NOISE", "SIGMAS")
    found, sigmas = getattr(kind(), kind.FUNCTION)(comfyui.LATENT)
    assert (sigmas.dtype, sigmas.tolist()) == (torch.float32, CONFIG["sigmas"])
    assert found.seed == 0
    for shape in ((1, *SHAPE), (3, *SHAPE), (1, SHAPE[0], 1, *SHAPE[1:])):  # a batch; with an axis of time
        made = found.generate_noise({"samples": torch.zeros(shape)})
        assert (made.shape, made.dtype, made.device.type) == (shape, torch.float32, "cpu")
        np.testing.assert_array_equal(made[-1].reshape(SHAPE), noise()[0])
    with pytest.raises(ValueError, match="use the model, width and height of the search"):
        found.generate_noise({"samples": torch.zeros(1, 4, 8, 6)})
    before = kind.IS_CHANGED(comfyui.LATENT)
    (tmp_path / comfyui.LATENT).write_bytes(b"other")
    assert kind.IS_CHANGED(comfyui.LATENT) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_workflows_are_wired(family):
    """Every input comes from an output that there is, and all that is made reaches the picture."""
    for guidance in (0.0, 1.0, 4.0, {"scale": 4.0, "true_cfg": 2.0}):
        config = CONFIG | {"family": family, "guidance": guidance, "negative_prompt": "ugly"}
        nodes = comfyui.workflow(layouts.of(family).comfy(config), PROMPT, config)
        wires = {name: [x for x in node["inputs"].values() if isinstance(x, list)] for name, node in nodes.items()}
        assert {source for wired in wires.values() for source, _ in wired} == set(nodes) - {"save"}
        assert wires["sampler"][:2] != [] and nodes["sampler"]["inputs"]["noise"] == ["noise", 0]  # noqa: PT018
        assert nodes["noise"] == {"class_type": "SESNoise", "inputs": {"latent": comfyui.LATENT}}
        assert nodes["prompt"]["inputs"]["text"] == PROMPT
        json.dumps(nodes)


def test_a_script_says_what_its_model_lacks():
    for changes in ({}, {"schedule": {"shift": 3.0}, "quantize": "int8"}):
        assert assigned(changes) == (changes, [])


def assigned(changes):
    """What a script says of a model with changes: those that it leaves out, and its adapters."""
    config = CONFIG | {"family": "ZImagePipeline", "height": 64, "width": 64} | changes
    script = export.export(noise(1, (16, 8, 8))[0], PROMPT, config, "diffusers")["generate.py"].decode()
    found = {node.targets[0].id: node.value for node in ast.parse(script).body if isinstance(node, ast.Assign)}
    return tuple(ast.literal_eval(found[name]) for name in ("CHANGES", "ADAPTERS"))


def test_a_script_loads_the_adapters_that_diffusers_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a"b.safetensors', "one/x.safetensors", "two/x.safetensors", "two/y.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lora = [['a"b.safetensors', 0.5], ["one", -1.0], ["org/name", 2.0], ["org/name:sub/z.safetensors", 1.0]]
    places = [(str(tmp_path), 'a"b.safetensors'), (str(tmp_path / "one"), "x.safetensors")]
    places += [("org/name", None), ("org/name", "sub/z.safetensors")]
    found = [(*place, strength) for place, (_, strength) in zip(places, lora, strict=True)]
    assert assigned({"lora": lora, "quantize": "int8"}) == ({"quantize": "int8"}, found)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.safetensors").touch()  # its scale is in a file beside it
    for source in ("peft", "two", "org/name:adapter_model.safetensors"):
        lora = [["org/name", 1.0], [source, 1.0]]
        assert assigned({"lora": lora}) == ({"lora": lora}, [])


def test_guidance_of_workflows():
    def guider(family, **config):
        nodes = comfyui.workflow(layouts.of(family).comfy(CONFIG | {"family": family} | config), PROMPT, CONFIG)
        return nodes["guider"]["inputs"].get("cfg"), nodes.get("guidance", {}).get("inputs", {}).get("guidance")

    assert guider("ZImagePipeline", guidance=4.0) == (5.0, None)  # counted from the negative prompt
    assert guider("ZImagePipeline", guidance=0.0) == (None, None)
    assert guider("FluxPipeline", guidance=3.5) == (None, 3.5)
    both = {"guidance": {"scale": 2.0, "true_cfg": 3.0}, "negative_prompt": ""}
    assert guider("FluxPipeline", **both) == (3.0, 2.0)
    assert guider("Flux2Pipeline", guidance=4.0) == (None, 4.0)
    assert guider("Flux2KleinPipeline", guidance=4.0) == (4.0, None)
    assert guider("QwenImagePipeline", guidance=1.0) == (None, None)


# --- pictures and repeating ---

FAST = {"budget": 4, "population": 2, "elites": 1, "preview_steps": 2, "steps": 2, "progress": False}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of the toy, saved."""
    folder = tmp_path_factory.mktemp("found")
    reward = toy.mixture(red=1.0, green=0.5)
    settings = FAST | {"seed": 7, "guidance": 0.25, "negative_prompt": "b, c"}
    return ses_jax.search(PROMPT, model=toy.pipeline(), reward=reward, out=folder, **settings), folder


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_pictures_say_how_they_were_made(found, tmp_path, kind):
    result, _ = found
    result.save(tmp_path, image_format=kind, report=False)
    for name, score in (("best", result.score), ("baseline", result.baseline_score)):
        notes = pictures.read(tmp_path / f"{name}.{kind}")
        assert notes.facts["prompt"] == PROMPT
        assert (notes.facts["image"], notes.facts["score"]) == (name, score)
        assert notes.facts["config"]["seed"] == 7
        assert set(notes.facts["versions"]) == {"ses_jax", "jax"}
        first, second, third = notes.parameters.split("\n")
        assert (first, second) == (PROMPT, "Negative prompt: b, c")
        pairs = dict(pair.split(": ") for pair in third.split(", "))
        assert (pairs["Steps"], pairs["Seed"], pairs["Size"]) == ("2", "7", "16x16")
    with Image.open(tmp_path / f"best.{kind}") as image:
        assert image.size == (16, 16)
        assert image.format == pictures.FORMATS[kind]
        assert ("parameters" in image.info) == (kind == "png")


@pytest.mark.parametrize("kind", pictures.FORMATS)
@pytest.mark.parametrize("length", [24_000, 70_000])
def test_pictures_of_long_prompts_are_saved_too(tmp_path, kind, length):
    """A JPEG has room for the facts of the first, and of the second for nothing."""
    notes = pictures.Notes("x" * length, {"prompt": "x" * length})
    pictures.save(tmp_path / "long", Image.new("RGB", (4, 4)), kind, notes)
    if kind != "jpeg":
        assert pictures.read(tmp_path / "long") == notes
    elif length < 65_000:
        assert pictures.read(tmp_path / "long") == notes._replace(parameters="")
    else:
        with pytest.raises(ValueError, match="does not say how it was made"):
            pictures.read(tmp_path / "long")


def test_pictures_of_others_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="does not say how it was made"):
        repeat.read(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(ValueError, match="is no picture"):
        repeat.read(tmp_path / "text.png")
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not the result\.json of a search"):
        repeat.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        repeat.read(tmp_path / "none.png")


def test_what_a_folder_says_is_what_its_picture_says(found):
    result, folder = found
    assert repeat.read(folder)["config"].items() >= repeat.read(folder / "best.png")["config"].items()
    code = repeat.python(PROMPT, result.config)
    call = eval(code, {"ses_jax": types.SimpleNamespace(search=lambda *a, **k: (a, k)), "red": "red", "green": "green"})
    assert call[0] == (PROMPT,)
    assert call[1]["reward"] == {"red": 1.0, "green": 0.5}
    assert call[1].items() >= {"seed": 7, "budget": 4, "guidance": 0.25, "negative_prompt": "b, c"}.items()
    assert not call[1].keys() & {"chunk", "wavelet", "standardize"}


def parsed(words, monkeypatch):
    """What the search command is given."""
    seen = {}

    def spy(prompts, **settings):
        seen.update(settings, prompts=prompts)
        raise ValueError("seen")

    monkeypatch.setattr(ses_jax, "search", spy)
    assert cli.main(words) == 2
    return seen


def test_a_command_gives_its_settings_back(found, monkeypatch):
    config = found[0].config | {"model": "somebody/model", "load": {"max_tokens": 7, "band": "x"}, "prompt_index": 3}
    config |= {"rewards": {"pick": 1.0, "hps": 0.5, "clip": 0.0}, "guidance": {"scale": 2.0}, "standardize": False}
    config |= {"searcher": {"name": "zero-order", "radius": 0.5}, "fidelity": "half:0.5"}
    seen = parsed(["search", *repeat.arguments(config), PROMPT, "again"], monkeypatch)
    expected = {"model": "somebody/model", "load": {"max_tokens": 7, "band": "x"}, "index": 3, "seed": 7}
    expected |= {"reward": {"pick": 1.0, "hps": 0.5}, "report": {"clip": 1.0}, "guidance": {"scale": 2.0}}
    expected |= {"standardize": False, "searcher": "zero-order,radius=0.5", "fidelity": "half:0.5"}
    assert {name: seen[name] for name in expected} == expected
    assert seen["prompts"] == [PROMPT, "again"]


def test_what_a_model_was_loaded_with_is_repeated(found, tmp_path, monkeypatch):
    load = {"lora": [["a b.safetensors", 0.123456789], ["b=c", 1.0]], "schedule": {"shift": 3.0, "end": None}}
    load |= {"quantize": "int8", "transformer": "/some/file.gguf", "dtype": "float16"}
    config = found[0].config | {"load": load, "rewards": {"pick": 1.0}}
    assert (
        eval(repeat.python(PROMPT, config), {"ses_jax": types.SimpleNamespace(search=lambda *a, **k: k["load"])})
        == load
    )
    same = load | {"lora": tuple(map(tuple, load["lora"]))}
    assert parsed(["search", *repeat.arguments(config), PROMPT], monkeypatch)["load"] == same
    summary = found[0].summary() | {"config": config}
    (tmp_path / "result.json").write_text(json.dumps(summary))
    assert parsed(["search", "--like", str(tmp_path)], monkeypatch)["load"] == same
    other = ["search", "--like", str(tmp_path), "--lora", "mine=2", "--quantize", "fp8"]
    assert parsed(other, monkeypatch)["load"] == same | {"lora": (("mine", 2.0),), "quantize": "fp8"}
    older = {name: value for name, value in config.items() if name != "load"} | {"lora": load["lora"]}
    older |= {"files": {"transformer": "/some/file.gguf"}}
    assert repeat.settings(older)["load"] == {name: load[name] for name in ("lora", "transformer")}


def test_what_cannot_be_repeated_says_why(found, tmp_path, capsys):
    _, folder = found
    assert cli.main(["search", "--like", str(folder / "best.png")]) == 2
    assert "with a reward of its maker's own, 'red'; give --reward MODULE:red" in capsys.readouterr().err
    assert cli.main(["search", "--like", str(tmp_path / "none.png")]) == 2
    assert "none.png: no such file" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--to", "comfyui"]) == 2
    assert "'Toy' has no place in other programs" in capsys.readouterr().err


# --- base noise ---


def test_a_search_starts_from_a_given_noise(tmp_path):
    """Candidate 0 is the image that the noise makes, and the winner is never worse."""
    pipeline, settings = toy.pipeline(), {**FAST, "steps": 2}
    base = noise(1, (3, 16, 16))
    result = ses_jax.search("a", model=pipeline, reward=toy.brightness(), base_noise=torch.from_numpy(base), **settings)
    image = ses_jax.generate(pipeline, "a", noise=base, steps=2)
    np.testing.assert_allclose(result.baseline_score, image.mean(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(result.baseline_image), np.asarray(image[0]) * 255, atol=0.51)
    assert result.score >= result.baseline_score
    np.save(tmp_path / "base.npy", base[0])
    again = ses_jax.search(
        ["a", "a"], model=pipeline, reward=toy.brightness(), base_noise=tmp_path / "base.npy", **settings
    )
    np.testing.assert_array_equal(again[0].noise, result.noise)
    assert again[1].baseline_score == pytest.approx(result.baseline_score, abs=1e-6)
    assert result.config["base_noise"]["file"] is None
    assert again[0].config["base_noise"]["file"] == str(tmp_path / "base.npy")
    assert again[0].config["base_noise"]["sha256"] == result.config["base_noise"]["sha256"]


def test_a_base_noise_that_does_not_fit_ends_before_the_work():
    with pytest.raises(ValueError, match=r"noise has shape \(3, 8, 8\)"):
        ses_jax.search("a", model=toy.pipeline(), reward=toy.brightness(), base_noise=np.zeros((3, 8, 8)), **FAST)
