"""Adapters (LoRA and its relatives) merged on load: against changes computed here, and against diffusers with peft."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import lora_files
import numpy as np
import oracle_flux1
import pytest
import safetensors.numpy
import torch
import toy
from adapted import assert_a_search_with_an_adapter_in_eight_bits
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline, ZImagePipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from layouts import assert_bit_equal, original_tensors
from lora_files import dense, low_rank, same, save, write
from parity import assert_same_images, pair
from test_flux1_pipeline import SHORT, arguments

import ses_jax
from ses_jax import cli
from ses_jax.convert import decoder_lm, engine
from ses_jax.convert.engine import ConversionError
from ses_jax.convert.names import vocabulary
from ses_jax.engine import identity, models, resume
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import network, rows
from ses_jax.loading.lora_files import open_adapters, pairs
from ses_jax.models import quantized
from ses_jax.shell import options as shell_options

KOHYA = (".lora_down.weight", ".lora_up.weight")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Tiny transformers by the family's name, each made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = lora_files.Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def assert_close(params, expected, atol=1e-6):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), params, expected)


# What begins a name, what ends those of down and up, and the alpha; then whether layers go by the authors' names.
LAYOUTS = {
    "peft": (("transformer.", (".lora_A.weight", ".lora_B.weight"), None), False),
    "peft with a name": (("", (".lora_A.default.weight", ".lora_B.default.weight"), None), False),
    "peft with another name": (("transformer.", (".lora_A.default_0.weight", ".lora_B.default_0.weight"), None), False),
    "comfy with a name": (
        ("diffusion_model.", (".lora_down.default.weight", ".lora_up.default.weight"), 2.0),
        True,
    ),
    "bare with alpha": (("", KOHYA, 8.0), False),
    "transformer with alpha": (("transformer.", KOHYA, 3.0), False),
    "comfy": (("diffusion_model.", (".lora_A.weight", ".lora_B.weight"), None), True),
    "comfy with alpha": (("diffusion_model.", KOHYA, 2.0), True),
    "kohya": (("lora_unet_", KOHYA, 4.0), True),
    "videox": (("lora_unet__", KOHYA, 4.0), False),
    "kohya by diffusers' names": (("lora_unet_", KOHYA, 4.0), False),
    "onetrainer": (("lora_transformer_", KOHYA, 1.0), False),
    "peft dump": (("base_model.model.", (".lora_A.weight", ".lora_B.weight"), None), True),
    "simpletuner": (("lycoris_", KOHYA, 2.0), False),
}


OF_EVERY_FAMILY = [(name, layout) for name in lora_files.FAMILIES for layout in ("kohya", "comfy with alpha")]


@pytest.mark.parametrize(
    ("name", "layout"), dict.fromkeys([*(("flux1", layout) for layout in LAYOUTS), *OF_EVERY_FAMILY])
)
def test_every_layout_on_every_linear_layer(family, tmp_path, name, layout):
    tiny = family(name)
    (prefix, ends, alpha), original = LAYOUTS[layout]
    vocabulary = tiny.layout if original else same
    factors = low_rank(tiny.layers(vocabulary))
    file = write(tmp_path / "lora.safetensors", factors, prefix, ends, alpha=alpha)
    changes = dense(factors, lambda rank: 0.7 * (1 if alpha is None else alpha / rank))
    assert_close(tiny.load({file: 0.7}), tiny.params(tiny.changed(changes, vocabulary)), atol=2e-6)


@pytest.mark.parametrize("name", lora_files.FAMILIES)
def test_two_adapters_are_the_sum_that_diffusers_makes(family, tmp_path, name):
    """By peft's own layers, `set_adapters` and `fuse_lora`; one of them has patterns of ranks and alphas."""
    tiny = family(name)
    reference = lora_files.FAMILIES[name][0]()
    first, second = (low_rank(tiny.layers(), seed) for seed in (1, 2))
    ranks = {layer: len(down) for layer, (down, _) in second.items()}
    config = {"r": 2, "lora_alpha": 3, "rank_pattern": ranks, "alpha_pattern": {next(iter(ranks)): 5}}
    config |= {"use_rslora": True, "target_modules": list(ranks)}
    said = {f"transformer.{name}": value for name, value in config.items()}
    files = [
        write(tmp_path / "first.safetensors", first, "transformer."),
        write(
            tmp_path / "second.safetensors",
            second,
            "transformer.",
            metadata={"lora_adapter_metadata": json.dumps(said)},
        ),
    ]
    for file, adapter in zip(files, ("first", "second"), strict=True):
        state = {k: torch.from_numpy(v) for k, v in safetensors.numpy.load_file(file).items()}
        reference.load_lora_adapter(
            state, prefix="transformer", adapter_name=adapter, metadata=said if adapter == "second" else None
        )
    reference.set_adapters(["first", "second"], [0.7, -0.3])
    reference.fuse_lora(adapter_names=["first", "second"])
    reference.unload_lora()
    fused = {k: v.numpy() for k, v in reference.state_dict().items()}
    assert fused.keys() == tiny.tensors.keys()
    assert_close(tiny.load([(files[0], 0.7), (files[1], -0.3)]), tiny.params(fused), atol=2e-6)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# What diffusers makes of these files; each is right here by the test of layouts above.


