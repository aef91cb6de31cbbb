"""Bad input, by the thousand: whatever is wrong, it is named, in a second and without a traceback.

`python benchmarks/fuzz.py --cases 10000 --seed 1` makes cases of the areas below, each a small harmful change of
something that works, and runs it up to where long work would begin. A case is fine if it works, or ends in an error
(ValueError, TypeError, OSError) that the project raises on purpose; from the shell in a status other than 0 and one
line. Another exception, one from within a library, more than 60 s or 2 GB are failures. Equal failures are shown once,
with the number of a case, and `--only AREA:NUMBER` runs that one again with its traceback.
"""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import fuzz_files
import fuzz_values
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

import ses_jax
from ses_jax import cli
from ses_jax.batch import run as batch
from ses_jax.convert import autoencoder_kl, clip, decoder_lm, dialects, files, pickles, score_head, z_image
from ses_jax.convert.matching import path_of
from ses_jax.engine import kept, repeat, resume
from ses_jax.engine import search as engine
from ses_jax.engine.config import Placement, RunConfig, SearchConfig
from ses_jax.engine.cost import Cost, Spent
from ses_jax.engine.program import Scored, State
from ses_jax.engine.result import SearchResult
from ses_jax.engine.settings import fields, shown
from ses_jax.engine.watching import Shot
from ses_jax.loading import adapters, hub, network
from ses_jax.loading.configs import read_config
from ses_jax.loading.lora_files import open_adapters
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.pipelines.base import Defaults, Pipeline, in_chat_template

