"""Settings of the whole run: exact matrix products, one compilation cache, shape annotations checked."""

import atexit
import functools
import gc
import importlib.metadata
import os
import shutil
import tempfile
import types
import typing

# Workers inherit the cache of the process that starts them, and so do the processes that tests start. It is empty at
# first and gone at the end, so that every run does the same.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ses_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.update(
    XLA_FLAGS=" ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            # Virtual devices that share a few busy cores may wait for each other longer than XLA does before it aborts.
            "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
            # The programs of tiny networks take much longer to compile than to run: the quicker generator of kernels,
            # where there still is a choice, and, as workers share the cores, no threads.
            "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_multi_thread_eigen=false",
        )
    ),
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    # CUDA's compiler is there without a GPU.
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    # Where an operation was called from: one place instead of all of the stack, which takes 4% of the time.
    JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS="0",
    JAX_TRACEBACK_IN_LOCATIONS_LIMIT="1",
    # Every program is kept: each file, and each process that a test starts, begins with the same small ones.
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    # XLA's threads. By default as many as there are devices, which two collectives at once can all keep waiting for
    # each other: such tests stood still every few runs.
    NPROC="32",
    OMP_NUM_THREADS="1",
    # For meshes; everything else stays on the first. By the environment, as the precision: programs of processes that
    # tests start are those of the workers only where both are the same.
    JAX_NUM_CPU_DEVICES="8",
    JAX_DEFAULT_MATMUL_PRECISION="float32",
    TOKENIZERS_PARALLELISM="false",
)

import beartype
import hypothesis
import jax  # reads the variables
import jaxtyping
import pytest

hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")


# Disks take long, and no test pulls the plug of the machine. Tests of full disks have a function of their own here, and
# processes that tests start wait for theirs.
os.fsync = lambda file: None


# Files of about half a minute and more, which start first so that no worker waits for the other one at the end.
LONG = {
    *("scripts", "train_demo", "processes", "flux2_pipeline", "throughput", "partition", "scale", "scorers", "cli"),
    *("qwen_image_pipeline", "z_image_pipeline", "flux1_pipeline", "quantized", "programs", "planner", "soak"),
    *("kernels", "batch", "examples", "notebook"),
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish():
    """What has been imported stays; the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


SAME_ERROR = beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)


def _jaxtyped(function=None, *, typechecker=None, jaxtyped=jaxtyping.jaxtyped):
    """What compares shapes takes a millisecond to make, wherever a function is defined in another, and 20 microseconds
    a call. A function without annotations stays as it is; one whose annotations name no array is checked without it."""
    if function is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if not isinstance(function, types.FunctionType) or any(map(_may_name_arrays, function.__annotations__.values())):
        return jaxtyped(function, typechecker=typechecker)
    return typechecker(function, conf=SAME_ERROR) if function.__annotations__ else function


def _may_name_arrays(annotation):
    """Whether it is, or contains, a type of `jaxtyping`, or a string, which may be anything."""
    if isinstance(annotation, list | tuple):
        return any(map(_may_name_arrays, annotation))
    if isinstance(annotation, str | typing.ForwardRef | typing.TypeVar | typing.NewType):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    modules = (getattr(part, "__module__", None) for part in (annotation, type(annotation)))
    return any(str(m).startswith("jaxtyping") for m in modules) or _may_name_arrays(typing.get_args(annotation))


jaxtyping.jaxtyped = _jaxtyped


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def optimized_programs():
    """For tests whose tolerance is that of optimized programs, or that look into one."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def fresh_programs():
    """For tests that count programs: none is kept from before, which a new one could push out."""
    from ses_jax.loading import programs

    programs.clear()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_this_file():
    """Compiled programs are dropped after each file: all together they would use up a process's memory mappings."""
    from ses_jax.loading import programs  # after the annotations are checked

    yield
    programs.clear()
    jax.clear_caches()
