"""Prompt files: every format, the published benchmarks as they are, what is refused and what is only noted."""

import json

import pytest

from ses_jax.batch import prompts, run_folder
from ses_jax.batch.prompts import Row, read_rows

pytestmark = pytest.mark.quick

# The beginnings of the published files.
GENEVAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], \
"prompt": "a photo of two clocks"}
"""
DRAWBENCH = """\
Prompts,Category
A red colored car.,Colors
"A sign that says ""Deep, Learning"".",Text
"""
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    "a bike, with 'wheels'\tArtifacts\tStyle & Format\t\n"
)
HPD = ["A black colored banana.", "A sign that says 'NeurIPS'."]


def test_columns_of_other_names_separators_and_encodings(tmp_path):
    def found(name, text, column=None, encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return [(row.prompt, dict(row.metadata), row.error) for row in read_rows(tmp_path / name, column)]

    assert found("a.csv", "caption,n\na cat,1\n") == [("a cat", {"n": "1"}, None)]
    assert found("b.csv", "n;Text\n1,5;a cat, asleep\n") == [("a cat, asleep", {"n": "1,5"}, None)]
    broken = found("k.csv", 'words;n\n"a, cat";1\n"open;2\nb;3\n', "words", "utf-16")  # only that row
    assert [(prompt, error is None) for prompt, _, error in broken] == [("a, cat", True), ("", False), ("b", True)]
    assert found("c.csv", "prompt,text\na cat,more\n") == [("a cat", {"text": "more"}, None)]
    assert found("d.csv", "prompt,words\nno,a cat\n", "words") == [("a cat", {"prompt_": "no"}, None)]
    assert found("e.txt", "caf\u00e9 \u732b\r\ntwo\r\n", encoding="utf-16") == [
        ("caf\u00e9 \u732b", {}, None),
        ("two", {}, None),
    ]
    assert found("f.jsonl", '{"text": "a cat", "seed": 3}\n')[0][0] == "a cat"
    assert [row.prompt for row in read_rows([{"caption": "a cat"}, "two"])] == ["a cat", "two"]
    for name, text in (("g.csv", "n,m\n1,2\n"), ("h.jsonl", '{"n": 1}\n')):
        with pytest.raises(ValueError, match="has no column 'words'; its columns are n"):
            found(name, text, "words")
    with pytest.raises(ValueError, match=r"has no column 'prompt'; .* or name one with --prompt-column"):
        found("i.csv", "n,m\n1,2\n")


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "found", "metadata"),
    [
        (
            "evaluation_metadata.jsonl",
            GENEVAL,
            ["a photo of a bench", "a photo of two clocks"],
            {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
        ),
        (
            "drawbench.csv",
            DRAWBENCH,
            ["A red colored car.", 'A sign that says "Deep, Learning".'],
            {"Category": "Colors"},
        ),
        (
            "PartiPrompts.tsv",
            PARTI,
            ["bond", "a bike, with 'wheels'"],
            {
                "Category": "Abstract",
                "Challenge": "Basic",
                "Note": "Biology-inspired concepts with multiple meanings",
            },
        ),
        ("anime.json", json.dumps(HPD), HPD, {}),
    ],
)
def test_published_benchmarks_work_as_they_are(tmp_path, name, text, found, metadata):
    rows = read_rows(write(tmp_path, name, text))
    assert [row.prompt for row in rows] == found
    assert [row.id for row in rows] == ["00000", "00001"]
    assert rows[0].metadata == metadata
    assert all(row.error is None and row.overrides == {} for row in rows)


def test_text_has_a_prompt_a_line(tmp_path):
    rows = read_rows(write(tmp_path, "p.TXT", "\ufeffone, two\r\n\r\n  drei Bäume \n"))
    assert [row.prompt for row in rows] == ["one, two", "drei Bäume"]


def test_every_format_gives_the_same_rows(tmp_path):
    records = [
        {"id": "x", "prompt": "a, b", "seed": 3, "height": 64, "negative_prompt": "red", "kind": "one"},
        {"id": "y", "prompt": 'line one\nline "two"', "guidance": 2.5, "standardize": False},
    ]
    columns = ["id", "prompt", "seed", "height", "negative_prompt", "kind", "guidance", "standardize"]
    files = {"p.json": json.dumps(records), "p.jsonl": "\n\n".join(map(json.dumps, records))}
    for name, separator in (("p.csv", ","), ("p.tsv", "\t")):
        quoted = [['"' + str(r.get(c, "")).replace('"', '""') + '"' for c in columns] for r in records]
        files[name] = "\n".join(separator.join(cells) for cells in [columns, *quoted])
    expected = [
        Row(0, "x", "a, b", {"seed": 3, "height": 64, "negative_prompt": "red"}, {"kind": "one"}),
        Row(1, "y", 'line one\nline "two"', {"guidance": 2.5, "standardize": False}),
    ]
    assert read_rows(records) == expected
    for name, text in files.items():
        assert read_rows(write(tmp_path, name, text)) == expected


def test_columns_are_known_in_any_case_and_unknown_ones_are_kept(tmp_path):
    row = read_rows(write(tmp_path, "p.csv", "ID,PROMPT,Seed,Note,seeds\n7,a,4,N,5\n"))[0]
    assert row == Row(0, "7", "a", {"seed": 4}, {"Note": "N", "seeds": "5"})


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("budget", "12", 12),
        ("height", "512.0", 512),
        ("height", 512.0, 512),
        ("seed", 2**60 + 1, 2**60 + 1),
        ("seed", str(2**60 + 1), 2**60 + 1),
        ("guidance", "4", 4.0),
        ("guidance", '{"scale": 4.0, "truncation": 0.8}', {"scale": 4.0, "truncation": 0.8}),
        ("guidance", {"scale": 4.0}, {"scale": 4.0}),
        ("standardize", "False", False),
        ("standardize", True, True),
        ("negative_prompt", "", ""),
        ("wavelet", "db2", "db2"),
    ],
)
def test_overrides_are_parsed(name, value, parsed):
    row = read_rows([{"prompt": "a", name: value}])[0]
    assert row.error is None
    assert row.overrides == {name: parsed}
    assert type(row.overrides[name]) is type(parsed)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"seed": 3}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt must be a string, got 3"),
        ({"prompt": None}, "the prompt is empty"),
        (["a"], r"a row is a prompt or a mapping, got \['a'\]"),
        ({"prompt": "a", "budget": "many"}, "budget='many' is not a whole number"),
        ({"prompt": "a", "budget": 2.5}, "budget=2.5 is not a whole number"),
        ({"prompt": "a", "budget": True}, "budget=True is not a whole number"),
        ({"prompt": "a", "seed": float("nan")}, "seed=nan is not a whole number"),
        ({"prompt": "a", "seed": float("inf")}, "seed=inf is not a whole number"),
        ({"prompt": "a", "guidance": "strong"}, "guidance='strong' is not a number"),
        ({"prompt": "a", "guidance": [1]}, r"guidance=\[1\] is not a number"),
        ({"prompt": "a", "standardize": "maybe"}, "standardize='maybe' is not true or false"),
        ({"prompt": "a", "wavelet": 2}, "wavelet=2 is not text"),
        ({"prompt": "a", "Reward": "hps"}, "column 'reward' is a setting of a whole run; set it there, or rename"),
        ({"prompt": "a", "model": "x"}, "column 'model' is a setting of a whole run"),
        ({"prompt": "a", "load": {}}, "column 'load' is a setting of a whole run"),
    ],
)
def test_a_bad_row_is_noted_and_the_others_stay(record, message):
    rows = read_rows(["one", record, "two"])
    assert [row.error is None for row in rows] == [True, False, True]
    with pytest.raises(ValueError, match=message):
        raise ValueError(rows[1].error)


def test_broken_lines_are_noted(tmp_path):
    rows = read_rows(write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b\n"c"\n'))
    assert [row.error is None for row in rows] == [True, False, True]
    assert "the line is no JSON" in rows[1].error
    rows = read_rows(write(tmp_path, "p.csv", "prompt,seed\na red, round thing,1\nb,2\n,3\n"))
    assert rows[0].error == "3 cells under 2 columns; quote what holds a separator"
    assert rows[1] == Row(1, "00001", "b", {"seed": 2})
    assert rows[2].error == "the prompt is empty"


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (NESTED, "the line is no JSON: it is nested too deep"),
        ('{"prompt": "a", "x": ' + "[" * 100 + "]" * 100 + "}", "the row is nested more than 64 deep"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "the line is no JSON: Exceeds the limit"),
        ('{"prompt": "a", "guidance": "{' + NESTED + '"}', r"guidance='\{\[\[\S*\.\.\. is not a number"),
        ('{"prompt": "half \\ud800"}', r"the text 'half \\ud800' is not Unicode"),
        ('{"prompt": "a", "negative_prompt": "\\ud800"}', r"negative_prompt='\\ud800' is not text"),
        ('{"prompt": "a", "seed": 1e30}', r"seed=\S+ must be less than"),
        ('{"prompt": "a", "budget": 99999999999}', "budget=99999999999 must be less than 2147483648"),
    ],
)
def test_hostile_rows_are_noted_and_can_be_written_down(tmp_path, line, message):
    rows = read_rows(write(tmp_path, "p.jsonl", f'{{"prompt": "one"}}\n{line}\n{{"prompt": "two"}}\n'))
    assert [row.error is None for row in rows] == [True, False, True]
    with pytest.raises(ValueError, match=message):
        raise ValueError(rows[1].error)
    for row in rows:
        assert json.loads(run_folder._row_line(row).encode())["index"] == row.index


def test_rows_that_are_no_json_are_noted():
    circle = {"prompt": "a"}
    circle["self"] = circle
    rows = read_rows([circle, {"prompt": "a", "x": {(1, 2): 3}}, {"prompt": "a", "x": {1, 2}}])
    assert "nested more than 64 deep" in rows[0].error
    assert "can't be written as JSON" in rows[1].error
    assert rows[2].error is None
    with pytest.raises(ValueError, match="prompts=b'x' is neither a file nor a list of prompts"):
        read_rows(b"x")


@pytest.mark.parametrize(
    ("text", "prompts", "bad"),
    [
        ('a\n"b\nc\nd', ["a", "", "c", "d"], 1),
        ('"a\nb\n"c" d\ne', ["", "b", "c d", "e"], 0),
        ('a\n"b\nb" and more\n"c\nd"\ne', ["a", "", 'b" and more', "c\nd", "e"], 1),
        ('a\n"b ""quoted"""\n"c" and "d"\ne"f', ["a", 'b "quoted"', 'c and "d"', 'e"f'], None),
    ],
)
def test_a_quote_that_is_never_closed_takes_no_other_row(tmp_path, text, prompts, bad):
    for name, separator in (("p.csv", ","), ("p.tsv", "\t")):
        lines = text.replace("\n", f"{separator}x\n") if bad is None else text
        rows = read_rows(write(tmp_path, name, f"prompt{separator}note\n{lines}\n"))
        assert [row.prompt for row in rows] == prompts
        assert [row.index for row in rows if row.error] == ([] if bad is None else [bad])
        if bad is not None:
            assert "a cell that begins with a quote must end with one" in rows[bad].error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.json", NESTED, "is no JSON: it is nested too deep"),
        ("p.yaml", "- a", "unknown ending '.yaml'; known: .txt, .csv"),
        ("p.txt", " \n", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '{"prompt": "a"}', "must hold a list, got a dict"),
        ("p.json", "[", "is no JSON"),
        ("p.csv", "", "no column 'prompt'"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.csv", "words,seed\na,1\n", r"no column 'prompt'; its first line is \['words', 'seed'\]"),
        ("p.tsv", "Prompt,Category\na,b\n", "no column 'prompt'"),
    ],
)
def test_a_meaningless_file_is_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, name, text))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"p\.txt is not UTF-8"):
        read_rows(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="no prompts"):
        read_rows([])


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("00012", "00012"),
        ("a/../b c", "a_.._b_c"),
        ("../up", "_up"),
        ("..", "_"),
        ("", "_"),
        (".hidden", "hidden"),
        ("Bäume 木", "Bäume_木"),
        ("results.jsonl", "results_jsonl"),
        ("run.json", "run_json"),
        ("report.html", "report_html"),
        ("x" * 300, "x" * 80 + "-0d4e2ca9"),
    ],
)
def test_ids_are_made_safe_as_folder_names(name, folder):
    row = read_rows([{"id": name, "prompt": "a"}])[0]
    assert (row.id, row.folder) == (name, folder)


def test_long_ids_are_cut_by_bytes_and_told_apart():
    names = ["\U0001f600" * 80, "木" * 80, "木" * 81, "ä" * 200 + "1", "ä" * 200 + "2", "x" * 80]
    folders = [row.folder for row in read_rows([{"prompt": "a", "id": name} for name in names])]
    assert len(set(folders)) == len(names)
    assert all(len(folder.encode()) <= 89 for folder in folders)
    assert folders[-1] == names[-1]


@pytest.mark.parametrize("pair", [("a", "a"), ("a/b", "a b"), ("Cat", "cat"), ("00000", None), (7, "7")])
def test_two_rows_of_the_same_id_are_named(pair):
    rows = [{"prompt": "x", "id": pair[0]}, {"prompt": "y", "id": pair[1]}]
    if pair[1] is None:
        rows.reverse()
        rows[1]["id"] = "00000"
    with pytest.raises(ValueError, match=r"rows 0 and 1 \(the first is row 0\) have the same id"):
        read_rows(rows)


def test_known_columns_are_the_settings_of_a_search():
    assert set(prompts._SETTINGS) >= {"budget", "seed", "height", "guidance", "negative_prompt"}
    assert not set(prompts._SETTINGS) & {"prompt", "prompts", "id"}
