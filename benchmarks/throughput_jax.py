"""This library's side of the throughput benchmark."""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import kernels
import phases
import random_weights
from phases import Job

import ses_jax
from ses_jax.engine import denoising, flops, memory
from ses_jax.loading import compiler
from ses_jax.pipelines import sampler
from ses_jax.pipelines.base import Pipeline
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.rewards import scorers

MATMUL_SIZES = {"cpu": 1024}  # elsewhere 16384
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def run(job: Job) -> dict[str, Any]:
    """Times the phases of every batch size; text encoders leave the device before the other networks are made.

    Everything is compiled first, side by side: `compile_seconds` are those of a program beside the others, and
    `compiling` of all of them by the clock.
    """
    clock = phases.Clock("jax")
    pipeline = _pipeline(job)
    job = _filled(job, pipeline)
    peak = matmul_peak(MATMUL_SIZES.get(jax.default_backend(), 16384))
    clock.say(f"{jax.devices()[0].device_kind}, {peak / 1e12:.4g} TFLOP/s in one bfloat16 product")
    scorer = _scorer(job, pipeline)
    start = time.perf_counter()
    programs = _compile_all(job, pipeline, scorer)
    compiling = time.perf_counter() - start
    clock.say(f"{len(programs)} programs compiled in {compiling:.1f} s")
    meter = Meter(job, peak, clock, programs)
    encoded = _encode_all(meter, pipeline)
    start = time.perf_counter()
    params = jax.block_until_ready(_make(pipeline.image_params(pipeline.params), seed=1))
    setup = time.perf_counter() - start
    clock.say(f"weights made in {setup:.1f} s")
    batches = [_batch(meter, pipeline, params, scorer, item) for item in encoded]
    return {
        "job": dataclasses.asdict(job),
        "peak_flops": peak,
        "compiling": compiling,
        "setup": setup,
        "seconds": clock.seconds(),
        "batches": batches,
        "environment": common.environment(),
    }


class Encoded(NamedTuple):
    """A batch of prompts: how many, the figures of encoding them, and their conditions."""

    batch: int
    result: dict[str, Any]
    condition: Any


class Program(NamedTuple):
    """A phase of a batch size: its function, and what compiling it gave, or the error, and the seconds it took."""

    function: Callable[..., Any]
    compiled: Any
    seconds: float


@dataclasses.dataclass(frozen=True)
class Meter:
    """Counts and times one phase after the other."""

    job: Job
    peak: float
    clock: phases.Clock
    programs: Mapping[tuple[str, int], Program]

    def __call__(self, phase: str, batch: int, *args: Any) -> tuple[dict[str, Any], Any]:
        """The phase's figures, and what it gives."""
        function, compiled, compile_seconds = self.programs[phase, batch]
        if isinstance(compiled, Exception):
            raise compiled
        memory = _memory(compiled)
        out = jax.block_until_ready(compiled(*args))  # the first call also loads the program

        def call():
            return jax.block_until_ready(compiled(*args))

        with jax.transfer_guard_device_to_host("disallow"):
            seconds, runs = phases.median_seconds(call, self.job)
        result = phases.rates(seconds, batch, flops.count(function, *args), self.peak)
        result |= {"runs": runs, "compile_seconds": compile_seconds, **memory}
        if self.job.kernels:
            result["kernels"] = kernels.longest(call, self.job.kernels)
        self.clock.say(phases.line(phase, batch, result))
        return result, out


def _compile_all(job: Job, pipeline: Pipeline, scorer: scorers.Scorer | None) -> dict[tuple[str, int], Program]:
    """The programs of all phases and batch sizes."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {
            (phase, batch): (function, pool.submit(_compile, _lower(function, args)))
            for batch in job.batches
            for phase, function, args in _phases(job, pipeline, scorer, batch)
        }
    return {key: Program(function, *future.result()) for key, (function, future) in found.items()}


def _lower(function: Callable[..., Any], args: tuple[Any, ...]) -> jax.stages.Lowered:
    """With the options that a search compiles with."""
    return jax.jit(function, compiler_options=dict(compiler.options(args))).lower(*args)


def _compile(lowered: jax.stages.Lowered) -> tuple[Any, float]:
    """The compiled program, or the error of one that does not fit, and the seconds."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        compiled = error
    return compiled, time.perf_counter() - start


