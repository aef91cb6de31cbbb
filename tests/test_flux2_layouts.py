"""FLUX.2's two published layouts: one folder a network, and its authors' single files in the checkpoint's root."""

import shutil

import jax
import numpy as np
import oracle_flux2
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

import ses_jax
from ses_jax.cli import convert as main
from ses_jax.convert import autoencoder_kl_bn, engine, files, flux2, matching
from ses_jax.convert.engine import ConversionError, Header
from ses_jax.models import autoencoder_kl_bn as vae
from ses_jax.pipelines import flux2 as family

TRANSFORMERS = {
    "flux2_dev.transformer": family.PUBLISHED[0],
    "flux2_klein_4b.transformer": family.PUBLISHED[1],
    "flux2_klein_9b.transformer": family.PUBLISHED[2],
}
COUNTER = "bn.num_batches_tracked"  # the one scalar; it has no place in the params
# Heads and groups of the published size, so that a file is enough to know the rest.
TINY = oracle_flux2.Sizes(
    heads=1,
    axes_dims=(32, 32, 32, 32),
    single_layers=3,
    mlp_ratio=2.5,
    vae_widths=(32, 64),
    vae_groups=32,
    vae_layers=1,
)


def original_transformer(names):
    """By name in the single file: the tensors of diffusers' layout that it joins along their outputs, and how."""
    renamed = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    out = {f"{new}.weight": ([f"{old}.weight"], None) for old, new in renamed.items() if f"{old}.weight" in names}
    out["final_layer.adaLN_modulation.1.weight"] = (["norm_out.linear.weight"], "swap")
    for i in range(count(names, "transformer_blocks")):
        for stream, qkv, projection, mlp, infix in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ""),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "added_"),
        ):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}.{stream}"
            out |= {
                f"{new}_attn.qkv.weight": ([f"{old}.attn.{name}.weight" for name in qkv], None),
                f"{new}_attn.proj.weight": ([f"{old}.attn.{projection}.weight"], None),
                f"{new}_attn.norm.query_norm.scale": ([f"{old}.attn.norm_{infix}q.weight"], None),
                f"{new}_attn.norm.key_norm.scale": ([f"{old}.attn.norm_{infix}k.weight"], None),
                f"{new}_mlp.0.weight": ([f"{old}.{mlp}.linear_in.weight"], None),
                f"{new}_mlp.2.weight": ([f"{old}.{mlp}.linear_out.weight"], None),
            }
    for i in range(count(names, "single_transformer_blocks")):
        old, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        out |= {
            f"{new}.linear1.weight": ([f"{old}.to_qkv_mlp_proj.weight"], None),
            f"{new}.linear2.weight": ([f"{old}.to_out.weight"], None),
            f"{new}.norm.query_norm.scale": ([f"{old}.norm_q.weight"], None),
            f"{new}.norm.key_norm.scale": ([f"{old}.norm_k.weight"], None),
        }
    return out


def original_bn_vae(names):
    around = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    out = {}
    for new, sources in original_vae(names).items():
        layer, _, kind = new.rpartition(".")
        if new != COUNTER:
            out[f"{around.get(layer, layer)}.{kind}"] = sources
    return out


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_table_covers_a_whole_single_file(name):
    """Also the config that is made up from the file's shapes is the published one."""
    shapes = published_shapes(name)
    original = original_shapes(original_transformer(shapes), shapes)
    config = flux2.original_config(headers(original))
    assert flux2.COMPONENT.from_json(config) == TRANSFORMERS[name].configs["transformer"]
    assert_consumed_whole(flux2.COMPONENT, flux2.ORIGINAL, config, original)


