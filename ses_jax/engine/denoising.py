"""Rows of noise to images: on meshes, and as many at a time as fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ses_jax.engine import memory
from ses_jax.loading import partition
from ses_jax.pipelines import sampler


class Model(NamedTuple):
    """How noise becomes images: the two functions of a pipeline that run inside the compiled step, and its devices.

    Attributes:
      mesh: None is the default device.
      decoded: how many rows each device decodes at a time; None is all of them.
      apart: whether denoising is a program of its own where that is possible, see `compiler.denoises_apart`.
    """

    velocity: Callable[..., Array]
    decode: Callable[..., Array]
    mesh: Mesh | None = None
    decoded: int | None = None
    apart: bool = False


class Rows(NamedTuple):
    """A batch for the networks: noise `[r, C, h, w]`, and which prompt each row belongs to, `[r]`."""

    noise: Array
    owner: Array


class Finish(NamedTuple):
    """What becomes of images.

    Attributes:
      see: `images -> tree`, what is to be known of those that are decoded at a time.
      say: `(seen, owner) -> tree`, what is made of that, of all that are denoised at a time: small images of many rows
        fill a network better than those of one.
      show: `images -> tree`, what comes along.
    """

    see: Callable[[Array], Any]
    say: Callable[[Any, Array], Any]
    show: Callable[[Array], Any]


# Images as they are.
IMAGES = Finish(lambda images: None, lambda seen, owner: None, lambda images: images)


class Paths(NamedTuple):
    """Denoised rows, to be followed back.

    Attributes:
      latents: `[r, steps + 1, C, h, w]`, from noise to image.
      owner: `[r]`, which prompt each row belongs to.
      slopes: `[r, parts]`, derivatives with respect to each component of the row.
    """

    latents: Array
    owner: Array
    slopes: Array


def images(
    model: Model,
    chunk: int,
    params: Any,
    prompts: tuple[Array, Any],
    rows: Rows,
    finish: Finish,
    denoise: Callable[..., Array] = sampler.denoise,
) -> tuple[Any, Any]:
    """What is said of all rows' images, and what is shown of them.

    Args:
      chunk: how many rows are denoised at a time.
      prompts: sigmas or a plan, and conditions.
    """

    def sample(velocity, part):
        latents = denoise(velocity, part.noise, prompts[0])
        latents = partition.constrain(model.mesh, latents, partition.DATA)
        return decoded(model, params, Rows(latents, part.owner), finish)

    return _sampled(model, chunk, (params, prompts[1]), rows, sample)


def latents(model: Model, chunk: int, params: Any, prompts: tuple[Array, Any], rows: Rows) -> Array:
    """The denoised latents of all rows, `chunk` rows at a time, whole on every device; `prompts` as for `images`."""

    def sample(velocity, part):
        found = sampler.denoise(velocity, part.noise, prompts[0])
        return partition.constrain(model.mesh, found, partition.DATA)

    return partition.constrain(model.mesh, _sampled(model, chunk, (params, prompts[1]), rows, sample))


def predicted(
    model: Model, chunk: int, params: Any, prompts: tuple[Array, Any], rows: Rows, finish: Finish
) -> tuple[Array, tuple[Any, Any]]:
    """The latents of all rows at the last of the sigmas, and as `images` of what they will be at 0."""

    def sample(velocity, part):
        both = sampler.predict(velocity, part.noise, prompts[0])
        latents, clean = partition.constrain(model.mesh, both, partition.DATA)
        return latents, decoded(model, params, Rows(clean, part.owner), finish)

    return _sampled(model, chunk, (params, prompts[1]), rows, sample)


def followed(
    model: Model, chunk: int, params: Any, prompts: tuple[Array, Any], rows: Rows, finish: Finish
) -> tuple[Array, tuple[Any, Any]]:
    """As `images`, with all latents on the way, `[r, steps + 1, C, h, w]`."""

    def sample(velocity, part):
        path = jnp.moveaxis(sampler.follow(velocity, part.noise, prompts[0]), 0, 1)
        path = partition.constrain(model.mesh, path, partition.DATA)
        return path, decoded(model, params, Rows(path[:, -1], part.owner), finish)

    return _sampled(model, chunk, (params, prompts[1]), rows, sample)


def pulled_back(
    model: Model,
    chunk: int,
    params: Any,
    prompts: tuple[Array, Any],
    paths: Paths,
    score: Callable[[Array, Array], Any],
) -> Array:
    """Derivatives with respect to the rows' noise, `[r, C, h, w]`.

    Args:
      score: `(images, owner) -> [n, parts]`, whose derivatives the paths have.
    """

    def sample(velocity, part):
        part = part._replace(latents=jnp.moveaxis(part.latents, 1, 0))
        with partition.differentiated():
            last = _pulled_back_images(model, params, part._replace(latents=part.latents[-1]), score)
            return sampler.pull_back(velocity, part.latents, prompts[0], last)

    return _sampled(model, chunk, (params, prompts[1]), paths, sample)


def _pulled_back_images(model: Model, params: Any, last: Paths, score: Callable[[Array, Array], Any]) -> Array:
    """Derivatives with respect to denoised latents."""

    def run(part):
        def scores(latents):
            with partition.compiled_for(model.mesh):
                return score(model.decode(params, latents), part.owner)

        return partition.constrain(model.mesh, jax.vjp(scores, part.latents)[1](part.slopes)[0])

    return _on_all_devices(model, last, run)


def _sampled(
    model: Model, chunk: int, given: tuple[Any, Any], rows: Rows | Paths, sample: Callable[[Callable, Any], Any]
) -> Any:
    """`sample(velocity, part)` of all rows, `chunk` rows at a time; `given` are params and conditions.

    On a mesh the rows are denoised along the data axis. Surplus rows fill the last split and are thrown away.
    """
    params, condition = given

    def run(part: Rows | Paths) -> Any:
        part = partition.constrain(model.mesh, part, partition.DATA)
        texts = partition.constrain(model.mesh, owned(condition, part.owner), partition.DATA)

        def velocity(latents, sigma):
            # Said again and again: where the rows go afterwards would spread into the loop.
            latents = partition.constrain(model.mesh, latents, partition.DATA)
            with partition.compiled_for(model.mesh):
                out = model.velocity(params, latents, sigma, texts)
            return partition.constrain(model.mesh, out, partition.DATA)

        return sample(velocity, part)

    count, data = len(rows.owner), partition.size(model.mesh, partition.DATA)
    out = in_chunks(run, _fill(rows, data), -(-chunk // data) * data)
    return jax.tree.map(lambda x: x[:count], out)


def decoded(model: Model, params: Any, rows: Rows, finish: Finish) -> tuple[Any, Any]:
    """What is said and shown of denoised rows."""

    def see(part: Rows) -> tuple[Any, Any]:
        with partition.compiled_for(model.mesh):
            images = model.decode(params, part.noise)
        seen = partition.constrain(model.mesh, finish.see(images), *partition.AXES)
        return seen, partition.constrain(model.mesh, finish.show(images))

    def say(found: tuple[Any, Any], rows: Rows) -> tuple[Any, Any]:
        seen, owner = partition.constrain(model.mesh, (found[0], rows.owner), *partition.AXES)
        return partition.constrain(model.mesh, finish.say(seen, owner)), found[1]

    return _on_all_devices(model, rows, see, say)


def _on_all_devices(
    model: Model, rows: Any, run: Callable[[Any], Any], gather: Callable[[Any, Any], Any] = lambda found, rows: found
) -> Any:
    """`gather(found, rows)` of what `run(part)` finds of rows, which on a mesh are spread over all devices.

    Small networks have no other use for them.
    """
    devices, count = partition.size(model.mesh, *partition.AXES), len(rows.owner)
    chunk = devices * memory.even_part(-(-count // devices), model.decoded)
    filled = _fill(rows, chunk)
    found = in_chunks(lambda part: run(partition.constrain(model.mesh, part, *partition.AXES)), filled, chunk)
    return jax.tree.map(lambda x: x[:count], gather(found, filled))


def _fill(rows: Any, multiple: int) -> Any:
    """The rows, with copies of the first one behind them, so that their number is a multiple."""
    surplus = -len(rows.owner) % multiple
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], surplus, axis=0)]), rows)


def owned(tree: Any, owner: Int[Array, " r"]) -> Any:
    """Every array's rows `[P, ...]` as `[r, ...]`, each row its owner's."""

    def take(x):
        x = jnp.asarray(x)
        return jnp.broadcast_to(x, (len(owner), *x.shape[1:])) if len(x) == 1 else x[owner]

    return jax.tree.map(take, tree)


def in_chunks(function: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """`function` over the leading axis of the arrays in `rows`, `chunk` at a time; its outputs have that axis too."""
    count = len(jax.tree.leaves(rows)[0])
    if chunk >= count:
        return function(rows)
    whole = count - count % chunk
    stacked = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), rows)
    # Not -1: an array may have no columns.
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(function, stacked))
    if whole == count:
        return out
    rest = function(jax.tree.map(lambda x: x[whole:], rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
