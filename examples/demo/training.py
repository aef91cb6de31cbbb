"""A training loop that can be killed at any time: state in Orbax, batches and keys a function of the step."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from ses_jax.models.convolution import Conv
from ses_jax.models.layers import GroupNorm
from ses_jax.models.quantized import Dense

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Probe = Callable[[Any], dict[str, float]]


class State(NamedTuple):
    """Everything that a run needs to continue."""

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any


class Parts(NamedTuple):
    """What a training's compiled programs are made of."""

    init: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    loss: Loss


class Limits(NamedTuple):
    """When to stop (`minutes`), how long the whole schedule is (`steps`), how often to save, log and probe.

    It is saved every `save_every` steps and whenever the last time was `save_seconds` ago.
    """

    steps: int
    minutes: float = float("inf")
    save_every: int = 200
    save_seconds: float = float("inf")
    log_every: int = 20
    probe_every: int = 500


class Schedule(NamedTuple):
    """Warm-up, hold, then a linear fall to zero over the last part of the steps: any stop can still be annealed."""

    warmup: int = 100
    decay: float = 0.4

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.warmup, (steps - step) / max(1, int(self.decay * steps)))


SCHEDULE = Schedule()


def train(
    folder: Path,
    parts: Parts,
    batch_at: Callable[[int], Any],
    limits: Limits,
    *,
    schedule: Schedule = SCHEDULE,
    average_decay: float = 0.999,
    seed: int = 0,
    probe: Probe | None = None,
) -> State:
    """Trains `parts.init(key)` up to `limits`, continuing from `folder`'s latest checkpoint.

    Losses go to `folder`/losses.jsonl and stdout, what `probe` says of the averaged params to probes.jsonl. Trainings
    of the same parts share their compiled programs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _start(parts)(jax.device_put(jax.random.key(seed), jax.devices()[0]))  # lies where what is restored does
    update = _updater(parts, average_decay)
    start = saved_at = time.monotonic()
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        state = _restore(manager, state)
        saved = int(state.step)
        for step in range(saved, limits.steps):
            key = jax.random.fold_in(jax.random.key(seed), step)
            state, facts = update(state, batch_at(step), key, schedule(step, limits.steps))
            if (step + 1) % limits.log_every == 0 or step + 1 == limits.steps:
                _log(folder, "losses", step + 1, facts, time.monotonic() - start)
            if (step + 1) % limits.save_every == 0 or time.monotonic() - saved_at > limits.save_seconds:
                saved, saved_at = _save(manager, state), time.monotonic()
            if probe is not None and ((step + 1) % limits.probe_every == 0 or step + 1 == limits.steps):
                _log(folder, "probes", step + 1, probe(state.average), time.monotonic() - start)
            if time.monotonic() - start > 60 * limits.minutes:
                break
        if saved != int(state.step):
            _save(manager, state)
        manager.wait_until_finished()
    return state


def load(folder: Path) -> tuple[int, Any]:
    """Step and averaged params of the latest checkpoint."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        if manager.latest_step() is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint; train this stage first")
        step = manager.latest_step()
        found = manager.restore(step, args=ocp.args.Composite(average=ocp.args.StandardRestore()))
    return step, jax.tree.map(jnp.asarray, found.average)


@functools.lru_cache(maxsize=8)
def _start(parts: Parts):
    @jax.jit
    def start(key: jax.Array) -> State:
        params = parts.init(key)
        return State(jnp.zeros((), jnp.int32), params, params, parts.optimizer.init(params))

    return start


@functools.lru_cache(maxsize=8)
def _updater(parts: Parts, average_decay: float):
    @jax.jit
    def update(state: State, batch: Any, key: jax.Array, scale: float) -> tuple[State, dict[str, jax.Array]]:
        with nn.intercept_methods(_quicker):
            (value, facts), gradients = jax.value_and_grad(parts.loss, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = parts.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        facts = {"loss": value, "gradient": optax.tree.norm(gradients), **facts}
        return State(state.step + 1, params, average, optimizer_state), facts

    return update


def _quicker(call, args, kwargs, context):
    """Runs layers in forms whose gradients are far faster on CPUs; the results are equal up to rounding."""
    module = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(module, Dense):  # on `[B * L, D]`: with one batch axis
        (x,) = args
        last = 2 if module.of_heads else 1
        y = call(x.reshape(-1, *x.shape[-last:]))
        return y.reshape(*x.shape[:-last], *y.shape[1:])
    if isinstance(module, Conv) and not module.use_bias and module.strides == module.kernel_size:
        return _patches(args[0], module.get_variable("params", "kernel"))
    if isinstance(module, GroupNorm):
        scale, bias = (module.get_variable("params", name) for name in ("scale", "bias"))
        return _group_norm(args[0], scale, bias, module.groups, module.eps)
    return call(*args, **kwargs)


def _patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution without a bias whose windows do not overlap, as one product."""
    height, width, channels, features = kernel.shape
    batch, rows, columns = len(x), x.shape[1] // height, x.shape[2] // width
    cells = x.reshape(batch, rows, height, columns, width, channels).transpose(0, 1, 3, 2, 4, 5)
    return (cells.reshape(batch * rows * columns, -1) @ kernel.reshape(-1, features)).reshape(batch, rows, columns, -1)


def _group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Group normalisation of `x [B, H, W, C]`, its sums over the pixels as products with a vector."""
    batch, *_, channels = x.shape
    pixels = x.reshape(batch, -1, channels)
    weights = jnp.full(pixels.shape[1], 1 / pixels.shape[1])

    def mean(values):
        by_channel = jnp.einsum("bnc,n->bc", values, weights)
        by_group = by_channel.reshape(batch, groups, -1).mean(-1)
        return jnp.repeat(by_group, channels // groups, axis=-1)

    center = mean(pixels)
    factor = scale * jax.lax.rsqrt(mean(pixels**2) - center**2 + epsilon)
    return (pixels * factor[:, None] + (bias - center * factor)[:, None]).reshape(x.shape)


def _restore(manager: ocp.CheckpointManager, state: State) -> State:
    if manager.latest_step() is None:
        return state
    parts = {name: ocp.args.StandardRestore(part) for name, part in _items(state).items()}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**parts))
    return State(average=restored.average, **restored.others)


def _save(manager: ocp.CheckpointManager, state: State) -> int:
    parts = {name: ocp.args.StandardSave(part) for name, part in _items(state).items()}
    manager.save(int(state.step), args=ocp.args.Composite(**parts))
    return int(state.step)


def _items(state: State) -> dict[str, Any]:
    """As they are saved: the average, which is all that the other stages read, apart."""
    others = state._asdict()
    return {"average": others.pop("average"), "others": others}


def _log(folder: Path, file: str, step: int, facts: dict[str, Any], seconds: float) -> None:
    row = {"step": step, "seconds": round(seconds, 1)} | {k: round(float(v), 5) for k, v in facts.items()}
    line = json.dumps(row)
    print(folder.name, line, flush=True)
    with open(folder / f"{file}.jsonl", "a") as lines:
        lines.write(line + "\n")
