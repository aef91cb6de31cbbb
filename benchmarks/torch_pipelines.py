"""The published models as diffusers pipelines with random weights, made from their configs on the device.

Facts of the published `config.json`s; what is not named is the constructor's default. Text encoders are whole, as
diffusers runs them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from phases import Job

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FLUX1_VAE = BLOCKS | {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
QWEN2_5_VL = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}
MISTRAL3 = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    },
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "tie_word_embeddings": False,
}
Z_IMAGE = {"axes_lens": [1536, 512, 512]}
DYNAMIC_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
QWEN_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}


class Network(NamedTuple):
    """A class of diffusers or transformers, and what its config says."""

    name: str
    config: dict[str, Any]


class Published(NamedTuple):
    """The networks of a published model; `texts` in the order of `text_encoder`, `text_encoder_2`."""

    pipeline: str
    transformer: Network
    vae: Network
    texts: tuple[Network, ...]
    scheduler: dict[str, Any]
    extra: Mapping[str, Any] = MappingProxyType({})


FLUX1_TEXTS = (Network("CLIPTextModel", CLIP_L), Network("T5EncoderModel", T5_XXL))
FLUX2_VAE = Network("AutoencoderKLFlux2", {})
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}


def _flux1(guided: bool, scheduler: dict[str, Any]) -> Published:
    transformer = Network("FluxTransformer2DModel", {"guidance_embeds": guided})
    return Published("FluxPipeline", transformer, Network("AutoencoderKL", FLUX1_VAE), FLUX1_TEXTS, scheduler)


def _z_image(shift: float) -> Published:
    transformer, vae = Network("ZImageTransformer2DModel", Z_IMAGE), Network("AutoencoderKL", FLUX1_VAE)
    return Published("ZImagePipeline", transformer, vae, (Network("Qwen3Model", QWEN3_4B),), {"shift": shift})


def _klein(transformer: dict[str, Any], text: dict[str, Any], distilled: bool) -> Published:
    network = Network("Flux2Transformer2DModel", transformer | {"guidance_embeds": False})
    texts = (Network("Qwen3ForCausalLM", text),)
    return Published("Flux2KleinPipeline", network, FLUX2_VAE, texts, DYNAMIC_SHIFT, {"is_distilled": distilled})


PUBLISHED = {
    "Tongyi-MAI/Z-Image-Turbo": _z_image(3.0),
    "Tongyi-MAI/Z-Image": _z_image(6.0),
    "black-forest-labs/FLUX.1-dev": _flux1(True, DYNAMIC_SHIFT | {"shift": 3.0}),
    "black-forest-labs/FLUX.1-schnell": _flux1(False, {"shift": 1.0}),
    "black-forest-labs/FLUX.2-dev": Published(
        "Flux2Pipeline",
        Network("Flux2Transformer2DModel", {}),
        FLUX2_VAE,
        (Network("Mistral3ForConditionalGeneration", MISTRAL3),),
        DYNAMIC_SHIFT,
    ),
    "black-forest-labs/FLUX.2-klein-4B": _klein(KLEIN_4B, QWEN3_4B, True),
    "black-forest-labs/FLUX.2-klein-9B": _klein(KLEIN_9B, QWEN3_8B, True),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(KLEIN_4B, QWEN3_4B, False),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(KLEIN_9B, QWEN3_8B, False),
    "Qwen/Qwen-Image": Published(
        "QwenImagePipeline",
        Network("QwenImageTransformer2DModel", {}),
        Network("AutoencoderKLQwenImage", {}),
        (Network("Qwen2_5_VLForConditionalGeneration", QWEN2_5_VL),),
        QWEN_SHIFT | {"shift_terminal": 0.02, "time_shift_type": "exponential"},
    ),
}


def build(network: Network, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network with random weights, made where it will run; on "meta" it is its shapes alone."""
    with _default_dtype(dtype), torch.device(device):
        if hasattr(diffusers, network.name):
            module = getattr(diffusers, network.name)(**network.config)
        else:
            kind = getattr(transformers, network.name)
            module = kind(kind.config_class(**network.config))
    module.eval().requires_grad_(False)
    if device != "meta":
        for weight in module.parameters():
            # What is left uninitialised, as pad tokens are, may be anything.
            if weight.ndim > 1:
                weight.normal_(std=0.02)
    return module


