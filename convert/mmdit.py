"""What the tables of multimodal diffusion transformers share: the reading of their authors' single files."""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert.matching import Header
from ses_jax.models.mmdit import Config


def original_config(headers: Mapping[str, Header], published: Config) -> dict[str, Any]:
    """The entries of `config.json` that the shapes of a single file's tensors tell, alike for all families.

    Args:
      headers: of the file, by name of the tensor.
      published: the family's published config, which has the sizes that no shape tells.

    Raises:
      ValueError: if the heads are not of the published size, from which alone the rotary axes are known.
    """
    dim, channels = headers["img_in.weight"].shape
    head_dim = headers["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    if head_dim != published.attention_head_dim:
        raise ValueError(f"the rotary axes of heads of {head_dim} channels are unknown; add transformer/config.json")
    return {
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": _count(headers, "double_blocks"),
        "num_single_layers": _count(headers, "single_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": headers["txt_in.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in headers,
        "axes_dims_rope": list(published.axes_dims_rope),
    }


def _count(headers: Mapping[str, Header], blocks: str) -> int:
    return len({name.split(".")[1] for name in headers if name.startswith(f"{blocks}.")})
