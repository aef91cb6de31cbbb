"""Writes the trained demo as a checkpoint folder in the published layouts of diffusers and transformers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demo.losses import CLIP_MEAN, CLIP_STD
from demo.tokenizers import CLIP_LENGTH, load_tokenizers
from ses_jax.convert import autoencoder_kl, clip, decoder_lm, z_image
from ses_jax.loading import network

SHIFT = 3.0


class Parts(NamedTuple):
    """Trained networks and what belongs to them.

    Attributes:
      vae: params of the autoencoder.
      dit: params of the transformer and its text encoder.
      clips: params of CLIPs, by the name of their folder.
      tokenizers: folder with the two tokenizers' folders, `tokenizer` and `clip`.
      latents: `scaling_factor` and `shift_factor`.
      settings: of searches, the content of `ses_jax.json`.
    """

    vae: Any
    dit: Any
    clips: Mapping[str, Any]
    tokenizers: Path
    latents: Mapping[str, float]
    settings: Mapping[str, Any]


def export(parts: Parts, out: Path, sizes: Any) -> None:
    """Weights, as bfloat16, into the folder `out`; other files there stay."""
    out.mkdir(parents=True, exist_ok=True)
    text_json = text_config(sizes)
    idle = ((name, _bfloat16(x)) for name, x in decoder_lm.idle_layers(text_json, sizes.text.layers))
    _write(out / "vae", autoencoder_kl.COMPONENT, vae_config(parts, sizes), parts.vae)
    _write(out / "transformer", z_image.COMPONENT, transformer_config(sizes), parts.dit["transformer"])
    _write(out / "text_encoder", decoder_lm.component(-2), text_json, parts.dit["text_encoder"], unused=idle)
    _copy_tokenizer(parts.tokenizers / "tokenizer", out / "tokenizer")
    for name, params in parts.clips.items():
        _write(out / name, clip.COMPONENT, clip_config(parts, sizes), params)
        _copy_tokenizer(parts.tokenizers / "clip", out / name)
        _write_json(out / name / "preprocessor_config.json", preprocessor_config(sizes))
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler_config())
    _write_json(out / "model_index.json", MODEL_INDEX)
    _write_json(out / "ses_jax.json", parts.settings)


MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def vae_config(parts: Parts, sizes: Any) -> dict[str, Any]:
    c, blocks = sizes.vae, len(sizes.vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": list(c.block_out_channels),
        "layers_per_block": c.layers_per_block,
        "act_fn": "silu",
        "latent_channels": c.latent_channels,
        "norm_num_groups": c.norm_num_groups,
        "sample_size": parts.settings["height"],
        "force_upcast": True,
        "mid_block_add_attention": True,
        "use_quant_conv": c.use_quant_conv,
        "use_post_quant_conv": c.use_post_quant_conv,
        **parts.latents,
    }


def transformer_config(sizes: Any) -> dict[str, Any]:
    c = sizes.dit
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [c.patch_size],
        "all_f_patch_size": [1],
        "in_channels": c.in_channels,
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_refiner_layers": c.n_refiner_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_heads,
        "norm_eps": c.norm_eps,
        "qk_norm": True,
        "cap_feat_dim": c.cap_feat_dim,
        "rope_theta": c.rope_theta,
        "t_scale": c.t_scale,
        "axes_dims": list(c.axes_dims),
        "axes_lens": list(c.axes_lens),
    }


def text_config(sizes: Any) -> dict[str, Any]:
    """The pipeline reads the state before the last layer, so the published file has one layer more, and a norm."""
    c = sizes.text
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers + 1,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": 1024,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def clip_config(parts: Parts, sizes: Any) -> dict[str, Any]:
    c, (_, tokenizer) = sizes.reward, load_tokenizers(parts.tokenizers)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.projection_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": c.vocab_size,
            "max_position_embeddings": CLIP_LENGTH,
            "eos_token_id": tokenizer.eos_token_id,
            **tokens,
            **_tower(c.text),
            "projection_dim": c.projection_dim,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "num_channels": 3,
            **_tower(c.vision),
            "projection_dim": c.projection_dim,
        },
        "dtype": "bfloat16",
    }


def preprocessor_config(sizes: Any) -> dict[str, Any]:
    side = sizes.reward.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(x), 8) for x in CLIP_MEAN],
        "image_std": [round(float(x), 8) for x in CLIP_STD],
    }


def scheduler_config() -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": SHIFT,
    }


def _copy_tokenizer(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "losses*"))


def _tower(tower: Any) -> dict[str, Any]:
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.act,
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def _write(folder: Path, component: Any, config: dict[str, Any], params: Any, **options: Any) -> None:
    network.export(folder, component, config, jax.tree.map(_bfloat16, params), **options)


def _bfloat16(x: Any) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
