"""Adapters for tests: random low-rank changes of a tiny transformer, written as each program that makes them does."""

import numpy as np
import oracle_flux1
import oracle_flux2
import oracle_qwen_image
import safetensors.numpy
from oracle import ZImageSizes, z_image
from test_flux1_layouts import original_transformer as flux1_original
from test_flux2_layouts import original_transformer as flux2_original

from ses_jax.convert import engine, files, flux1, flux2, matching, qwen_image
from ses_jax.convert import z_image as z_image_tables
from ses_jax.convert.engine import Header, Weights
from ses_jax.loading import adapters, network
from ses_jax.loading.lora_files import open_adapters


def z_image_original(names):
    """By the authors' name: the tensors of diffusers' layout that it joins along their outputs, and how."""
    out = {}
    for name in names:
        new = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        new = new.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
        if "attention.to_q" in new:
            out[new.replace("to_q", "qkv")] = ([name.replace("to_q", f"to_{n}") for n in "qkv"], None)
        elif "attention.to_k" not in new and "attention.to_v" not in new:
            out[new] = ([name], None)
    return out


def same(names):
    return {name: ([name], None) for name in names}


# By family: the reference, our component, and the layout of the authors' own names.
FAMILIES = {
    "flux1": (
        lambda: oracle_flux1.flux1(oracle_flux1.Flux1Sizes(heads=2, head_dim=8, axes_dims=(2, 2, 4))),
        flux1.COMPONENT,
        flux1_original,
    ),
    "flux2": (
        lambda: oracle_flux2.transformer(oracle_flux2.Sizes(heads=2, axes_dims=(2, 2, 2, 2), context=24)),
        flux2.COMPONENT,
        flux2_original,
    ),
    "qwen_image": (
        lambda: oracle_qwen_image.transformer(oracle_qwen_image.Sizes(heads=2, axes_dims=(2, 2, 4))),
        qwen_image.COMPONENT,
        same,
    ),
    "z_image": (
        lambda: z_image(ZImageSizes(dim=24, heads=3, axes_dims=(2, 2, 4), refiner_layers=1)),
        z_image_tables.COMPONENT,
        z_image_original,
    ),
}


class Family:
    """A tiny transformer of a family, saved to a folder, and its tensors."""

    def __init__(self, name, folder):
        build, self.component, self.layout = FAMILIES[name]
        self.name, self.folder, self.reference = name, folder, build()
        self.reference.save_pretrained(folder)
        self.json = files.read_json(folder / "config.json")
        self.tensors = {name: x.numpy() for name, x in self.reference.state_dict().items()}

    def load(self, lora, folder=None, **how):
        """Params with adapters."""
        opened = open_adapters(lora)
        edits = adapters.plan_edits(opened, {"transformer": (self.component, self.json)})
        return network.load(folder or self.folder, self.component, edits=edits.get("transformer"), **how).params

    def params(self, tensors):
        """Params of tensors under diffusers' names."""
        headers = {name: Header(x.shape, "F32", "memory") for name, x in tensors.items()}
        abstract = self.component.abstract(self.component.from_json(self.json))
        plan = matching.plan(self.component.table(self.json), abstract, headers)
        return engine.load(plan, abstract, Weights(headers, tensors.__getitem__))

    def changed(self, deltas, layout=same):
        """The tensors with changes, given by name in a layout, added."""
        tensors = dict(self.tensors)
        for name, (sources, how) in layout(self.tensors).items():
            if name not in deltas:
                continue
            delta = np.roll(deltas[name], len(deltas[name]) // 2, axis=0) if how == "swap" else deltas[name]
            ends = np.cumsum([len(tensors[source]) for source in sources])
            for source, part in zip(sources, np.split(delta, ends[:-1]), strict=True):
                tensors[source] = tensors[source] + part
        return tensors

    def layers(self, layout=same):
        """Shapes of the linear layers' weights, by the layer's name in a layout."""
        found = {}
        for name, (sources, _) in layout(self.tensors).items():
            shapes = [self.tensors[source].shape for source in sources]
            if name.endswith(".weight") and len(shapes[0]) == 2:
                found[name.removesuffix(".weight")] = (sum(shape[0] for shape in shapes), shapes[0][1])
        return found


def low_rank(shapes, seed=0):
    """Random factors `(down, up)` by layer, of ranks 1 to 4."""
    rng = np.random.default_rng(seed)
    ranks = {layer: 1 + i % 4 for i, layer in enumerate(shapes)}
    return {
        layer: tuple(
            rng.standard_normal(shape).astype(np.float32) / 3
            for shape in ((ranks[layer], inputs), (outputs, ranks[layer]))
        )
        for layer, (outputs, inputs) in shapes.items()
    }


def dense(factors, scale=lambda rank: 1.0):
    """Changes by name of the weight."""
    return {f"{layer}.weight": scale(len(down)) * (up @ down) for layer, (down, up) in factors.items()}


def write(path, factors, prefix="", names=(".lora_A.weight", ".lora_B.weight"), *, alpha=None, metadata=None):
    """Writes low-rank factors; a prefix that ends with an underscore takes layers with underscores."""
    tensors = {}
    for layer, (down, up) in factors.items():
        whole = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
        tensors |= {whole + names[0]: down, whole + names[1]: up}
        tensors |= {} if alpha is None else {f"{whole}.alpha": np.array(alpha, np.float32)}
    return save(path, tensors, metadata)


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return str(path)
