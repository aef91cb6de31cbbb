"""Batch runs whose processes are killed at random moments: nothing is lost, nothing is done twice, no file is torn.

`python benchmarks/kills.py --kills 200 --processes 1 2 4` lets so many processes share runs of a toy model, kills one
of them (SIGKILL) again and again, and starts it anew. After every kill and at the end of every run it looks at the
folder: what was finished is as it was, every file is whole, and in the end the run is that of a process that nobody
killed.
"""

import dataclasses
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import common
import fuzz
import numpy as np
import tyro
from PIL import Image

import ses_jax

SETTINGS = {"budget": 5, "population": 3, "elites": 1, "steps": 2, "preview_steps": 1, "progress": False}
STABLE = ("best.png", "baseline.png", "noise.npy", "history.jsonl")
SECONDS = 300  # for a process to start, or to end
PRELOADED = ["ses_jax.batch.run"]  # whose import takes as long as all the rest


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kills processes of batch runs.

    Attributes:
      kills: for each number of processes.
      processes: that share a run.
      prompts: of a run.
      seed: of the moments.
      spread: seconds within which a process is killed, once it searches.
      sleep: seconds that the reward takes.
      out: folder for the numbers; None is the benchmarks' own.
    """

    kills: int = 200
    processes: tuple[int, ...] = (1, 2, 4)
    prompts: int = 8
    seed: int = 0
    spread: float = 0.5
    sleep: float = 0.02
    out: Path | None = None


def main(args: Arguments) -> dict[str, Any]:
    """Runs the campaigns; raises AssertionError where a kill did harm."""
    with tempfile.TemporaryDirectory() as folder:
        whole = undisturbed(Path(folder), args)
        results = {}
        for count in args.processes:
            start = time.monotonic()
            runs = campaign(count, args, whole)
            results[count] = {"kills": args.kills, "runs": runs, "seconds": time.monotonic() - start}
            print(f"{count} processes: {args.kills} kills in {runs} runs, nothing lost, twice or torn", flush=True)
    common.save("kills", {"prompts": args.prompts, "seed": args.seed, "campaigns": results}, args.out or common.RESULTS)
    return results


def undisturbed(folder: Path, args: Arguments) -> dict[str, bytes]:
    """The files of a run that nobody disturbs."""
    _end(_start(Place(str(folder), 0, 1), args))
    return stable_files(folder)


def campaign(count: int, args: Arguments, whole: Mapping[str, bytes]) -> int:
    """Kills processes of runs that `count` of them share; how many runs that took."""
    rng, kills, runs = random.Random(f"{args.seed}/{count}"), args.kills, 0
    while kills > 0:
        with tempfile.TemporaryDirectory() as folder:
            kills -= disturbed(Path(folder), count, (args, kills, rng))
            check_end(Path(folder), whole)
        runs += 1
    return runs


class Place(NamedTuple):
    """Of a process: the run's folder, its number, how many there are, and whether generations are saved."""

    out: str
    process_id: int
    num_processes: int
    resume: bool = False


class Searcher(NamedTuple):
    """A process, and what is set once it searches."""

    process: BaseProcess
    searching: Any


def disturbed(out: Path, count: int, how: tuple[Arguments, int, random.Random]) -> int:
    """A whole run with at most so many kills; how many there were."""
    args, most, rng = how
    running = {i: _start(Place(str(out), i, count, rng.random() < 0.5), args) for i in range(count)}
    known: dict[str, int] = {}
    kills = 0
    while running:
        chosen = rng.choice(sorted(running))
        one = running[chosen]
        assert one.searching.wait(SECONDS), "a process does not start"
        time.sleep(rng.uniform(0, args.spread))
        if kills < most and one.process.is_alive():
            one.process.kill()
            one.process.join()
            kills += one.process.exitcode < 0
            known = check(out, known)
            running[chosen] = _start(Place(str(out), chosen, count, rng.random() < 0.5), args)
        else:
            _end(running.pop(chosen))
    check(out, known)
    return kills


