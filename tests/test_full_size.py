"""The published sizes, abstractly: a whole generation is traced at 1024 x 1024 without allocating a weight."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from ses_jax.engine import generation
from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image
from ses_jax.pipelines import base, schedule
from ses_jax.pipelines import z_image as family
from ses_jax.pipelines.guidance import Guided
from ses_jax.rewards import device_parts, scorers
from ses_jax.rewards.preprocess import Preprocessor
from ses_jax.searchers import space
from ses_jax.searchers.searcher import Problem
from ses_jax.searchers.ses import Ses

CLIP_H = clip.Config(
    text=clip.Tower(1024, 4096, 24, 16, "gelu"), vision=clip.Tower(1280, 5120, 32, 16, "gelu"), projection_dim=1024
)
POPULATION, STEPS = 10, 8


def abstract_params(dtype):
    networks = {
        "transformer": (z_image, z_image.Config()),
        "vae": (autoencoder_kl, autoencoder_kl.Config()),
        "text_encoder": (decoder_lm, decoder_lm.Config()),
        "clip": (clip, CLIP_H),
    }
    trees = {
        name: jax.eval_shape(functools.partial(module.init, config=config), jax.random.key(0))
        for name, (module, config) in networks.items()
    }
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), trees)


def tokens(guided):
    ids, lengths = np.zeros((1, 64), np.int32), np.array([40], np.int32)
    guidance = {name: np.ones(1, np.float32) for name in family.GUIDANCE_OFF}
    rows = base.Tokens(ids, lengths)
    return Guided(rows, rows if guided else None, guidance)


@pytest.mark.parametrize(("size", "guided"), [((1024, 1024), False), ((832, 1216), True)], ids=["turbo", "guided"])
def test_a_generation_of_z_image_with_clip_h(size, guided):
    params = abstract_params(jnp.bfloat16)
    shape = 16, size[0] // 8, size[1] // 8
    condition = jax.eval_shape(
        functools.partial(family.encode, decoder_lm.Config(), z_image.Config()), params, tokens(guided)
    )
    assert condition.positive.tokens.shape == (1, 64, 3840)
    assert (condition.negative is not None) == guided

    problem = Problem(space.make("low", "db1", 4, tuple(shape)), POPULATION, elites=5)
    program = generation.Program(
        model=generation.Model(
            functools.partial(family.velocity, z_image.Config()),
            functools.partial(family.decode, autoencoder_kl.Config()),
        ),
        score=device_parts.DeviceScores(
            (scorers.ImageScore(Preprocessor(), functools.partial(scorers.clip_score, CLIP_H)),)
        ),
        weights=(1.0,),
        standardize=False,
        searcher=Ses(),
        problem=problem,
        evaluated=POPULATION,
        chunk=5,
    )
    points, rest = jax.eval_shape(problem.space.split, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    inputs = generation.Inputs(
        key=jax.random.key(0)[None],
        base=points,
        rest=rest,
        condition=condition,
        text=(jax.ShapeDtypeStruct((1, 1024), jnp.float32),),
        sigmas=schedule.static_shift_sigmas(schedule.even(STEPS), 3.0),
        budget=jnp.int32(50),
    )
    state = generation.init(program, 1, 5)
    step = functools.partial(generation.generation_step, program)
    after, scored = jax.eval_shape(step, (params, (params["clip"],)), inputs, jnp.int32(0), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert scored.components.shape == (1, POPULATION, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves((after, scored))} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_activations_run_in_the_dtype_of_the_weights():
    """Nothing in the blocks silently promotes bfloat16 to float32: the products all take bfloat16."""
    params = abstract_params(jnp.bfloat16)["transformer"]
    caption = z_image.Caption(jax.ShapeDtypeStruct((2, 32, 3840), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32))
    jaxpr = jax.make_jaxpr(functools.partial(z_image.velocity, config=z_image.Config()))(
        params,
        latents=jax.ShapeDtypeStruct((2, 16, 64, 64), jnp.float32),
        sigma=jax.ShapeDtypeStruct((2,), jnp.float32),
        caption=caption,
    )
    products = jaxprs.products(jaxpr.jaxpr)
    assert len(products) > 10
    for equation in products:
        assert all(operand.aval.dtype == jnp.bfloat16 for operand in equation.invars), equation
