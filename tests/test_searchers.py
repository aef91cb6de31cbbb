"""Searchers by themselves: their formulas, where their proposals lie, and that they climb analytic rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ses_jax.searchers import cem, elites, evosax, registry, space, wavelet
from ses_jax.searchers.best_of_n import BestOfN
from ses_jax.searchers.searcher import Problem, Searcher
from ses_jax.searchers.ses import Ses
from ses_jax.searchers.zero_order import ZeroOrder

pytestmark = pytest.mark.quick

SHAPE, LEVEL, POPULATION = (2, 8, 8), 1, 10
TARGET = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
SPECS = [
    "ses",
    "ses,renormalise=channel",
    "ses,explore=15",
    "ses,space=whole",
    "zero-order",
    "zero-order,space=low",
    "evosax",
]


def problem(searcher, name="db1"):
    return Problem(space.make(searcher.space, name, LEVEL, SHAPE), POPULATION, elites=5)


def along_target(noise):
    """Standard normal for Gaussian noise."""
    return jnp.sum(noise * TARGET, axis=(-3, -2, -1)) / np.linalg.norm(TARGET)


def low_along_target(noise):
    """The same of the low bands alone."""
    low = functools.partial(wavelet.split, level=LEVEL)
    target = low(TARGET)[0]
    return jnp.sum(low(noise)[0] * target, axis=(-3, -2, -1)) / jnp.linalg.norm(target)


def means(noise):
    """Of blocks of 2 x 2 cells."""
    noise = np.asarray(noise)
    return noise.reshape(*noise.shape[:-2], 4, 2, 4, 2).mean(axis=(-3, -1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(searcher, generations, reward, seeds):
    """Noises and scores `[seeds, generations, population, ...]`, all searched at once."""
    over = problem(searcher)

    def search(seed):
        key = jax.random.key(seed)
        _, rest = over.space.split(jax.random.normal(key, SHAPE))

        def generation(state, index):
            points = searcher.ask(over, jax.random.fold_in(key, index), state, index)
            noise = over.space.merge(points, rest)
            scores = reward(noise)
            return searcher.tell(over, state, points, scores), (noise, scores)

        return jax.lax.scan(generation, searcher.init(over), jnp.arange(generations))[1]

    return jax.vmap(search)(seeds)


@pytest.mark.parametrize("spec", SPECS)
def test_climbs_above_independent_noises(spec):
    """Both rewards are standard normal for independent noise, so that the best of so many is known to the searcher."""
    searcher, seeds = registry.load(spec), jnp.arange(24)
    reward = low_along_target if not spec.startswith("zero-order") or "low" in spec else along_target
    _, scores = run(searcher, 8, reward, seeds)
    _, independent = run(BestOfN(), 8, reward, seeds)
    best = scores.max(axis=(1, 2)).mean()
    assert best > independent.max(axis=(1, 2)).mean() + 0.2
    assert best > scores[:, 0].max(axis=1).mean() + 0.5
    assert scores[:, -1].mean() > scores[:, 0].mean() + 0.5


@pytest.mark.parametrize("spec", ["zero-order", "zero-order,mutation=0.2,anneal=0", "best-of-n"])
def test_stays_on_the_shell(spec):
    """The norm of Gaussian noise of 128 numbers is their root within a sixteenth or so, whatever was selected."""
    noise, _ = run(registry.load(spec), 8, along_target, jnp.arange(24))
    norm = np.linalg.norm(noise.reshape(24, 8, POPULATION, -1), axis=-1) / TARGET.size**0.5
    assert np.abs(norm - 1).max() < 0.35
    np.testing.assert_allclose(norm.mean(axis=(0, 2)), 1, atol=0.05)


@pytest.mark.parametrize(("spec", "axes"), [("whole", (-3, -2, -1)), ("channel", (-2, -1))])
def test_renormalised_samples_have_the_norm_of_noise(spec, axes):
    searcher = Ses(renormalise=spec)
    noise, _ = run(searcher, 8, low_along_target, jnp.arange(24))
    np.testing.assert_allclose(np.mean(np.square(2 * means(noise)), axis=axes), 1, rtol=1e-4)
    free, _ = run(Ses(), 8, low_along_target, jnp.arange(24))
    assert np.abs(np.mean(np.square(2 * means(free)), axis=axes) - 1).max() > 0.1


def test_ses_is_the_cross_entropy_method(key):
    searcher, over = Ses(), problem(Ses())

    @jax.jit
    def both(keys):
        state, plain = searcher.init(over), cem.init((2, 4, 4), elites=5)
        for index, key in enumerate(keys):
            points = searcher.ask(over, key, state, jnp.int32(index))
            samples = cem.ask(key, plain, POPULATION)
            state = searcher.tell(over, state, points, points.sum(axis=(1, 2, 3)))
            plain = cem.tell(plain, samples, samples.sum(axis=(1, 2, 3)))
        return state, plain

    jax.tree.map(np.testing.assert_array_equal, *both(jax.random.split(key, 3)))


def test_exploring_lends_the_high_bands_of_the_best(key):
    """15 whole noises; whatever comes after them differs from the best of them in its low band alone."""
    searcher, over = Ses(explore=15), problem(Ses(explore=15))
    noise, scores = (np.asarray(x)[3] for x in run(searcher, 8, low_along_target, jnp.arange(24)))
    noise, scores = noise.reshape(-1, *SHAPE), scores.ravel()
    high = noise - means(noise).repeat(2, axis=-2).repeat(2, axis=-1)
    for index in range(POPULATION, 15):
        assert np.abs(high[index] - high[:index]).max(axis=(1, 2, 3)).min() > 0.5
    # The rest of that generation knows the first one only.
    np.testing.assert_allclose(high[15:20], high[[np.argmax(scores[:10])] * 5], atol=1e-5)
    np.testing.assert_allclose(high[20:], high[[np.argmax(scores[:20])] * 60], atol=1e-5)
    state = searcher.init(over)
    assert state.high.points.shape == (1, *SHAPE)
    blind = jax.jit(functools.partial(searcher.ask, over))(key, state, jnp.int32(9))
    assert np.abs(blind.high).max(axis=(1, 2, 3)).min() > 0.5  # never noise without high bands


@pytest.mark.parametrize("spec", SPECS)
def test_proposals_are_float32_whatever_the_default(spec, key):
    searcher = registry.load(spec)
    with jax.enable_x64():
        state = jax.eval_shape(lambda: searcher.init(problem(searcher)))
        index = jax.ShapeDtypeStruct((), jnp.int32)
        points = jax.eval_shape(lambda *x: searcher.ask(problem(searcher), *x), key, state, index)
        scores = jax.ShapeDtypeStruct((POPULATION,), jnp.float32)
        told = jax.eval_shape(lambda *x: searcher.tell(problem(searcher), *x), state, points, scores)
    assert {leaf.dtype for leaf in jax.tree.leaves(points)} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), told) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("strategy", ["SNES", "CMA_ES"])
def test_evosax_proposes_the_same_whatever_the_default(strategy, key):
    searcher = registry.load(f"evosax,strategy={strategy}")
    over = problem(searcher)

    @jax.jit
    def later():
        state = searcher.init(over)
        points = searcher.ask(over, key, state, jnp.int32(0))
        state = searcher.tell(over, state, points, along_target(over.space.merge(points, jnp.zeros(SHAPE))))
        return searcher.ask(over, key, state, jnp.int32(1))

    expected = later()
    with jax.enable_x64():
        found = later()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_children_by_hand(key):
    searcher = ZeroOrder(parents=2, mutation=0.6, anneal=0, space="low")
    over = problem(searcher)
    ask, tell = (jax.jit(functools.partial(f, over)) for f in (searcher.ask, searcher.tell))
    nothing = searcher.init(over)
    points = ask(key, nothing, jnp.int32(0))
    np.testing.assert_array_equal(points, jax.random.normal(key, (POPULATION, 2, 4, 4)))
    scores = jnp.array([0.0, 5, 1, 7, *[-1] * 6])
    state = tell(nothing, points, scores)
    later = jax.random.fold_in(key, 1)
    children = ask(later, state, jnp.int32(1))
    fresh = np.asarray(jax.random.normal(later, (POPULATION, 2, 4, 4)))
    for index in range(POPULATION):
        parent = np.asarray(points)[(3, 1)[index % 2]]
        np.testing.assert_allclose(children[index], 0.8 * parent + 0.6 * fresh[index], atol=1e-6)
    alone = tell(nothing, points, jnp.array([-jnp.inf] * 4 + [0.0] + [-jnp.inf] * 5))
    children = ask(later, alone, jnp.int32(1))
    np.testing.assert_allclose(children, 0.8 * np.asarray(points)[4] + 0.6 * fresh, atol=1e-6)


def test_the_share_of_fresh_noise_falls_with_the_candidates_made():
    def shares(population, **options):
        over = problem(ZeroOrder())._replace(population=population)
        return [float(ZeroOrder(**options).share(over, jnp.int32(g))) for g in range(7)]

    np.testing.assert_allclose(shares(10), [1, 0.8375, 0.675, 0.5125, 0.35, 0.35, 0.35], rtol=1e-6)
    np.testing.assert_allclose(shares(20, mutation=0.4), [1, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(shares(10, anneal=0), [0.35] * 7, rtol=1e-6)
    np.testing.assert_allclose(shares(10, anneal=5), [0.35] * 7, rtol=1e-6)


best = jax.jit(elites.best)
# XLA takes subnormal numbers for zero.
numbers = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([np.nan, np.inf, -np.inf]))


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=3), st.sampled_from([1, 3]))
@settings(max_examples=15)
def test_elites_are_the_best_of_all_in_the_order_they_came(generations, count):
    found, pool = elites.none({"x": jnp.zeros(())}, count), []
    for scores in generations:
        points = np.arange(len(pool), len(pool) + 4, dtype=np.float32)
        found = best(found, {"x": jnp.asarray(points)}, jnp.array(scores, jnp.float32))
        pool += zip(scores, points, strict=True)
    ranked = sorted((pair for pair in pool if np.isfinite(pair[0])), key=lambda pair: -pair[0])[:count]
    np.testing.assert_array_equal(found.scores, [s for s, _ in ranked] + [-np.inf] * (count - len(ranked)))
    np.testing.assert_array_equal(found.points["x"], [x for _, x in ranked] + [0.0] * (count - len(ranked)))


@pytest.mark.parametrize("name", ["db1", "db2"])
@pytest.mark.parametrize("kind", space.SPACES)
def test_spaces_split_and_merge(kind, name, key):
    over = space.make(kind, name, LEVEL, (2, 8, 6))
    noise = jax.random.normal(key, (3, 2, 8, 6))
    points, rest = over.split(noise)
    np.testing.assert_allclose(over.merge(points, rest), noise, atol=1e-5)
    np.testing.assert_allclose(over.low(points), wavelet.split(noise, wavelet=name, level=LEVEL)[0], atol=1e-6)
    drawn = over.draw(key, 3)
    assert jax.tree.map(lambda x: x.shape[1:], drawn) == jax.tree.map(lambda x: x.shape, over.like)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, points)
    if kind != "low":
        np.testing.assert_allclose(over.merge(drawn, rest), noise, atol=1e-5)  # the very same draw


def test_searchers_by_name():
    for spec in ("ses", "best-of-n", "zero-order", "gradient,step=1", "ses,renormalise=whole", "ses, explore = 20"):
        searcher = registry.load(spec)
        assert isinstance(searcher, Searcher)
        assert registry.load(registry.describe(searcher)) == registry.load(searcher) == searcher
        assert hash(registry.load(spec)) == hash(searcher)
    assert registry.load("ses") == Ses() == registry.load("ses,renormalise=none,explore=0")
    assert registry.load("zero-order,parents=1,mutation=1") == ZeroOrder(parents=1, mutation=1.0)
    assert registry.describe(BestOfN(space="low")) == {"name": "best-of-n", "space": "low"}


class Own:
    """A searcher of a user's."""

    space = "low"

    def init(self, problem):
        return ()

    def ask(self, problem, key, state, generation):
        return problem.draw(key)

    def tell(self, problem, state, points, scores):
        return state