def _start(place: Place, args: Arguments) -> Searcher:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    searching = context.Event()
    process = context.Process(target=search, args=(place, args, searching))
    process.start()
    return Searcher(process, searching)


def _end(one: Searcher) -> None:
    one.process.join(SECONDS)
    assert one.process.exitcode == 0, f"a process ended with {one.process.exitcode}"


def search(place: Place, args: Arguments, searching: Any) -> None:
    """What a process does: its part of a run."""

    def brightness(images: Any, prompts: Any) -> Any:
        time.sleep(args.sleep)
        return np.asarray(images).mean(axis=(1, 2, 3))

    reward = ses_jax.load_reward(brightness, traceable=False)
    settings = SETTINGS | {"model": fuzz.toy_pipeline(), "reward": reward}
    ses_jax.search("warm", **settings)  # so that the kills do not all fall into the compilation
    searching.set()
    ses_jax.search_many([f"prompt {i}" for i in range(args.prompts)], **place._asdict(), **settings)


def check(out: Path, known: Mapping[str, int]) -> dict[str, int]:
    """What is finished; raises AssertionError where something that was is not, or was done again, or a file is torn."""
    now = finished(out)
    changed = sorted(name for name, when in known.items() if now.get(name) != when)
    assert not changed, f"lost or done again: {', '.join(changed)}"
    for path in out.rglob("*.*"):
        if path.is_file() and ".search" not in path.parts:
            _check_whole(path)
    return now


def _check_whole(path: Path) -> None:
    """Raises AssertionError for a file that is not whole; a journal may end within a line."""
    readers = {".png": _pixels, ".npy": lambda path: np.load(path, allow_pickle=False), ".npz": _arrays}
    readers |= {".json": lambda path: json.loads(path.read_text()), ".html": _page}
    readers |= {".jsonl": lambda path: lines(path, cut=path.name.startswith("results-"))}
    try:
        if not path.name.startswith("."):
            readers[path.suffix](path)
    except Exception as error:
        raise AssertionError(f"{path.relative_to(path.parents[1])} is torn: {error}") from error


def _arrays(path: Path) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        dict(arrays)


def _page(path: Path) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("it does not end")


def check_end(out: Path, whole: Mapping[str, bytes]) -> None:
    """Raises AssertionError unless a finished run is as if nobody had disturbed it."""
    names = sorted({name.split("/")[0] for name in whole})
    assert [row["id"] for row in lines(out / "results.jsonl")] == names, "results.jsonl is not of all prompts"
    assert json.loads((out / "summary.json").read_text())["finished"] == len(names), "the summary is not of all prompts"
    noted = [row["id"] for path in out.glob("results-*.jsonl") for row in lines(path, cut=True)]
    assert len(noted) == len(set(noted)), "a prompt was done twice"
    found = stable_files(out)
    other = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
    assert not other, f"not what an undisturbed run writes: {', '.join(other)}"
    assert not list(out.glob("*/.*.tmp")), "half a file was left"


def finished(out: Path) -> dict[str, int]:
    """When each finished prompt was finished, by its folder."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


def stable_files(out: Path) -> dict[str, bytes]:
    """Content of everything in a run that must not depend on how it was run; of pictures their pixels."""
    found = {str(path.relative_to(out)): path for name in STABLE for path in out.glob(f"*/{name}")}
    return {name: _pixels(path) if path.suffix == ".png" else path.read_bytes() for name, path in found.items()}


def _pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def lines(path: Path, cut: bool = False) -> Sequence[dict[str, Any]]:
    """The rows of a file of JSON lines; `cut` leaves out lines that a kill has cut off."""
    rows = []
    for line in path.read_text(errors="replace" if cut else "strict").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            if not cut:
                raise
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except AssertionError as error:
        sys.exit(f"kills: {error}")