def test_what_diffusers_gets_wrong():
    """Where it does no longer, its loader can be an oracle of these, too."""

    def converted(pipeline, prefix, ends, shapes=((2, 8), (8, 2)), **more):
        tensors = {prefix + end: torch.ones(shape) for end, shape in zip(ends, shapes, strict=True)}
        return pipeline.lora_state_dict(tensors | {prefix + end: value for end, value in more.items()})

    peft, alpha = (".lora_A.weight", ".lora_B.weight"), {".alpha": torch.tensor(1.0)}
    kohya = converted(FluxPipeline, "lora_unet_img_in", KOHYA, **alpha)
    assert not any(key.startswith("transformer.") for key in kohya)  # and so without effect
    assert "transformer.x_embedder.alpha" in converted(FluxPipeline, "transformer.x_embedder", KOHYA, **alpha)
    with pytest.raises(ValueError, match="should be empty"):
        converted(Flux2Pipeline, "diffusion_model.img_in", peft, **alpha)
    up = torch.arange(8.0)[:, None]
    final = "diffusion_model.final_layer.adaLN_modulation.1"
    swapped = Flux2Pipeline.lora_state_dict({final + peft[0]: torch.ones(1, 8), final + peft[1]: up})
    assert torch.equal(swapped["transformer.norm_out.linear.lora_B.weight"], up)
    assert "transformer.layers.0.attention.qkv.lora_A.weight" in converted(
        ZImagePipeline, "diffusion_model.layers.0.attention.qkv", peft
    )
    dora = converted(QwenImagePipeline, "transformer.img_in", peft, **{".dora_scale": torch.ones(8, 1)})
    assert not any("dora" in key for key in dora)


@pytest.fixture(scope="module")
def flux1(family):
    return family("flux1")


