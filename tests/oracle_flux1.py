"""Tiny random FLUX.1 pipelines: the reference that parity is measured against."""

import dataclasses

import oracle
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

# Stand-in tokenizers know 256 bytes and two special tokens.
VOCABULARY = 258


@dataclasses.dataclass(frozen=True)
class Flux1Sizes:
    """Sizes of a tiny FLUX.1 pipeline."""

    heads: int = 4
    head_dim: int = 16
    axes_dims: tuple[int, int, int] = (4, 6, 6)  # sums to head_dim
    layers: int = 2
    single_layers: int = 2
    guidance_embeds: bool = True
    clip_width: int = 24
    clip_layers: int = 2
    clip_heads: int = 2
    t5_width: int = 32
    t5_layers: int = 3
    t5_heads: int = 4
    t5_head_dim: int = 12  # times heads differs from the width, which the published one does not bring to light
    t5_hidden: int = 72
    t5_buckets: int = 32
    t5_distance: int = 128
    vae_widths: tuple[int, ...] = (8, 16, 32, 32)
    vae_layers: int = 2
    vae_groups: int = 4
    quant_convs: bool = False
    # Of all weights, and of the matrices alone; faint ones bring the norms' epsilons to light.
    gain: float = 1.0
    matrix_gain: float = 1.0


def flux1_pipeline(sizes: Flux1Sizes = Flux1Sizes(), seed: int = 0) -> FluxPipeline:
    """A whole tiny pipeline; dev with guidance embeddings, else schnell."""
    return FluxPipeline(
        scheduler=scheduler(sizes.guidance_embeds),
        vae=oracle.vae(sizes, seed),
        text_encoder=clip_text(sizes, seed),
        tokenizer=oracle.clip_tokenizer(),
        text_encoder_2=t5(sizes, seed),
        tokenizer_2=t5_tokenizer(),
        transformer=flux1(sizes, seed),
    )


def scheduler(dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """The published scheduler of dev (dynamic) or schnell."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if dynamic else 1.0,
        use_dynamic_shifting=dynamic,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def flux1(sizes: Flux1Sizes = Flux1Sizes(), seed: int = 0) -> FluxTransformer2DModel:
    """The diffusion transformer."""
    return oracle.seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=sizes.layers,
            num_single_layers=sizes.single_layers,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.t5_width,
            pooled_projection_dim=sizes.clip_width,
            guidance_embeds=sizes.guidance_embeds,
            axes_dims_rope=sizes.axes_dims,
        ),
        seed,
        sizes.gain,
        sizes.matrix_gain,
    )


def clip_text(
    sizes: Flux1Sizes = Flux1Sizes(), seed: int = 0, *, act: str = "quick_gelu", eos_token_id: int = 2
) -> CLIPTextModel:
    """CLIP's text tower by itself."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.clip_width,
        intermediate_size=2 * sizes.clip_width,
        projection_dim=sizes.clip_width,
        num_hidden_layers=sizes.clip_layers,
        num_attention_heads=sizes.clip_heads,
        max_position_embeddings=77,
        hidden_act=act,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=eos_token_id,
        pad_token_id=1,
    )
    return oracle.seeded(lambda: CLIPTextModel(config), seed, sizes.gain)


def t5(sizes: Flux1Sizes = Flux1Sizes(), seed: int = 0) -> T5EncoderModel:
    """T5's encoder."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=sizes.t5_width,
        d_kv=sizes.t5_head_dim,
        d_ff=sizes.t5_hidden,
        num_layers=sizes.t5_layers,
        num_heads=sizes.t5_heads,
        relative_attention_num_buckets=sizes.t5_buckets,
        relative_attention_max_distance=sizes.t5_distance,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
    )
    network = oracle.seeded(lambda: T5EncoderModel(config), seed, sizes.gain)
    with torch.no_grad():  # scores are not scaled, so that trained queries are small
        for block in network.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(sizes.t5_head_dim**-0.5)
    return network


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with T5's special tokens."""
    tokenizer = oracle.byte_tokenizer(("<pad>", "</s>"))
    end = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
