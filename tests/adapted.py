"""An adapter and weights in eight bits, of any family's checkpoint: what is loaded, and a search with it."""

import shutil
from pathlib import Path

import jax
import lora_files
import numpy as np
import safetensors.torch
import toy

import ses_jax


def assert_an_adapter_in_eight_bits(source, folder):
    """The weights are those of a checkpoint whose transformer was changed beforehand.

    Args:
      source: folder of the checkpoint.
      folder: an empty one.
    """
    lora, changed = _adapter(source, folder)
    found = ses_jax.load_pipeline(str(source), lora=lora, quantize="int8").params
    expected = ses_jax.load_pipeline(str(changed), quantize="int8").params
    differences = []

    def compare(ours, theirs):
        assert ours.dtype == theirs.dtype
        if ours.dtype == np.int8:  # a sum may be rounded the other way
            differences.append(np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).ravel())
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)

    jax.tree.map(compare, found, expected)
    differences = np.concatenate(differences)
    assert differences.max() <= 1
    assert differences.mean() < 1e-4


def assert_a_search_with_an_adapter_in_eight_bits(source, folder, *, size=(32, 32), **settings):
    """It is that of a checkpoint whose transformer was changed beforehand.

    Args:
      source: folder of the checkpoint.
      folder: an empty one.
      size: height and width.
      settings: of the searches.

    Returns:
      The result of the search with the adapter.
    """
    lora, changed = _adapter(source, folder)
    settings = {"height": size[0], "width": size[1], "level": 1, "reward": toy.brightness()} | settings
    settings |= {"budget": 3, "population": 2, "elites": 1, "steps": 1, "preview_steps": 1, "progress": False}
    load = {"quantize": "int8"}
    found = ses_jax.search("a red circle", model=str(source), load=load | {"lora": lora}, **settings)
    expected = ses_jax.search("a red circle", model=str(changed), load=load, **settings)
    np.testing.assert_allclose(*([row["score"] for row in each.history] for each in (found, expected)), atol=1e-4)
    np.testing.assert_allclose(np.asarray(found.image, np.int16), np.asarray(expected.image, np.int16), atol=1)
    assert (found.config["quantize"], len(found.config["lora"])) == ("int8", 1)
    return found


def _adapter(source, folder):
    """One of all linear layers of the transformer; and a checkpoint that it was added to."""
    files = Path(source, "transformer").glob("*.safetensors")
    tensors = {k: x.float().numpy() for file in files for k, x in safetensors.torch.load_file(file).items()}
    layers = {name: x.shape for name, x in tensors.items() if name.endswith(".weight") and x.ndim == 2}
    factors = lora_files.low_rank({name.removesuffix(".weight"): shape for name, shape in layers.items()})
    lora = {lora_files.write(folder / "lora.safetensors", factors, "transformer."): 0.2}
    changed = folder / "changed"
    shutil.copytree(source, changed, ignore=lambda path, names: [n for n in names if "diffusion_pytorch_model" in n])
    shutil.copytree(Path(source, "vae"), changed / "vae", dirs_exist_ok=True)
    tensors |= {name: tensors[name] + np.float32(0.2) * change for name, change in lora_files.dense(factors).items()}
    lora_files.save(changed / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    return lora, changed
