"""FLUX.1's two published layouts: one folder a network, and its authors' single files in the checkpoint's root."""

import inspect
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_flux1
import pytest
import safetensors.numpy
import torch
from diffusers.loaders import single_file_utils
from layouts import (
    assert_bit_equal,
    assert_consumed_whole,
    count,
    headers,
    original_shapes,
    original_tensors,
    original_vae,
    published_shapes,
)
from oracle_flux1 import Flux1Sizes

import ses_jax
from ses_jax.cli import convert as main
from ses_jax.convert import autoencoder_kl, clip, engine, files, flux1, matching, t5
from ses_jax.convert.engine import ConversionError, Header
from ses_jax.loading import network

T5_XXL = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
DIFFUSERS = {
    "flux1_dev.transformer": (flux1.COMPONENT, {"guidance_embeds": True}),
    "flux1_schnell.transformer": (flux1.COMPONENT, {"guidance_embeds": False}),
    "t5_xxl.text_encoder": (t5.COMPONENT, T5_XXL),
    "clip_l.text_encoder": (clip.TEXT_COMPONENT, CLIP_L),
}
ORIGINAL = ("flux1_dev.transformer", "flux1_schnell.transformer", "flux1.vae")
# Heads of the published size, so that a file is enough to know the rest.
TINY = Flux1Sizes(
    heads=1,
    head_dim=128,
    axes_dims=(16, 56, 56),
    layers=2,
    single_layers=3,
    vae_widths=(32, 64),
    vae_groups=32,
    vae_layers=1,
    t5_width=16,
    clip_width=16,
)


# The authors' layout, written down from diffusers' tensors: by name, which of them it joins along their outputs, and
# how.
def pair(source, target):
    return {f"{target}.{kind}": ([f"{source}.{kind}"], None) for kind in ("weight", "bias")}


def joined(sources, target):
    return {f"{target}.{kind}": ([f"{source}.{kind}" for source in sources], None) for kind in ("weight", "bias")}


