"""The page: a prompt and few settings, a search that can be watched and stopped, what it found, and what was before."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ses_jax.engine.result import SearchResult
from ses_jax.studio import sessions
from ses_jax.studio.sessions import Search, Update, search

TITLE = "ses_jax studio"
HEIGHT = 360  # of pictures, in pixels
FILES = ("report.html", "best.png", "baseline.png", "noise.npy", "result.json")


def build(model: str, folder: Path, *, find: Search = search) -> Any:
    """The page, as Gradio's `Blocks`.

    Args:
      model: what the field of the model says at first.
      folder: of the results, one subfolder each.
      find: the search.

    Raises:
      ValueError: where Gradio is not installed.
    """
    gradio = _gradio()
    stops: dict[str, threading.Event] = {}
    find = sessions.in_turn(find)

    def start(prompt, chosen, reward, budget, seed, before, request: gradio.Request):
        stop = stops[request.session_hash] = threading.Event()
        try:
            settings = sessions.settings_of(chosen, reward, budget, seed)
            if not prompt.strip():
                raise ValueError("write what to search for")
            out = Path(tempfile.mkdtemp(dir=folder, prefix="search-"))
            for news in sessions.run(prompt, settings, out, stop, find=find):
                yield _shown(gradio, news, before, out)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error)) from error

    def halt(request: gradio.Request):
        if request.session_hash in stops:
            stops[request.session_hash].set()
        return "stopping after this generation"

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {TITLE}\nSearches the noise that an image starts from, for the image a reward likes best.")
        fields = _fields(gradio, model)
        with gradio.Row():
            go, end = gradio.Button("Search", variant="primary"), gradio.Button("Stop and keep the best")
        status = gradio.Textbox(label="Status", interactive=False)
        with gradio.Row():
            live = gradio.Image(label="Best so far", interactive=False, height=HEIGHT)
            compare = gradio.ImageSlider(label="Without a search, and found", interactive=False, height=HEIGHT)
        files = gradio.Files(label="Download", interactive=False)
        history = gradio.Gallery(label="This session", columns=4)
        before = gradio.State([])
        shown = [status, live, compare, files, history, before]
        go.click(start, [*fields, before], shown, concurrency_limit=1, concurrency_id="search", api_name="search")
        end.click(halt, None, status, queue=False, api_name="stop")
    return blocks


def serve(model: str, folder: Path, host: str, port: int) -> None:
    """Shows the page until Ctrl-C; one search at a time, the others wait."""
    blocks = build(model, folder)
    blocks.queue(default_concurrency_limit=8)
    blocks.launch(server_name=host, server_port=port, allowed_paths=[str(folder)], share=False)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise ValueError("the studio needs Gradio: pip install 'ses_jax[studio]'") from None
    return gradio


def _fields(gradio: Any, model: str) -> list[Any]:
    prompt = gradio.Textbox(label="Prompt", placeholder="a red circle left of a blue square on a white background")
    with gradio.Row():
        return [
            prompt,
            gradio.Textbox(label="Model", value=model),
            gradio.Textbox(label="Reward", placeholder="the model's own; or pick=1,hps=0.5"),
            gradio.Slider(1, 200, value=50, step=1, label="Budget"),
            gradio.Number(value=0, precision=0, label="Seed"),
        ]


def _shown(gradio: Any, news: Update | SearchResult, before: list[Any], out: Path) -> Iterator[Any] | tuple[Any, ...]:
    """What the page's parts show after some news."""
    if isinstance(news, Update):
        same = gradio.skip()
        return f"generation {news.generation + 1}: best {news.best:.4f}", news.image, same, same, same, same
    kind = "stopped" if news.interrupted else "found"
    words = f"{kind}: preview {news.baseline_score:.4f} -> {news.score:.4f}"
    results = [(news.image, f"{news.prompt} ({news.score:.4f})"), *before]
    files = [str(out / name) for name in FILES]
    return words, news.image, (news.baseline_image, news.image), files, results, results
