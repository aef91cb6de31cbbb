"""The Cross-Entropy Method against an independent numpy rewrite of the reference, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ses_jax.searchers import cem

pytestmark = pytest.mark.quick

SHAPE = (2, 3)
# One program each instead of one an operation.
ask, tell = jax.jit(cem.ask, static_argnums=2), jax.jit(cem.tell)


class Reference:
    """The reference's loop over flat vectors: one growing archive, sorted stably, best first."""

    def __init__(self, size, elites):
        self.mean, self.variance = np.zeros(size), np.ones(size)
        self.archive, self.elites = [], elites
        self.best_score, self.best = -np.inf, np.zeros(size)

    def ask(self, normal):
        return self.mean + normal * np.sqrt(np.maximum(self.variance, 1e-9))

    def tell(self, samples, scores):
        for sample, score in zip(samples, scores, strict=True):
            if np.isfinite(score):
                self.archive.append((score, sample))
                if score > self.best_score:
                    self.best_score, self.best = score, sample
        elite = [sample for _, sample in sorted(self.archive, key=lambda pair: -pair[0])[: self.elites]]
        if elite:
            self.mean = np.mean(elite, axis=0)
        if len(elite) > 1:
            self.variance = np.var(elite, axis=0, ddof=1) + 1e-7


def smooth(samples):
    return -((samples - 0.7) ** 2).sum(axis=1)


def with_ties(samples):
    return np.round(smooth(samples))


def with_holes(samples):
    scores = smooth(samples).copy()
    scores[::3], scores[1::5] = np.nan, -np.inf
    return scores


def mostly_nan(samples):
    scores = np.full(len(samples), np.nan)
    scores[2] = 1.0
    return scores


@pytest.mark.parametrize("objective", [smooth, with_ties, with_holes, mostly_nan])
@pytest.mark.parametrize("elites", [1, 3, 5])
def test_equals_the_reference_over_generations(objective, elites):
    population, budget = 8, 43
    reference, state = Reference(6, elites), cem.init(SHAPE, elites=elites)
    for generation in range(6):
        key = jax.random.fold_in(jax.random.key(3), generation)
        samples = ask(key, state, population)
        normal = np.asarray(jax.random.normal(key, (population, *SHAPE))).reshape(population, -1)
        expected = reference.ask(normal)
        np.testing.assert_allclose(samples.reshape(population, -1), expected, atol=1e-4)

        count = min(population, budget - generation * population)
        scores = objective(np.asarray(samples, np.float64).reshape(population, -1))
        reference.tell(np.asarray(samples, np.float64).reshape(population, -1)[:count], scores[:count])
        hidden = np.where(np.arange(population) < count, scores, np.nan)
        state = tell(state, samples, jnp.asarray(hidden, jnp.float32))

        np.testing.assert_allclose(state.mean.ravel(), reference.mean, atol=1e-4)
        np.testing.assert_allclose(state.variance.ravel(), reference.variance, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(state.best_score, reference.best_score, rtol=1e-5)
        np.testing.assert_allclose(state.best_sample.ravel(), reference.best, atol=1e-5)
        assert int(state.count) == len(reference.archive)


def test_hand_computed_step():
    state = cem.init((1,), elites=2)
    state = tell(state, jnp.array([[1.0], [3.0], [10.0]]), jnp.array([5.0, 7.0, 0.0]))
    np.testing.assert_allclose(state.mean, [2.0])
    np.testing.assert_allclose(state.variance, [2.0 + 1e-7])
    state = tell(state, jnp.array([[4.0]]), jnp.array([6.0]))
    np.testing.assert_allclose(state.mean, [3.5])
    np.testing.assert_allclose(state.variance, [0.5 + 1e-7])


def test_on_ties_the_earlier_sample_stays():
    state = tell(cem.init((1,), elites=2), jnp.array([[1.0], [2.0], [3.0]]), jnp.array([4.0, 4.0, 4.0]))
    np.testing.assert_array_equal(state.elite_samples, [[1.0], [2.0]])
    state = tell(state, jnp.array([[9.0]]), jnp.array([4.0]))
    np.testing.assert_array_equal(state.elite_samples, [[1.0], [2.0]])
    np.testing.assert_array_equal(state.best_sample, [1.0])


# XLA takes subnormal numbers for zero.
scores_lists = st.lists(
    st.one_of(st.floats(-100, 100, width=32, allow_subnormal=False), st.sampled_from([np.nan, np.inf, -np.inf])),
    min_size=4,
    max_size=4,
)


@given(st.lists(scores_lists, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_non_finite_scores_never_win(generations):
    state = cem.init(SHAPE, elites=3)
    finite = []
    for index, scores in enumerate(generations):
        samples = ask(jax.random.key(index), state, 4)
        state = tell(state, samples, jnp.array(scores, jnp.float32))
        finite += [np.float32(score) for score in scores if np.isfinite(score)]
    assert int(state.count) == len(finite)
    assert np.isfinite(state.mean).all()
    assert np.isfinite(state.variance).all()
    assert (np.asarray(state.variance) > 0).all()
    expected = sorted(finite, reverse=True)[:3]
    np.testing.assert_array_equal(state.elite_scores[: len(expected)], np.array(expected, np.float32))
    assert np.all(np.isneginf(state.elite_scores[len(expected) :]))
    assert float(state.best_score) == max(finite, default=-np.inf)


def test_without_a_finite_score_the_distribution_stays():
    before = cem.init(SHAPE)
    after = tell(before, jnp.ones((4, *SHAPE)), jnp.full(4, jnp.nan))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_one_elite_moves_the_mean_and_keeps_the_variance():
    state = tell(cem.init(SHAPE), jnp.full((1, *SHAPE), 2.0), jnp.array([1.0]))
    np.testing.assert_array_equal(state.mean, np.full(SHAPE, 2.0))
    np.testing.assert_array_equal(state.variance, np.ones(SHAPE))


def test_draws_are_standard_normal_at_the_start():
    samples = ask(jax.random.key(0), cem.init((16,)), 4000)
    assert abs(float(samples.mean())) < 0.02
    assert abs(float(samples.std()) - 1) < 0.02


def test_finds_the_maximum_inside_one_scan(key):
    def generation(state, key):
        samples = ask(key, state, 40)
        return tell(state, samples, -jnp.square(samples - 1.5).sum(axis=-1)), state.best_score

    state, best = jax.lax.scan(generation, cem.init((2,), elites=8), jax.random.split(key, 20))
    np.testing.assert_allclose(state.best_sample, [1.5, 1.5], atol=0.01)
    assert np.all(np.diff(best[1:]) >= 0)


def test_vmaps_over_independent_searches():
    keys = jax.random.split(jax.random.key(1), 3)
    targets = jnp.array([-1.0, 0.0, 1.0])

    def run(key, target):
        state = cem.init((2,), elites=3)
        samples = ask(key, state, 6)
        return tell(state, samples, -jnp.square(samples - target).sum(axis=-1))

    batched = jax.jit(jax.vmap(run))(keys, targets)
    alone = jax.jit(run)
    for i in range(3):
        single = alone(keys[i], targets[i])
        np.testing.assert_allclose(batched.mean[i], single.mean, atol=1e-6)
        np.testing.assert_allclose(batched.elite_scores[i], single.elite_scores, rtol=1e-6)