def original_transformer(names):
    embedders = {"time": "timestep_embedder", "guidance": "guidance_embedder", "vector": "text_embedder"}
    out = pair("x_embedder", "img_in") | pair("context_embedder", "txt_in") | pair("proj_out", "final_layer.linear")
    for ours, theirs in embedders.items():
        if f"time_text_embed.{theirs}.linear_1.weight" in names:
            out |= pair(f"time_text_embed.{theirs}.linear_1", f"{ours}_in.in_layer")
            out |= pair(f"time_text_embed.{theirs}.linear_2", f"{ours}_in.out_layer")
    swapped = pair("norm_out.linear", "final_layer.adaLN_modulation.1")
    out |= {name: (sources, "swap") for name, (sources, _) in swapped.items()}
    for i in range(count(names, "transformer_blocks")):
        source, target = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, suffix, qkv, projection, infix in (
            ("img", "", ("to_q", "to_k", "to_v"), "to_out.0", ""),
            ("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "added_"),
        ):
            out |= pair(f"{source}.norm1{suffix}.linear", f"{target}.{stream}_mod.lin")
            out |= joined([f"{source}.attn.{name}" for name in qkv], f"{target}.{stream}_attn.qkv")
            out |= pair(f"{source}.attn.{projection}", f"{target}.{stream}_attn.proj")
            out |= pair(f"{source}.ff{suffix}.net.0.proj", f"{target}.{stream}_mlp.0")
            out |= pair(f"{source}.ff{suffix}.net.2", f"{target}.{stream}_mlp.2")
            for short, long in (("q", "query"), ("k", "key")):
                norm = f"{source}.attn.norm_{infix}{short}.weight"
                out[f"{target}.{stream}_attn.norm.{long}_norm.scale"] = ([norm], None)
    for i in range(count(names, "single_transformer_blocks")):
        source, target = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        first = [f"{source}.attn.to_q", f"{source}.attn.to_k", f"{source}.attn.to_v", f"{source}.proj_mlp"]
        out |= pair(f"{source}.norm.linear", f"{target}.modulation.lin") | joined(first, f"{target}.linear1")
        out |= pair(f"{source}.proj_out", f"{target}.linear2")
        out[f"{target}.norm.query_norm.scale"] = ([f"{source}.attn.norm_q.weight"], None)
        out[f"{target}.norm.key_norm.scale"] = ([f"{source}.attn.norm_k.weight"], None)
    return out


@pytest.mark.parametrize("name", DIFFUSERS)
def test_table_covers_a_whole_published_checkpoint(name):
    component, config = DIFFUSERS[name]
    assert_consumed_whole(component, component.table(config), config, published_shapes(name))


@pytest.mark.parametrize("name", ORIGINAL)
def test_table_covers_a_whole_single_file(name):
    """Also the config that is made up from the file's shapes is the published one."""
    component = autoencoder_kl.COMPONENT if name == "flux1.vae" else flux1.COMPONENT
    shapes = published_shapes(name)
    layout = original_vae(shapes) if name == "flux1.vae" else original_transformer(shapes)
    original = original_shapes(layout, shapes)
    config = component.single_file.config(headers(original))
    published = {} if name == "flux1.vae" else {"guidance_embeds": name == "flux1_dev.transformer"}
    assert component.from_json(config) == component.from_json(published)
    assert_consumed_whole(component, component.single_file.table(config), config, original)


def test_the_prefix_of_text_encoders_is_optional():
    shapes = published_shapes("clip_l.text_encoder")
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    assert_consumed_whole(clip.TEXT_COMPONENT, clip.TEXT_TABLE, CLIP_L, bare)
    more = {"text_model.embeddings.position_ids": (1, 77), "text_projection.weight": (768, 768), "logit_scale": ()}
    abstract = clip.TEXT_COMPONENT.abstract(clip.TEXT_COMPONENT.from_json(CLIP_L))
    assert matching.plan(clip.TEXT_TABLE, abstract, headers(shapes | more)).unused == tuple(more)
    tied = headers(published_shapes("t5_xxl.text_encoder") | {"encoder.embed_tokens.weight": (32128, 4096)})
    abstract = t5.COMPONENT.abstract(t5.COMPONENT.from_json(T5_XXL))
    assert matching.plan(t5.TABLE, abstract, tied).unused == ("encoder.embed_tokens.weight",)


# The same weights in both layouts.


@pytest.fixture(scope="module")
def reference():
    pipe = oracle_flux1.flux1_pipeline(TINY, seed=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    """The checkpoint in diffusers' layout, and with single files instead of two networks' weights."""
    root = tmp_path_factory.mktemp("flux1")
    reference.save_pretrained(root / "diffusers")
    shutil.copytree(root / "diffusers", root / "original")
    for name, layout, file in (
        ("transformer", original_transformer, "flux1-dev.safetensors"),
        ("vae", original_vae, "ae.safetensors"),
    ):
        weights = root / "original" / name / "diffusion_pytorch_model.safetensors"
        tensors = safetensors.numpy.load_file(weights)
        weights.unlink()
        original = original_tensors(layout(tensors), tensors)
        safetensors.numpy.save_file(original, root / "original" / file)
    return root


@pytest.fixture
def original(folders, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(folders / "original", tmp_path / "original")
    return tmp_path / "original"


def test_the_layout_is_what_diffusers_converts(reference, folders):
    """The renaming above, checked with the converters that the reference ships."""
    file = safetensors.numpy.load_file(folders / "original" / "flux1-dev.safetensors")
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    names = {"torch": torch}
    exec(source.replace("inner_dim = 3072", "inner_dim = 128"), names)
    converted = names["convert_flux_transformer_checkpoint_to_diffusers"](
        {name: torch.from_numpy(tensor) for name, tensor in file.items()}
    )
    expected = reference.transformer.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)

    file = safetensors.numpy.load_file(folders / "original" / "ae.safetensors")
    converted = single_file_utils.convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(tensor) for name, tensor in file.items()}, reference.vae.config
    )
    expected = reference.vae.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_both_layouts_give_the_same_pipeline(folders):
    one = ses_jax.load_pipeline(str(folders / "diffusers"))
    other = ses_jax.load_pipeline(str(folders / "original"))
    assert_bit_equal(one.params, other.params)
    assert one.velocity.args == other.velocity.args  # the config of the transformer
    assert one.decode.args == other.decode.args


