"""The programs of a search as shapes: what each costs, and how much memory it takes. Nothing is compiled or allocated.

The reward is CLIP ViT-H/14, the network of "pick", "hps" and "clip", or the CLIP that comes with a checkpoint.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ses_jax.engine import cost, evaluations, flops
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.cost import search_stages
from ses_jax.engine.fidelity import WHOLE, Form
from ses_jax.loading import partition
from ses_jax.loading.programs import comparable
from ses_jax.models import clip, quantized
from ses_jax.pipelines.base import Pipeline
from ses_jax.pipelines.guidance import unguided
from ses_jax.pipelines.registry import FAMILIES
from ses_jax.planner import footprint, splits
from ses_jax.rewards import scorers
from ses_jax.rewards.device_parts import DeviceScores
from ses_jax.rewards.preprocess import Preprocessor
from ses_jax.rewards.scorers import Scorer


class Phase(NamedTuple):
    """A program's FLOPs and the peak of its temporaries."""

    flops: int
    temporary_bytes: int


class Split(NamedTuple):
    """Along which axes the leaves of a function's first arguments are split, and over how many devices."""

    axes: tuple[splits.Axis, ...] = ()
    parts: int = 1


WHOLE_PARAMS = Split()


@functools.lru_cache(maxsize=8)  # whose shapes take longer to find than those of most networks
def clip_scorer(dtype: Any, quantize: str | None = None) -> Scorer:
    """CLIP ViT-H/14 as shapes; its tokens are blank."""
    config = clip.Config.from_open_clip({})
    shapes = jax.eval_shape(lambda: clip.init(None, config))
    cast = quantized.cast(shapes, dtype)
    return Scorer(
        name="clip",
        params=quantized.abstract(cast, quantize and quantized.Quantization(quantize, clip.QUANTIZED)),
        tokenize=lambda prompts: np.zeros((len(prompts), config.max_length), np.int32),
        embed_text=functools.partial(scorers.embed_clip, config),
        score=scorers.ImageScore(Preprocessor(), functools.partial(scorers.clip_score, config)),
    )


def scorer_of(pipeline: Pipeline) -> Scorer:
    """What scores a model's images by default, as shapes, in the dtype of its params."""
    how = quantized.dtype_of(pipeline.params), quantized.kind_of(pipeline.params)
    own = Path(pipeline.folder) / "clip"
    return scorers.abstract_clip(own, *how) if own.is_dir() else clip_scorer(*how)


class Work:
    """What a search asks of any machine; every program is traced once, also for another search that asks it too."""

    def __init__(self, pipeline: Pipeline, config: SearchConfig, tokens: int):
        self.pipeline, self.config = pipeline, config
        self.tokens = pipeline.blank_tokens(1, tokens, guidance=config.guidance)
        self.scorer = scorer_of(pipeline)
        self.image_params = pipeline.image_params(pipeline.params)
        self.gradient = config.needs_gradient
        self._encode = functools.cache(self._trace_encode)
        self._step, self._finish = functools.cache(self._trace_step), functools.cache(self._trace_finish)

    def encode(self, model: int = 1) -> Phase:
        """The condition of one prompt, by networks that are split over so many devices."""
        return self._encode(model)

    @functools.cached_property
    def condition(self) -> Any:
        return jax.eval_shape(self.pipeline.encode, self.pipeline.text_params(self.pipeline.params), self.tokens)

    def step(self, rows: int, form: Form = WHOLE, *, gradient: bool = False, model: int = 1) -> Phase:
        """One denoising step of so many candidates, by a network that is split over so many devices."""
        return self._step(rows, form, gradient, model)

    def finish(self, rows: int, form: Form = WHOLE, *, gradient: bool = False) -> Phase:
        """Images and scores of so many latents."""
        return self._finish(rows, form.part, gradient)

    def _trace_encode(self, model: int) -> Phase:
        params = self.pipeline.text_params(self.pipeline.params)
        return _phase(self.pipeline.encode, params, self.tokens, split=self._split(params, model))

    def _trace_step(self, rows: int, form: Form, gradient: bool, model: int) -> Phase:
        condition = self.condition if form.guided else unguided(self.condition)
        condition = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), condition)
        sigma = jax.ShapeDtypeStruct((rows,), jnp.float32)
        velocity = self.pipeline.velocity
        velocity = functools.partial(evaluations.with_gradient, velocity) if gradient else velocity
        split = self._split(self.image_params, model)
        return _phase(velocity, self.image_params, self._latents(rows, form.part), sigma, condition, split=split)

    def _split(self, params: Any, model: int) -> Split:
        """Along which axes params are split over so many devices."""
        mesh = partition.abstract_mesh(f"{partition.MODEL}={model}")
        rules = {name: part.partition for name, part in FAMILIES[self.pipeline.family].COMPONENTS.items()}
        leaves = jax.tree.leaves(partition.shardings(mesh, rules, params))
        return Split(tuple(_axis(sharding.spec) for sharding in leaves), model)

    def _trace_finish(self, rows: int, part: int, gradient: bool) -> Phase:
        scorer = self.scorer
        text = jax.eval_shape(scorer.embed_text, scorer.params, scorer.tokenize([""] * rows))

        scores = DeviceScores((scorer.score,))
        finish = functools.partial(cost.finished, self.pipeline.decode, scores)
        if gradient:
            finish = functools.partial(cost.finished_with_gradient, self.pipeline.decode, scores, (1.0,))
        return _phase(finish, (self.image_params, (scorer.params,)), self._latents(rows, part), (text,))

    def _latents(self, rows: int, part: int) -> jax.ShapeDtypeStruct:
        shape = self.pipeline.noise_shape(self.config.height // part, self.config.width // part)
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32)

    def image_flops(self, steps: int, form: Form = WHOLE, *, gradient: bool = False) -> int:
        """Of one image, from noise to score."""
        return steps * self.step(1, form, gradient=gradient).flops + self.finish(1, form, gradient=gradient).flops

    @functools.cached_property
    def candidates_flops(self) -> int:
        """Of all candidates, each with the looks that it gets."""
        stages = search_stages(self.config, self.config.budget)
        image_flops = functools.partial(self.image_flops, gradient=self.gradient)
        return sum(stage.images * image_flops(stage.steps, stage.form) for stage in stages)

    def search_flops(self) -> int:
        """Of a whole search: encoding, all candidates, winner and base with all steps."""
        return self.encode().flops + self.candidates_flops + 2 * self.image_flops(self.config.steps)


def _axis(spec: PartitionSpec) -> splits.Axis:
    return spec.index(partition.MODEL) if partition.MODEL in spec else None


def _phase(function: Callable[..., Any], *args: Any, split: Split = WHOLE_PARAMS) -> Phase:
    """Of a function whose first arguments' leaves may be split."""
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple((x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves)
    return _traced(comparable(function), tree, shapes, split)


@functools.lru_cache(maxsize=512)  # plans for several machines ask for much the same
def _traced(function: Callable[..., Any], tree: Any, leaves: tuple[tuple[Any, Any], ...], split: Split) -> Phase:
    args = jax.tree.unflatten(tree, itertools.starmap(jax.ShapeDtypeStruct, leaves))
    with partition.compiled_for_none():  # as wherever else one plans: kernels of the device at hand are no part of it
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    axes = (*split.axes, *(None,) * (len(leaves) - len(split.axes)))
    return Phase(flops.count_jaxpr(jaxpr), footprint.temporary_bytes_of_jaxpr(jaxpr, axes, split.parts))
