"""Kinds of answers, each in many variants: what is equal, and what must not be paid for."""

import random
import time

import pytest

from common import answers_equal, is_correct, is_readable

NUMBERS = random.Random(0)
CASES = 60  # variants of a kind


def number():
    return NUMBERS.randint(2, 99)


def digits(n):
    return "".join(NUMBERS.choice("123456789") for _ in range(n))


def different(n):
    return n + NUMBERS.choice((-1, 1, 10))


def choice(*words):
    return NUMBERS.choice(words)


UNITS = ("apples", "cm", "km/h", "dollars", "cups of tea", "minutes", "square feet", "kg", "cm^2")
# Each kind makes one pair (predicted, gold).
EQUAL = {
    "unit": lambda n: (f"{n} {choice(*UNITS)}", f"{n}"),
    "currency": lambda n: (choice(f"${n}", f"{n} USD", f"US${n}", f"€{n}", rf"\${n}"), f"{n}"),
    "thousands": lambda n: (choice(f"{n},080", f"{n}{{,}}080", f"{n}\u202f080", rf"{n}\,080"),
                            f"{n}080"),
    "calculation": lambda n: (choice(f"{n}*3={n * 3}", f"{n}+{n}+{n} = {3 * n}",
                                     rf"{n} \times 3 = {3 * n}"), f"{3 * n}"),
    "sides may swap": lambda n: (f"{n} = x", f"x = {n}"),
    "mixed number": lambda n: (choice(f"{n}½", f"{n} 1/2", rf"{n}\frac{{1}}{{2}}"), f"{n}.5"),
    "power sign": lambda n: (choice(f"{n}²", f"{n}^2", f"{n}**2"), f"{n * n}"),
    "repeating decimal": lambda n: (choice(rf"0.\overline{{{n:02}}}", f"0.({n:02})"), f"{n}/99"),
    "word before": lambda n: (choice(f"Answer: {n}", f"The final answer is {n}", f"answer is {n}"),
                              f"{n}"),
    "rounded": lambda n: (rf"x=\frac{{{n}00}}{{3}}\approx {100 * n / 3:.2f}", f"{n}00/3"),
    "not equal": lambda n: (f"x != {n}", rf"x \neq {n}"),
    "clock": lambda n: (choice(f"{n % 12 + 1}:30 p.m.", f"{n % 12 + 1}:30 PM"),
                        f"{n % 12 + 1}:30 pm"),
    "list of accepted answers": lambda n: (choice("the Eiffel tower", "eiffel tower"),
                                           ["La tour Eiffel", "Eiffel Tower"]),
    "text": lambda n: (choice("the New York Times", "New York Times."), "New York Times"),
}
UNEQUAL = {
    "another number": lambda n: (f"{different(n)} {choice(*UNITS)}", f"{n}"),
    "repeating decimal": lambda n: (rf"0.\overline{{{n:02}}}", choice("0", f"0.{n:02}", f"{n}")),
    "bracket after a decimal": lambda n: (f"{n}.5(3)", choice(f"{n}.5", f"{1.5 * n}", f"{n}.53")),
    "equation": lambda n: (f"x+y+z={n}", f"{n}") if n % 2 else (f"2x = {n}", f"{n}"),
    "minus x": lambda n: (f"-x = {n}", f"{n}"),
    "wrong calculation": lambda n: (f"{n}*3={different(3 * n)}", f"{different(3 * n)}"),
    "time as a quotient": lambda n: (f"{n % 11 + 2}:30", f"{n % 11 + 2}/30"),
    "ratio of three": lambda n: (f"{n}:{n + 1}:{n + 2}", f"{n}/{n + 1}/{n + 2}"),
    "morning is no evening": lambda n: (f"{n % 12 + 1}:30 a.m.", f"{n % 12 + 1}:30 p.m."),
    "binomial": lambda n: (rf"\binom{{{n + 1}}}{{2}}", f"{2 * (n + 1)}"),
    "determinant": lambda n: (rf"\begin{{vmatrix}}{n}&1\\1&2\end{{vmatrix}}",
                              rf"\begin{{pmatrix}}{n}&1\\1&2\end{{pmatrix}}"),
    "word that changes a value": lambda n: (
        f"{n} " + choice("squared", "thousand", "thousands", "factorial", "million", "dozen",
                         "cubed"), f"{n}"),
    "below zero": lambda n: (f"{n} {choice('below zero', 'below', 'degrees below zero')}", f"{n}"),
    "sine is no cosine": lambda n: (f"sin({n})", f"cos({n})"),
    "sine in plain text": lambda n: (f"sin {n}", f"cos {n}"),
    "long decimal": lambda n: (f"0.{n}", f"{n}/99"),
    "letter": lambda n: (choice("A or B", "A, B", "B"), "A"),
    "none of the accepted": lambda n: (choice("Paris", "tower", "Eiffel"),
                                       ["La tour Eiffel", "Eiffel Tower"]),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_variants_of_an_answer_are_equal(kind):
    for _ in range(CASES):
        predicted, gold = EQUAL[kind](number())
        assert answers_equal(predicted, gold), f"{predicted!r} is {gold!r}"


@pytest.mark.parametrize("kind", UNEQUAL)
def test_variants_of_another_answer_are_not_paid(kind):
    for _ in range(CASES):
        predicted, gold = UNEQUAL[kind](number())
        assert not answers_equal(predicted, gold), f"{predicted!r} is not {gold!r}"


PIECES = ["A\n", "(", "1/(1+", r"\frac{1}{", "1,", "9^9^", "{", "=", "answer is ", "5 apples ",
          "sqrt(",
          r"\begin{pmatrix}1&", "\\", "x^2+", "1:", "≈1", "1" * 50, "a b ", "#### "]


@pytest.mark.parametrize("piece", PIECES)
def test_no_hostile_text_takes_long(piece):
    for size in (399, 50_000):
        text = (piece * size)[:size]
        for gold in ("3.5", "C", "x^2+1", "(1,2)"):
            clock = time.process_time()
            is_correct(text, gold)
            is_correct(f"#### {text}", gold)
            assert time.process_time() - clock < 0.3  # both calls, on any machine


def test_a_list_of_golds_is_readable_if_one_of_them_is():
    assert is_readable(["18", "eighteen"]) and is_readable("27")
    assert is_correct("so it is #### 27 apples", ["3", "27"])
    assert not is_correct("so it is #### 28 apples", ["3", "27"])