def test_table_covers_the_whole_single_file_of_the_autoencoder():
    shapes = published_shapes("flux2.vae")
    original = original_shapes(original_bn_vae(shapes), shapes) | {COUNTER: ()}
    config = autoencoder_kl_bn.original_config(headers(original))
    component = autoencoder_kl_bn.COMPONENT
    assert component.from_json(config) == vae.Config()
    abstract = component.abstract(vae.Config())
    plan = matching.plan(component.single_file.table(config), abstract, headers(original))
    assert {slot.name for slots in plan.slots.values() for slot in slots} | set(plan.unused) == original.keys()
    assert plan.unused == (COUNTER,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint in diffusers' layout, and with single files instead of two networks' weights and configs."""
    root = tmp_path_factory.mktemp("flux2")
    oracle_flux2.dev_pipeline(TINY, seed=3).save_pretrained(root / "diffusers")
    shutil.copytree(root / "diffusers", root / "original")
    for name, layout, file in (
        ("transformer", original_transformer, "flux2-dev.safetensors"),
        ("vae", original_bn_vae, "ae.safetensors"),
    ):
        tensors = safetensors.numpy.load_file(root / "original" / name / "diffusion_pytorch_model.safetensors")
        shutil.rmtree(root / "original" / name)
        original = original_tensors(layout(tensors), tensors)
        original |= {COUNTER: tensors[COUNTER]} if COUNTER in tensors else {}
        safetensors.numpy.save_file(original, root / "original" / file)
    return root


def test_the_layout_is_what_diffusers_converts(folders):
    """The renaming above, checked with the converters that the reference ships."""
    file = safetensors.numpy.load_file(folders / "original" / "flux2-dev.safetensors")
    converted = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(tensor) for name, tensor in file.items()}
    )
    published = folders / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = safetensors.numpy.load_file(published)
    assert converted.keys() == expected.keys()
    assert all(np.array_equal(converted[name].numpy(), expected[name]) for name in expected)


def test_both_layouts_give_the_same_pipeline(folders):
    one = ses_jax.load_pipeline(str(folders / "diffusers"))
    other = ses_jax.load_pipeline(str(folders / "original"))
    assert_bit_equal(one.params, other.params)
    assert one.velocity.args == other.velocity.args  # the config of the transformer
    assert one.decode.args == other.decode.args


def test_heads_of_another_size_need_a_config(folders):
    tensors = safetensors.numpy.load_file(folders / "original" / "flux2-dev.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes["double_blocks.0.img_attn.norm.query_norm.scale"] = (64,)
    with pytest.raises(ValueError, match=r"heads of 64 channels are unknown; add transformer/config.json"):
        flux2.original_config(headers(shapes))


def test_a_wrong_single_file_is_named(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "original")
    file = tmp_path / "original" / "flux2-dev.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["single_blocks.1.linear2.weight"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ConversionError, match=r"missing: single_blocks.1.linear2.weight \[128, 448\], for"):
        ses_jax.load_pipeline(str(tmp_path / "original"))


def test_command_converts_and_exports_bit_for_bit(folders, tmp_path):
    main(str(folders / "diffusers"), tmp_path / "converted")
    one, other = (ses_jax.load_pipeline(str(folder)) for folder in (folders / "diffusers", tmp_path / "converted"))
    assert_bit_equal(one.params, other.params)
    main(str(tmp_path / "converted"), tmp_path / "exported", export=True)
    for file in sorted((folders / "diffusers").rglob("*.safetensors")):
        expected = safetensors.numpy.load_file(file)
        exported = safetensors.numpy.load_file(tmp_path / "exported" / file.relative_to(folders / "diffusers"))
        assert exported.keys() == expected.keys()
        assert all(exported[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_single_file_round_trips_through_its_table(folders):
    tensors = safetensors.numpy.load_file(folders / "original" / "flux2-dev.safetensors")
    config = files.read_json(folders / "diffusers" / "transformer" / "config.json")
    abstract = flux2.COMPONENT.abstract(flux2.COMPONENT.from_json(config))
    found = {name: Header(tensor.shape, "F32", "file") for name, tensor in tensors.items()}
    plan = matching.plan(flux2.ORIGINAL, abstract, found)
    params = engine.load(plan, abstract, engine.Weights(found, tensors.__getitem__))
    exported = dict(engine.export(flux2.ORIGINAL, params))
    assert exported.keys() == tensors.keys()
    assert all(np.array_equal(exported[name], tensors[name]) for name in tensors)
    assert len(jax.tree.leaves(params)) == len(plan.slots)
