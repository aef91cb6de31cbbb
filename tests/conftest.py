"""Settings of the whole run: exact matrix products, one compilation cache, shape annotations checked."""

import os
import tempfile

# Virtual devices that share a few busy cores may wait for each other longer than XLA's 40 s, after which it aborts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=1200"

import jax  # reads the flags
import pytest

CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ses_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else stays on the first
jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tiny networks, whose programs take much longer to optimize than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_this_file():
    """Compiled programs are dropped after each file: all together they would use up a process's memory mappings."""
    yield
    jax.clear_caches()
