"""What a search is asked to do, and with what; checked before any long work starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from ses_jax.engine.settings import ANY, GUIDANCE, SEARCHER, TEXT, TRUTH, WHOLE, Settings, described, setting
from ses_jax.pipelines.base import Guidance, Pipeline
from ses_jax.pipelines.guidance import forwards
from ses_jax.searchers import wavelet
from ses_jax.searchers.searcher import Searcher

SEEDS = 2**64
BUDGET = 50


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderConfig(Settings):
    """Settings of images. None means the model's own default."""

    steps: int | None = setting(None, WHOLE, "denoising steps of the final images", at_least=1)
    guidance: Guidance | None = setting(
        None, GUIDANCE, "guidance scale in the model's own convention, or a mapping of the model's own options"
    )
    negative_prompt: str | None = setting(None, TEXT, "what to steer away from, where guidance is on")
    height: int | None = setting(None, WHOLE, "of the image, in pixels", at_least=1)
    width: int | None = setting(None, WHOLE, "of the image, in pixels", at_least=1)
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
        reference="ses_inference_steps",
    )
    nfe: int | None = setting(
        None,
        WHOLE,
        "instead of budget, the most network evaluations that previews may take; a step is one of them, and two with "
        "classifier-free guidance",
        at_least=1,
    )
    searcher: str | Mapping[str, Any] | Searcher = setting(
        "ses",
        SEARCHER,
        "what proposes candidates: ses, best-of-n or zero-order, with options as in ses,explore=20, or an object of "
        "your own",
    )
    population: int = setting(10, WHOLE, "candidates per generation", at_least=2)
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
        if self.elites >= self.population:
            raise ValueError(f"elites={self.elites} must be at least 1 and less than population={self.population}")
        if self.budget is not None and self.nfe is not None:
            raise ValueError(f"budget={self.budget} and nfe={self.nfe} exclude each other; give one of them")

    def resolve(self, pipeline: Pipeline, tokens: Any = None) -> "SearchConfig":
        """This config with the model's defaults filled in, checked against the model; nfe becomes a budget.

        Args:
          pipeline: the model.
          tokens: of any prompt, for nfe; None asks the pipeline's tokenizer.

        Raises:
          ValueError: for sizes, wavelets or levels that the model's latents do not allow, and for an nfe that is not
            enough for one candidate.
        """
        filled = self.with_defaults(pipeline)
        filled = dataclasses.replace(filled, budget=_budget(filled, pipeline, tokens), nfe=None)
        check_size(pipeline, filled.height, filled.width)
        wavelet.check(self.wavelet, filled.level, pipeline.noise_shape(filled.height, filled.width)[1:])
        return filled

    def with_defaults(self, pipeline: Pipeline) -> "SearchConfig":
        """This config with the model's defaults filled in."""
        filled = super().with_defaults(pipeline)
        preview_steps = self.preview_steps or min(pipeline.defaults.preview_steps, filled.steps)
        return dataclasses.replace(filled, preview_steps=preview_steps)


def _budget(config: SearchConfig, pipeline: Pipeline, tokens: Any) -> int:
    """How many candidates are scored; of what nfe pays for, as many as fit."""
    if config.nfe is None:
        return BUDGET if config.budget is None else config.budget
    if tokens is None:
        tokens = pipeline.tokenize([""], guidance=config.guidance, negative_prompt=config.negative_prompt)
    each = config.preview_steps * forwards(tokens)
    if config.nfe < each:
        raise ValueError(f"nfe={config.nfe} is less than the {each} network evaluations of one candidate")
    return config.nfe // each


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement(Settings):
    """Where a model lies."""

    mesh: str | Mesh | None = setting(
        None,
        ANY,
        'devices to spread over, such as "data=4,model=2"; by default those of the loaded pipeline, or the default one',
    )
    load: Mapping[str, Any] | None = setting(
        None,
        ANY,
        'what else load_pipeline takes, such as {"offload_text_encoder": True}; only where the model is a name',
    )


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """What a search runs with, and how."""

    model: str | Pipeline = setting("demo", ANY, "what load_pipeline takes, or a loaded pipeline")
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
        False, TRUTH, "save the search after every generation, and go on from there if an unfinished one is found"
    )
    progress: bool = setting(True, TRUTH, "whether progress is shown")


def check_size(pipeline: Pipeline, height: int, width: int) -> None:
    """Raises ValueError unless the model can make images of this size."""
    for name, value in (("height", height), ("width", width)):
        if value % pipeline.size_multiple:
            below = max(value // pipeline.size_multiple, 1) * pipeline.size_multiple
            raise ValueError(
                f"{name}={value} must be a multiple of {pipeline.size_multiple}; "
                f"try {below} or {below + pipeline.size_multiple}"
            )