def test_one_adapter_in_both_vocabularies_onto_all_forms_of_a_checkpoint(flux1, tmp_path):
    """A fused layer's adapter is one of each part with the same down; folder, single file and Orbax give the same."""
    original, parts = low_rank(flux1.layers(flux1.layout)), {}
    for name, (sources, how) in flux1.layout(flux1.tensors).items():
        if name.removesuffix(".weight") in original and name.endswith(".weight"):
            down, up = original[name.removesuffix(".weight")]
            up = np.roll(up, len(up) // 2, axis=0) if how == "swap" else up
            ends = np.cumsum([len(flux1.tensors[source]) for source in sources])
            ups = np.split(up, ends[:-1])
            parts |= {s.removesuffix(".weight"): (down, part) for s, part in zip(sources, ups, strict=True)}
    one = {write(tmp_path / "original.safetensors", original, "diffusion_model."): 0.3}
    other = {write(tmp_path / "parts.safetensors", parts, "transformer."): 0.3}
    expected = flux1.load(one)
    assert_bit_equal(flux1.load(other), expected)

    (tmp_path / "single" / "transformer").mkdir(parents=True)
    tensors = original_tensors(flux1.layout(flux1.tensors), flux1.tensors)
    save(tmp_path / "single" / "flux1-dev.safetensors", tensors)
    shutil.copy(flux1.folder / "config.json", tmp_path / "single" / "transformer")
    network.save_converted(tmp_path / "converted", network.load(flux1.folder, flux1.component))
    for lora in (one, other):
        assert_bit_equal(flux1.load(lora, tmp_path / "single" / "transformer"), expected)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    assert_bit_equal(flux1.load(other, tmp_path / "converted", dtype=jnp.bfloat16), rounded)


def test_all_adapters_are_added_before_the_sum_is_rounded_once(flux1, tmp_path):
    half = {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in flux1.tensors.items()}
    reference = low_rank(flux1.layers())
    files = [write(tmp_path / f"{i}.safetensors", reference, "transformer.") for i in range(3)]
    save(tmp_path / "diffusion_pytorch_model.safetensors", {k: x.astype(jnp.bfloat16) for k, x in half.items()})
    shutil.copy(flux1.folder / "config.json", tmp_path)
    lora = list(zip(files, (0.01, -0.3, 0.5), strict=True))
    params = flux1.load(lora, tmp_path, dtype=jnp.bfloat16)
    exact = jax.tree.map(np.asarray, flux1.load(lora, tmp_path, dtype=jnp.float32))
    assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_adapters_are_merged_before_weights_are_put_into_eight_bits(flux1, tmp_path, monkeypatch):
    """From a published folder and from converted ones; one that is in eight bits already is refused."""
    lora = {write(tmp_path / "lora.safetensors", low_rank(flux1.layers()), "transformer."): 0.5}
    network.save_converted(tmp_path / "converted", network.load(flux1.folder, flux1.component))
    found = flux1.load(lora, quantize="int8")
    taken = flux1.component.quantization("int8").takes

    def stored(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return quantized.quantize(np.asarray(leaf), "int8") if taken(path) else leaf

    expected = quantized.spread(jax.tree_util.tree_map_with_path(stored, flux1.load(lora)))
    assert_bit_equal(found, expected)
    assert_bit_equal(flux1.load(lora, tmp_path / "converted", quantize="int8"), expected)
    assert rows.stored(tmp_path / "converted" / "params", "single_blocks/mlp_in/kernel") is None
    monkeypatch.setattr(rows, "LARGE", 0)
    network.save_converted(tmp_path / "by the layer", network.load(flux1.folder, flux1.component))
    assert_bit_equal(flux1.load(lora, tmp_path / "by the layer", quantize="int8"), expected)
    assert rows.stored(tmp_path / "by the layer" / "params", "single_blocks/mlp_in/kernel") is not None
    network.save_converted(tmp_path / "int8", network.load(flux1.folder, flux1.component, quantize="int8"))
    with pytest.raises(ValueError, match="quantised already"):
        flux1.load(lora, tmp_path / "int8")


def test_a_strength_of_zero_is_none(flux1, tmp_path):
    file = write(tmp_path / "lora.safetensors", low_rank(flux1.layers()), "transformer.")
    assert_bit_equal(flux1.load({file: 0.0}), flux1.load(None))


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (6.0, 3.0), (1e-2, 5e-3)])
def test_alpha_is_over_the_rank(flux1, tmp_path, alpha, scale):
    down, up = random(2, 64), random(16, 2)
    for dtype in (np.float32, jnp.bfloat16):
        tensors = {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}
        tensors |= {} if alpha is None else {"img_in.alpha": np.array([alpha], dtype)}
        scale = scale if alpha is None or not alpha else float(np.array(alpha, dtype)) / 2
        params = flux1.load(save(tmp_path / "lora.safetensors", tensors))
        assert_close(params, flux1.params(flux1.changed({"x_embedder.weight": scale * up @ down})), 1e-5)


def test_peft_says_the_scale_beside_its_own_files(flux1, tmp_path):
    factors = {"x_embedder": (random(4, 64), random(16, 4)), "proj_out": (random(4, 16), random(64, 4))}
    write(tmp_path / "adapter_model.safetensors", factors, "base_model.model.")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"x_emb.*": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scaled = {name: change * (0.5 if "x_emb" in name else 2.0) for name, change in dense(factors).items()}
    assert_close(flux1.load(tmp_path), flux1.params(flux1.changed(scaled)))


