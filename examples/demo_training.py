"""A training loop that can be killed at any time: state in Orbax, batches and keys a function of the step."""

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

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class State(NamedTuple):
    """Everything that a run needs to continue."""

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any


class Limits(NamedTuple):
    """When to stop (`minutes`), how long the whole schedule is (`steps`), how often to save (`save_every`)."""

    steps: int
    minutes: float = float("inf")
    save_every: int = 200
    log_every: int = 20


class Schedule(NamedTuple):
    """Warm-up, hold, then a linear fall to zero over the last part of the steps: any stop can still be annealed."""

    warmup: int = 100
    decay: float = 0.4

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.warmup, (steps - step) / max(1, int(self.decay * steps)))


SCHEDULE = Schedule()


def train(
    folder: Path,
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    batch_at: Callable[[int], Any],
    limits: Limits,
    *,
    schedule: Schedule = SCHEDULE,
    average_decay: float = 0.999,
    seed: int = 0,
) -> State:
    """Trains `init(key)` up to `limits`, continuing from `folder`'s latest checkpoint.

    Losses go to `folder`/losses.jsonl and stdout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _start(init, optimizer)(jax.random.key(seed))
    update = _updater(optimizer, loss, average_decay)
    start = time.monotonic()
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        state = _restore(manager, state)
        saved = int(state.step)
        for step in range(saved, limits.steps):
            key = jax.random.fold_in(jax.random.key(seed), step)
            state, facts = update(state, batch_at(step), key, schedule(step, limits.steps))
            if (step + 1) % limits.log_every == 0 or step + 1 == limits.steps:
                _log(folder, step + 1, facts, time.monotonic() - start)
            if (step + 1) % limits.save_every == 0:
                saved = _save(manager, state)
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
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return int(state["step"]), jax.tree.map(jnp.asarray, state["average"])


def _start(init, optimizer):
    @jax.jit
    def start(key: jax.Array) -> State:
        params = init(key)
        return State(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return start


def _updater(optimizer, loss, average_decay):
    @jax.jit
    def update(state: State, batch: Any, key: jax.Array, scale: float) -> tuple[State, dict[str, jax.Array]]:
        with nn.intercept_methods(_flatten_tokens):
            (value, facts), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        facts = {"loss": value, "gradient": optax.tree.norm(gradients), **facts}
        return State(state.step + 1, params, average, optimizer_state), facts

    return update


def _flatten_tokens(call, args, kwargs, context):
    """Runs dense layers on `[B * L, D]`: with one batch axis the weights' gradient is far faster on CPUs."""
    if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    (x,) = args
    return call(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _restore(manager: ocp.CheckpointManager, state: State) -> State:
    if manager.latest_step() is None:
        return state
    restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state._asdict()))
    return State(**restored)


def _save(manager: ocp.CheckpointManager, state: State) -> int:
    manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()))
    return int(state.step)


def _log(folder: Path, step: int, facts: dict[str, jax.Array], seconds: float) -> None:
    row = {"step": step, "seconds": round(seconds, 1)} | {k: round(float(v), 5) for k, v in facts.items()}
    line = json.dumps(row)
    print(folder.name, line, flush=True)
    with open(folder / "losses.jsonl", "a") as file:
        file.write(line + "\n")
