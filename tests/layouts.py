"""The layouts of their authors' single files, for tests: how they are made of diffusers' tensors, and what reads them.

A layout is, by name in the single file, the tensors of diffusers' that it joins along their outputs, and how.
"""

import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ses_jax.convert import matching
from ses_jax.convert.engine import ConversionError, Header


def original_vae(names):
    levels = count(names, "decoder.up_blocks")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for name in names:
        new = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        new = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        for ours, theirs in attention.items():
            new = new.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        new = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", new).replace(".resnets.", ".block.")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        out[new] = ([name], "1x1" if convolution else None)
    return out


def count(names, prefix):
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in names if name.startswith(f"{prefix}.")})


def original_shapes(layout, shapes):
    def shape(sources, how):
        first = shapes[sources[0]]
        return (sum(shapes[s][0] for s in sources), *first[1:], *((1, 1) if how == "1x1" else ()))

    return {name: shape(sources, how) for name, (sources, how) in layout.items()}


def original_tensors(layout, tensors):
    def tensor(sources, how):
        whole = np.concatenate([tensors[source] for source in sources])
        if how == "swap":
            return np.concatenate([whole[len(whole) // 2 :], whole[: len(whole) // 2]])
        return whole[:, :, None, None] if how == "1x1" else whole

    return {name: tensor(sources, how) for name, (sources, how) in layout.items()}


def published_shapes(name):
    path = Path(__file__).parent / "headers" / f"{name}.json.gz"
    return {tensor: tuple(shape) for tensor, shape in json.loads(gzip.decompress(path.read_bytes())).items()}


def headers(shapes, file="file.safetensors"):
    return {name: Header(shape, "BF16", file) for name, shape in shapes.items()}


def assert_consumed_whole(component, table, config, shapes):
    abstract = component.abstract(component.from_json(config))
    plan = matching.plan(table, abstract, headers(shapes))
    slots = [slot for group in plan.slots.values() for slot in group]
    used = {slot.name: slot.shape for slot in slots}
    assert used == shapes  # all of them, and none is left over
    assert not plan.unused
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == sum(x.size for x in jax.tree.leaves(abstract))
    first = next(iter(shapes))
    with pytest.raises(ConversionError, match=f"missing: {re.escape(first)} "):
        matching.plan(table, abstract, headers({k: v for k, v in shapes.items() if k != first}))


def assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
