"""Mixtures against numpy, and their properties."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ses_jax.rewards import mixture

pytestmark = pytest.mark.quick


def by_hand(components, weights, population):
    driving = [i for i, weight in enumerate(weights) if weight]
    rows = [row for row in population if all(np.isfinite(row[i]) for i in driving)]
    total = np.zeros(len(components))
    for i in driving:
        values = np.array([row[i] for row in rows])
        if values.std() > 1e-6 * abs(values.mean()):
            total += weights[i] * (components[:, i] - values.mean()) / values.std()
    return total


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, -0.5, 0.1), (1.0, 0.0, 3.0)])
def test_standardized_sum_by_hand(weights, array):
    rng = np.random.default_rng(0)
    components = (rng.standard_normal((20, 3)) * [1, 100, 1e-3] + [0, 20, 5]).astype(np.float32)
    got = mixture.standardized_sum(array(components[:7]), weights, array(components))
    assert isinstance(got, type(array(components)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, by_hand(components[:7].astype(np.float64), weights, components), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("total", [mixture.plain_sum, mixture.standardized_sum])
def test_a_sum_is_no_matrix_product_which_devices_take_with_fewer_digits(total):
    def summed(components):
        return total(components, (2.0, -0.5, 0.1), *[components] * (total is mixture.standardized_sum))

    assert "dot_general" not in str(jax.make_jaxpr(summed)(jnp.ones((20, 3), jnp.float32)))


def test_plain_sum_ignores_parts_that_are_only_reported():
    components = np.array([[1.0, np.nan, 3.0], [4.0, 5.0, np.inf]], np.float32)
    np.testing.assert_array_equal(mixture.plain_sum(components, (2.0, 0.0, 1.0)), [5.0, np.inf])
    assert np.isfinite(mixture.standardized_sum(components, (2.0, 0.0, 1.0), components)[0])


def test_a_row_that_is_not_finite_has_no_score_and_no_say():
    components = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 1.0], [np.inf, 0.0]], np.float32)
    scores = np.asarray(mixture.standardized_sum(components, (1.0, 1.0), components))
    np.testing.assert_array_equal(np.isfinite(scores), [True, False, True, False])
    np.testing.assert_allclose(
        scores[[0, 2]], mixture.standardized_sum(components[[0, 2]], (1.0, 1.0), components[[0, 2]])
    )


def test_scores_on_the_host_say_nothing_and_are_float32():
    components = np.array([[1.0, 2e30], [3.0, -np.inf], [5.0, 1e30], [np.inf, 0.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = mixture.standardized_sum(components, (1.0, 1.0), components)
    assert scores.dtype == np.float32
    assert not np.isfinite(scores[[1, 3]]).any()


def test_a_constant_part_counts_for_nothing():
    components = np.array([[0.1, 7.3], [0.2, 7.3], [0.4, 7.3]], np.float32)
    alone = mixture.standardized_sum(components[:, :1], (1.0,), components[:, :1])
    np.testing.assert_allclose(mixture.standardized_sum(components, (1.0, 100.0), components), alone, rtol=1e-5)
    assert np.all(mixture.standardized_sum(components[:1], (1.0, 1.0), components[:1]) == 0)


@given(st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_units_of_a_part_do_not_matter(scale, shift):
    components = np.random.default_rng(1).standard_normal((12, 2)).astype(np.float32)
    rescaled = components * np.float32([scale, 1]) + np.float32([shift, 0])
    expected = mixture.standardized_sum(components, (1.0, 2.0), components)
    got = mixture.standardized_sum(rescaled, (1.0, 2.0), rescaled)
    np.testing.assert_allclose(got, expected, atol=5e-3 * max(1, abs(shift) / scale / 50))
