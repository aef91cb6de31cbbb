"""What a search is asked to do, and with what; checked before any long work starts."""

import dataclasses
import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jax.sharding import Mesh

from ses_jax.engine import evaluations
from ses_jax.engine.fidelity import Fidelity
from ses_jax.engine.placement import LOAD, MESH, MODEL
from ses_jax.engine.settings import (
    ANY,
    FIDELITY,
    GUIDANCE,
    PICTURE,
    SEARCHER,
    TEXT,
    TRUTH,
    WHOLE,
    Settings,
    described,
    setting,
)
from ses_jax.pipelines.base import Guidance, Pipeline
from ses_jax.pipelines.guidance import forwards
from ses_jax.rewards.reward import Reward
from ses_jax.searchers import wavelet
from ses_jax.searchers.searcher import Searcher, needs_gradient, own_population
from ses_jax.searchers.ses import Ses

SEEDS = 2**64
BUDGET = 50
STEPS = 10_001  # more noise levels than any model was trained on
PIXELS = 65_537
# More words than any family reads.
LONG = "a " * 2000


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderConfig(Settings):
    """Settings of images. None means the model's own default."""

    steps: int | None = setting(None, WHOLE, "denoising steps of the final images", at_least=1, below=STEPS)
    guidance: Guidance | None = setting(
        None, GUIDANCE, "guidance scale in the model's own convention, or a mapping of the model's own options"
    )
    negative_prompt: str | None = setting(None, TEXT, "what to steer away from, where guidance is on")
    height: int | None = setting(None, WHOLE, "of the image, in pixels", at_least=1, below=PIXELS)
    width: int | None = setting(None, WHOLE, "of the image, in pixels", at_least=1, below=PIXELS)
    seed: int = setting(0, WHOLE, "of all random draws, up to 64 bits", at_least=0, below=SEEDS)
    chunk: int | None = setting(
        None, WHOLE, "images made at a time; by default as many as fit on the device", at_least=1
    )

    def with_defaults(self, pipeline: Pipeline) -> Any:
        """This config with the model's defaults filled in."""
        names = [name for name in vars(pipeline.defaults) if name in vars(self) and getattr(self, name) is None]
        return dataclasses.replace(self, **{name: getattr(pipeline.defaults, name) for name in names})


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(RenderConfig):
    """Settings of a search. None means the model's own default."""

    budget: int | None = setting(
        None,
        WHOLE,
        f"how many candidates are scored, the base noise among them; {BUDGET} if nfe is not given either",
        at_least=1,
        reference="ses_eval_budget",
    )
    preview_steps: int | None = setting(
        None,
        WHOLE,
        "denoising steps of a candidate; the default is never more than steps",
        at_least=1,
        below=STEPS,
        reference="ses_inference_steps",
    )
    nfe: int | None = setting(
        None,
        WHOLE,
        "instead of budget, the most network evaluations that previews may take; a step is one of them, two with "
        "classifier-free guidance, and three times as many where its gradient is taken",
        at_least=1,
    )
    fidelity: str | Fidelity = setting(
        "full",
        FIDELITY,
        "how candidates are scored: full, by a preview each; auto; or by cheaper looks after which only the best go "
        'on, as in "half:0.3", "early3:0.5" or "half:0.5>early4:0.5"',
    )
    searcher: str | Mapping[str, Any] | Searcher = setting(
        "ses",
        SEARCHER,
        "what proposes candidates: ses, best-of-n, zero-order, gradient, evosax, or auto for what won on the demo, "
        "with options as in ses,explore=20; or an object of your own",
    )
    population: int = setting(10, WHOLE, "candidates per generation", at_least=1)
    elites: int = setting(5, WHOLE, "how many of the best candidates shape the next generation", at_least=1)
    wavelet: str = setting("db1", TEXT, "name in PyWavelets of the transform that splits off the low band")
    level: int | None = setting(None, WHOLE, "how deep the searched low band lies", at_least=1)
    standardize: bool = setting(
        True,
        TRUTH,
        "whether a mixture's parts are standardised, per prompt over all candidates so far, before they are summed; "
        "otherwise the plain weighted sum drives the search",
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.searcher, Ses) and self.elites >= self.population:
            raise ValueError(f"elites={self.elites} must be at least 1 and less than population={self.population}")
        if self.budget is not None and self.nfe is not None:
            raise ValueError(f"budget={self.budget} and nfe={self.nfe} exclude each other; give one of them")
        if self.needs_gradient and self.fidelity.looks:
            raise ValueError(
                f"fidelity={str(self.fidelity)!r}: this searcher takes the gradients of full previews; "
                'use fidelity="full", or another searcher'
            )

    @property
    def needs_gradient(self) -> bool:
        """Whether the searcher learns from gradients too."""
        return needs_gradient(self.searcher)

    def resolve(self, pipeline: Pipeline, tokens: Any = None) -> "SearchConfig":
        """This config with the model's defaults filled in, checked against the model; nfe becomes a budget.

        Args:
          pipeline: the model.
          tokens: of any prompt, for nfe and looks without guidance; None asks the pipeline's tokenizer.

        Raises:
          ValueError: for sizes, wavelets or levels that the model's latents do not allow, and for an nfe that is not
            enough for one candidate.
        """
        filled = self.with_defaults(pipeline)
        check_size(pipeline, filled.height, filled.width)
        filled.fidelity.check(filled.preview_steps)
        if filled.fidelity.halves:
            _check_half(filled, pipeline)
        if filled.fidelity.unguided:
            _check_guided(filled, pipeline, tokens)
        filled = dataclasses.replace(filled, budget=_budget(filled, pipeline, tokens), nfe=None)
        wavelet.check(self.wavelet, filled.level, pipeline.noise_shape(filled.height, filled.width)[1:])
        return filled

    def with_defaults(self, pipeline: Pipeline) -> "SearchConfig":
        """This config with the model's defaults filled in."""
        filled = super().with_defaults(pipeline)
        preview_steps = self.preview_steps or min(pipeline.defaults.preview_steps, filled.steps)
        population = own_population(self.searcher) or self.population
        return dataclasses.replace(filled, preview_steps=preview_steps, population=population)


