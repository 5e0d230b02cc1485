"""Problem files: formats, columns, named sets, and the one line that each bad input gets."""

import gzip
import json
import sys
from pathlib import Path

import pytest

import common
from common import load_problems

DATA = Path(__file__).parent / "data"
ROW = '{"question": "1+1?", "answer": "2"}\n'
FORMATS = [
    ("a.jsonl", "\ufeff\r\n" + ROW.replace("\n", "\r\n") + "  \r\n"),
    ("a.jsonl.gz", ROW),
    ("a.json", f"[{ROW}]"),
    ("a.json", '{"version": 1, "data": [%s]}' % ROW),
    ("a.csv", "\ufeffProblem,Target\r\n1+1?,2\r\n\r\n,\r\n"),
]
ANSWERS = [
    ({"answer": 18.0}, "18"),
    ({"answer": 2.5, "solution": r"\boxed{3}"}, "2.5"),
    ({"answer": "#### 1,080"}, "1,080"),
    ({"solution": r"\boxed{1}, no: \boxed{\frac{1}{2}}"}, r"\frac{1}{2}"),
    ({"choices": ["x", "y", "z"], "answer": 2}, "C"),
    ({"choices": ["7", "1", "2"], "answer": 0}, "A"),
    ({"choices": {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}, "answerKey": "2"}, "B"),
    ({"choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answer": 1}, "B"),
    ({"choices": {"label": None, "text": ["x", "y"]}, "answer": 1.0}, "B"),
    ({"choices": ["3", "5", "4", "2"], "answer": 2}, "C"),  # an integer is an index, as in MMLU
    ({"options": ["Rome", "Oslo"], "answer": "Oslo"}, "B"),
]
MISTAKES = [  # file, content, what the message has to say
    ("a.jsonl", ROW + "\n{oops\n", "a.jsonl:3"),
    ("a.json", '[{"question": "Q",\n oops}]', "a.json & line 2"),
    ("a.json", '{"data": []}', "a.json & no problems"),
    ("a.json", '{"train": [], "test": []}', 'a.json & "data" & train, test'),
    ("a.json", "5", "a.json & list of rows & 5"),
    ("a.json", '{"data": "x"}', "a.json & list of rows & x"),
    ("a.json", ROW * 2, "a.json & line 2 & .jsonl"),
    ("a.jsonl", "[1]", "a.jsonl:1 & JSON object"),
    ("a.jsonl", '{"text": "Q", "gold": 1}', "a.jsonl:1 & no question & text, gold & rename"),
    ("a.jsonl", '{"problem": "Q", "gold": 1}', "a.jsonl:1 & no answer & problem, gold & rename"),
    ("a.jsonl", ROW + '{"question": " ", "answer": 1}', "a.jsonl:2: question & empty"),
    ("a.jsonl", '{"prompt": [{"role": "user"}], "answer": 1}', "prompt & no question"),
    ("a.jsonl", '{"prompt": [{"role": "system", "content": "S"}], "answer": 1}', "question & S"),
    ("a.jsonl", ROW + '{"question": "Q", "answer": null}', "a.jsonl:2 & no answer"),
    ("a.jsonl", ROW + '{"question": "Q", "answer": NaN}', "a.jsonl:2: answer & nan"),
    ("a.jsonl", ROW + '{"question": "Q", "answer": -Infinity}', "a.jsonl:2: answer & inf"),
    ("a.jsonl", '{"question": "Q", "answer": ["1", null]}', "a.jsonl:1: answer & None"),
    ("a.jsonl", '{"question": "Q", "answer": []}', "a.jsonl:1: answer & []"),
    ("a.jsonl", '{"question": "Q\\ud800", "answer": 1}', "a.jsonl:1: question & \\ud800"),
    ("a.jsonl", '{"question": "Q", "answer": "\\udfff"}', "a.jsonl:1: answer & \\udfff"),
    ("a.jsonl", '{"question": "Q", "answer": 1, "steps": ["\\ud800"]}', "steps & \\ud800"),
    ("a.jsonl", '{"question": "Q", "answer": 1, "choices": 5}', "a.jsonl:1: choices & list & 5"),
    ("a.jsonl", '{"problem": "Q", "answer": 1, "choices": {"text": ["x"], "label": 5}}', "choices"),
    ("a.jsonl", '{"question": "Q", "answer": 2, "choices": ["x", "2"]}', "'2' & 2 choices"),
    ("a.jsonl", '{"question": "Q", "answer": true, "choices": ["x", "y"]}', "'True'"),
    ("a.jsonl", '{"question": "Q", "answer": "1", "choices": ["1", "y"]}', "'1' & two"),
    ("a.jsonl", '{"question": "Q", "answer": 1, "steps": [{}]}', "a.jsonl:1: steps"),
    ("a.jsonl", '{"input": "Q", "answer": "E", "choices": ["x", "y"]}', "'E' & 2 choices"),
    ("a.jsonl", "\n", "a.jsonl & no problems"),
    ("a.jsonl", ROW.encode() + b"\xe9\n", "a.jsonl:2 & utf-8"),
    ("a.csv", "1+1?,2\n2+2?,4\n", "a.csv:2 & 1+1?, 2 & question"),
    ("a.csv", "question,answer\n1,000?,2\n", "a.csv:2 & header"),
    ("a.csv", 'question,answer\n"1+1?,2\n', "a.csv:2"),
    ("a.csv", b"question,answer\ncaf\xe9,2\n", "a.csv:2 & utf-8"),
    ("a.csv", "question,answer\n1+1?,nan\n", "a.csv:2: answer & nan"),
    ("a,b.jsonl", ROW, "one of gsm8k"),
]


