"""What the cases of `fuzz.py` are made of: values of another kind, damaged bytes and files, hostile texts."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000
TEMPLATES = (
    "{{ raise_exception('no') }}",
    "{{ messages[0].content.nothing.here }}",
    "{{ undefined_name.x }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% bad",
    "{{ 1 / 0 }}",
    "{{ messages | tojson | length // 0 }}",
    "{% include '/etc/passwd' %}",
    "",
)


def value(rng: random.Random) -> Any:
    """Anything that a caller may hand over by mistake or on purpose."""
    simple = (
        *(None, True, False, 0, 1, -1, 2, 3, 10, 64, 2**31, 2**64, 10**30, -(10**30), 10**400),
        *(0.0, 0.5, 1.0, 3.5, 10.0, -1.5, 1e308, math.nan, math.inf, -math.inf, 1j, b"", b"bytes"),
        *("", " ", "0", "10", "3.5", "nan", "yes", "demo", "ses", "clip", "db1", "auto", "full", "half:0.3", "data=1"),
        *("no/such", "a=b=c", "scale=3", '{"scale": 3}', "x" * 5000, "\ud800", "\0", "../..", "~", "-", "1e999"),
        *(object(), object, len, lambda images, prompts: 0, [], {}, (), set(), frozenset({1}), range(3)),
    )
    picked = rng.choice(simple)
    kind = rng.random()
    if kind < 0.1:
        return [picked] * rng.choice((1, 3))
    if kind < 0.2:
        return {rng.choice(("scale", "clip", "name", "pick", "dtype", "x", 1)): picked}
    return nested(rng.choice((3, 2000))) if kind < 0.23 else picked


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def text(rng: random.Random) -> str:
    """An argument on the command line."""
    words = ("demo", "a red circle", "", " ", "no_such", "x.txt", "-5", "0", "1e9", "nan", "clip=1,clip=2", "pick=nan")
    words += (
        "clip=0",
        "os:getcwd",
        "nothing:at_all",
        ":",
        "a:",
        "half:2",
        "ses,explore=-1",
        "data=0",
        "\udcff",
        "=",
        "~",
    )
    words += (
        "/dev/null",
        "/proc/self/mem",
        "a" * 300,
        "Tongyi-MAI/Z-Image-Turbo",
        "h100",
        "ä" * 100,
        "3.5,4",
        "{",
        "[[",
    )
    return rng.choice(words)


def damaged_json(rng: random.Random, content: Any) -> Any:
    """JSON with a value changed, added or taken away somewhere."""
    places = list(_places(content))
    container, key = rng.choice(places) if places else (None, None)
    if container is None:
        return plain(rng)
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.2:
        return plain(rng)
    elif isinstance(container[key], int | float) and kind < 0.5:
        container[key] = rng.choice((0, -1, 1, 2, 3, 10**3, 10**9, 2**63, 1e-30, 1e300, -0.5, 0.5))
    else:
        container[key] = plain(rng)
    return content


def plain(rng: random.Random) -> Any:
    """A plain JSON value."""
    return rng.choice(
        (
            *(None, True, 0, -1, 7, 10**25, 0.5, 1e308, math.nan, "", "x", "\ud800"),
            [],
            [1, "a"],
            {},
            {"a": {}},
            nested(200),
        )
    )


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        yield content, key
        yield from _places(inner)


def damaged_bytes(rng: random.Random, data: bytes, *, text: bool = True) -> bytes:
    """Bytes of which some are changed, doubled, cut off or of zeros."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, kind = rng.randrange(len(data) + 1), rng.random()
        if kind < 0.3:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind < 0.45:
            data = data[:place]
        elif kind < 0.6:
            end = min(len(data), place + rng.choice((1, 8, 64)))
            data = data[:place] + data[place:end] * rng.choice((0, 2, 3)) + data[end:]
        elif kind < 0.7:
            data = bytes(len(data)) if rng.random() < 0.3 else data[:place] + bytes(len(data) - place)
        elif text:
            data = data[:place] + rng.choice(NASTY) + data[place:]
        else:
            data = (
                data[:place]
                + rng.choice((b"\xff" * 8, b"r\xff\xff\xff\x7f", b"h\x00", b"(", b"R", b"0", b"\x00" * 8))
                + data[place:]
            )
    return data


NASTY = (
    *(b'"', b'""', b"\n", b"\r", b"\t", b",", b"\0", b"{", b"[", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b'"\n"'),
    *(DEEP.encode(), b"\xff\xfe", b"1" * 5000, b"1e999", b"NaN", "\u2028".encode()),
)


def prompt_file(rng: random.Random, kind: str) -> bytes:
    """A prompt file that is fine, but for values that a row may have."""
    rows = [{"prompt": f"prompt {i}", "id": f"row-{i}", "seed": i, "note": "x"} for i in range(4)]
    for row in rng.sample(rows, 2):
        row[rng.choice(("prompt", "id", "seed", "guidance", "budget", "height", "note", "searcher"))] = rng.choice(
            (
                None,
                5,
                -1,
                10**30,
                0.5,
                "",
                "a" * 500,
                "木" * 200,
                "..",
                "a/b",
                "\ud800",
                True,
                [1],
                {"a": 1},
                nested(100),
            )
        )
    if kind == ".txt":
        return "\n".join(str(row["prompt"]) for row in rows).encode(errors="surrogatepass")
    if kind in (".csv", ".tsv"):
        separator = "," if kind == ".csv" else "\t"
        columns = ["id", "prompt", "seed", "note", "guidance"]
        lines = [separator.join(columns), *(separator.join(str(row.get(c, "")) for c in columns) for row in rows)]
        return "\n".join(lines).encode(errors="surrogatepass")
    return (json.dumps(rows) if kind == ".json" else "\n".join(map(json.dumps, rows))).encode()


def damage(rng: random.Random, path: Path) -> None:
    """Changes a file as crashes, other programs and people do."""
    kind = rng.random()
    if not path.exists():
        return
    data = path.read_bytes()
    if kind < 0.15:
        path.unlink()
    elif kind < 0.25:
        path.unlink()
        path.mkdir()
    elif kind < 0.35:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(data[:100])
    elif kind < 0.55:
        path.write_bytes(rng.choice((b"", bytes(len(data)), b"{}", b"[]", b"null", b'{"settings": 3}', DEEP.encode())))
    elif kind < 0.8 and (path.suffix in (".json", ".jsonl") or path.name.startswith("_")):
        try:
            path.write_text(
                json.dumps(damaged_json(rng, json.loads(data.split(b"\n")[0] if path.suffix == ".jsonl" else data)))
            )
        except (ValueError, RecursionError):  # damaged before
            path.write_bytes(damaged_bytes(rng, data))
    else:
        path.write_bytes(damaged_bytes(rng, data))


# The pickle of {"a": a tensor of 3 x 4 float32}, as torch writes it.
PICKLE = (
    b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x0ctq\x07QK\x00K\x03K\x04\x86q\x08"
    b"K\x04K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
)