def _budget(config: SearchConfig, pipeline: Pipeline, tokens: Any) -> int:
    """How many candidates are scored, or looked at; of what nfe pays for, as many as fit."""
    if config.nfe is None:
        return BUDGET if config.budget is None else config.budget
    if tokens is None:
        # The longest prompts leave the least to gain from half the size; no prompt may take more than nfe.
        text = LONG if config.fidelity.halves else ""
        tokens = pipeline.tokenize([text], guidance=config.guidance, negative_prompt=config.negative_prompt)
    half = functools.partial(evaluations.share_of_half, pipeline, tokens, config.height, config.width)

    @functools.cache
    def share(form):
        whole = half(guided=form.guided) if form.part == 2 else Fraction(1)
        return whole if form.guided else whole / forwards(tokens)

    def taken(budget):
        steps = config.fidelity.evaluations(budget, config.population, config.preview_steps, share)
        return forwards(tokens) * evaluations.of_searcher(config.searcher) * steps

    if config.nfe < taken(1):
        each = f"{float(taken(1)):g}"
        raise ValueError(f"nfe={config.nfe} is less than the {each} network evaluations of one candidate")
    whole = int(config.nfe // taken(config.population)) * config.population
    return next(n for n in range(whole + config.population, 0, -1) if taken(n) <= config.nfe)


def _check_guided(config: SearchConfig, pipeline: Pipeline, tokens: Any) -> None:
    """Raises ValueError unless there is classifier-free guidance to leave out, by the tokens of any prompt."""
    if tokens is None:
        tokens = pipeline.tokenize([""], guidance=config.guidance, negative_prompt=config.negative_prompt)
    if forwards(tokens) == 1:
        raise ValueError(
            f"fidelity={str(config.fidelity)!r}: there is no classifier-free guidance to leave out; leave "
            "unguided- out, or choose a guidance"
        )


def _check_half(config: SearchConfig, pipeline: Pipeline) -> None:
    """Raises ValueError unless the model can make images of half the size, from half the noise."""
    multiple = 2 * pipeline.size_multiple
    for name, value in (("height", config.height), ("width", config.width)):
        if value % multiple:
            below = max(value // multiple, 1) * multiple
            raise ValueError(
                f"fidelity={str(config.fidelity)!r} looks at half the size, so {name}={value} must be a multiple of "
                f"{multiple}; try {below} or {below + multiple}, or looks without half"
            )
    channels, rows, columns = pipeline.noise_shape(config.height, config.width)
    half = tuple(pipeline.noise_shape(config.height // 2, config.width // 2))
    if (channels, rows, columns) != (half[0], 2 * half[1], 2 * half[2]):
        raise ValueError(
            f"fidelity={str(config.fidelity)!r} looks at half the size, but the noise {half} of such images is not "
            f"half of {(channels, rows, columns)}; choose looks without half"
        )


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement(Settings):
    """Where a model lies."""

    mesh: str | Mesh | None = setting(
        None,
        MESH,
        'devices to spread over, such as "data=4,model=2"; by default those of the loaded pipeline, or the default one',
    )
    load: Mapping[str, Any] | None = setting(
        None,
        LOAD,
        'what else load_pipeline takes, such as {"offload_text_encoder": True}; only where the model is a name',
    )


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """What a search runs with, and how."""

    model: str | Pipeline = setting("demo", MODEL, "what load_pipeline takes, or a loaded pipeline")
    reward: Any = setting(
        None,
        ANY,
        "what load_reward takes, or a loaded reward; by default the model's own",
        reference="ses_reward_model",
    )
    report: Any = setting(
        None,
        ANY,
        "rewards, or names of rewards, that score every image without driving the search: where the search's own "
        "reward rises and these fall, the search has fooled it",
    )
    prompts_at_once: int = setting(
        1, WHOLE, "how many prompts are searched in one compiled call; results do not depend on it", at_least=1
    )
    resume: bool = setting(
        False,
        TRUTH,
        "save the search after every generation, and go on from there if an unfinished one is found, or a finished one "
        "with a smaller budget",
    )
    progress: bool = setting(True, TRUTH, "whether progress is shown")
    no_report: bool = setting(False, TRUTH, "leave out report.html, the page that shows what a search did")
    save_candidates: bool = setting(
        False, TRUTH, "keep the preview and the noise of every candidate, in the folder candidates of a result"
    )
    image_format: str = setting("png", PICTURE, "of saved images: png, jpeg or webp")


def check_reward(config: SearchConfig, reward: Reward) -> None:
    """Raises ValueError for gradients of a reward that is not compiled into the search."""
    names = ", ".join(part.name for part in reward.parts if part.on_host)
    if names and config.needs_gradient:
        raise ValueError(
            f"searcher={config.as_json()['searcher']!r} needs the gradients of rewards that JAX can trace, and {names} "
            "is not; leave it out, or choose another searcher"
        )


def check_size(pipeline: Pipeline, height: int, width: int) -> None:
    """Raises ValueError unless the model can make images of this size."""
    for name, value in (("height", height), ("width", width)):
        if value % pipeline.size_multiple:
            below = max(value // pipeline.size_multiple, 1) * pipeline.size_multiple
            raise ValueError(
                f"{name}={value} must be a multiple of {pipeline.size_multiple}; "
                f"try {below} or {below + pipeline.size_multiple}"
            )