SECONDS, BYTES = 60, 2 << 30
FINE = (ValueError, TypeError, OSError)
NETWORKS = {
    "vae": autoencoder_kl.COMPONENT,
    "clip": clip.COMPONENT,
    "transformer": z_image.COMPONENT,
    "text_encoder": decoder_lm.component(-2),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Makes and runs cases.

    Attributes:
      cases: how many, over all areas.
      seed: of the first case.
      areas: which ones; all of them by default.
      only: a single case, as AREA:NUMBER.
      out: folder for the numbers; None is the benchmarks' own.
    """

    cases: int = 1000
    seed: int = 0
    areas: tuple[str, ...] = ()
    only: str | None = None
    out: Path | None = None


class StartedError(Exception):
    """Long work would begin here, so the case was no bad input."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Something that is wrong with how a case ended; equal for cases that ended alike.

    Attributes:
      area: of the case.
      what: the exception and where it was raised, or the rule that was broken.
    """

    area: str
    what: str


def main(args: Arguments) -> dict[str, Any]:
    """Runs the cases; raises AssertionError if there was a failure."""
    if args.only:
        area, number = args.only.split(":")
        with tempfile.TemporaryDirectory() as folder, prepared():
            AREAS[area](random.Random(f"{area}:{number}"), _empty(folder))
        return {}
    chosen = args.areas or tuple(AREAS)
    numbers = [(chosen[i % len(chosen)], args.seed + i // len(chosen)) for i in range(args.cases)]
    start = time.monotonic()
    failures = run(numbers)
    for failure, where in failures.items():
        print(f"{failure.area}: {failure.what}\n    {len(where)} cases, such as --only {failure.area}:{where[0]}")
    seconds = time.monotonic() - start
    print(f"{args.cases} cases of {len(chosen)} areas in {seconds:.0f} s: {len(failures)} distinct failures")
    result = {"cases": args.cases, "seed": args.seed, "areas": list(chosen), "seconds": seconds}
    common.save("fuzz", result | {"failures": len(failures)}, args.out or common.RESULTS)
    assert not failures, f"{len(failures)} distinct failures"
    return result


def run(numbers: list[tuple[str, int]]) -> dict[Failure, list[int]]:
    """Runs cases; the failures with the numbers of their cases."""
    failures: dict[Failure, list[int]] = {}
    with prepared():
        for area, number in numbers:
            failure = outcome(area, number)
            if failure is not None:
                failures.setdefault(failure, []).append(number)
    return failures


def outcome(area: str, number: int) -> Failure | None:
    """Runs one case; what is wrong with how it ended."""
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            AREAS[area](random.Random(f"{area}:{number}"), _empty(folder))
        except FINE as error:
            text = str(error)
            if not text.strip() or len(text) > 10_000 or not _on_purpose(error):
                what = f"{type(error).__name__} in {_place(error)}: {text[:100]!r}"
        except StartedError:
            pass
        except Exception as error:
            what = f"{type(error).__name__} in {_place(error)}: {str(error)[:100]}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if time.monotonic() - start > SECONDS:
        what = f"more than {SECONDS} s"
    if grown > BYTES:
        what = f"more than {BYTES >> 30} GiB"
    return what and Failure(area, what.replace(folder, "FOLDER"))


def _empty(folder: str) -> Path:
    path = Path(folder) / "case"
    path.mkdir()
    return path


def _on_purpose(error: Exception) -> bool:
    """Whether the project raised an error itself, or it names its file; the tests check annotations as well."""
    if type(error).__name__ == "TypeCheckError":
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = "site-packages" not in last.filename and "/lib/python" not in last.filename
    return (own and "raise" in (last.line or "")) or (isinstance(error, OSError) and error.filename is not None)


def _place(error: Exception) -> str:
    """The last place of the project that an exception came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "fuzz" not in f.filename]
    own = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    return " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own[-2:] or frames[-1:]))


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Within it no search begins and nothing is downloaded."""

    def started(*_: Any, **__: Any) -> Any:
        raise StartedError

    with contextlib.ExitStack() as patches:
        for module, name in ((engine, "search_prompts"), (engine, "encode"), (batch, "search_prompts")):
            patches.enter_context(mock.patch.object(module, name, started))
        patches.enter_context(mock.patch.object(hub, "_snapshot", side_effect=OSError("no network here")))
        yield


# --- areas: `(random, empty folder)`, raising what the case ends with


def settings(rng: random.Random, folder: Path) -> None:
    """Calls of `search` and `generate` with one or two values of another kind."""
    known = [*fields(RunConfig, SearchConfig, Placement), "prompt", "out", "overwrite", "nonsense"]
    given = {"model": toy_pipeline(), "reward": brightness, "progress": False, "prompt": "a red circle"}
    given |= {name: fuzz_values.value(rng) for name in rng.sample(known, rng.choice((1, 1, 2)))}
    if isinstance(given.get("out"), str) and given["out"]:
        given["out"] = str(folder / given["out"].lstrip("/"))
    if given.get("out") == "" or isinstance(given.get("mesh"), str | int):
        given.pop("model")
    if rng.random() < 0.2:
        kept = {
            name: value for name, value in given.items() if name in ("seed", "steps", "guidance", "height", "width")
        }
        ses_jax.generate(given.get("model", toy_pipeline()), given["prompt"], noise=fuzz_values.value(rng), **kept)
    else:
        with contextlib.chdir(folder):
            ses_jax.search(given.pop("prompt"), **given)


def shell(rng: random.Random, folder: Path) -> None:
    """Command lines; ends in AssertionError unless it is a status, and one line where that is 2."""
    names = [
        name.replace("_", "-") for name in fields(RunConfig, SearchConfig, Placement) if name not in ("load", "model")
    ]
    arguments = [rng.choice(("search", "search", "generate", "plan", "batch", "convert", "models", "nonsense"))]
    arguments += [fuzz_values.text(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    for name in rng.sample([*names, "option", "out", "tokens", "device"], rng.choice((1, 2))):
        value = fuzz_values.text(rng) if rng.random() < 0.5 else shown(fuzz_values.value(rng))
        arguments += [f"--{name}", value]
    out, error = io.StringIO(), io.StringIO()
    parsers_own = None
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = cli.main([argument.replace("\0", "") for argument in arguments])
        except SystemExit as left:  # with its box of help
            parsers_own = left.code
    said = error.getvalue()
    assert "Traceback" not in said, "a traceback"
    if parsers_own is not None:
        assert parsers_own in (0, 2), f"status {parsers_own}"
        return
    assert status in (0, 1) or said.count("\n") == 1, f"{said.count(chr(10))} lines"
    assert status in (0, 1) or len(said) > len("ses-jax: \n"), "an empty line"


def prompts(rng: random.Random, folder: Path) -> None:
    """Prompt files, read and noted down; a bad row must not take the others with it."""
    kind = rng.choice((".txt", ".csv", ".tsv", ".json", ".jsonl"))
    path = folder / f"prompts{kind}"
    path.write_bytes(fuzz_values.damaged_bytes(rng, fuzz_values.prompt_file(rng, kind)))
    with contextlib.suppress(StartedError):
        ses_jax.search_many(path, out=folder / "run", model=toy_pipeline(), reward=brightness, progress=False)
    ses_jax.search_many(path, out=folder / "run", model=toy_pipeline(), reward=brightness, progress=False)


def safetensors(rng: random.Random, folder: Path) -> None:
    """Damaged weights of a small network, in one file or in shards."""
    network.export(folder, score_head.COMPONENT, {"input_size": 4}, _head())
    file = next(folder.glob("*.safetensors"))
    if rng.random() < 0.3:
        index = {"weight_map": dict.fromkeys(("layers.0.weight", "layers.0.bias", "layers.2.weight"), file.name)}
        text = json.dumps(fuzz_values.damaged_json(rng, index))
        (folder / f"{score_head.COMPONENT.stem}{files.INDEX}").write_text(text)
        file.rename(folder / "shard.safetensors") if rng.random() < 0.5 else None
    else:
        file.write_bytes(fuzz_values.damaged_bytes(rng, file.read_bytes()))
    network.load(folder, score_head.COMPONENT)


def configs(rng: random.Random, folder: Path) -> None:
    """Changed configs of the demo's networks, its scheduler and its own settings."""
    name = rng.choice((*NETWORKS, "pipeline"))
    if name != "pipeline":
        _write_json(rng, hub.DEMO / name / "config.json", folder / "config.json")
        read_config(folder / "config.json", NETWORKS[name])
        return
    small = ("scheduler/scheduler_config.json", "model_index.json", "ses_jax.json")
    _link_demo(folder / "model")
    changed = folder / "model" / rng.choice(small)
    changed.unlink()
    _write_json(rng, hub.DEMO / changed.relative_to(folder / "model"), changed)
    pipeline = ses_jax.load_pipeline(str(folder / "model"))
    SearchConfig().resolve(pipeline)


