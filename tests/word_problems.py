"""Short word problems for a small pretrained model: training rows, held-out rows, copied chains.

python tests/word_problems.py OUT mawps.jsonl gsm8k.jsonl     # rows with "steps" like <<48/2=24>>

Keeps questions of at most 200 characters with one or two steps. OUT/held_out.jsonl gets 300 of
them, those whose hash of the question is smallest; OUT/train.jsonl all others. OUT/copied.jsonl has
the training rows again, with the numbers of each step written before it: what HyRea needs, for a
bare equation has no step that can be foreseen.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import load_problems

HELD_OUT = 300


def copied(steps):
    """["<<48/2=24>>", ...] -> ["48, 2\n", "<<48/2=24>>", ...]"""
    found = []
    for number, step in enumerate(steps):
        operands = re.findall(r"\d+(?:\.\d+)?", step.partition("=")[0])
        found += ["\n" * (number > 0) + ", ".join(operands) + "\n", step]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args(argv)
    rows = {}
    for problem in load_problems(",".join(args.files)):
        if len(problem["question"]) <= 200 and len(problem["steps"] or []) in (1, 2):
            row = {key: problem[key] for key in ("question", "answer", "steps")}
            rows[problem["question"]] = row  # a question that occurs twice counts once
    order = sorted(rows, key=lambda question: hashlib.sha256(question.encode()).hexdigest())
    parts = {"held_out": [rows[question] for question in order[:HELD_OUT]],
             "train": [rows[question] for question in order[HELD_OUT:]]}
    parts["copied"] = [{**row, "steps": copied(row["steps"])} for row in parts["train"]]
    args.out.mkdir(parents=True)
    for name, chosen in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.out}/{name}.jsonl: {len(chosen)} rows")


if __name__ == "__main__":
    main()