def assemble(published: Published, networks: dict[str, Any]) -> Any:
    """The pipeline around its networks; those that are absent, and the tokenizers, are None."""
    kind = getattr(diffusers, published.pipeline)
    names = ["text_encoder", "tokenizer", "transformer", "vae"]
    names += ["text_encoder_2", "tokenizer_2"] if len(published.texts) > 1 else []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**published.scheduler)
    return kind(scheduler=scheduler, **{name: networks.get(name) for name in names}, **published.extra)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Family(NamedTuple):
    """How a pipeline is called without its tokenizers.

    Attributes:
      lengths: of what each of the text encoders reads.
      arguments: `(pipe, batch, job) -> ` those of a call.
      guided: whether so much guidance runs a second branch.
    """

    lengths: Callable[[Job], tuple[int, ...]]
    arguments: Callable[[Any, int, Job], dict[str, Any]]
    guided: Callable[[float], bool] = lambda guidance: False


def _flux1_arguments(pipe: Any, batch: int, job: Job) -> dict[str, Any]:
    config = pipe.transformer.config
    return {
        "prompt_embeds": _states(pipe, batch, _flux1_lengths(pipe)[1], config.joint_attention_dim),
        "pooled_prompt_embeds": _states(pipe, batch, config.pooled_projection_dim),
        "guidance_scale": job.guidance,
    }


def _flux1_lengths(pipe: Any) -> tuple[int, int]:
    return (77, 512 if pipe.transformer.config.guidance_embeds else 256)


def _flux2_arguments(pipe: Any, batch: int, job: Job) -> dict[str, Any]:
    states = _states(pipe, batch, 512, pipe.transformer.config.joint_attention_dim)
    return {"prompt_embeds": states, "guidance_scale": job.guidance}


def _klein_arguments(pipe: Any, batch: int, job: Job) -> dict[str, Any]:
    arguments = _flux2_arguments(pipe, batch, job)
    return arguments | {"negative_prompt_embeds": arguments["prompt_embeds"]}


def _qwen_arguments(pipe: Any, batch: int, job: Job) -> dict[str, Any]:
    states = _states(pipe, batch, job.tokens, pipe.transformer.config.joint_attention_dim)
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    arguments = {"prompt_embeds": states, "prompt_embeds_mask": mask, "true_cfg_scale": job.guidance}
    if job.guidance > 1:
        arguments |= {"negative_prompt_embeds": states, "negative_prompt_embeds_mask": mask}
    return arguments


def _z_image_arguments(pipe: Any, batch: int, job: Job) -> dict[str, Any]:
    states = list(_states(pipe, batch, job.tokens, pipe.transformer.config.cap_feat_dim))
    return {"prompt_embeds": states, "negative_prompt_embeds": states, "guidance_scale": job.guidance}


def _states(pipe: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=pipe.transformer.dtype, device=pipe.transformer.device)


FAMILIES = {
    "FluxPipeline": Family(lambda job: (77, 256 if job.model.endswith("schnell") else 512), _flux1_arguments),
    "Flux2Pipeline": Family(lambda job: (512,), _flux2_arguments),
    "Flux2KleinPipeline": Family(lambda job: (512,), _klein_arguments, lambda guidance: guidance > 1),
    "QwenImagePipeline": Family(lambda job: (job.tokens + 34,), _qwen_arguments, lambda guidance: guidance > 1),
    "ZImagePipeline": Family(lambda job: (512,), _z_image_arguments, lambda guidance: guidance > 0),
}
