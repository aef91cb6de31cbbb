"""The documentation: it builds strictly, its links lead somewhere, its code compiles, its commands are understood."""

import ast
import contextlib
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tyro

import ses_jax
from ses_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """What a built page refers to: links, what it loads to show itself, and its own anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag in ("img", "script", "iframe") and "src" in attrs:
            self.loaded.append(attrs["src"])
        elif tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site, and its pages by path."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder, {path: Page(path) for path in folder.rglob("*.html")}


def test_links_and_pictures_of_the_site_lead_somewhere(site):
    folder, pages = site
    assert len(pages) > 10
    for path, page in pages.items():
        for reference in page.links + page.loaded:
            url = urlsplit(reference)
            if url.scheme or url.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(folder)}: {reference}"
            if url.fragment and target in pages and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[target].anchors, f"{path.relative_to(folder)}: {reference}"


def test_the_site_loads_nothing_from_elsewhere(site):
    _, pages = site
    assert {url for page in pages.values() for url in page.loaded if urlsplit(url).netloc} == set()


def test_every_public_name_and_argument_is_in_the_reference(site):
    folder, pages = site
    text = (folder / "api.html").read_text(encoding="utf-8")
    for name in ses_jax.__all__:
        assert f"ses_jax.{name}" in pages[folder / "api.html"].anchors
    for name in inspect.signature(ses_jax.search).parameters:
        assert f"<code>{name}</code>" in text


def test_every_setting_is_in_the_table(site):
    text = (site[0] / "searching.html").read_text(encoding="utf-8")
    for name in list(inspect.signature(ses_jax.search).parameters)[1:]:
        assert f"<td><code>{name}</code></td>" in text


def test_every_room_is_in_the_architecture(site):
    text = (site[0] / "architecture.html").read_text(encoding="utf-8")
    for room in [*ROOT.glob("ses_jax/*/__init__.py"), ROOT / "models" / "x", ROOT / "convert" / "x"]:
        assert f"<code>{room.parent.relative_to(ROOT)}/</code>" in text


def test_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_links_of_the_readme_lead_somewhere(site):
    folder, pages = site
    for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        path, _, fragment = link.partition("#")
        if urlsplit(link).scheme:
            continue
        assert (ROOT / path).is_file(), link
        if fragment:
            assert fragment in pages[folder / f"{Path(path).stem}.html"].anchors, link


def blocks(language):
    """Fenced blocks of README and pages: `(page and line, text)`."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
            yield f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", textwrap.dedent(match[2])


@pytest.mark.parametrize(("where", "code"), [pytest.param(*block, id=block[0]) for block in blocks("python")])
def test_python_compiles_and_calls_what_there_is(where, code):
    for node in ast.walk(compile(code, where, "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ses_jax":
            assert node.attr in ses_jax.__all__
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ses_jax."):
            function = getattr(ses_jax, node.func.attr)
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


def commands():
    """`ses-jax ...` in shell blocks: `(page and line, arguments)`."""
    for where, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words[:1] == ["ses-jax"]:
                    yield where, words[1:]


@pytest.mark.parametrize("arguments", [pytest.param(a, id=f"{w} {' '.join(a)}") for w, a in commands()])
def test_commands_are_understood(monkeypatch, arguments):
    """By the shell's own parser, with commands that do nothing."""
    parsed = []
    real = tyro.extras.subcommand_cli_from_dict

    def idle(command):
        @functools.wraps(command)
        def noted(*_, **__):
            parsed.append(command.__name__)

        return noted

    def parse(commands, **how):
        return real({name: idle(command) for name, command in commands.items()}, **how)

    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parse)
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments) == 0
    assert parsed == [arguments[0]]
