"""The folder of a batch run: what it was asked to do, what is done, and what came of it.

    RUN/run.json            settings; written once, before the first prompt
    RUN/prompts.jsonl       the rows as they were read
    RUN/ID/                 a finished prompt, as `SearchResult.save` writes it: finished is what has a `result.json`
    RUN/results-P.jsonl     what process P noted down: a line a prompt, appended; the only place of errors
    RUN/results.jsonl       the merged results, a line a prompt in the order of the file
    RUN/summary.json        means over prompts
    RUN/report.html         the same for people, with a card a prompt

A process may die at any moment and any number of them may share the folder. Whatever is read again appears whole or not
at all, and what is merged follows from the rest, so that merging twice, or by two processes at once, changes nothing.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ses_jax.batch.prompts import Row
from ses_jax.engine.config import BUDGET
from ses_jax.engine.files import brief, naming, writable_folder, write
from ses_jax.engine.result import SearchResult
from ses_jax.engine.saved import SCORES, picture, read_json, read_summary
from ses_jax.report import gallery

Outcome = dict[str, Any]
NEEDED = (*SCORES, "components", "scored", "timings", "interrupted", "config")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
      folder: of the run.
      rows: of its prompt file.
      process: number of this process.
      report: whether pages for people are written.
      image_format: of pictures.
      budget: that results must have had at least; None where that of a run cannot grow.
    """

    folder: Path
    rows: Sequence[Row]
    process: int = 0
    report: bool = True
    image_format: str = "png"
    budget: int | None = None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError where the folder holds something else than the beginning of this very run.

        Where the run has a budget that results must have had, the one that it began with may be smaller.
        """
        writable_folder(self.folder)
        present = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        if not (self.folder / "run.json").exists():
            if set(present) - {"prompts.jsonl"} and not (self.folder / "run.json").exists():
                raise ValueError(f"{self.folder} is not empty and no run.json tells of a run; choose another folder")
            return
        saved = self._saved_settings()
        for name, value in _plain(settings).items():
            if saved.get(name, value) != value and not (name == "budget" and self._grows(saved)):
                larger = " go on with a larger budget and resume=True (--resume)," if name == "budget" else ""
                before, now = brief(repr(saved[name])), brief(repr(value))
                raise ValueError(
                    f"{self.folder} was started with {name}={before}, now {name}={now}; "
                    f"continue with the same setting,{larger} or choose another folder"
                )
        self._check_rows()

    def _grows(self, saved: Mapping[str, Any]) -> bool:
        """Whether the run was begun with a smaller budget."""
        before = BUDGET if saved["budget"] is None else saved["budget"]
        return (
            self.budget is not None and saved.get("nfe") is None and isinstance(before, int) and before <= self.budget
        )

    def _saved_settings(self) -> Mapping[str, Any]:
        """What `run.json` tells."""
        file = self.folder / "run.json"
        try:
            saved = read_json(file).get("settings")
            if not isinstance(saved, dict):
                raise ValueError(f"{file} is damaged: it has no settings")
        except ValueError as error:
            raise ValueError(f"{error}; restore it, or choose another folder") from None
        return saved

    def _check_rows(self) -> None:
        file = self.folder / "prompts.jsonl"
        try:
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged or gone: {error}; restore it, or choose another folder") from None
        for row, line in zip(self.rows, lines, strict=False):
            if _row_line(row) != line:
                raise ValueError(
                    f"{self.folder} was started with other prompts: row {row.index} was {line}, now {_row_line(row)}; "
                    f"rows may only be added at the end; choose another folder"
                )
        if len(lines) > len(self.rows):
            raise ValueError(
                f"{self.folder} was started with {len(lines)} prompts, now {len(self.rows)}; choose another folder"
            )

    def start(self, settings: Mapping[str, Any]) -> None:
        """Notes down rows and settings, which are new only where the budget grew; `run.json` comes last."""
        _write_text(self.folder / "prompts.jsonl", "".join(_row_line(row) + "\n" for row in self.rows))
        file, budget = self.folder / "run.json", settings.get("budget")
        if not file.exists() or self._saved_settings().get("budget", budget) != budget:
            text = json.dumps({"settings": _plain(settings)}, indent=2, ensure_ascii=False) + "\n"
            _write_text(file, text)

    def finished(self, row: Row) -> Mapping[str, Any] | None:
        """The `result.json` of a row that needs no more work."""
        try:
            found = read_summary(self.folder / row.folder / "result.json", only=NEEDED)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return None  # not there, or damaged: it is made again
        return None if found["interrupted"] or self._lacks(row, found["config"]) else found

    def _lacks(self, row: Row, config: Mapping[str, Any]) -> bool:
        """Whether a row's result had a smaller budget than the run has now; a budget of the row's own never grows."""
        had = config.get("budget")
        own = row.overrides.keys() & {"budget", "nfe"}
        return bool(self.budget and not own and isinstance(had, int) and had < self.budget)

    def obstacle(self, row: Row) -> str | None:
        """Why the row's results could not be saved, as far as that is plain now."""
        path = self.folder / row.folder
        return f"{path} is a file, and this row's folder has that name; remove it" if path.is_file() else None

    def save(self, row: Row, result: SearchResult) -> Outcome:
        """Saves a result, and what an earlier process left half written goes."""
        folder = self.folder / row.folder
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        result.save(folder, image_format=self.image_format, report=self.report)
        return self._note(_success(row, result.summary()))

    def fail(self, row: Row, error: str, **details: Any) -> Outcome:
        """Notes down what went wrong with a row."""
        return self._note(_base(row) | {"error": error} | details)

    def _note(self, outcome: Outcome) -> Outcome:
        path = self.folder / f"results-{self.process}.jsonl"
        line = _line(outcome)
        with naming(path), path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read() == b"\n" else "\n" + line  # a killed process ended in the middle of a line
            file.write(line.encode())
        return outcome

    def outcomes(self) -> list[Outcome | None]:
        """What is known of each row: its result, else its error, else None."""
        errors = self._errors()
        found = ((row, self.finished(row)) for row in self.rows)
        return [_failure(row, errors) if summary is None else _success(row, summary) for row, summary in found]

    def _errors(self) -> dict[str, Outcome]:
        noted = {}
        for path in sorted(self.folder.glob("results-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                outcome = _json_or_none(line)
                if isinstance(outcome, dict) and isinstance(outcome.get("error"), str):
                    noted[str(outcome.get("id"))] = outcome
        return noted

    def merge(self) -> dict[str, Any]:
        """Writes `results.jsonl` and `summary.json` if every row has an outcome.

        Returns:
          The summary, of what is there so far.
        """
        written = None
        while True:
            outcomes = self.outcomes()
            text = "".join(map(_line, outcomes))
            # Another process may finish between the reading and the writing: what is written must be what is there.
            if None in outcomes or text == written:
                return summarize(outcomes)
            _write_text(self.folder / "results.jsonl", text)
            summary = json.dumps(summarize(outcomes), indent=2, ensure_ascii=False) + "\n"
            _write_text(self.folder / "summary.json", summary)
            if self.report:
                page = gallery.gallery(self.folder.name, self._with_endings(outcomes), json.loads(summary))
                _write_text(self.folder / "report.html", page)
            written = text

    def _with_endings(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Outcomes with the ending of their pictures, which may be another after a restart."""
        folders = [self.folder / outcome.get("folder", "") for outcome in outcomes]
        endings = [picture(folder, "best").suffix.removeprefix(".") for folder in folders]
        return [outcome | {"ending": ending} for outcome, ending in zip(outcomes, endings, strict=True)]


def summarize(outcomes: Sequence[Outcome | None]) -> dict[str, Any]:
    """Counts, and means over prompts with their standard errors.

    Args:
      outcomes: of every row; None for one that is not finished.

    Returns:
      Counts `prompts`, `finished`, `failed`, `unfinished`; `scores` and, where the reward has several parts,
      `components` by part: for "preview" and "final" the `baseline` (unsearched), the `search` and its `gain`, each
      with `mean` and `standard_error`; `seconds` of all prompts, one process after the other, and
      `images_per_second` of a process while it searches.
    """
    done = [outcome for outcome in outcomes if outcome and "error" not in outcome]
    failed = sum(outcome is not None and "error" in outcome for outcome in outcomes)
    searching = sum(outcome["search_seconds"] for outcome in done)
    # Of rows that were continued those since then, as the seconds are.
    images = sum(outcome["images_per_second"] * outcome["search_seconds"] for outcome in done)
    parts = list(dict.fromkeys(name for outcome in done for name in outcome["components"]))
    return {
        "prompts": len(outcomes),
        "finished": len(done),
        "failed": failed,
        "unfinished": len(outcomes) - len(done) - failed,
        "scores": _means(done),
        "components": {
            name: _means([outcome["components"][name] for outcome in done if name in outcome["components"]])
            for name in parts
        },
        "seconds": sum(outcome["seconds"] for outcome in done),
        "images_per_second": images / searching if searching else None,
    }


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Means of scores before, after and of the gain, of previews and of final images."""
    kinds = {"preview": ("baseline_score", "score"), "final": ("baseline_final_score", "final_score")}
    found = {}
    for kind, names in kinds.items():
        pairs = np.array([[row[name] for name in names] for row in scores], np.float64).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        columns = {"baseline": pairs[:, 0], "search": pairs[:, 1], "gain": pairs[:, 1] - pairs[:, 0]}
        found[kind] = {name: _mean(column) for name, column in columns.items()}
    return found


def _mean(values: np.ndarray) -> dict[str, float | None]:
    return {
        "mean": float(values.mean()) if len(values) else None,
        "standard_error": float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
    }


def _base(row: Row) -> Outcome:
    return {"id": row.id, "index": row.index, "prompt": row.prompt, "metadata": dict(row.metadata)}


def _failure(row: Row, noted: Mapping[str, Outcome]) -> Outcome | None:
    """A line of results from a row and what was noted of its error, if there was one."""
    outcome = noted.get(row.id)
    return outcome and _base(row) | {name: outcome[name] for name in ("error", "traceback") if name in outcome}


def _success(row: Row, summary: Mapping[str, Any]) -> Outcome:
    """A line of results from a row and its `SearchResult.summary()`."""
    timings = summary["timings"]
    # Prompts that were searched at once share their seconds, and each has its part of them.
    searching = summary["cost"]["search"]["seconds"]
    share = searching / timings["search"]
    return _base(row) | {
        "folder": row.folder,
        **{name: summary[name] for name in SCORES},
        "components": summary["components"],
        "scored": summary["scored"],
        "search_seconds": searching,
        "images_per_second": timings["images_per_second"],
        "seconds": share * (timings["encode"] + timings["search"] + timings["render"]),
    }


def _row_line(row: Row) -> str:
    return _line(row.as_json()).rstrip("\n")


def _line(value: Any) -> str:
    """A line of JSON; of a user's own objects, their text."""
    line = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character: escaped, it is still JSON
        line = json.dumps(value, default=str) + "\n"
    return line


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are after a way through JSON."""
    return json.loads(_line(settings))


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _write_text(path: Path, text: str) -> None:
    def writer(temporary: Path) -> Any:
        return temporary.write_text(text, encoding="utf-8")

    write(path, writer)
