"""Kinds of files: whichever holds the records, they are the same; a broken one is named."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.data.examples import load_feedback, load_prompts, read_texts
from nanorlhf.data.files import format_of, read_records
from tests.data.test_examples import refused_file, write
from tests.helpers import refused

RECORDS = [{"prompt": 'é\n,"x"', "completion": "a"}, {"prompt": "q", "completion": ""}]


def written(folder, suffix):
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        return path
    kind = suffix.removesuffix(".gz")
    if kind == ".csv":
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, RECORDS[0])
            rows.writeheader()
            rows.writerows(RECORDS)
    else:
        lines = "\n".join(map(json.dumps, RECORDS))
        path.write_text(json.dumps(RECORDS, indent=1) if kind == ".json" else lines)
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, suffix):
    assert [r for _, r in read_records([written(tmp_path, suffix)])] == RECORDS


LINES = "\n".join(map(json.dumps, RECORDS))
LISTS = {key: [r[key] for r in RECORDS] for key in RECORDS[0]}
PANDAS = {key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]}


@pytest.mark.parametrize(
    "name, content",
    [
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.log", LINES),
        ("a", LINES),
        ("a.txt", json.dumps(RECORDS, indent=2)),
        ("a.jsonl", LINES.replace("}\n", "},\n")),
        ("a.json", LINES),
        ("a.json", "\n".join(json.dumps(r, indent=2) for r in RECORDS)),
        ("a.jsonl", "\n".join(json.dumps(r, indent=2) for r in RECORDS)),
        ("a.json", json.dumps({"version": 1, "data": RECORDS})),
        ("a.json", json.dumps(LISTS)),
        ("a.json", json.dumps(PANDAS, indent=1)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_begins_like_records_is_read_as_such_whatever_its_name(
    tmp_path, name, content, zipped
):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    assert format_of(path)
    assert [r for _, r in read_records([path])] == RECORDS


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,,\nq,a,,\n")
    [(_, record)] = read_records([tmp_path / "a.csv"])
    assert record == {"prompt": "q", "completion": "a", "": ""}


MESSAGE = {"role": "user", "content": "q"}


@pytest.mark.parametrize("record", [RECORDS[0], {"messages": [MESSAGE], "tags": ["x"]}])
def test_one_object_alone_is_one_record(tmp_path, record):
    (tmp_path / "a.json").write_text(json.dumps(record, indent=1))
    assert [r for _, r in read_records([tmp_path / "a.json"])] == [record]


@pytest.mark.parametrize("text", ["{ a set }", "[1] a note", "{}", "int main() {\n}", '"q": {"a"}'])
def test_text_that_only_begins_with_a_bracket_stays_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert [t for _, t in read_texts([tmp_path / "a.txt"])] == [text]


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("A.CSV", ";"), ("a.tsv", "\t")])
def test_tables_have_any_separator(tmp_path, name, separator):
    rows = ([*RECORDS[0]], *([*r.values()] for r in RECORDS))
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:  # with its mark
        csv.writer(file, delimiter=separator).writerows(rows)
    assert [r for _, r in read_records([tmp_path / name])] == RECORDS


@pytest.mark.parametrize("stored", [json.dumps, str])
@pytest.mark.parametrize("keys", [("role", "content"), ("content", "role"), ("value", "from")])
def test_messages_stored_as_text_are_messages(tmp_path, stored, capsys, keys):
    said = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": 'a "b"'}]
    of = {"from": "role", "value": "content"}
    said = [{key: message[of.get(key, key)] for key in keys} for message in said]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "text"], [stored(said), '[{"a": 1}]']])
    [(_, record)] = read_records([tmp_path / "a.csv"])
    assert record == {"messages": said, "text": '[{"a": 1}]'}
    (tmp_path / "b.csv").write_text("messages\n\"[{'role': 'user'} {'role': 'user'}]\"\n")
    error = refused(capsys, list, read_records([tmp_path / "b.csv"]))
    assert "'messages' holds messages as text" in error


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", b"prompt,completion\rq,a\r", "not CSV (new-line"),
        ("a.csv", "prompt,completion\nq,a\n".encode("utf-16"), "UTF-16"),
        ("a.txt", "some words".encode("utf-16"), "UTF-16"),
        ("a.json", b'{"prompt": "q"}\n\n{"prompt": ', "a.json:3: not JSON"),
        (
            "a.csv",
            b"prompt,prompt,text\nq,r,a\n",
            "a.csv:1: not CSV ('prompt' twice in [('prompt', ",
        ),
        ("a.csv", b"q,a\n1\n", "a.csv:2: not CSV (not as many cells as the 2 columns)"),
        ("a.tsv", b"q\ta\ta\n1\t2\t3\n", "a.tsv:1: not CSV ('a' twice in "),
        (
            "a.jsonl",
            b'{"text": "q"}\n{"text": "q", "n": 1, "n": 1}',
            "a.jsonl:2: not JSON ('n' twice",
        ),
        ("a.jsonl", b'{"text": "q", "of": [{"n": 1, "n": 2}]}', "a.jsonl:1: not JSON ('n' twice"),
        (
            "a.json",
            b'{"text": "q"}\n{"text": "q", "text": "r"}',
            "a.json:2: not JSON ('text' twice",
        ),
        ("a.json", b'[{"text": "q",\n"text": "r"}]', "[('text', 'q'), ('text', 'r')]"),
    ],
)
def test_what_cannot_be_read_is_named_as_what_it_is(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in refused(capsys, list, read_texts([tmp_path / name]))


def test_a_data_set_by_name_is_read_through_datasets(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)  # datasets takes a folder of that name before it asks the hub
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps(r | {"prompt": split}) for r in RECORDS]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    for spec, split in (("hf:owner/name", "train"), ("hf:owner/name:test", "test")):
        found = list(read_records([spec]))
        assert [source for source, _ in found] == [f"{spec}[0]", f"{spec}[1]"]
        assert {r["prompt"] for _, r in found} == {split}
    with pytest.raises(SystemExit):
        list(read_records(["hf:owner/name:nosplit"]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: hf:owner/name:nosplit: could not be loaded") and "split" in error
    )


@pytest.mark.parametrize("data_set", ["hf:owner/name", "data.parquet"])
def test_a_missing_package_says_how_to_install_it(data_set, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused(capsys, list, read_records([data_set]))
    assert "pip install -e '.[datasets]'" in error


def test_columns_are_renamed_by_flag(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("ask,good,bad,prompt\nq,a,b,other\n")
    columns = ["prompt=ask", "chosen=good", "rejected=bad"]
    kind, [example] = load_feedback([path], columns)
    assert kind == "rankings"
    assert (example.messages, example.completions) == ([("user", "q")], ["a", "b"])


def test_our_own_files_are_read_without_what_reads_other_peoples(tmp_path):
    said = {"judgement_id": "1", "labeler": "ann", "models": ["m"] * 2, "seed": 1, "seconds": 2}
    said |= {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}
    write(tmp_path, said, name="rm.jsonl")
    write(tmp_path, {"prompt": "q", "completion": "a"}, name="sft.jsonl.gz")
    write(tmp_path, "a story", "<|endoftext|>", "another", name="text.txt")
    code = """if True:
        import sys
        import train_ppo
        from nanorlhf.data import examples
        assert examples.load_feedback(["rm.jsonl"])[0] == "rankings"
        assert len(examples.load_demonstrations(["sft.jsonl.gz"])) == 1
        assert len(list(examples.read_texts(["text.txt"]))) == 2
        foreign = ("nanorlhf.data.shapes", "nanorlhf.data.formats", "datasets")
        assert not sys.modules.keys() & {*foreign}, sys.modules.keys() & {*foreign}
    """
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.txt", "data.txt.gz"])
@pytest.mark.parametrize("before", [1, 3000])  # more lines than one read of a buffer
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, capsys, name, before):
    content = b'{"text": "caf\xc3\xa9"}\n' * before + b'{"text": "caf\xe9"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    error = refused_file(capsys, "texts", path)
    assert "UTF-8" in error and f"{path}:{before + 1}: " in error, error


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.txt.gz"])
def test_a_broken_gzip_file_is_refused(tmp_path, capsys, name):
    lines = [json.dumps({"text": str(i**3)}) for i in range(2000)]
    whole = write(tmp_path, *lines, name=name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[:-100])
    assert "ended" in refused_file(capsys, "texts", path)
    path.write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    refused_file(capsys, "texts", path)
    path.write_bytes(b"not zipped at all")
    assert "gzip" in refused_file(capsys, "texts", path)


@pytest.mark.parametrize(
    "columns, says",
    [
        (["prompt=a", "prompt=b"], "each once"),
        (["prompt=question"], "no column 'question' among 'a', 'b'"),
    ],
)
def test_a_column_that_is_named_twice_or_not_there_is_refused(tmp_path, capsys, columns, says):
    path = write(tmp_path, {"a": "q", "b": "r"})
    assert says in refused(capsys, load_prompts, [path], columns)