def tokenizers(rng: random.Random, folder: Path) -> None:
    """Changed tokenizers and chat templates of the demo."""
    shutil.copytree(hub.DEMO / "tokenizer", folder / "tokenizer")
    name = rng.choice(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    file = folder / "tokenizer" / name
    if name.endswith("json") and rng.random() < 0.7:
        _write_json(rng, file, file)
    elif name.endswith("jinja") and rng.random() < 0.7:
        file.write_text(rng.choice(fuzz_values.TEMPLATES))
    else:
        file.write_bytes(fuzz_values.damaged_bytes(rng, file.read_bytes()))
    tokenizer = load_tokenizer(folder / "tokenizer")
    text = in_chat_template(tokenizer, [{"role": "user", "content": "a red circle"}], add_generation_prompt=True)
    assert len(tokenizer([text])["input_ids"]) == 1, "another number of texts"


def pickled(rng: random.Random, folder: Path) -> None:
    """Damaged files of torch, by our own reader."""
    file = folder / "weights.pt"
    program = fuzz_values.damaged_bytes(rng, fuzz_values.PICKLE, text=False)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", program)
        archive.writestr("weights/data/0", bytes(48 * rng.choice((0, 1, 1, 1))))
    if rng.random() < 0.3:
        file.write_bytes(fuzz_values.damaged_bytes(rng, file.read_bytes(), text=False))
    weights = pickles._open(file)
    for name, header in weights.headers.items():
        assert weights.read(name).shape == header.shape


def quantised(rng: random.Random, folder: Path) -> None:
    """Quantised files, safetensors and GGUF, with all that stands beside a weight."""
    if rng.random() < 0.3:
        file = fuzz_files.gguf(rng, folder / "it.gguf")
    else:
        file = fuzz_files.quantised(rng, folder / "it.safetensors")
    weights = dialects.without_prefix(dialects.open_file(file))
    for name, header in weights.headers.items():
        values = weights.read(name)
        assert values.shape == header.shape, "another shape"
        if values.ndim and weights.read_part is not None:
            part = weights.read_part(name, (slice(1, 3),))
            np.testing.assert_array_equal(part, values[1:3])


def loras(rng: random.Random, folder: Path) -> None:
    """Adapters for the demo's transformer."""
    file = fuzz_files.adapter(rng, folder / "it.safetensors")
    component, json_ = NETWORKS["transformer"], files.read_json(hub.DEMO / "transformer" / "config.json")
    edits = adapters.plan_edits(open_adapters({file: 0.5}), {"transformer": (component, json_)})["transformer"]
    abstract = component.abstract(component.from_json(json_))
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    for (path, index), edit in edits.items():
        piece = np.zeros(shapes[path] if index is None else shapes[path][1:], np.float32)
        assert edit(piece).shape == piece.shape, "another shape"


def runs(rng: random.Random, folder: Path) -> None:
    """Damaged folders of batch runs and results."""
    with contextlib.suppress(StartedError):
        ses_jax.search_many(["one", "two", ""], out=folder, model=toy_pipeline(), reward=brightness, progress=False)
    for name in ("00000", "00001"):
        _result().save(folder / name)
    _damage_some(rng, folder)
    with contextlib.suppress(*FINE):
        SearchResult.load(folder / "00000")
    for path in (folder / "00001", folder / "00001" / "best.png"):
        with contextlib.suppress(*FINE):
            about = repeat.read(path)
            repeat.parameters(about)
            repeat.command(about["prompt"], about["config"])
    ses_jax.search_many(["one", "two", ""], out=folder, model=toy_pipeline(), reward=brightness, progress=False)


def states(rng: random.Random, folder: Path) -> None:
    """Damaged states of unfinished and of finished searches: each is read, or the search begins anew."""
    state = State(np.zeros((1, 3), np.float32), np.zeros((1,), np.int32), None)
    scored = Scored(np.zeros((1, 4, 1), np.float32), np.zeros((1, 4), np.float32))
    resume.begin(folder / "s", {"prompts": ["a"]})
    resume.save(folder / "s", 1, state, [scored])
    resume.save_films(folder / "s", [[Shot(0, 1, True, Image.new("RGB", (4, 4)))]])
    _damage_some(rng, folder / "s")
    resume.begin(folder / "s", {"prompts": ["a"]})
    done, found, _ = resume.load(folder / "s", state)
    assert done in (0, 1), done
    assert len(resume.load_films(folder / "s", 1, 4)) == 1, "films of other prompts"
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, state), "another state"
    resume.save(folder / "s", done + 1, state, [scored])
    identity, film = {"budget": 8, "prompts": ["a"]}, [[Shot(0, 1, True, Image.new("RGB", (4, 4)))]]
    kept.save(folder / "k", identity, kept.Kept(1, jax.tree.leaves(state), scored, film))
    _damage_some(rng, folder / "k")
    done, found, _, films = kept.begin(None, kept.load([folder / "k"], [identity]), state)
    assert (done in (0, 1), len(films)) == (True, 1), (done, films)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, state), "another state"


