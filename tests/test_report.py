"""Pages for people: what they say, that they need nothing else, and that a real browser shows them well."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from browser import LAYOUT, ask, needs_browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ses_jax
from ses_jax.engine import previews
from ses_jax.report import charts, curves, gallery, html

PROMPT = 'a <b>red</b> & "blue" picture </script> \u732b ' + "with many words " * 8
SETTINGS = {"budget": 9, "population": 4, "elites": 2, "preview_steps": 2, "steps": 2, "progress": False}


def darkness(images, prompts):
    return 1 - np.asarray(images).mean(axis=(1, 2, 3))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.data())
def test_the_expected_best_is_the_mean_over_all_draws(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    draws = [max(draw) for draw in itertools.combinations(scores, count)]
    assert curves.expected_best(np.array(scores), [count])[0] == pytest.approx(np.mean(draws), abs=1e-9)


def test_the_expected_best_of_many():
    scores = np.random.default_rng(0).standard_normal(2000)
    found = curves.expected_best(scores, [1, 10, 2000])
    np.testing.assert_allclose(found[[0, 2]], [scores.mean(), scores.max()], rtol=1e-9)
    drawn = [np.random.default_rng(i).choice(scores, 10, replace=False).max() for i in range(2000)]
    assert abs(found[1] - np.mean(drawn)) < 4 * np.std(drawn) / math.sqrt(2000)


def rows(scores, **parts):
    best, found = None, []
    for i, score in enumerate(scores):
        best = score if best is None or (score is not None and score > best) else best
        row = {"index": i, "generation": i // 2, "score": score, "best": best, "low_rms": 1.0 + i / 10}
        found.append(row | ({"components": {name: values[i] for name, values in parts.items()}} if parts else {}))
    return found


def test_curves_of_a_history():
    history = rows([None, 1.0, 3.0, 2.0], a=[0.0, 2.0, 4.0, 6.0])
    assert curves.best_so_far(history) == [(2, 1.0), (3, 3.0), (4, 3.0)]
    assert curves.best_of_n(history) == [pytest.approx(pair) for pair in ((1, 2.0), (2, 8 / 3), (3, 3.0))]
    spread = np.std([0.0, 2.0, 4.0, 6.0])
    assert curves.of_the_best(history, "a") == [pytest.approx((n, x / spread)) for n, x in ((2, 2), (3, 4), (4, 4))]
    assert curves.of_the_best(rows([1.0, 1.0]), None) == []  # no spread, no deviations
    assert curves.drift(history)[0] == (1, 1.0)


@given(st.floats(-1e3, 1e3), st.floats(1e-4, 1e3))
def test_ticks_are_round_and_inside(low, span):
    found = charts.ticks(low, low + span, 4)
    assert 1 <= len(found) <= 11
    slack = 1e-9 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_charts_are_drawings_of_their_lines():
    lines = [charts.Line("a <&", [(1.0, 2.0), (3.0, 4.0)]), charts.Line("one", [(2.0, 3.0)]), charts.Line("none", [])]
    svg = charts.chart(lines, below="n", marks=[2.0], standalone=True)
    root = ElementTree.fromstring(svg.text)
    paths = [element.get("d") for element in root.iter("{http://www.w3.org/2000/svg}path")]
    assert len(paths) == 2
    start, end = (tuple(map(float, pair.split(","))) for pair in paths[0].removeprefix("M").split(" "))
    assert start[0] < end[0]
    assert start[1] > end[1]  # upwards
    assert charts.chart([], below="n").text == ""
    assert svg._repr_svg_() == svg.text


class Loaded(HTMLParser):
    """What a page would fetch, where it leads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        sources = [attrs.get("src"), attrs.get("href") if tag == "link" else None]
        self.fetched += [source for source in sources if source and not source.startswith("data:")]
        self.links += [attrs["href"]] if tag == "a" else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    settings = SETTINGS | {"report": {darkness: 1.0}}
    return ses_jax.search(PROMPT, model=toy.pipeline(), reward=toy.brightness(), out=folder, **settings), folder


def test_a_report_says_what_there_is_and_fetches_nothing(searched):
    result, folder = searched
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Loaded(text)
    assert page.fetched == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    words = " ".join(page.words)
    for said in (PROMPT, f"{result.score:.4f}", f"{result.baseline_final_score:.4f}", "darkness (reported only)"):
        assert said in words
    assert "which did not drive the search, finds the final image worse" in words  # brighter is less dark
    assert "ses-jax search" in words
    assert "ses_jax.search(" in words
    assert text.count("<figure>") == 6 - 1  # best and worst of three generations, the last of one candidate
    assert text.count("data:image/webp") == 2 + 5