def test_single_files_need_no_config(folders, original):
    shutil.rmtree(original / "transformer")
    (original / "vae" / "config.json").unlink()
    (original / "vae").rmdir()
    expected = ses_jax.load_pipeline(str(folders / "diffusers"))
    pipeline = ses_jax.load_pipeline(str(original))
    assert_bit_equal(pipeline.params, expected.params)
    assert pipeline.velocity.args == expected.velocity.args  # the config of the transformer
    assert pipeline.decode.args == expected.decode.args


def test_schnells_file_is_found_as_well(original):
    (original / "flux1-dev.safetensors").rename(original / "flux1-schnell.safetensors")
    assert ses_jax.load_pipeline(str(original)).defaults.guidance == 3.5  # the content counts, not the name


def test_a_file_that_holds_all_networks_serves_each_of_them(folders, tmp_path):
    """As Comfy saves a checkpoint."""
    original, whole = folders / "original", tmp_path / "whole.safetensors"
    places = {
        "model.diffusion_model.": original / "flux1-dev.safetensors",
        "vae.": original / "ae.safetensors",
        "text_encoders.clip_l.transformer.text_model.": folders / "diffusers" / "text_encoder" / "model.safetensors",
        "text_encoders.t5xxl.transformer.": folders / "diffusers" / "text_encoder_2" / "model.safetensors",
    }
    tensors = {
        f"{prefix}{name.removeprefix('text_model.')}": x
        for prefix, file in places.items()
        for name, x in safetensors.numpy.load_file(file).items()
    }
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = np.zeros((2, 2), np.float32)
    tensors["text_encoders.clip_l.logit_scale"] = np.zeros((), np.float32)
    safetensors.numpy.save_file(tensors, whole)
    expected = ses_jax.load_pipeline(str(folders / "diffusers")).params
    loaded = ses_jax.load_pipeline(str(folders / "diffusers"), **dict.fromkeys(expected, whole))
    assert_bit_equal(loaded.params, expected)


def test_a_file_may_have_any_prefix_but_not_two(folders, tmp_path):
    """As training programs save it: compiled, or for many devices."""
    bare = safetensors.numpy.load_file(folders / "original" / "flux1-dev.safetensors")
    transformer, file = folders / "diffusers" / "transformer", tmp_path / "it.safetensors"
    expected = network.load(transformer, flux1.COMPONENT).params
    for prefix in ("module._orig_mod.", "transformer.", "model."):
        safetensors.numpy.save_file({prefix + name: x for name, x in bare.items()}, file)
        assert_bit_equal(network.load(transformer, flux1.COMPONENT, file=file).params, expected)
    safetensors.numpy.save_file({p + name: x for name, x in bare.items() for p in ("model.", "ema.")}, file)
    with pytest.raises(ConversionError, match=r"it\.safetensors holds the network twice, as (model|ema)\. and as"):
        network.load(transformer, flux1.COMPONENT, file=file)
    safetensors.numpy.save_file({"model.extra": bare["img_in.bias"]} | {f"model.{n}": x for n, x in bare.items()}, file)
    with pytest.raises(ConversionError, match=r"unexpected: extra in .*it\.safetensors"):
        network.load(transformer, flux1.COMPONENT, file=file)


def test_two_single_files_are_refused(original):
    shutil.copyfile(original / "flux1-dev.safetensors", original / "flux1-schnell.safetensors")
    with pytest.raises(ValueError, match=r"transformer has no weights, and .*dev.* and .*schnell.* both could be its"):
        ses_jax.load_pipeline(str(original))


