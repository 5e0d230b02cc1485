"""The answer checker of common.py: what is equal, what is not, and what it survives."""

import gzip
import json
import os
import random
import time
from pathlib import Path

import pytest

from common import answers_equal, extract_answer, is_correct, is_readable

EQUAL = r"""
18 <- 18. | 18.0 | 018 | +18 | $18 | 18 dollars | 18% | 18 percent | (18) | x=18 | 3 \cdot 6 | 2*9
-5 <- −5 | - 5 | -5.00 | \frac{10}{-2} | -\frac{-5}{-1} | -5^1
1080 <- 1,080 | 1{,}080 | 1,\!080 | \$1,080 | 1\,080
5 <- 5 m | 5 km/h | 5\text{ cm}^2 | 5 cm^2 | 5^\circ | 5° | 5 \text{ degrees} | y = 5 | a+b=5
1/2 <- 0.5 | .5 | \frac12 | \dfrac{1}{2} | \tfrac{3}{6} | 2^{-1} | 1:2
9/5 <- 1\frac{4}{5} | 1 4/5 | 1.8 | \frac95
-1.5 <- -1\frac12 | -\frac{3}{2} | \frac{-3}{2}
1/3 <- 0.333333 | 0.3333333333333333
.0000672 <- 6.72e-05 | 6.72\times10^{-5}
18.90 <- \$18.9 | 18.9 \text{ dollars}
\frac{270}7\text{ degrees} <- 270/7
3\sqrt{13} <- \sqrt{117} | 3\sqrt{13}\text{ cm} | 3sqrt(13)
\frac{\sqrt{3}}{3} <- \frac{1}{\sqrt3} | \sqrt{3}/3
2 <- \sqrt[3]{8} | \sqrt4 | 2**1
18\pi <- 18\pi\text{ cm}^2 | 18 pi | \pi\cdot18
(1,2) <- (1, 2) | 1,2 | \left(1.0, \frac42\right) | (x,y) = (1,2)
1,2 <- 2,1 | \{2,1\} | 1 \text{ and } 2 | 2 or 1 | 1; 2
1 \pm \sqrt{19} <- 1-\sqrt{19}, 1+\sqrt{19} | 1\pm\sqrt{19}
(-\infty,2)\cup(3,\infty) <- (3, \infty) \cup (-\infty, 2)
x \in [-2,7] <- [-2,7] | x\in[-2, 7]
x \geq 2 <- x >= 2 | x\ge2 | 2 \le x
\begin{pmatrix} \frac12 \\ 2 \end{pmatrix} <- \begin{bmatrix}0.5\\2\end{bmatrix}
x^2+2x+1 <- (x+1)^2 | 1+x^{2}+2x
y = 2x+3 <- 3+2x | y=2x + 3
\frac{x+2}{7} <- \frac{x}{7}+\frac{2}{7}
\cot x <- \cot(x)
6 - 5i <- -5i+6
52_8 <- 52_{8}
\text{Evelyn} <- evelyn | \textbf{Evelyn} | \text{ Evelyn}
No solution <- \text{no solution}
B <- b | (B) | B. | \text{(B)} | B. 3.2 eV | \textbf{(B)}
"""
DIFFERENT = r"""
18 <- 180 | -18 | 1 8 | 17.99999999 | 18.0000000001 | 17 or 18 | 18 and a half | 18 million | ?
1 <- 100 | 1/0 | 1, 2 | True | -[0,1) | 1 million | nan | \text{one} | 1!
3 <- 3 apples and 4 pears | 3! | 3 hours 20 minutes | x | 3x | 0.3e2
1000000 <- 1 million | 1 000 000 | 1_000_000
70000 <- 70.000 | 70, 000 | 69999.9999999
9007199254740993 <- 9007199254740992
123456 <- 123457
3.14 <- 3.1401 | \pi | 3.1
1/3 <- 0.33 | 0.333335 | 3
2\pi <- 6.28 | 6.283185 | \pi
3\sqrt{13} <- 10.8167 | 13\sqrt{3}
15\% <- 0.15
8 <- 0o10
(1,2) <- (2,1) | [1,2] | (1,2] | (1,2,3) | \{2,1\}
6,6,7 <- 6,7 | 6,7,7
(-\infty,2)\cup(3,\infty) <- (-\infty,2) | (-\infty,2]\cup(3,\infty)
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{pmatrix}1&2\end{pmatrix} | (1,2)
x=5 <- y=5 | x>5 | x=-5
x=5, y=3 <- x=3, y=5 | 3, 5
0 <- a^2+b=0 | none
x \leq 2 <- x < 2 | x \geq 2 | 2
x^2+2x+1 <- x^2+2x-1 | (x-1)^2
5r^5 <- 5 | 5r
bx <- ip | 3
2\ln 3 <- \ln 6 | 3\ln 2
52_8 <- 42_{10} | 52 | 52_9
6-5i <- 6+5i | 6
\text{east} <- west | seat
\text{ellipse} <- \text{an ellipse}
B <- C | A or B | A, B | A/B | AB | Bob | \text{B or C}
"""
EXTRACTED = [  # (text, answer)
    *[("so\n#### 18", "18"), ("#### 20 no\n#### 18\nmore", "18"), ("####\n\n 18 <|end|>", "18")],
    *[(r"#### \boxed{18}", "18"), (r"\boxed{6} #### 5", "5"), (r"\boxed{5} no: \boxed{6}", "6")],
    *[(r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}")],
    *[
        (r"\fbox{7}", "7"),
        (r"\boxed{809", None),
        (r"\boxed{1} \boxed{2", "1"),
        (r"{\boxed{1}", "1"),
    ],
    *[("the answer is 18", None), ("", None), ("####", "")],
]
STATED = r"""
A <- The answer is A. | A. Because B is not valid | #### A | The answer is A, not B
B <- ANSWER IS B | the answer is b | (B) | The correct answer is (B) 42 m/s. | \boxed{\text{B}}
B <- It's not A, therefore I think it's B | A good question. The answer is B. | **Answer:** B
C <- I think the answer is C | Options A and B are plausible; answer: C | \boxed{B}\boxed{C}
D <- The answer is for sure D, it can't be A or B | The correct option is D | Answer: (D)
none <- Answer: A or B | The answer is not B | The answer is a number | I don't know | \boxed{A, B}
none <- No valid answer here | #### A and B | Options A and B are plausible | \boxed{B
"""
HOSTILE = [
    *["9^{9^{9^{9}}}", "9**9**9", "1000000000!", "((9!)!)!", "1" * 40_000, r"\frac{1}{" * 5_000],
    *["{" * 50_000, "(" * 399, "$" * 1_000_000, "#### " * 20_000, " " * 1_000_000 + "x"],
    *[r"\text{" * 20_000, "\\" * 1_000_000, r"\boxed{" * 20_000, "√" * 399, "-" * 390],
    *["__import__('os').abort() or 1\\pi", "().__class__", "{0.__class__}", "nan", "inf", "1e999"],
    *["0/0", "5\x00", "\u202e5", "\ud800", "True", "1,1," * 90, "9^{640}/7^{720}*" * 20, "٣", "５"],
    *["answer is " * 5_000, "1e99*" * 70, r"\sqrt[0]{4}", "2^" * 150, "A.\n" * 20_000],
]


def pairs(table):
    """(predicted, gold) for each line `gold <- predicted | predicted` of a table."""
    lines = [line.split(" <- ") for line in table.strip().splitlines()]
    return [(predicted, gold) for gold, row in lines for predicted in row.split(" | ")]


@pytest.mark.parametrize("predicted, gold", pairs(EQUAL))
def test_other_spellings_of_an_answer_are_equal(predicted, gold):
    assert answers_equal(predicted, gold) and answers_equal(gold, gold)


@pytest.mark.parametrize("predicted, gold", [*pairs(DIFFERENT), (None, "5"), ("", "5"), ("", "")])
def test_near_misses_are_not_equal(predicted, gold):
    assert not answers_equal(predicted, gold)


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_the_last_marker_and_the_last_closed_box_win(text, answer):
    assert extract_answer(text) == answer


def test_another_marker_can_be_named():
    assert extract_answer("<think> 1 </think> 2", marker="</think>") == "2"
    assert extract_answer(r"\boxed{1} </think> so \boxed{2}", marker="</think>") == "2"


def test_prose_is_read_only_by_flexible_extraction():
    for text in ("The answer is 18. I hope so.", "first 20, then 18", "Answer: $18$", "18"):
        assert extract_answer(text) is None and not is_correct(text, "18")
        assert answers_equal(extract_answer(text, flexible=True), "18")


@pytest.mark.parametrize("completion, letter", [*pairs(STATED), ("A. 1\nB. 2\nC. 3", "none")])
def test_an_anchored_letter_counts_and_an_ambiguous_one_does_not(completion, letter):
    assert [g for g in "ABCDEFGHIJ" if is_correct(completion, g)] == [letter] * (letter != "none")


def test_unreadable_golds_are_found_and_still_equal_themselves():
    for gold in ("18", "-3.0e-05", "B", r"\text{Evelyn}", r"3 \pm 2\sqrt{2}", "(0,1]", "y = -2x"):
        assert is_readable(gold), gold
    for gold in ("", " ", "(1,2", r"\frac{1}{", "1 8", "1/0", "1" * 1_000, "3 +"):
        assert not is_readable(gold), gold
    assert answers_equal("6:00 p.m.", "6:00  p.m.") and not answers_equal("7:00 p.m.", "6:00 p.m.")
    assert answers_equal("9" * 20_000, "9" * 20_000)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_cheap(text):
    for completion in (text, rf"\boxed{{{text}}}", f"#### {text}"):
        for gold in ("3.5", "C", "(1,2)"):
            start = time.process_time()
            assert not is_correct(completion, gold)
            extract_answer(completion, flexible=True)
            assert time.process_time() - start < 0.25  # 0.05 s with room for a slow machine


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [*"0123456789+-*/^_(){}[]|,.;:!=<>$%& xyieABC\\'\"~°π√∞∪±≤\n\x00\ud800５²", "9^{999}"]
    pieces += [r"\frac", r"\sqrt", r"\text{", r"\boxed{", "####", r"\begin{pmatrix}", "answer is"]
    for _ in range(2_000):
        text = "".join(rng.choices(pieces, k=rng.choice([3, 8, 20, 60])))
        gold = rng.choice(["5", "B", r"\frac{1}{2}", "(1,2)", "x=5", text[::-1]])
        for completion in (text, rf"\boxed{{{text}}}", f"#### {text}"):
            assert is_correct(completion, gold) in (True, False)
        assert answers_equal(gold, text) in (True, False) and is_readable(text) in (True, False)
        assert answers_equal(text, text) == bool(text.strip())


def test_labelled_cases_are_graded_as_labelled():
    folder = os.environ.get("LATENT_RL_DATA")
    if not folder:
        pytest.skip("LATENT_RL_DATA names no folder with the labelled cases")
    rows = []
    for name in ("answer_cases_dev.jsonl.gz", "gsm8k_outputs_dev.jsonl.gz"):
        with gzip.open(Path(folder) / name, "rt") as lines:
            rows += [json.loads(line) for line in lines]
    wrong, false_positives = [], []
    rows = [row for row in rows if row.get("scope", "must") == "must"]
    rows = [row for row in rows if not row.get("disputed") and not row.get("either_ok")]
    for row in rows:
        text, gold = row["prediction"], row["gold_answer"]
        graded = is_correct(text, gold) or answers_equal(text, gold)
        if not graded and "####" not in text and "box" not in text:  # prose, not for training
            graded = answers_equal(extract_answer(text, flexible=True), gold)
        if graded != row["expected_equal"]:
            (false_positives if graded else wrong).append(row["id"])
    assert not false_positives
    assert len(wrong) <= 0.001 * len(rows), wrong