def _phases(
    job: Job, pipeline: Pipeline, scorer: scorers.Scorer | None, batch: int
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Names, functions and arguments, as shapes."""
    tokens = _tokens(job, pipeline, batch)
    params = jax.eval_shape(lambda: pipeline.params)
    text_params, image_params = pipeline.text_params(params), pipeline.image_params(params)
    yield "encode", pipeline.encode, (text_params, tokens)
    condition = jax.eval_shape(pipeline.encode, text_params, tokens)
    noise = jax.ShapeDtypeStruct((batch, *pipeline.noise_shape(job.height, job.width)), jnp.float32)
    denoise = functools.partial(_denoise, pipeline.velocity)
    call = (image_params, noise, jax.ShapeDtypeStruct((job.steps + 1,), jnp.float32), condition)
    yield "denoise", denoise, call
    latents = jax.eval_shape(denoise, *call)
    decode = functools.partial(_decode, pipeline.decode, job)
    yield "decode", decode, (image_params, latents)
    if scorer is not None:
        images = jax.eval_shape(decode, image_params, latents)
        scorer_params = jax.eval_shape(lambda: scorer.params)
        text = jax.eval_shape(scorer.embed_text, scorer_params, scorer.tokenize(["a prompt"] * batch))
        yield "reward", scorer.score, (scorer_params, images, text)


def _tokens(job: Job, pipeline: Pipeline, batch: int) -> Any:
    return pipeline.blank_tokens(batch, job.tokens, guidance=job.guidance)


def matmul_peak(size: int, count: int = 8, runs: int = 5) -> float:
    """FLOP/s of `count` bfloat16 products of two square matrices in a row, the best of several runs."""
    x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    w = w / size**0.5

    @jax.jit
    def products(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, count)[0]

    jax.block_until_ready(products(x, w))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(products(x, w))
        times.append(time.perf_counter() - start)
    return 2 * size**3 * count / min(times)


def _encode_all(meter: Meter, pipeline: Pipeline) -> list[Encoded]:
    """The conditions of each batch size; the text encoders' weights are gone afterwards."""
    params = _make(pipeline.text_params(pipeline.params), seed=0)
    encoded = []
    for batch in meter.job.batches:
        tokens = jax.device_put(_tokens(meter.job, pipeline, batch))
        result, condition = _or_out_of_memory(meter, "encode", batch, params, tokens)
        encoded.append(Encoded(batch, result, condition))
    return encoded


def _batch(
    meter: Meter, pipeline: Pipeline, params: Any, scorer: scorers.Scorer | None, encoded: Encoded
) -> dict[str, Any]:
    """The phases of one batch size, up to the one that does not fit."""
    job, batch = meter.job, encoded.batch
    result = {"batch": batch, "encode": encoded.result}
    if encoded.condition is None:
        return result
    shape = (batch, *pipeline.noise_shape(job.height, job.width))
    noise = jax.random.normal(jax.random.key(batch), shape)
    sigmas = jnp.asarray(pipeline.sigmas(job.steps, job.height, job.width))
    result["denoise"], latents = _or_out_of_memory(meter, "denoise", batch, params, noise, sigmas, encoded.condition)
    if latents is None:
        return result
    result["denoise"]["seconds_per_step"] = result["denoise"]["seconds"] / job.steps
    result["decode"], images = _or_out_of_memory(meter, "decode", batch, params, latents)
    if images is None:
        return result
    result["finite"] = bool(jnp.isfinite(images).all())
    if scorer is not None:
        text = jax.jit(scorer.embed_text)(scorer.params, scorer.tokenize(["a prompt"] * batch))
        result["reward"], _ = _or_out_of_memory(meter, "reward", batch, scorer.params, images, text)
    return result


def _denoise(velocity: Callable[..., Any], params: Any, noise: Any, sigmas: Any, condition: Any) -> jax.Array:
    return sampler.denoise(lambda latents, sigma: velocity(params, latents, sigma, condition), noise, sigmas)


def _decode(decode: Callable[..., Any], job: Job, params: Any, latents: Any) -> jax.Array:
    """As many images at a time as a search decodes."""
    at_once = memory.decoded_at_once(job.height, job.width, jax.default_backend())
    return denoising.in_chunks(functools.partial(decode, params), latents, at_once)


def _or_out_of_memory(meter: Meter, phase: str, batch: int, *call: Any) -> tuple[dict[str, Any], Any]:
    """The measurement, or an error in its place and None."""
    try:
        return meter(phase, batch, *call)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        meter.clock.say(f"{phase} of {batch}: out of memory")
        return {"error": "out of memory"}, None


def _pipeline(job: Job) -> Pipeline:
    """A folder's pipeline with its weights, a published one as shapes."""
    if job.model == "demo" or Path(job.model).exists():
        return ses_jax.load_pipeline(job.model, dtype=jnp.dtype(job.dtype))
    return abstract_pipeline(job.model, dtype=jnp.dtype(job.dtype))


def _filled(job: Job, pipeline: Pipeline) -> Job:
    """The job with the model's defaults; more steps than these are not needed to know the time of one."""
    names = ("height", "width", "steps", "guidance")
    missing = {name: getattr(pipeline.defaults, name) for name in names if getattr(job, name) is None}
    return dataclasses.replace(job, **missing)


def _make(params: Any, seed: int) -> Any:
    """Weights for shapes; weights stay what they are."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return params
    return random_weights.random_params(params, seed)


def _scorer(job: Job, pipeline: Pipeline) -> scorers.Scorer | None:
    if job.reward == "none":
        return None
    if job.reward == "own":
        return scorers.load_clip("clip", pipeline.folder / "clip", jnp.dtype(job.dtype))
    return random_weights.clip_h(jnp.dtype(job.dtype))


def _memory(compiled: Any) -> dict[str, int | None]:
    """Bytes of the program, by XLA's account; and the most the device holds in it, all weights that are there included.

    The latter is unknown on a CPU.
    """
    analysis = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats()
    working = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return {
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "peak_bytes": stats["bytes_in_use"] + working if stats else None,
    }