def test_films_are_the_best_and_worst_of_generations(searched):
    result, _ = searched
    scores = [row["score"] for row in result.history]
    expected = []
    for generation, start in enumerate((0, 4, 8)):
        part = scores[start : start + 4]
        expected.append((generation, start + int(np.argmax(part)), True))
        if len(part) > 1:
            expected.append((generation, start + int(np.argmin(part)), False))
    assert [(shot.generation, shot.index, shot.best) for shot in result.film] == expected
    for shot in result.film:
        assert np.asarray(shot.image).mean() / 255 == pytest.approx(scores[shot.index], abs=0.003)  # brightness itself
    assert result.grid().size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    ElementTree.fromstring(result.plot().text)
    assert "iframe" in result._repr_html_()


def test_no_report_is_as_if_there_were_none(tmp_path):
    settings = SETTINGS | {"model": toy.pipeline(), "reward": toy.brightness(), "no_report": True}
    result = ses_jax.search("a", out=tmp_path, **settings)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match=r"no previews to show: .* no_report keeps none, and a result that was loaded"):
        result.grid()
    with pytest.raises(ValueError, match="save_candidates needs out="):
        ses_jax.search("a", save_candidates=True, **settings)


def test_candidates_are_kept_with_their_noise(tmp_path):
    """Rewards on the device and on the host; each noise makes its preview and its score again."""
    pipeline = toy.pipeline()
    for reward in (toy.brightness(), lambda images, prompts: np.asarray(images).mean(axis=(1, 2, 3))):
        folder = tmp_path / type(reward).__name__
        result = ses_jax.search("a", model=pipeline, reward=reward, out=folder, save_candidates=True, **SETTINGS)
        names = {f"{i:05d}.{ending}" for i in range(9) for ending in ("png", "npy")}
        assert {path.name for path in (folder / "candidates").iterdir()} == names
        for row in result.history:
            noise = np.load(folder / "candidates" / f"{row['index']:05d}.npy")
            image = np.asarray(ses_jax.generate(pipeline, "a", noise=noise[None], steps=2)[0])
            assert image.mean() == pytest.approx(row["score"], abs=1e-5)
            saved = np.asarray(Image.open(folder / "candidates" / f"{row['index']:05d}.png"))
            np.testing.assert_allclose(saved, image * 255, atol=0.51)


def test_a_function_sees_each_generation_and_may_stop():
    seen = []

    def watch(generation, image, scores):
        seen.append((generation, image, scores))
        return generation == 1

    settings = SETTINGS | {"model": toy.pipeline(), "reward": toy.brightness(), "on_generation": watch}
    results = ses_jax.search(["a", "b"], **settings)
    assert [generation for generation, _, _ in seen] == [0, 1, 0, 1]
    for result, (first, second) in zip(results, (seen[:2], seen[2:]), strict=True):
        scores = [row["score"] for row in result.history]
        assert len(scores) == 8
        assert result.interrupted
        assert [*first[2], *second[2]] == pytest.approx(scores)
        assert np.asarray(second[1]).mean() / 255 == pytest.approx(max(scores), abs=0.003)
        assert result.score == max(scores)


def test_a_search_that_was_stopped_goes_on_with_its_film(tmp_path):
    settings = SETTINGS | {"model": toy.pipeline(), "reward": toy.brightness(), "resume": True}
    whole = ses_jax.search("a", out=tmp_path / "whole", **settings)
    stopped = ses_jax.search(
        "a", out=tmp_path / "out", on_generation=lambda generation, *_: generation == 1, **settings
    )
    assert (len(stopped.history), len(stopped.film)) == (8, 4)
    result = ses_jax.search("a", out=tmp_path / "out", **settings)
    assert result.history == whole.history
    for shot, expected in zip(result.film, whole.film, strict=True):
        assert (shot.generation, shot.index, shot.best) == (expected.generation, expected.index, expected.best)
        np.testing.assert_array_equal(shot.image, expected.image)


OUTCOMES = [
    {"id": f"{i:05d}", "index": i, "prompt": f"{PROMPT} {i}", "folder": f"id {i}#", "score": s, "baseline_score": 1.0}
    for i, s in enumerate((1.5, 3.0, 0.5, None))
] + [{"id": "bad", "index": 4, "prompt": "no <good>", "error": "ValueError: <x>"}]
MEANS = {name: {"mean": 1.0, "standard_error": 0.1} for name in ("baseline", "search", "gain")}
SUMMARY = {
    "prompts": 5,
    "finished": 4,
    "failed": 1,
    "unfinished": 0,
    "components": {},
    "scores": {"preview": MEANS, "final": MEANS},
}


