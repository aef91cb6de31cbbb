"""The searcher that climbs along gradients: by itself, and the gradients of whole previews, against JAX's own."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax.engine import generation, resume, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import partition
from ses_jax.searchers import registry, space, wavelet
from ses_jax.searchers.gradient import Gradient
from ses_jax.searchers.searcher import Problem

SHAPE, CLIMBERS = (2, 8, 8), 4
TARGET = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
PROMPTS = ["a cat", "two blue squares"]
SETTINGS = {"progress": False, "budget": 11, "steps": 3, "preview_steps": 2}


# By itself.


def problem(searcher):
    return Problem(space.make(searcher.space, "db1", 1, SHAPE), CLIMBERS, elites=5)


def along_target(noise):
    """Standard normal for Gaussian noise."""
    return jnp.sum(noise * TARGET, axis=(-3, -2, -1)) / np.linalg.norm(TARGET)


def bounded(noise):
    """The same, of a reward that is hardly steep."""
    return 1e-4 * jnp.tanh(along_target(noise) / 8)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(searcher, generations, reward, seeds):
    """Noises and scores `[seeds, generations, climbers, ...]`, all searched at once."""
    over = problem(searcher)

    def search(seed):
        key = jax.random.key(seed)
        _, rest = over.space.split(jax.random.normal(key, SHAPE))

        def generation(state, index):
            points = searcher.ask(over, jax.random.fold_in(key, index), state, index)
            scores = jax.vmap(lambda point: reward(over.space.merge(point, rest)))
            slopes = jax.grad(lambda points: scores(points).sum())(points)
            told = searcher.tell(over, state, points, scores(points), slopes)
            return told, (over.space.merge(points, rest), scores(points))

        return jax.lax.scan(generation, searcher.init(over), jnp.arange(generations))[1]

    return jax.vmap(search)(seeds)


@functools.partial(jax.jit, static_argnums=0)
def tell(searcher, *seen):
    return searcher.tell(problem(searcher), *seen)


@functools.partial(jax.jit, static_argnums=0)
def ask(searcher, key, state, index):
    return searcher.ask(problem(searcher), key, state, index)


@pytest.mark.quick
@pytest.mark.parametrize("spec", ["gradient", "gradient,space=low,shell=channel,momentum=0.5"])
@pytest.mark.parametrize("reward", [along_target, bounded])
def test_climbs_on_the_shell(spec, reward):
    """As far as no number of independent noises would, whatever the scale of the reward; every norm stays its own."""
    searcher = registry.load(spec)
    noise, scores = run(searcher, 12, reward, jnp.arange(8))
    along = along_target(noise)
    assert (np.diff(scores, axis=1) > 0).all()
    assert (along[:, -1] - along[:, 0]).min() > (1 if searcher.space == "low" else 6)
    norms = np.square(noise).sum(axis=(-2, -1) if searcher.shell == "channel" else (-3, -2, -1))
    np.testing.assert_allclose(norms, np.broadcast_to(norms[:, :1], norms.shape), rtol=1e-5)


@pytest.mark.quick
def test_two_steps_by_hand(key):
    """The mean of directions has no bias towards its start at zero; the step is a share of the norm."""
    searcher = Gradient(step=0.3, momentum=0.75)
    over = problem(searcher)
    first, slopes, later = jax.random.normal(key, (3, CLIMBERS, *SHAPE))
    state = searcher.init(over)
    np.testing.assert_array_equal(ask(searcher, key, state, 0), over.draw(key))

    def norm(x):
        return np.linalg.norm(x.reshape(CLIMBERS, -1), axis=1).reshape(-1, 1, 1, 1)

    def stepped(points, ahead):
        moved = points + 0.3 * norm(points) * ahead
        return moved * norm(points) / norm(moved)

    scores = jnp.zeros(CLIMBERS)
    state = tell(searcher, state, first, scores, 50 * slopes)
    second = ask(searcher, key, state, 1)
    np.testing.assert_allclose(second, stepped(first, slopes / norm(slopes)), atol=1e-5)
    state = tell(searcher, state, second, scores, later)
    mean = (0.25 * later / norm(later) + 0.25 * 0.75 * slopes / norm(slopes)) / (1 - 0.75**2)
    np.testing.assert_allclose(ask(searcher, key, state, 2), stepped(second, mean), atol=1e-5)


@pytest.mark.quick
def test_who_is_lost_begins_anew(key):
    """Without a score, without a gradient, or where it is flat; and forgets the way it came."""
    searcher = Gradient(step=0.3)
    over = problem(searcher)
    points, slopes, drawn = *jax.random.normal(key, (2, CLIMBERS, *SHAPE)), np.asarray(over.draw(key))
    state = tell(searcher, searcher.init(over), points, jnp.zeros(CLIMBERS), slopes)
    bad = np.array(slopes)
    bad[1, 0, 0, 0], bad[2] = np.nan, 0
    state = tell(searcher, state, points, jnp.array([0.0, 0, 0, -jnp.inf]), jnp.asarray(bad))
    assert state.lost.tolist() == [False, True, True, True]
    anew = ask(searcher, key, state, 2)
    np.testing.assert_array_equal(anew[1:], drawn[1:])
    assert np.abs(anew[0] - drawn[0]).max() > 0.5
    state = tell(searcher, state, anew, jnp.zeros(CLIMBERS), slopes)
    fresh = tell(searcher, searcher.init(over), anew, jnp.zeros(CLIMBERS), slopes)
    np.testing.assert_allclose(state.points[1:], fresh.points[1:], atol=1e-6)
    assert state.steps.tolist() == [3, 1, 1, 1]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gradient,climbers=0", "climbers=0 must be a whole number, at least 1"),
        ("gradient,momentum=1", "momentum=1 must be at least 0 and less than 1"),
        ("gradient,shell=row", "shell='row' must be one of whole, channel"),
        ("gradient,population=3", "gradient takes climbers, step, momentum, shell, space"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(ValueError, match=f"^searcher=.*{message}"):
        registry.load(spec)


# Of whole previews.


@dataclasses.dataclass(frozen=True)
class Seeker:
    """Its state is what it was told last."""

    space: str = "whole"
    needs_gradient: ClassVar[bool] = True

    def init(self, problem):
        return jnp.zeros((problem.population, *problem.space.like.shape))

    def ask(self, problem, key, state, generation):
        return problem.draw(key)

    def tell(self, problem, state, points, scores, gradients):
        return gradients


def pipeline(mesh=None):
    """Steps that bend, and images that are not cut off."""

    def velocity(params, latents, sigma, condition):
        return jnp.sin(2 * latents) * (1 + sigma[:, None, None, None]) + condition[:, :1, None, None]

    def decode(params, latents):
        return jnp.tanh(jnp.moveaxis(latents, 1, -1)) * 0.5 + 0.5

    return dataclasses.replace(toy.pipeline(mesh), velocity=velocity, decode=decode)


def channel_means(pipeline, task, noise, prompt):
    """Of the image of one noise, `[3]`, a step at a time."""
    condition, sigmas = task.inputs.condition[prompt][None], task.inputs.sigmas
    latents = noise[None]
    for now, after in itertools.pairwise(sigmas):
        latents = latents + (after - now) * pipeline.velocity(task.params[0], latents, now[None], condition)
    return pipeline.decode(task.params[0], latents)[0].mean(axis=(0, 1))


@pytest.mark.parametrize(("name", "mesh", "chunk"), [("whole", None, None), ("low", "data=4,model=2", 3)])
def test_gradients_of_previews_are_jaxs_own(name, mesh, chunk):
    """Of a standardised mixture, whose parts count by their deviations so far; a part that is reported has no say."""
    model = pipeline(mesh and partition.parse_mesh(mesh))
    reward = toy.mixture(red=1.0, green=0.0, blue=0.5)
    config = SearchConfig(searcher=Seeker(name), population=5, elites=1, budget=10, preview_steps=3, chunk=chunk)
    task = tasks.prepare(model, reward, config.resolve(model), PROMPTS, [0, 1])
    state, components = tasks.initial_state(task), []
    for index in range(2):
        points = generation.propose(task.program, task.inputs, jnp.int32(index), state)
        state, scored = generation.generation_step(task.program, task.params, task.inputs, np.int32(index), state)
        components.append(scored.components)
    noise = generation.noise_of(task.program, task.inputs, points)
    for prompt in range(2):
        means = functools.partial(channel_means, model, task, prompt=prompt)
        deviation = np.concatenate(components, axis=1)[prompt].std(axis=0)
        by_part = jax.jit(jax.vmap(jax.jacrev(means)))(noise[prompt])
        expected = by_part[:, 0] / deviation[0] + 0.5 * by_part[:, 2] / deviation[2]
        expected = expected if name == "whole" else wavelet.split(expected, level=task.config.level)[0]
        np.testing.assert_allclose(state.searcher[prompt], expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


def test_a_killed_search_goes_on_bit_equal(tmp_path, monkeypatch):
    run = {"model": pipeline(), "reward": toy.mixture(red=1.0, blue=0.5), "searcher": "gradient,climbers=3", **SETTINGS}

    class KilledError(Exception):
        pass

    def killed(*args):
        save(*args)
        if args[1] == 2:
            raise KilledError

    expected = ses_jax.search("a", **run)
    save = resume.save
    monkeypatch.setattr(resume, "save", killed)
    with pytest.raises(KilledError):
        ses_jax.search("a", out=tmp_path, resume=True, **run)
    monkeypatch.setattr(resume, "save", save)
    found = ses_jax.search("a", out=tmp_path, resume=True, **run)
    assert found.history == expected.history
    np.testing.assert_array_equal(found.noise, expected.noise)
    assert found.config["population"] == 3
    assert [row["generation"] for row in found.history][-3:] == [2, 3, 3]


def test_what_has_no_gradient_is_refused():
    def judge(images, prompts):
        return np.asarray(images).mean(axis=(1, 2, 3))

    run = {"model": pipeline(), "searcher": "gradient", **SETTINGS}
    with pytest.raises(ValueError, match=r"searcher=.*needs the gradients of rewards that JAX can trace, and judge is"):
        ses_jax.search("a", reward=judge, **run)
    with pytest.raises(ValueError, match=r"fidelity='half:0.5': this searcher takes the gradients of full previews"):
        ses_jax.search("a", reward=toy.brightness(), fidelity="half:0.5", **run)