class Named(Own):
    def __repr__(self):
        return "Named(3)"


def test_a_users_own_searcher_is_described_the_same_in_every_process():
    assert registry.load(mine := Own()) is mine
    assert registry.describe(mine) == f"{__name__}:Own"
    assert registry.describe(Named()) == "Named(3)"


def test_auto_is_the_one_that_won_with_options_of_ones_own():
    assert registry.load("auto") == registry.load(registry.AUTO)
    assert registry.load("auto,parents=1") == registry.load(f"{registry.AUTO},parents=1")
    assert registry.describe(registry.load("auto"))["name"] == registry.AUTO


class Unhashable(Own):
    __hash__ = None


class Elsewhere(Own):
    space = "pixels"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sea", "'sea' is unknown; known: auto, ses, best-of-n, zero-order, gradient, evosax, or an object"),
        ({"explore": 3}, "is unknown; known: auto, ses"),
        ("ses,explor=3", "unknown option 'explor'; ses takes renormalise, explore, space"),
        ("ses,explore", "'explore' is no option such as explore=20"),
        ("ses,explore=-1", "explore=-1 must be a whole number, at least 0"),
        ("ses,explore=1.5", "explore=1.5 must be a whole number"),
        ({"name": "ses", "explore": True}, "explore=True must be a whole number"),
        ("ses,renormalise=row", "renormalise='row' must be one of none, whole, channel"),
        ("ses,explore=5,space=whole", "explore=5 has no effect where space is whole"),
        ("zero-order,mutation=0", "mutation=0 must be more than 0 and at most 1"),
        ("zero-order,mutation=nan", "mutation=nan must be"),
        ("zero-order,mutation=x", "mutation='x' must be"),
        ("zero-order,parents=0", "parents=0 must be a whole number, at least 1"),
        ("best-of-n,space=bands", "space='bands' must be one of whole, low"),
        (
            3,
            "3 is neither one of ses, best-of-n, zero-order, gradient, evosax nor an object with space, init, ask",
        ),
        (Own, "nor an object with"),
        (Unhashable(), "must be hashable"),
        (Elsewhere(), "has space 'pixels'; known: low, whole"),
    ],
)
def test_bad_searchers_are_named(spec, message):
    with pytest.raises(ValueError, match=f"^searcher=.*{message}"):
        registry.load(spec)


