"""tests/word_problems.py: rows for a small pretrained model; the runs of comparison.py on them."""

import json

import comparison
import pytest
import word_problems
from pages import read


def test_copied_steps_name_their_numbers_first():
    assert word_problems.copied(["<<48/2=24>>", "<<24-1.5=22.5>>"]) == [
        "48, 2\n", "<<48/2=24>>", "\n24, 1.5\n", "<<24-1.5=22.5>>"]


def test_short_problems_are_shared_out_by_their_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(word_problems, "HELD_OUT", 3)
    rows = [{"question": f"{n}+1?", "answer": str(n + 1), "steps": [f"<<{n}+1={n + 1}>>"] * (n % 4)}
            for n in range(16)]
    rows += [rows[1], {**rows[2], "question": "2" * 201}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = {}
    for folder, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        word_problems.main([str(tmp_path / folder), str(tmp_path / "a.jsonl")])
        for name in ("train", "held_out", "copied"):
            lines = read(tmp_path / folder / f"{name}.jsonl").splitlines()
            parts[folder, name] = [json.loads(line) for line in lines]
    assert parts["one", "held_out"] == parts["two", "held_out"]  # whatever the order of the rows
    questions = [{row["question"] for row in parts["one", name]} for name in ("train", "held_out")]
    assert len(questions[0]) == 5 and len(questions[1]) == 3 and not questions[0] & questions[1]
    assert [len(row["steps"]) for row in parts["one", "copied"]] == [
        2 * len(row["steps"]) for row in parts["one", "train"]]


@pytest.mark.parametrize("preset, first", [("tiny", "tiny"), ("real", "FOLDER")])
def test_every_run_starts_from_one_that_is_made_before(preset, first, monkeypatch):
    monkeypatch.setattr("sys.argv", ["comparison.py", "out", "--preset", preset, "--model", first])
    args = comparison.parse_args()
    for place, name in enumerate(args.names):
        _, start, _ = args.runs[name]
        assert start is None or start in args.names[:place]
        *_, command = [comparison.command(name, 1, args)]
        assert f"out/{start}-1" in command if start else first in command
