"""Rows as public data sets have them, several sets at once, and what tells two data sets apart."""

import datetime
import json
from decimal import Decimal

import pytest

import common
from common import data_fingerprint, load_problems

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "An example?"},
         {"role": "assistant", "content": "#### 1"}, {"role": "user", "content": "9*3?"}]
VERL = {"data_source": "x", "prompt": TURNS,
        "reward_model": {"style": "rule", "ground_truth": "27"}}
ROWS = {  # name: (row, its solution or None); each asks 9*3? and has the answer 27
    "verl": ({**VERL, "extra_info": {"question": "9*3?", "answer": "so\n#### 27"}}, "so"),
    "verl with another question beside the prompt": (
        {**VERL, "prompt": [{"role": "user", "content": "9*3? Put it after ####."}],
         "extra_info": {"question": "9*3?"}}, None),
    "DAPO": ({**VERL, "extra_info": {"index": "7"}}, None),
    "verl, question null": ({**VERL, "extra_info": {"question": None}}, None),
    "TRL, solution": ({"prompt": TURNS, "solution": "So $\\boxed{27}$"}, "So $\\boxed{27}$"),
    "TRL, completion": ({"prompt": TURNS, "completion": [
        {"role": "assistant", "content": "So\n#### 27"}]}, "So"),
    "TRL, answer": ({"prompt": TURNS, "answer": 27}, None),
    "TRL, bare solution": ({"prompt": TURNS, "solution": "27"}, "27"),
    "open-r1": ({"problem": "9*3?", "prompt": TURNS[:1], "solution": "\\boxed{27}"}, "\\boxed{27}"),
    "expected_answer": ({"problem": "9*3?", "expected_answer": "27"}, None),
    "ground_truth": ({"problem": "9*3?", "ground_truth": 27.0}, None),
    "OlympiadBench": ({"question": "9*3?", "solution": ["text"], "final_answer": ["27"]}, None),
    "Latent-SFT": ({"problem": "9*3?", "cot": "<think>\n<<9*3=27>>27\n</think>",
                    "cot_answer": "The answer is \\boxed{27}."}, "27"),
    "GSM8K-Aug": ({"question": "9*3?", "cot": "<<9*3=27>>", "answer": "27"}, None),
    "MetaMathQA": ({"query": "9*3?", "original_question": "3*9?", "type": "GSM_AnsAug",
                    "response": "It is 27.\n#### 27\nThe answer is: 27"}, "It is 27."),
    "MetaMathQA without ####": (
        {"query": "9*3?", "response": "I add nine and nine and nine. The answer is: 27."},
        "I add nine and nine and nine. The answer is: 27."),
    "NuminaMath": ({"problem": "9*3?", "solution": "We get $\\boxed{27}$.", "source": "olympiads",
                    "messages": TURNS[:2]}, "We get $\\boxed{27}$."),
    "messages": ({"messages": [*TURNS, {"role": "assistant", "content": "So\n#### 27"}]}, "So"),
    "null columns": ({"question": None, "problem": "9*3?", "answer": None, "target": "27"}, None),
}
ALIASES = {  # rows with several accepted answers
    "answer": {"question": "Q", "answer": ["NYC", "New York"]},
    "golden_answers": {"question": "Q", "golden_answers": ["NYC", "New York"]},
    "Search-R1": {"question": "Q", "reward_model": {"ground_truth": {
        "target": ["NYC", "New York"]}}},
    "TriviaQA": {"question": "Q", "answer": {"value": "NYC", "aliases": ["NYC", "New York"]}},
    "SQuAD": {"question": "Q", "answers": {"text": ["NYC", "New York"], "answer_start": [1, 1]}},
    "#### in each": {"question": "Q", "answer": ["a\n#### NYC", "b\n#### New York"]},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_public_data_sets_are_read(tmp_path, name):
    row, solution = ROWS[name]
    problem, = load_problems(write(tmp_path / "a.jsonl", row))
    assert (problem["question"], problem["answer"]) == ("9*3?", "27")
    assert problem["solution"] == solution
    assert problem["steps"] == (["<<9*3=27>>"] if "cot" in row else None)
    assert problem["row"] == row  # a user's own reward sees every column


@pytest.mark.parametrize("name", ALIASES)
def test_several_accepted_answers_stay_a_list(tmp_path, monkeypatch, name):
    monkeypatch.setattr(common, "is_readable", lambda gold: gold == ["NYC", "New York"])
    problem, = load_problems(write(tmp_path / "a.jsonl", ALIASES[name]))
    assert problem["answer"] == ["NYC", "New York"]


def test_prose_without_a_marked_answer_is_dropped_by_line_and_never_gold(tmp_path, capsys):
    prose = {"problem": "9*3?", "solution": "Add three to itself eight times and stop there."}
    path = write(tmp_path / "a.jsonl", prose, ROWS["NuminaMath"][0], prose, {
        "problem": "Q", "solution": "####"}, {"problem": "Q", "answer": "proof"})
    problem, = load_problems(path)
    assert problem["source"] == f"{path}:2"
    warning, = capsys.readouterr().err.splitlines()
    assert "4 rows dropped" in warning and f"{path}:5: 'proof'" in warning
    assert all(f"{path}:{line}: ''" in warning for line in (1, 3, 4))


def test_parquet_rows_are_read_and_can_be_written_as_json(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    day, price = datetime.date(2024, 2, 1), Decimal("2.50")
    table = pyarrow.Table.from_pylist([{**VERL, "day": day, "price": price}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    problem, = load_problems(str(tmp_path / "a.parquet"))
    assert (problem["question"], problem["answer"]) == ("9*3?", "27")
    row = json.loads(json.dumps(problem["row"]))
    assert (row["day"], row["price"], row["data_source"]) == ("2024-02-01", "2.50", "x")
    table = pyarrow.table({"problem": ["9*3?", "9*4?"], "answer": [27.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(SystemExit):
        load_problems(str(tmp_path / "b.parquet"))
    assert "b.parquet:2: answer is empty or not text: nan" in capsys.readouterr().err


def test_commas_separate_sets_and_the_limit_counts_in_each(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_RL_DATA", str(tmp_path))
    rows = [{"question": f"{i}+1?", "answer": i + 1} for i in range(5)]
    path = write(tmp_path / "b.jsonl", *rows)
    write(tmp_path / "mine_test.jsonl", *rows[:3])
    problems = load_problems(f"mine, {path},arithmetic:2", "test", 4)
    assert [p["set"] for p in problems] == ["mine"] * 3 + [path] * 4 + ["arithmetic:2"] * 4
    alone = [load_problems(name, "test", 4) for name in ("mine", path, "arithmetic:2")]
    assert problems == sum(alone, [])
    assert len(load_problems(f"{path},{path}")) == 10
    with pytest.raises(SystemExit):
        load_problems(f"{path},", "test")


def test_data_is_known_by_its_questions_and_answers_wherever_it_lies(tmp_path):
    rows = [{"question": "1+1?", "answer": 2, "solution": "I count."},
            {"question": "Q", "answer": 3}]
    (tmp_path / "other").mkdir()
    first = load_problems(write(tmp_path / "a.jsonl", *rows))
    moved = load_problems(write(tmp_path / "other" / "b.jsonl", *rows))
    assert first[0]["source"] != moved[0]["source"]
    encoded = [{**problem, "prompt_ids": [1, 2]} for problem in moved]
    assert data_fingerprint(first) == data_fingerprint(moved) == data_fingerprint(encoded)
    told = load_problems(write(tmp_path / "c.jsonl", {**rows[0], "solution": "I add."}, rows[1]))
    assert data_fingerprint(told) != data_fingerprint(first)  # a supervised stage learns from it
    for changed in (rows[::-1], rows[:1], [rows[0], {**rows[1], "answer": 4}]):
        problems = load_problems(write(tmp_path / "d.jsonl", *changed))
        assert data_fingerprint(problems) != data_fingerprint(first)
    assert data_fingerprint([{"question": "Q", "answer": ["a", "b"]}])


def test_several_sets_get_an_accuracy_each():
    records = [{"set": name, "correct": correct, "truncated": 0, "format_ok": 1, "unanswered": 0,
                "latent_steps": 0, "length": 3, "switches": 0}
               for name, correct in (("a", 1), ("a", 0), ("b", 1))]
    row = common.summarise(records, 1)
    assert row["accuracy/a"] == 0.5 and row["accuracy/b"] == 1 and row["n"] == 3
    assert not [key for key in common.summarise(records[:2], 1) if "/" in key]


def test_a_demonstration_ends_with_the_first_accepted_answer():
    assert common.taught_answer({"answer": ["New York", "NYC"]}) == "New York"
    assert common.taught_answer({"answer": "1", "teacher_answer": "2"}) == "2"
