"""What compilers are told: for NVIDIA GPUs, and TPUs that denoise, and no more than they know."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ses_jax.loading import compiler, programs
from ses_jax.models import target

NVIDIA = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
WEIGHTS = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU is the default device; the options it knows are those in the list."""
    known = [name for name, _ in compiler.NVIDIA]
    monkeypatch.setattr(target, "device", lambda: NVIDIA)
    monkeypatch.setattr(compiler, "_is_known", lambda option, device: option[0] in known and device is NVIDIA)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return known


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "9.0", 9), ("cuda", "10.0", 10), ("gpu", "gfx942", None), ("gpu", "", None), ("cpu", "", None)],
)
def test_the_generation_of_an_nvidia_gpu(platform, capability, expected):
    assert target.capability(types.SimpleNamespace(platform=platform, compute_capability=capability)) == expected


def test_a_gpu_gets_options(gpu):
    assert compiler.options([WEIGHTS, None]) == compiler.NVIDIA
    assert compiler.options([]) == compiler.NVIDIA


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_weights_in_eight_bits_keep_the_products_that_cast_them(gpu, dtype):
    assert compiler.options([WEIGHTS, jax.ShapeDtypeStruct((2,), dtype)]) == ()
    # Tokens, masks and keys are no weights.
    others = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.uint8, jnp.bool_, jnp.int32)]
    assert compiler.options([*others, jax.random.key(0)]) == ()  # the key lies on this machine's CPU
    assert compiler.options(others) == compiler.NVIDIA


def test_the_users_own_flags_and_unknown_options_are_left_alone(gpu, monkeypatch):
    first, second = compiler.NVIDIA
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{first[0]}=true")
    assert compiler.options(WEIGHTS) == (second,)
    gpu.remove(second[0])
    assert compiler.options(WEIGHTS) == ()


def test_a_tpu_denoises_with_options_of_its_own(monkeypatch):
    known, of_v5p = compiler.DENOISING.values()
    monkeypatch.setattr(compiler, "_is_known", lambda option, device: True)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    kinds = {"TPU v6 lite": known, "TPU v5": of_v5p, "TPU v5p": of_v5p, "TPU v5 lite": (), "TPU v5e": (), "": ()}
    for kind, expected in kinds.items():
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        monkeypatch.setattr(target, "device", lambda device=device: device)
        assert compiler.options(WEIGHTS, denoises=True) == expected
        assert compiler.denoises_apart(None) == bool(expected)
        assert compiler.options(WEIGHTS) == ()
    monkeypatch.setattr(target, "device", lambda: types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{known[0][0]}=16384")
    assert compiler.options(WEIGHTS, denoises=True) == known[1:]


def test_arrays_decide_by_where_they_lie(gpu):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    shape = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert compiler.options(shape) == compiler.options(jnp.ones(2)) == ()


def test_of_a_mesh_over_processes_the_own_device_is_asked(gpu):
    """`NVIDIA` is the one that `gpu` knows all options of."""
    remote = types.SimpleNamespace(**vars(NVIDIA))
    spanning = types.SimpleNamespace(device_set=[remote, NVIDIA], addressable_devices=[NVIDIA])
    elsewhere = types.SimpleNamespace(device_set=[NVIDIA], addressable_devices=[])  # as those of a topology
    for sharding in (spanning, elsewhere):
        assert compiler.options(types.SimpleNamespace(sharding=sharding)) == compiler.NVIDIA


def test_the_compiler_itself_is_asked_what_it_knows():
    device = jax.devices()[0]
    assert all(compiler._is_known(option, device) for option in compiler.NVIDIA)
    assert not compiler._is_known(("xla_gpu_enable_perpetual_motion", True), device)
    assert not compiler._is_known(compiler.NVIDIA[0], "no device")


def test_programs_are_compiled_with_the_options_and_kept_apart_by_them(monkeypatch):
    given, compiled = [()], []
    monkeypatch.setattr(compiler, "options", lambda args, denoises: given[0])
    monkeypatch.setattr(jax, "jit", lambda function, compiler_options: compiled.append(compiler_options) or function)
    double = programs.compiled(static=1)(lambda factor, x: factor * x)
    for given[0] in ((), (("a", 1),), ()):
        assert double(2, 3) == 6
    assert compiled == [{}, {"a": 1}]
