"""What a command would do, without loading a model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ses_jax.batch.prompts import Row, Source, read_rows
from ses_jax.engine.cases import cases, several
from ses_jax.engine.config import BUDGET, SearchConfig
from ses_jax.engine.settings import fields
from ses_jax.planner.plan import PLANNED, plan
from ses_jax.rewards import spec

MANY = 5


def print_dry_run(prompts: Source, given: Mapping[str, Any], column: str | None = None) -> None:
    """Prints `describe` of a prompt file or of prompts."""
    for line in describe(read_rows(prompts, column), given):
        print(line)


def describe(rows: Sequence[Row], given: Mapping[str, Any]) -> Iterator[str]:
    """Lines on a search of rows with these arguments of `search`.

    Raises:
      ValueError: for bad settings.
    """
    seeds = several(given.get("seed"))
    own = {name: given[name] for name in fields(SearchConfig) if name in given and (name != "seed" or seeds is None)}
    config = SearchConfig(**own)
    if given.get("reward") is not None:
        spec.check(given["reward"])
    usable = [row for row in rows if row.error is None]
    yield f"would search {len(usable)} prompts with {given['model']}; nothing is loaded or written"
    if seeds is not None and usable:
        texts = [row.prompt for row in usable]
        asked = cases(texts[0] if len(texts) == 1 else texts, 0, seeds, config)
        yield f"  with {len(asked)} seeds: {', '.join(str(case.config.seed) for case in asked)}"
    yield from (f"  {row.prompt}" for row in usable[:MANY])
    if len(usable) > MANY:
        yield f"  and {len(usable) - MANY} more"
    yield from (f"row {row.index} cannot be used: {row.error}" for row in rows if row.error is not None)
    yield _candidates(config)
    yield from _planned(given)


def _candidates(config: SearchConfig) -> str:
    if config.nfe is not None:
        return f"a prompt: as many candidates as {config.nfe} network evaluations pay for"
    budget = config.budget or BUDGET
    return f"a prompt: {budget} candidates in {-(-budget // config.population)} generations, and 2 final images"


def _planned(given: Mapping[str, Any]) -> Iterator[str]:
    """What the planner says of memory and time, where the model is one that it knows."""
    wanted = {name: given[name] for name in PLANNED if given.get(name) is not None}
    try:
        planned = plan(given["model"], **wanted)
    except ValueError as error:
        yield f"no plan of memory and time: {error}"
        return
    yield str(planned)
    yield f"for other devices: ses-jax plan {given['model']} --device NAME"