def test_a_gallery_has_failures_first_and_then_the_largest_gains():
    text = gallery.gallery("run", OUTCOMES, SUMMARY, ending="webp")
    assert re.findall(r'data-index="(\d)"', text) == ["4", "1", "0", "3", "2"]
    page = Loaded(text)
    assert {unquote(link) for link in page.links} == {f"id {i}#/report.html" for i in range(4)}
    assert {unquote(source) for source in page.fetched} == {
        f"id {i}#/{name}.webp" for i in range(4) for name in ("best", "baseline")
    }
    words = " ".join(page.words)
    assert "ValueError: <x>" in words
    assert "1.0000 ± 0.1000" in words
    many = [OUTCOMES[i % 4] | {"id": str(i), "index": i} for i in range(1000)]
    assert len(gallery.gallery("run", many, SUMMARY).encode()) < 2e6


def test_text_stays_text():
    assert html.escape("<a href='x'>") == "&lt;a href=&#x27;x&#x27;&gt;"
    assert html.inline(Image.new("RGB", (300, 100)), 50).startswith("data:image/webp;base64,")


SLIDER = """
const slider = document.querySelector(".slider"), found = document.querySelectorAll(".compare img")[1];
const before = getComputedStyle(found).clipPath;
slider.value = 80; slider.dispatchEvent(new Event("input"));
out.push(before + " | " + getComputedStyle(found).clipPath, getComputedStyle(document.body).backgroundColor);
"""
FILTERS = """
const cards = () => [...document.querySelectorAll(".card")].filter(e => !e.hidden).map(e => e.dataset.index).join("");
const set = (id, value, kind) => {
  const e = document.querySelector(id);
  e.value = value; e.dispatchEvent(new Event(kind)); out.push(cards());
};
out.push(cards());
set("#find", "picture", "input"); set("#which", "better", "change"); set("#which", "all", "change");
set("#find", "", "input"); set("#order", "index", "change");
out.push(document.querySelector("#shown").textContent);
"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_a_browser_shows_a_report(searched, tmp_path, width, dark):
    lines = ask(searched[1] / "report.html", LAYOUT + SLIDER, tmp_path, width=width, dark=dark)
    color = "rgb(15, 23, 42)" if dark else "rgb(255, 255, 255)"
    assert lines == ["inset(0px 0px 0px 50%) | inset(0px 0px 0px 80%)", color]


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_filters_and_sorts_a_gallery(tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(gallery.gallery("run", OUTCOMES, SUMMARY), encoding="utf-8")
    for outcome in OUTCOMES[:4]:
        (tmp_path / outcome["folder"]).mkdir()
        for name in ("best", "baseline"):
            Image.new("RGB", (64, 64)).save(tmp_path / outcome["folder"] / f"{name}.png")
    found = ask(page, LAYOUT + FILTERS, tmp_path / "profile", width=width)
    assert found == ["41032", "1032", "10", "1032", "41032", "40123", "5 of 5"]


def test_a_batch_run_has_a_gallery(tmp_path):
    settings = SETTINGS | {"model": toy.pipeline(), "reward": toy.brightness()}
    rows = ["a", {"prompt": "c", "budget": "x"}]
    ses_jax.search_many(rows, out=tmp_path, image_format="webp", **settings)
    ses_jax.search_many([*rows, "b"], out=tmp_path, **settings)
    assert (tmp_path / "00000" / "best.webp").is_file() and (tmp_path / "00002" / "best.png").is_file()  # noqa: PT018
    page = Loaded((tmp_path / "report.html").read_text(encoding="utf-8"))
    for link in [*page.links, *page.fetched]:
        assert (tmp_path / link).is_file()
    assert len(page.links) == 4
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == 1


@pytest.mark.parametrize(("height", "width", "side"), [(7, 9, None), (7, 9, 9), (7, 9, 3), (8, 4, 3), (2, 9, 1)])
def test_small_previews_are_means_of_squares(height, width, side):
    images = np.random.default_rng(0).random((2, height, width, 3)).astype(np.float32)
    small = np.asarray(previews.pixels(jnp.asarray(images), side))
    factor = 1 if side is None else min(math.ceil(max(height, width) / side), height, width)
    assert small.shape == (2, height // factor, width // factor, 3)
    for y, x in itertools.product(range(small.shape[1]), range(small.shape[2])):
        square = images[:, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        np.testing.assert_allclose(small[:, y, x], square.mean(axis=(1, 2)) * 255, atol=0.51)