AREAS: dict[str, Callable[[random.Random, Path], None]] = {
    "settings": settings,
    "shell": shell,
    "prompts": prompts,
    "safetensors": safetensors,
    "configs": configs,
    "tokenizers": tokenizers,
    "pickles": pickled,
    "quantised": quantised,
    "adapters": loras,
    "runs": runs,
    "states": states,
}


# --- what the areas change


def _damage_some(rng: random.Random, folder: Path) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        present = [path for path in folder.rglob("*") if path.is_file()]
        if present:
            fuzz_values.damage(rng, rng.choice(present))


def brightness(images: Any, prompts: Any) -> Any:
    """A reward."""
    return images.mean(axis=(1, 2, 3))


def toy_pipeline() -> Pipeline:
    """A pipeline without networks."""
    return Pipeline(
        family="Toy",
        folder=Path("toy"),
        params={"gain": jnp.float32(1.0)},
        defaults=Defaults(height=16, width=16, steps=4, level=2, reward="clip"),
        size_multiple=4,
        tokenize=lambda prompts, **_: np.zeros((len(prompts), 1), np.float32),
        encode=lambda params, tokens: tokens,
        velocity=lambda params, latents, sigma, condition: latents,
        decode=lambda params, latents: jnp.moveaxis(latents, 1, -1),
        sigmas=lambda steps, height, width: np.linspace(1, 0, steps + 1, dtype=np.float32),
        noise_shape=lambda height, width: (3, height, width),
    )


def _result() -> SearchResult:
    image, spent = Image.new("RGB", (4, 4)), Spent(1, 1, None, 1.0)
    row = {"index": 0, "generation": 0, "score": 1.0, "best": 1.0, "low_rms": 1.0}
    timings = {"encode": 1.0, "search": 1.0, "render": 1.0, "images_per_second": 1.0}
    noise = np.zeros((3, 4, 4), np.float32)
    scores = (1.0, 1.0, image, 1.0, math.nan)
    config = SearchConfig(height=4, width=4).as_json() | {"model": "demo", "reward": "clip", "rewards": {"clip": 1.0}}
    return SearchResult("one", image, noise, *scores, {}, [row], config, Cost(spent, spent), timings)


def _head() -> Any:
    abstract = score_head.COMPONENT.abstract(score_head.COMPONENT.from_json({"input_size": 4}))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)


def _link_demo(folder: Path) -> None:
    for path in hub.DEMO.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(hub.DEMO)).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, folder / path.relative_to(hub.DEMO))


def _write_json(rng: random.Random, source: Path, target: Path) -> None:
    content = copy.deepcopy(json.loads(source.read_text()))
    target.write_text(json.dumps(fuzz_values.damaged_json(rng, content)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except AssertionError as error:
        sys.exit(f"fuzz: {error}")
