"""Large arrays of the host beside NumPy: what is moved, looked at and read, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from ses_jax.convert import arrays, files
from ses_jax.convert.engine import ConversionError

DTYPES = ("float32", "bfloat16", "float16", "float64", "int8", "bool", "float8_e4m3fn")
PARTS = (
    *((slice(1, 3),), (slice(3, 9),), (slice(4, 2),), (slice(0, 5, 2),)),
    *((slice(None), slice(2, 4)), (slice(None), slice(None), slice(1, 2))),
)


@pytest.fixture(autouse=True)
def pieces_of_a_small_array(monkeypatch):
    """Several bands, blocks and threads, where they would be one."""
    for name, value in {"SMALL": 0, "BAND": 3, "BLOCK": 64, "CHUNK": 40}.items():
        monkeypatch.setattr(arrays, name, value)


def values_of(shape, dtype, seed=0):
    return np.asarray(100 * np.random.default_rng(seed).standard_normal(shape)).astype(jnp.dtype(dtype))


@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from(DTYPES), st.sampled_from(DTYPES[:3]), st.randoms())
def test_a_copy_is_an_assignment(shape, source, target, random):
    """Whatever the order of the axes of either side, within a larger array or not."""
    order = random.sample(range(len(shape)), len(shape))
    target = random.choice((source, target))
    values = np.asarray(values_of(shape, source).transpose(order))
    with np.errstate(over="ignore"):
        expected = np.asarray(values.astype(jnp.dtype(target)))
    out = arrays.empty((2, *values.shape), target)
    arrays.copy(out[1, ...], values)
    np.testing.assert_array_equal(out[1, ...], expected)
    scattered = np.zeros((*values.shape, 2), jnp.dtype(target))
    arrays.copy(scattered[..., 0], values)
    np.testing.assert_array_equal(scattered[..., 0], expected)
    assert not scattered[..., 1].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_finite_is_what_numpy_says_of_all_sixteen_bits(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype))
    for start in range(0, every.size, 128):
        block = every[start : start + 128]
        assert arrays.all_finite(block) == np.isfinite(block).all()
        assert arrays.all_finite(block[::2]) == np.isfinite(block[::2]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_in_any_block_is_found(dtype, value):
    for place in (0, 50, 99):
        values = values_of((100,), dtype)
        assert arrays.all_finite(values)
        values[place] = value
        assert not arrays.all_finite(values)


def test_numbers_and_nothing_are_finite():
    for values in (np.empty((0, 3), jnp.bfloat16), np.ones(3, np.int8), np.array(1.0, np.float32)):
        assert arrays.all_finite(values)
    assert not arrays.all_finite(np.array(np.nan, np.float32))


@pytest.mark.parametrize("shape", [(3, 5), (17,), (1, 2, 3)])
def test_a_device_of_the_cpu_takes_it_as_it_is(shape):
    for dtype in ("float32", "bfloat16", "int8"):
        values = arrays.empty(shape, dtype)
        assert (values.shape, values.dtype) == (shape, jnp.dtype(dtype))
        placed = jax.device_put(values)
        assert np.asarray(placed).ctypes.data == values.ctypes.data


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_eight_bits_are_looked_up(dtype):
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    table = every.astype(np.float32)
    for places in (
        every,
        np.repeat(every, 3).reshape(2, 3, 128),
        every.reshape(16, 16)[:, 3:9],
        every[::-3],
        every[:0],
    ):
        np.testing.assert_array_equal(arrays.look_up(table, places), places.astype(np.float32))


@given(st.integers(0, 20), st.integers(1, 5), st.sampled_from(((), (1,), (1, 1))))
def test_rows_are_scaled_in_place(rows, columns, axes):
    values = values_of((rows, columns, *axes[1:]), "float32")
    factors = np.asarray(values_of((rows, *axes) if axes else (), "float32", 1))
    expected = values * factors
    arrays.scale(values, factors)
    np.testing.assert_array_equal(values, expected)


def test_tensors_are_those_that_the_package_reads(tmp_path):
    tensors = {dtype: values_of((5, 4, 3), dtype) for dtype in DTYPES if "float8" not in dtype}
    tensors |= {
        dtype: np.arange(-20, 40).astype(dtype).reshape(5, 4, 3) for dtype in ("uint8", "int16", "int32", "int64")
    }
    tensors |= {"empty": np.zeros((0, 4, 3), np.float32), "number": np.array(2.5, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "b"})
    weights = files.open_files([tmp_path / "model.safetensors"])
    assert weights.headers.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert weights.headers[name].shape == expected.shape
        found = weights.read(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        if expected.ndim == 3:
            for index in PARTS:
                np.testing.assert_array_equal(weights.read_part(name, index), expected[index])


def test_a_file_that_became_shorter_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones((20, 20), np.float32)}, file)
    weights = files.open_files([file])
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ConversionError, match=r"model\.safetensors is truncated or corrupt: it ends too early"):
        weights.read("a")
    file.unlink()
    with pytest.raises(ConversionError, match=r"model\.safetensors .*No such file"):
        weights.read("a")