def write(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def error_of(capsys, spec, split="train"):
    with pytest.raises(SystemExit) as stop:
        load_problems(spec, split)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("name, content", FORMATS)
def test_every_format_gives_the_same_problem(tmp_path, name, content):
    problem = load_problems(write(tmp_path, name, content))[0]
    assert problem.pop("source") == f"{tmp_path / name}:{2 if content[0] == chr(0xFEFF) else 1}"
    assert list(problem.pop("row").values()) == ["1+1?", "2"]
    assert problem == {"question": "1+1?", "answer": "2", "steps": None, "solution": None,
                       "set": str(tmp_path / name)}


@pytest.mark.parametrize("columns, answer", ANSWERS)
def test_columns_are_read_as_documented(tmp_path, columns, answer):
    row = json.dumps({"question": "Q", **columns})
    problem = load_problems(write(tmp_path, "a.jsonl", row))[0]
    assert problem["answer"] == answer
    assert ("\nA. " in problem["question"]) == bool({"choices", "options"} & set(columns))


def test_steps_and_solution_come_from_columns_or_from_gsm8k_prose(tmp_path):
    prose = {"answer": "Is 48/2 = <<48/2=24>>24.\nSo 24+1=<<24+1=25>>25.\n#### 25"}
    plain = {"answer": "1", "steps": "<<2-1=1>><<1*1=1>>", "solution": "see <<f12>>", "Body": "Hi"}
    lines = "\n".join(json.dumps({"question": "Q?", **row}) for row in (prose, plain))
    prose, plain = load_problems(write(tmp_path, "a.jsonl", lines))
    assert prose["answer"] == "25" and prose["steps"] == ["<<48/2=24>>", "<<24+1=25>>"]
    assert prose["solution"] == "Is 48/2 = 24.\nSo 24+1=25."
    assert plain["solution"] == "see <<f12>>" and plain["steps"] == ["<<2-1=1>>", "<<1*1=1>>"]
    assert plain["question"] == "Hi. Q?"


@pytest.mark.parametrize("name, content, message", MISTAKES)
def test_a_mistake_gets_one_line_that_says_where(tmp_path, capsys, name, content, message):
    error = error_of(capsys, write(tmp_path, name, content))
    assert [part for part in message.split(" & ") if part not in error] == []


def test_missing_truncated_and_parquet_files_are_named(tmp_path, capsys, monkeypatch):
    assert "none.jsonl" in error_of(capsys, str(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(ROW.encode() * 99)[:-9])
    assert "cut.jsonl.gz" in error_of(capsys, str(tmp_path / "cut.jsonl.gz"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(capsys, str(tmp_path / "a.parquet"))


def test_unreadable_answers_are_listed_and_all_other_rows_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "is_readable", lambda gold: gold != "?")
    unreadable = '{"question": "Q", "answer": "?"}\n' * 6
    path = write(tmp_path, "a.jsonl", ROW.replace("1+1", "a\u2028b") + unreadable + ROW * 2)
    problems = load_problems(path)
    listed = capsys.readouterr().err
    assert "6 rows" in listed and f"{path}:6: '?'" in listed and f"{path}:7" not in listed
    assert [row["question"] for row in problems] == ["a\u2028b?", "1+1?", "1+1?"]
    assert [row["source"] for row in problems] == [f"{path}:1", f"{path}:8", f"{path}:9"]
    assert load_problems(path, limit=2) == problems[:2]
    with pytest.raises(SystemExit):
        load_problems(write(tmp_path, "b.jsonl", unreadable))


def test_named_sets_come_from_a_folder_or_a_checked_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LATENT_RL_DATA", str(tmp_path))
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    write(tmp_path, "svamp.jsonl", ROW)
    path = write(tmp_path, "gsm8k_test.jsonl.gz", ROW)
    assert load_problems("gsm8k", "test") == [{**p, "set": "gsm8k"} for p in load_problems(path)]
    assert load_problems("svamp", "test")[0]["answer"] == "2"
    assert "svamp (train): want" in error_of(capsys, "svamp", "train")
    assert "or one of gsm8k, svamp" in error_of(capsys, "gsm9k")
    trained = [name for name, splits in common.NAMED_SETS.items() if "train" in splits]
    assert trained == ["gsm8k"]  # as the message says
    address, digest = Path(path).as_uri(), common.sha256(path)
    sets = {"toy": {"test": (address, digest), "train": (address, "0" * 64), "x": ("file:/x", "")}}
    monkeypatch.setattr(common, "NAMED_SETS", sets)
    assert "toy: invalid hash value" in error_of(capsys, "toy", "train")
    assert "LATENT_RL_DATA" in error_of(capsys, "toy", "x")
    first = load_problems("toy", "test")
    Path(path).unlink()  # the second time it comes from the cache
    assert load_problems("toy", "test") == first and str(tmp_path / "cache") in first[0]["source"]


def test_the_hub_and_the_generator_get_what_the_name_says(tmp_path, capsys, monkeypatch):
    hub, calls, path = pytest.importorskip("huggingface_hub"), [], write(tmp_path, "a.jsonl", ROW)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: calls.append((*a, k)) or path)
    assert load_problems("hub:owner/repo@v1/sub/a.jsonl")[0]["answer"] == "2"
    assert calls == [("owner/repo", "sub/a.jsonl", {"repo_type": "dataset", "revision": "v1"})]
    assert "hub:owner/repo/file" in error_of(capsys, "hub:owner/a.jsonl")
    monkeypatch.setattr(common, "arithmetic_problems", lambda *arguments: [{"got": arguments}])
    assert load_problems("arithmetic:3", "test", 7) == [
        {"got": ("arithmetic:3", "test", 7), "set": "arithmetic:3"}]


def test_the_sample_files_load():
    gsm8k, svamp = (load_problems(str(DATA / f"{name}_mini.jsonl")) for name in ("gsm8k", "svamp"))
    assert [len(gsm8k), len(svamp)] == [24, 16] and all(row["steps"] for row in gsm8k + svamp)
    problems = load_problems(str(DATA / "choices.csv"))
    assert [row["answer"] for row in problems] == list("CCBBCD")
    assert problems[2]["question"].endswith("\nA. square\nB. triangle\nC. circle")