def test_own_weights_come_before_a_single_file(folders, original):
    shutil.copytree(folders / "diffusers" / "transformer", original / "transformer", dirs_exist_ok=True)
    (original / "flux1-dev.safetensors").write_bytes(b"never read")
    ses_jax.load_pipeline(str(original))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("img_in.weight"), r"dev.safetensors: lacks 'img_in.weight'"),
        (lambda t: t.pop("single_blocks.1.linear1.bias"), r"missing: single_blocks.1.linear1.bias \[896\], for"),
        (lambda t: t.update(extra=t["img_in.bias"]), r"unexpected: extra in .*flux1-dev.safetensors"),
        (
            lambda t: t.update({"double_blocks.0.img_attn.norm.query_norm.scale": np.zeros(64, np.float32)}),
            r"rotary axes of heads of 64 channels are unknown; add transformer/config.json",
        ),
    ],
)
def test_a_single_file_that_does_not_fit_is_named(original, change, complaint):
    tensors = safetensors.numpy.load_file(original / "flux1-dev.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, original / "flux1-dev.safetensors")
    (original / "transformer" / "config.json").unlink()
    with pytest.raises(ConversionError, match=complaint):
        network.load(original / "transformer", flux1.COMPONENT)


def test_an_autoencoder_of_other_widths_needs_its_config():
    shapes = {"encoder.down.0.block.0.conv1.weight": (48, 48, 3, 3)}
    with pytest.raises(ValueError, match=r"widths \[48\] do not divide into 32 groups; add vae/config.json"):
        autoencoder_kl.original_config(headers(shapes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_file_round_trips_through_its_table(folders, dtype):
    for name, component, file in (
        ("transformer", flux1.COMPONENT, "flux1-dev.safetensors"),
        ("vae", autoencoder_kl.COMPONENT, "ae.safetensors"),
    ):
        tensors = safetensors.numpy.load_file(folders / "original" / file)
        tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in tensors.items()}
        config = files.read_json(folders / "original" / name / "config.json")
        table = component.single_file.table(config)
        abstract = component.abstract(component.from_json(config))
        found = {k: Header(v.shape, {"float32": "F32", "bfloat16": "BF16"}[dtype], file) for k, v in tensors.items()}
        plan = matching.plan(table, abstract, found)
        params = engine.load(plan, abstract, engine.Weights(found, tensors.__getitem__))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        exported = dict(engine.export(table, params))
        assert exported.keys() == tensors.keys()
        assert all(exported[k].tobytes() == tensors[k].tobytes() for k in tensors)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_command_converts_and_exports_diffusers_layout(folders, tmp_path, layout):
    main(str(folders / layout), tmp_path / "converted")
    main(str(tmp_path / "converted"), tmp_path / "exported", export=True)
    assert not list((tmp_path / "converted").glob("*.safetensors"))
    expected = ses_jax.load_pipeline(str(folders / "diffusers"))
    assert_bit_equal(ses_jax.load_pipeline(str(tmp_path / "converted")).params, expected.params)

    def tensors(root):
        return {
            str(file.relative_to(root)): safetensors.numpy.load_file(file)
            for file in sorted(root.rglob("*.safetensors"))
        }

    assert_bit_equal(tensors(tmp_path / "exported"), tensors(folders / "diffusers"))
    diffusers.FluxPipeline.from_pretrained(tmp_path / "exported")


def test_command_without_configs_exports_what_diffusers_reads(folders, original, tmp_path):
    for name in ("transformer", "vae"):
        shutil.rmtree(original / name)
    main(str(original), tmp_path / "exported", export=True)
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "exported")
    saved = safetensors.numpy.load_file(folders / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors")
    state = again.transformer.state_dict()
    assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in saved.items())
    assert again.vae.config.scaling_factor == oracle.vae(Flux1Sizes()).config.scaling_factor
