"""`train_demo` at toy sizes: every stage runs, and an interrupted one continues to the very same weights."""

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jaxprs
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import measure_demo
import train_demo
from demo import batches, losses, tokenizers, training
from demo.sizes import DEMO, TINY

from ses_jax.models import convolution, layers, quantized

STAGES = ("vae", "decoder", "clip", "dit", "held-out-clip")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> train_demo.Arguments:
    """All stages without a stop."""
    args = train_demo.Arguments(work=tmp_path_factory.mktemp("straight"), steps=2, sizes="tiny")
    train_demo.main(args)
    return args


def test_an_interrupted_training_continues_to_the_same_weights(straight, tmp_path):
    for minutes in (0.0, float("inf")):  # the first run stops after one step
        train_demo.main(dataclasses.replace(straight, work=tmp_path, stage="vae", minutes=minutes))
        steps, found = training.load(tmp_path / "vae")
        assert steps == (1 if minutes == 0 else 2)
    jax.tree.map(np.testing.assert_array_equal, found, training.load(straight.work / "vae")[1])


def test_batches_are_of_all_buckets_and_follow_from_the_step(straight):
    tokenizer, _ = tokenizers.load_tokenizers(train_demo.tokenizers(straight))
    sizes = dataclasses.replace(TINY, buckets=tuple(dataclasses.replace(b, share=0.5) for b in TINY.buckets))
    statistics = json.loads((straight.work / "latents.json").read_text())
    first, second = (batches.pool_batches(straight.work / "pool", sizes, statistics, tokenizer, 0) for _ in range(2))
    shapes = set()
    for step in range(12):
        batch = first(step)
        jax.tree.map(np.testing.assert_array_equal, batch, second(step))
        shapes.add(batch["latents"].shape[2:])
    assert len(shapes) == len(sizes.buckets)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_evaluations_are_logged(straight, stage):
    for file in ("losses", "probes"):
        rows = [json.loads(line) for line in (straight.work / stage / f"{file}.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 2
        assert np.isfinite(list(rows[-1].values())).all()
    assert len(rows[-1]) > 2


def test_a_pool_continues_where_it_stopped(straight, tmp_path):
    tokenizer, _ = tokenizers.load_tokenizers(train_demo.tokenizers(straight))
    whole = straight.work / "pool"
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == sum(-(-b.pool // TINY.shard) for b in TINY.buckets)
    for name in names[1:]:
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    batches.make_pool(tmp_path, TINY, train_demo.load_vae(straight), tokenizer, straight.seed)
    for name in names:
        found, wanted = np.load(tmp_path / name), np.load(whole / name)
        for key in wanted.files:
            np.testing.assert_array_equal(found[key], wanted[key])


def test_both_clips_saw_other_data_from_other_weights(straight):
    first, second = (np.load(straight.work / f"{name}-pool" / "families-000.npz") for name in ("clip", "held-out-clip"))
    assert not np.array_equal(first["tokens"], second["tokens"])
    kernels = [training.load(straight.work / name)[1] for name in ("clip", "held-out-clip")]
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, kernels), strict=True))


def test_the_export_is_a_checkpoint_that_can_be_measured(straight, tmp_path):
    out = tmp_path / "facts.json"
    options = {"model": str(straight.work / "export"), "sizes": "tiny", "out": out}
    measure_demo.main(measure_demo.Arguments(**options, prompts=2, searched=1, noises=2, steps=1))
    facts = json.loads(out.read_text())
    assert set(facts) == {"reconstructions", "clip pairs", "held_out_clip pairs", "accuracy", "best_of"}
    assert set(facts["best_of"]) == {"one noise", "best of 2"}
    shares = [share for kind in facts.values() for share in jax.tree.leaves(kind)]
    assert len(shares) == 1 + 2 + 2 + 2 * 6 + 2
    assert all(0 <= share <= 1 for share in shares)


def test_prompts_fit(straight):
    prompt_tokenizer, clip_tokenizer = tokenizers.load_tokenizers(train_demo.tokenizers(straight))
    texts = batches.caption_sample(1000, seed=1)
    _, lengths = tokenizers.tokenize_prompts(prompt_tokenizer, texts, length=100)
    assert lengths.max() <= tokenizers.PROMPT_LENGTH
    assert max(len(ids) for ids in clip_tokenizer(texts)["input_ids"]) <= tokenizers.PROMPT_LENGTH


class Layers(nn.Module):
    """One of each kind that training runs in another form."""

    @nn.compact
    def __call__(self, x):
        x = convolution.Conv(8, (2, 2), (2, 2), "VALID", use_bias=False)(x)
        x = layers.GroupNorm(4)(x).reshape(len(x), -1, 8)
        heads = quantized.Dense(6, heads=2)(x)
        return quantized.Dense(3, of_heads=True)(heads)


def test_the_head_is_asked_for_the_shape_of_each_cell():
    rng = np.random.default_rng(0)
    batch, rows, columns, width, classes = 2, 2, 3, 5, 7
    features = rng.normal(size=(batch, rows * columns, width)).astype(np.float32)
    head = {"hidden": rng.normal(size=(width, width)), "out": rng.normal(size=(width, 4 * classes))}
    shapes = rng.integers(0, classes, (batch, 2 * rows, 2 * columns))
    errors, right = [], []
    for image, y, x in np.ndindex(shapes.shape):
        token = features[image, y // 2 * columns + x // 2]
        hidden = token / np.sqrt(np.mean(token**2)) @ head["hidden"]
        logits = (hidden / (1 + np.exp(-hidden)) @ head["out"]).reshape(2, 2, classes)[y % 2, x % 2]
        wanted = shapes[image, y, x]
        errors.append(np.log(np.exp(logits).sum()) - logits[wanted])
        if wanted:
            right.append(1 + logits[1:].argmax() == wanted)
    error, share = losses._shape_error(jax.tree.map(np.float32, head), 2, features, shapes)
    np.testing.assert_allclose(error, np.mean(errors), rtol=1e-4)
    np.testing.assert_allclose(share, np.mean(right), rtol=1e-5)


def test_layers_in_quicker_forms_are_the_same(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    params = jax.jit(Layers().init)(key, x)

    def quick(params, x):
        with nn.intercept_methods(training._quicker):
            return Layers().apply(params, x)

    np.testing.assert_allclose(jax.jit(quick)(params, x), jax.jit(Layers().apply)(params, x), atol=1e-5)
    traced = jax.make_jaxpr(quick)(params, x).jaxpr
    assert not jaxprs.convolutions(traced)
    assert sum(product.invars[0].aval.ndim == 2 for product in jaxprs.products(traced)) == 3


def test_shares_of_buckets_add_up_and_sides_fit_the_networks():
    for sizes in (DEMO, TINY):
        for buckets in (sizes.pictures, sizes.buckets):
            assert sum(b.share for b in buckets) == pytest.approx(1)
        side = sizes.vae.downscale * sizes.dit.patch_size
        assert all(b.height % side == b.width % side == 0 for b in sizes.buckets)
