"""What a search runs with: the pipeline, and the reward with what is reported beside it.

What is named rather than handed over is loaded, and kept for the next call that names the same: only what the latest
call used stays. A caller who wants to decide how long weights live loads them with `load_pipeline` and `load_reward`.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ses_jax.loading import hub, partition
from ses_jax.loading.lora_files import pairs
from ses_jax.pipelines.base import Pipeline
from ses_jax.pipelines.registry import load_pipeline
from ses_jax.rewards import scorers, spec
from ses_jax.rewards.reward import Reward
from ses_jax.rewards.spec import RewardSpec


class Kept:
    """Loaded things by what they were loaded from; those that the latest call did not ask for go."""

    def __init__(self):
        self._things: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def get(self, wanted: Mapping[Hashable, Callable[[], Any]]) -> list[Any]:
        """The things for some keys, loaded by their functions where they are not here; others go before that."""
        with self._lock:
            self._things = {key: thing for key, thing in self._things.items() if key in wanted}
            for key, load in wanted.items():
                if key not in self._things:
                    self._things[key] = load()
            return [self._things[key] for key in wanted]

    def clear(self) -> None:
        """Keeps nothing any more."""
        with self._lock:
            self._things = {}


_PIPELINES, _SCORERS = Kept(), Kept()


def forget() -> None:
    """Lets go of the models that earlier calls loaded."""
    _PIPELINES.clear()
    _SCORERS.clear()


def check_rewards(reward: Any, report: Any) -> RewardSpec | Reward | None:
    """The report as something to load, after both have been checked as far as that goes without loading them."""
    try:
        listed = isinstance(report, Sequence | Set) and not isinstance(report, str)
        for name in report if listed else ():
            spec.check_hashable(name, "report")
        if listed and not all(isinstance(name, Hashable) for name in report):
            raise ValueError(f"report={report!r} must be names or functions")
        report = dict.fromkeys(report, 1.0) if listed else report
        report = None if isinstance(report, Mapping) and not report else report
        if reward is not None:
            spec.check(reward, "reward")
            spec.check_drives(reward)
        if report is not None:
            spec.check(report, "report")
    except (RecursionError, TypeError) as error:  # of values that can't be shown, or not even looked up
        raise ValueError(f"reward and report must be names, functions or mappings of these: {error}") from error
    return report


def load_models(
    model: str | Pipeline,
    reward: RewardSpec | Reward | None,
    report: RewardSpec | Reward | None,
    options: Mapping[str, Any],
) -> tuple[Pipeline, Reward]:
    """The loaded pipeline and the reward with its reported parts, from arguments of `search` that were checked.

    Scorers that are named are quantised as the pipeline is.

    Raises:
      ValueError: for a broken checkpoint, and for options that a pipeline which is loaded already can't have.
    """
    pipeline = find_pipeline(model, **options)
    reward = pipeline.defaults.reward if reward is None else reward
    own = Path(pipeline.folder) / "clip"  # a checkpoint that ships its own scorer is scored by that one
    sources = {"clip": own} if own.exists() else {}
    names = dict.fromkeys(kind for spec in (reward, report) for kind in _kinds(spec))
    quantize = options.get("quantize")
    keys = {kind: (kind, quantize, *_state(sources.get(kind, scorers.KINDS[kind].source))) for kind in names}
    loaded = _SCORERS.get({keys[kind]: _scorer_loader(kind, sources.get(kind), quantize) for kind in names})
    known = dict(zip(names, loaded, strict=True))
    reported = None if report is None else spec.assemble(report, known)
    return pipeline, spec.with_report(spec.assemble(reward, known), reported)


def find_pipeline(model: str | Pipeline, mesh: str | Mesh | None = None, **options: Any) -> Pipeline:
    """The loaded pipeline.

    Raises:
      ValueError: for one on other devices than those asked for, and for options that would have no effect on it.
    """
    if not isinstance(model, Pipeline):
        return _named_pipeline(model, mesh, options)
    if options:
        raise ValueError(f"load={options} has no effect on a loaded pipeline; pass it to load_pipeline")
    if mesh is not None and partition.parse_mesh(mesh) != model.mesh:
        raise ValueError(
            f"the pipeline lies on {model.mesh}, not on mesh {mesh!r}; load it with load_pipeline(mesh=...)"
        )
    return model


def _named_pipeline(source: str, mesh: str | Mesh | None, options: Mapping[str, Any]) -> Pipeline:
    mesh = partition.parse_mesh(mesh)
    added = tuple(_state(adapter) for adapter, _ in pairs(options.get("lora")))
    named = tuple(_state(value) for value in options.values() if isinstance(value, str | Path))
    key = (*_state(source), mesh, repr(sorted(options.items())), added, named)
    return _PIPELINES.get({key: lambda: load_pipeline(source, mesh=mesh, **options)})[0]


def _scorer_loader(kind: str, source: Path | None, quantize: str | None) -> Callable[[], scorers.Scorer]:
    return lambda: scorers.load_scorer(kind, source=source, quantize=quantize)


def _kinds(spec: RewardSpec | Reward | None) -> list[str]:
    """The published scorers that a reward names."""
    if spec is None or isinstance(spec, Reward):
        return []
    return [kind for kind in (spec if isinstance(spec, Mapping) else [spec]) if isinstance(kind, str)]


def _state(source: str | Path) -> tuple[Hashable, ...]:
    """A source with the files of its local folder as they are now: one that is written again is loaded again."""
    folder = Path(hub.DEMO if source == "demo" else source).expanduser()
    # A folder of something else, such as a home, may hold more files than anyone waits for.
    checkpoint = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    below = folder.rglob("*") if checkpoint else folder.glob("*")
    files = sorted(path for path in (folder, *below) if path.is_file())
    return str(source), tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