def kron(rows, columns, blocks):
    """A LoKr of that shape: full factors, one or two of them a product, and what they make."""
    w1, w2 = random(blocks, blocks), random(rows // blocks, columns // blocks, seed=1)
    a, b = random(rows // blocks, 2, seed=2), random(2, columns // blocks, seed=3)
    c, d = random(blocks, 2, seed=4), random(2, blocks, seed=5)
    alpha = np.array(3.0, np.float32)
    return {
        "full": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": np.array(1e10, np.float32)}, np.kron(w1, w2)),
        "half": ({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": alpha}, 1.5 * np.kron(w1, a @ b)),
        "low": ({"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b}, np.kron(c @ d, a @ b)),
    }


@pytest.mark.parametrize("kind", ["full", "half", "low", "loha", "diff"])
@pytest.mark.parametrize(
    "layer", ["double_blocks.1.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2"]
)
def test_relatives_on_fused_layers(flux1, tmp_path, kind, layer):
    rows, columns = flux1.layers(flux1.layout)[layer]
    if kind == "loha":
        a, b, c, d = random(rows, 2), random(2, columns), random(rows, 3, seed=1), random(3, columns, seed=1)
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": np.array(1.0, np.float32)}
        change = (a @ b) * (c @ d) / 2
    elif kind == "diff":
        bias = random(sum(len(flux1.tensors[s]) for s in flux1.layout(flux1.tensors)[f"{layer}.bias"][0]))
        change = random(rows, columns)
        tensors = {"diff": change, "diff_b": bias}
    else:
        tensors, change = kron(rows, columns, 4)[kind]
    changes = {f"{layer}.weight": change} | ({f"{layer}.bias": bias} if kind == "diff" else {})
    changes = {name: -0.5 * values for name, values in changes.items()}
    expected = flux1.params(flux1.changed(changes, flux1.layout))
    for prefix in (f"diffusion_model.{layer}", f"lycoris_{layer.replace('.', '_')}"):
        file = save(tmp_path / "lora.safetensors", {f"{prefix}.{role}": values for role, values in tensors.items()})
        assert_close(flux1.load({file: -0.5}), expected, atol=1e-5)


def test_xlabs_layers_and_biases(flux1, tmp_path):
    """The first layer of its single blocks is that of queries, keys and values alone."""
    names = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.1.processor.qkv_lora2": "double_blocks.1.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "double_blocks.1.processor.proj_lora2": "double_blocks.1.txt_attn.proj",
        "single_blocks.1.processor.qkv_lora": "single_blocks.1.linear1",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }
    shapes = flux1.layers(flux1.layout)
    rows = {
        name: (shapes[layer][0] if name[-8:] != "qkv_lora" else 48, shapes[layer][1]) for name, layer in names.items()
    }
    factors = low_rank(rows)
    changes = {}
    for name, (down, up) in factors.items():
        changes[f"{names[name]}.weight"] = np.zeros(shapes[names[name]], np.float32)
        changes[f"{names[name]}.weight"][: len(up)] = up @ down
    file = write(tmp_path / "xlabs.safetensors", factors, names=(".down.weight", ".up.weight"))
    assert_close(flux1.load(file), flux1.params(flux1.changed(changes, flux1.layout)))

    down, up, bias = random(2, 64), random(16, 2), random(16)
    tensors = {"x_embedder.lora_A.weight": down, "x_embedder.lora_B.weight": up, "x_embedder.lora_B.bias": bias}
    file = save(tmp_path / "bias.safetensors", tensors | {"x_embedder.alpha": np.array(1, np.float32)})
    changes = {"x_embedder.weight": up @ down / 2, "x_embedder.bias": bias / 2}
    assert_close(flux1.load(file), flux1.params(flux1.changed(changes)))


def test_a_fused_layer_beside_its_parts_counts_once(family, tmp_path):
    """If they say the same; else neither is right."""
    tiny = family("z_image")
    down, up = random(2, 24), random(72, 2)
    tensors = {"layers.0.attention.qkv.lora_down.weight": down, "layers.0.attention.qkv.lora_up.weight": up}
    for part, name in zip(np.split(up, 3), ("to_q", "to_k", "to_v"), strict=True):
        layer = f"layers.0.attention.{name}"
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": part}
    expected = tiny.params(tiny.changed({"layers.0.attention.qkv.weight": up @ down}, tiny.layout))
    assert_close(tiny.load(save(tmp_path / "lora.safetensors", tensors)), expected)
    tensors["layers.0.attention.to_k.lora_up.weight"] = up[:24]
    with pytest.raises(
        ConversionError, match=r"the same weights as .*qkv.*: layers.0.attention.to_k.lora_down.weight, "
    ):
        tiny.load(save(tmp_path / "lora.safetensors", tensors))


# Whole pipelines.


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A tiny FLUX.1 of diffusers, and ours of its folder."""
    sizes = oracle_flux1.Flux1Sizes(layers=1, single_layers=1, t5_layers=1, vae_layers=1, vae_widths=(8, 16))
    return pair(oracle_flux1.flux1_pipeline(sizes, seed=4), tmp_path_factory.mktemp("pipeline"))


def text_layers(model):
    return {name: tuple(x.weight.shape) for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}


@pytest.fixture(scope="module")
def whole(pipelines, tmp_path_factory):
    """An adapter of all three networks, each in another layout."""
    reference, _ = pipelines
    folder = tmp_path_factory.mktemp("whole")
    parts = {}
    for name, prefix, ends in (
        ("transformer", "transformer.", (".lora_A.weight", ".lora_B.weight")),
        ("text_encoder", "lora_te1_", KOHYA),
        ("text_encoder_2", "lora_te3_", KOHYA),
    ):
        factors = low_rank(text_layers(getattr(reference, name)), seed=len(name))
        if name == "text_encoder" and not any("text_model" in layer for layer in factors):
            prefix += "text_model_"  # which this release of transformers leaves out
        parts[name] = factors, write(folder / f"{name}.safetensors", factors, prefix, ends)
    tensors = {key: x for _, file in parts.values() for key, x in safetensors.numpy.load_file(file).items()}
    return {name: factors for name, (factors, _) in parts.items()}, save(folder / "whole.safetensors", tensors)


def test_an_image_with_all_networks_changed(pipelines, whole):
    """The reference's weights are changed where they lie: its own loader drops T5's."""
    reference, ours = pipelines
    factors, file = whole
    pipeline = ses_jax.load_pipeline(str(ours.folder), lora={file: 0.5}, max_tokens=SHORT)
    kept = {name: {k: v.clone() for k, v in getattr(reference, name).state_dict().items()} for name in factors}
    with torch.no_grad():
        for name, changes in factors.items():
            weights = dict(getattr(reference, name).named_parameters())
            for key, change in dense(changes).items():
                weights[key].add_(torch.from_numpy(0.5 * change))
    assert_same_images((reference, pipeline), ["a cat"], arguments(SHORT))
    for name, state in kept.items():
        getattr(reference, name).load_state_dict(state)


def test_text_encoders_by_onetrainers_names(pipelines, whole, tmp_path):
    """`lora_te1_` and `lora_te2_` in its older form, names of their own in the newer one."""
    _, ours = pipelines
    factors, _ = whole
    changed = []
    for clip, t5 in (("lora_te1_text_model_", "lora_te2_"), ("clip_l.text_model.", "t5.")):
        parts = {"text_encoder": clip, "text_encoder_2": t5}
        files = [
            write(
                tmp_path / f"{name}{prefix}.safetensors",
                {layer.removeprefix("text_model."): pair for layer, pair in factors[name].items()},
                prefix,
                KOHYA,
            )
            for name, prefix in parts.items()
        ]
        changed.append(ses_jax.load_pipeline(str(ours.folder), lora=files).params)
    assert_bit_equal(*changed)
    with pytest.raises(AssertionError):
        assert_bit_equal(changed[0]["text_encoder_2"], ours.params["text_encoder_2"])


def test_a_search_in_eight_bits(pipelines, tmp_path):
    assert_a_search_with_an_adapter_in_eight_bits(pipelines[1].folder, tmp_path)


def test_the_same_on_a_mesh_and_on_the_host(pipelines, whole):
    folder, lora = str(pipelines[1].folder), {whole[1]: -0.5}
    plain = ses_jax.load_pipeline(folder, lora=lora)
    assert plain.changes == {"lora": [[whole[1], -0.5]]}
    for options in ({"mesh": "data=4,model=2"}, {"offload_text_encoder": True}):
        assert_bit_equal(ses_jax.load_pipeline(folder, lora=lora, **options).params, plain.params)


def test_loaded_pipelines_are_kept_apart(pipelines, tmp_path):
    _, ours = pipelines
    layer = {"x_embedder": (random(2, 64), random(64, 2))}
    file = write(tmp_path / "lora.safetensors", layer)
    first = models.find_pipeline(str(ours.folder), lora={file: 0.5})
    assert models.find_pipeline(str(ours.folder), lora={file: 0.5}) is first
    assert models.find_pipeline(str(ours.folder), lora={file: 0.6}) is not first
    second = models.find_pipeline(str(ours.folder), lora={file: 0.5})
    write(tmp_path / "lora.safetensors", {"proj_out": (random(3, 64), random(64, 3))})
    assert models.find_pipeline(str(ours.folder), lora={file: 0.5}) is not second
    models.forget()


def test_results_and_saved_searches_know_the_adapters(tmp_path):
    plain = toy.pipeline()
    pipeline = dataclasses.replace(plain, changes={"lora": [["a.safetensors", 0.5]]})
    identities = [identity.identity_of(p, toy.brightness(), SearchConfig(), ["x"], [0]) for p in (pipeline, plain)]
    resume.begin(tmp_path / "saved", identities[0])
    resume.begin(tmp_path / "saved", identities[0])
    with pytest.raises(ValueError, match=r"other settings \(lora \[\['a.safetensors', 0.5\]\] -> None\)"):
        resume.begin(tmp_path / "saved", identities[1])
    run = {"reward": toy.brightness(), "out": tmp_path / "batch", "budget": 2, "population": 2, "elites": 1}
    ses_jax.search_many(["x"], model=pipeline, progress=False, **run)
    saved = json.loads((tmp_path / "batch" / "00000" / "result.json").read_text())
    assert saved["config"]["lora"] == [["a.safetensors", 0.5]]
    with pytest.raises(ValueError, match=r"was started with model='Toy toy .*a.safetensors.*', now model='Toy toy'"):
        ses_jax.search_many(["x"], model=plain, progress=False, **run)


def test_a_schedule_may_be_overridden(pipelines):
    """As a distilled adapter of few steps wants it: a constant shift of 3, all the way to the end."""
    folder = str(pipelines[1].folder)
    shift = {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None}
    pipeline = ses_jax.load_pipeline(folder, schedule=shift)
    even = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(pipeline.sigmas(4, 64, 64), 3 * even / (1 + 2 * even), rtol=1e-6)
    log = {"base_shift": np.log(3), "max_shift": np.log(3)}  # as diffusers' users write it
    same_again = ses_jax.load_pipeline(folder, schedule=log)
    np.testing.assert_allclose(same_again.sigmas(4, 64, 64), pipeline.sigmas(4, 64, 64), rtol=1e-6)
    assert pipeline.changes == {"schedule": shift}
    for wrong, complaint in (
        ({"shfit": 3}, r"unknown entries \['shfit'\]; known: sigmas, use_dynamic_shifting, shift"),
        ({"_class_name": "FlowMatchLCMScheduler"}, r'sampler, FlowMatchLCMScheduler, .* schedule=\{"_class_name": "Fl'),
        ({"sigmas": [1.0, 0.5, 0.5]}, r"sigmas=\[1.0, 0.5, 0.5\] are not numbers that fall from at most 1 to above 0"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "are not numbers that fall"),
        ({"sigmas": "1.0"}, "sigmas='1.0' are not numbers"),
        ({"shift": "3"}, "shift='3' is not a number"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas are not supported"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ses_jax.load_pipeline(folder, schedule=wrong)


SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


def test_noise_levels_may_be_given_one_by_one(pipelines):
    reference, folder = pipelines[0], str(pipelines[1].folder)
    levels = [1.0, 0.6509, 0.2932, 0.0495]
    pipeline = ses_jax.load_pipeline(folder, schedule={"sigmas": levels})
    tokens = (128 // pipeline.size_multiple) * (192 // pipeline.size_multiple)
    mu = calculate_shift(tokens, *(reference.scheduler.config[name] for name in SHIFT))
    reference.scheduler.set_timesteps(sigmas=levels, mu=mu)
    np.testing.assert_allclose(pipeline.sigmas(4, 128, 192), reference.scheduler.sigmas.numpy(), rtol=1e-6)
    assert (pipeline.defaults.steps, pipeline.defaults.preview_steps) == (4, 4)
    with pytest.raises(ValueError, match="the schedule has 4 sigmas, one a step, and 3 steps are asked for"):
        ses_jax.search("a", model=pipeline, preview_steps=3, reward=toy.brightness(), budget=1)


# What is refused, and how it is said.

DOWN, UP = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
GOOD = {"transformer_blocks.0.attn.to_q.lora_A.weight": DOWN, "transformer_blocks.0.attn.to_q.lora_B.weight": UP}
LAYER = "transformer_blocks.0.attn.to_k"
WRONG = {
    "half a pair": ({f"{LAYER}.lora_A.weight": DOWN}, r"half of a change.*: transformer_blocks.0.attn.to_k.lora_A.w"),
    "no such layer": (
        {f"transformer_blocks.{i}.attn2.to_q.lora_{x}.weight": DOWN for i in range(3) for x in "AB"},
        r"no such layer in this model: transformer_blocks.\[0-2\].attn2.to_q.lora_A.weight, .*lora_B.weight",
    ),
    "dora": (
        {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"{LAYER}.dora_scale": UP},
        r"DoRA is not supported: .*to_k.dora_scale",
    ),
    "shape": (
        {f"{LAYER}.lora_A.weight": DOWN[:, :8], f"{LAYER}.lora_B.weight": UP},
        r"a change of \[16, 8\], the layer's is \[16, 16\]: .*to_k",
    ),
    "ranks": ({f"{LAYER}.lora_A.weight": DOWN[:1], f"{LAYER}.lora_B.weight": UP}, r"do not make a product: .*to_k"),
    "suffix": (
        {f"{LAYER}.set_weight": UP, f"{LAYER}.reshape_weight": UP},
        r"unknown kind of tensor: .*reshape_weight, .*set_weight",
    ),
    "no bias": ({"transformer_blocks.0.attn.norm_q.diff_b": UP[:8, 0]}, "the layer has no bias: .*norm_q.diff_b"),
    "two kinds": (
        {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"{LAYER}.diff": np.zeros((16, 16), np.float32)},
        "more than one kind of change: .*to_k.lora_A.weight",
    ),
    "twice": (
        {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP, f"{LAYER}.lora_up.weight": UP},
        r"means the same as .*to_k.lora_up.weight",
    ),
    "alpha alone": ({f"{LAYER}.alpha": np.ones(1, np.float32)}, "half of a change.*: .*to_k.alpha"),
    "integers": ({f"{LAYER}.diff": np.ones((16, 16), np.int8)}, "I8 is none of F32, F16, BF16: .*to_k.diff"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(flux1, tmp_path, monkeypatch, case):
    """Also beside what does, and before any weights are read."""
    monkeypatch.setattr(engine, "load", lambda *args, **how: pytest.fail("reads weights"))
    tensors, complaint = WRONG[case]
    metadata = {"modelspec.architecture": "some-model/lora"}
    with pytest.raises(ConversionError, match=rf"made for some-model/lora\) does not fit the model:\n  .*{complaint}"):
        flux1.load(save(tmp_path / "lora.safetensors", GOOD | tensors, metadata))


def test_all_that_is_wrong_with_all_adapters_comes_in_one_error(flux1, tmp_path):
    files = [save(tmp_path / f"{i}.safetensors", WRONG[case][0]) for i, case in enumerate(("half a pair", "dora"))]
    with pytest.raises(
        ConversionError, match=r"(?s)0.safetensors does not fit .*half .*1.safetensors does not fit .*DoRA"
    ):
        flux1.load(dict.fromkeys(files, 1.0))


@pytest.mark.parametrize("other", ["flux2", "qwen_image", "z_image"])
def test_an_adapter_of_another_family_is_refused(family, flux1, tmp_path, other):
    file = write(tmp_path / "lora.safetensors", low_rank(family(other).layers()), "transformer.")
    with pytest.raises(ConversionError, match="no such layer in this model"):
        flux1.load(file)


def test_layers_above_the_last_one_that_is_used_may_be_changed():
    """Of a text encoder that is not run to its end."""
    json = {"model_type": "qwen3", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 3}
    json |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    json |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4}
    words = vocabulary(decoder_lm.component(-2), json)
    for name in ("model.layers.{}.mlp.up_proj", "layers.{}.mlp.up_proj", "layers_{}_mlp_up_proj"):
        assert ((name.format(1), "weight") in words.tensors, words.ignored(name.format(1))) == (True, False)
        assert ((name.format(2), "weight") in words.tensors, words.ignored(name.format(2))) == (False, True)
        assert not words.ignored(name.format(22))


def test_made_up_layers_of_zeros_may_stay(flux1, tmp_path):
    nothing = {"made_up.diff_b": np.zeros(4, np.float32), "position_embedding.diff": np.zeros((2, 2), np.float32)}
    expected = flux1.load(save(tmp_path / "lora.safetensors", GOOD))
    assert_bit_equal(flux1.load(save(tmp_path / "more.safetensors", GOOD | nothing)), expected)
    with pytest.raises(
        ConversionError, match=r"changes nothing in this model: made_up.diff_b, position_embedding.diff"
    ):
        flux1.load(save(tmp_path / "none.safetensors", nothing))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float64])
def test_an_alpha_of_any_kind_is_a_number(flux1, tmp_path, dtype):
    alpha = "transformer_blocks.0.attn.to_q.alpha"
    expected = flux1.load(save(tmp_path / "lora.safetensors", GOOD | {alpha: np.array(3, np.float32)}))
    assert_bit_equal(flux1.load(save(tmp_path / "other.safetensors", GOOD | {alpha: np.array(3, dtype)})), expected)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"use_dora": True}, "DoRA is not supported"),
        ({"peft_type": "OFT"}, "peft_type 'OFT' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' needs weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga' needs weights"),
    ],
)
def test_what_peft_says_is_heard(flux1, tmp_path, config, complaint):
    save(tmp_path / "adapter_model.safetensors", GOOD)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | config))
    with pytest.raises(ConversionError, match=complaint):
        flux1.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("{", r"lora_adapter_metadata of .*a\.safetensors is not a JSON object"),
        ("[]", r"lora_adapter_metadata of .*a\.safetensors is not a JSON object"),
        ('{"transformer.lora_alpha": "4"}', "lora_alpha='4' is not a number"),
        ('{"transformer.alpha_pattern": 4}', "alpha_pattern=4 is not an object"),
        ('{"transformer.alpha_pattern": {"to_q": null}}', "lora_alpha=None is not a number"),
    ],
)
def test_what_peft_says_may_be_damaged(flux1, tmp_path, said, complaint):
    path = save(tmp_path / "a.safetensors", GOOD, {"lora_adapter_metadata": said})
    with pytest.raises(ConversionError, match=complaint):
        flux1.load(path)


def test_contradicting_scales_are_refused(flux1, tmp_path):
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
    alpha = {key.replace("lora_A.weight", "alpha"): np.array(1, np.float32) for key in GOOD if "lora_A" in key}
    with pytest.raises(ConversionError, match=r"alpha makes a scale of 0.5, the metadata of 2"):
        flux1.load(save(tmp_path / "lora.safetensors", GOOD | alpha, said))


def test_values_that_are_not_finite_are_named(flux1, tmp_path):
    bad = {key: value * np.float32("nan") for key, value in GOOD.items()}
    with pytest.raises(ConversionError, match=r"to_q.lora_\w.weight in .*lora.safetensors has NaN or infinite values"):
        flux1.load(save(tmp_path / "lora.safetensors", bad))


# Where adapters come from.


@pytest.mark.parametrize(
    "given", [{"a": 0.5, "b": 1.0}, [("a", 0.5), ["b", 1]], [("a", 0.5), "b"], {"a": np.float64(0.5), "b": 1}]
)
def test_ways_to_say_strengths(given):
    assert pairs(given) == (("a", 0.5), ("b", 1.0))
    assert pairs("a") == (("a", 1.0),)
    assert pairs(None) == ()


@pytest.mark.parametrize("given", [0.5, {"a": "strong"}, [("a", float("nan"))], {"a": True}, [("a", 1, 2)], {"": 1.0}])
def test_strengths_that_are_none(given):
    with pytest.raises(ValueError, match=r"lora=.* is not a path or Hugging Face id with a strength"):
        pairs(given)


def test_a_folder_holds_one_adapter_or_a_usual_one(tmp_path):
    def found():
        return open_adapters(tmp_path)[0].weights.headers.keys()

    with pytest.raises(ValueError, match=r"no .safetensors file in it"):
        found()
    save(tmp_path / "some.safetensors", GOOD)
    assert found() == GOOD.keys()
    save(tmp_path / "other.safetensors", GOOD)
    with pytest.raises(ValueError, match=r"holds 2 files; name one, as in .*:other.safetensors"):
        found()
    save(tmp_path / "pytorch_lora_weights.safetensors", {"x.diff": UP})
    assert found() == {"x.diff"}


@pytest.mark.parametrize(
    ("source", "error", "complaint"),
    [
        ("./absent.safetensors", FileNotFoundError, "no such file or folder"),
        ("absent/lora.safetensors", FileNotFoundError, "no such file or folder"),
        ("absent.safetensors", FileNotFoundError, "no such file or folder"),
        ("lora.pt", ValueError, "is no .safetensors file"),
        ("empty.safetensors", ValueError, "holds no tensors"),
        ("damaged.safetensors", ValueError, "is truncated or corrupt"),
    ],
)
def test_files_that_are_no_adapters(tmp_path, monkeypatch, source, error, complaint):
    monkeypatch.chdir(tmp_path)
    for name in ("lora.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"not tensors")
    save(tmp_path / "empty.safetensors", {})
    with pytest.raises(error, match=complaint):
        open_adapters({source: 0.5})


def test_adapters_come_from_the_hub(tmp_path, monkeypatch):
    fetched = []
    held = ["style.safetensors", "README.md"]

    def download(repository, name):
        fetched.append((repository, name))
        if "config" in name:
            raise huggingface_hub.errors.EntryNotFoundError("none")
        return save(tmp_path / "fetched.safetensors", GOOD)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: held)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    named = ["org/name", "org/name:style.safetensors", "org/name/style.safetensors", "org/name/sub/x.safetensors"]
    for source in named:
        assert open_adapters(source)[0].weights.headers.keys() == GOOD.keys()
    assert fetched == [("org/name", "style.safetensors")] * 3 + [("org/name", "sub/x.safetensors")]
    held.append("other.safetensors")
    with pytest.raises(ValueError, match=r"org/name holds 2 files; name one, as in org/name:other.safetensors"):
        open_adapters("org/name")
    fetched.clear()
    open_adapters("org/name:sub/adapter_model.safetensors")
    assert fetched == [("org/name", f"sub/adapter_{name}") for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda repository: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(ValueError, match=r"'org/name' is neither a file nor could it be fetched .*offline"):
        open_adapters("org/name")


def test_the_shell_takes_adapters_and_schedules(tmp_path, capsys):
    chosen = shell_options.RenderOptions(
        lora=("a=0.8", "odd=name.safetensors", "b=-1"), schedule=("shift=3", "shift_terminal=null")
    )
    assert shell_options.arguments(chosen)["load"] == {
        "lora": (("a", 0.8), ("odd=name.safetensors", 1.0), ("b", -1.0)),
        "schedule": {"shift": 3, "shift_terminal": None},
    }
    many = ["--lora", "absent.safetensors=0.5", "--lora", "also.safetensors"]
    assert cli.main(["generate", "x", *many, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "ses-jax: lora absent.safetensors: no such file or folder"
    assert cli.main(["generate", "x", "--schedule", "shift", "--out", str(tmp_path)]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err