@pytest.mark.parametrize("strategy", evosax.STRATEGIES)
def test_strategies_of_evosax_learn_from_points_and_scores_alone(strategy):
    searcher, over = evosax.Evosax(strategy=strategy), problem(evosax.Evosax())
    init, ask, tell = (jax.jit(functools.partial(f, over)) for f in (searcher.init, searcher.ask, searcher.tell))

    def run(seed):
        state, generations = init(), []
        for index in range(3):
            points = ask(jax.random.key(seed + index), state, jnp.int32(index))
            generations.append((points, points.sum((1, 2, 3))))
            state = tell(state, *generations[-1])
        return state, generations

    state, generations = run(0)
    package, parameters = searcher._strategy(over)
    updated = jax.jit(lambda key, state: package.ask(key, state, parameters)[1])
    asked = [updated(jax.random.key(seed), state) for seed in (1, 2)]
    jax.tree.map(np.testing.assert_array_equal, *asked)
    points, scores = (jnp.concatenate(all_of) for all_of in zip(*generations, strict=True))
    nothing = points.at[POPULATION:].set(jnp.nan), scores.at[POPULATION:].set(-jnp.inf)
    first = tell(init(), *generations[0])
    jax.tree.map(np.testing.assert_array_equal, tell(init(), *nothing), first)
    at_once = tell(init(), points, scores)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), at_once, state)


def test_less_than_a_population_teaches_evosax_nothing():
    searcher = evosax.Evosax()
    over = problem(searcher)
    state = searcher.init(over)
    points = searcher.ask(over, jax.random.key(0), state, jnp.int32(0))[:2]
    jax.tree.map(np.testing.assert_array_equal, searcher.tell(over, state, points, jnp.arange(2.0)), state)


def test_evosax_is_asked_for_where_it_lacks(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"searcher='evosax': needs the package evosax: pip install 'ses_jax\[evosax\]'"
    ):
        registry.load("evosax")
