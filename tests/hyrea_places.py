"""Which steps of a chain HyRea replaces, by the length of the chain, and where its errors arise.

python tests/hyrea_places.py runs/hyrea-0 [more runs] [--limit 1024]

For runs on arithmetic-restated, where a step either copies (`+8=3+8`) or computes (`=1`). For each
run, greedy on the test split of its --train, decoded in four ways:

    free       as trained
    explicit   no span may open
    no_value   no span may open where a computed step is due
    copies     a span opens wherever a copy is due, and nowhere else

Printed are the accuracy by the number of operations, the total length, and how many copies and
computed steps a chain loses. Then the error of single operations: a value that the text shows is
compared with what follows from the value shown before. `taught wrong` are the facts on which the
built-in teacher errs. At last, for the folder of a cold start, how often one of the k lowest is a
computed step: ranked by the model before the cold start, and by the one that ranked in it.
"""

import argparse
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
import hyrea  # noqa: E402
from common import (  # noqa: E402
    apply_operation,
    checkpoint_settings,
    encode_prompts,
    grade,
    load_model,
    load_problems,
    make_rng,
    mean,
    model_folder,
)

ITEM = re.compile(r"(?P<copy>[-+*]\d=(?P<shown>\d)[-+*]\d)|=(?P<value>\d)"
                  r"|(?P<span><start-latent>(?:<latent>)*<end-latent>)")
RULES = {  # may a span open where step m of 2n is due? None: as the model wants
    "free": lambda m, n: None,
    "explicit": lambda m, n: False,
    "no_value": lambda m, n: False if m % 2 else None,
    "copies": lambda m, n: m % 2 == 0 and m < 2 * n,
}


def wrong_facts():
    """The facts (a, operator, b) on which the built-in teacher errs; see arithmetic_problems."""
    teacher = random.Random("sloppy")
    found = set()
    for fact in [(a, op, b) for a in range(10) for op in "+-*" for b in range(10)]:
        unreliable = teacher.random() < 0.17
        teacher.randint(1, 9)
        if unreliable:
            found.add(fact)
    return found


def read_items(text):
    """Text of a thought -> its steps (matches), and what is left over behind the last whole one."""
    items, end = [], 0
    while match := ITEM.match(text, end):
        items.append(match)
        end = match.end()
    return items, text[end:]


def operations(problem):
    """"3+8*2=" -> 3, [("+", 8), ("*", 2)]"""
    pairs = re.findall(r"([-+*])(\d)", problem["question"])
    return int(problem["question"][0]), [(op, int(b)) for op, b in pairs]


def decode(policy, tokenizer, problems, cfg, rule):
    """Greedy completions, spans opened by the rule -> records of grade()."""
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    sizes = torch.tensor([len(operations(problem)[1]) for problem in problems])
    next_input, start_state = hyrea.next_input, hyrea.start_state

    def start(num_rows, policy, cfg):
        history = torch.zeros(num_rows, cfg.max_completion_length, dtype=torch.long)
        return {**start_state(num_rows, policy, cfg), "history": history, "sizes": sizes}

    def steer(policy, logits, hidden, t, state, cfg, rng, greedy):
        history = state["history"]
        for row in (state["left"] < 0).nonzero()[:, 0].tolist():
            text = "".join(words[i] for i in history[row, :t].tolist())
            items, rest = read_items(text)
            opens = rule(len(items), int(state["sizes"][row]))
            if opens is not None and not rest:
                logits[row, policy.start_id] = 1e4 if opens else -1e4
        found = next_input(policy, logits, hidden, t, state, cfg, rng, greedy)
        history[:, t] = found[0]
        return *found[:3], {**state, **found[3]}

    hyrea.next_input, hyrea.start_state = steer, start
    try:
        prompts = [problem["prompt_ids"] for problem in problems]
        batch = hyrea.rollout(policy, prompts, cfg, make_rng(policy.lm.device, 0), greedy=True)
    finally:
        hyrea.next_input, hyrea.start_state = next_input, start_state
    return grade(batch, problems, tokenizer, cfg.answer_marker)


def chain_of(record, problem):
    """Record -> kinds of its steps, or None if it has another form than the written chain."""
    thought = record["completion"].partition("</think>")[0]
    items, rest = read_items(thought)
    fits = not rest and len(items) == 2 * len(operations(problem)[1])
    for m, item in enumerate(items):
        fits = fits and (item["span"] or item["value" if m % 2 else "copy"])
    return items if fits else None


def local_errors(record, problem, items, wrong):
    """-> [(how the operation is written, is it taught wrong?, is its value wrong?)]"""
    value, ops = operations(problem)
    answer = re.search(r"</think>(\d)", record["completion"])
    found, waiting, facts = [], [], []
    truth = value
    for i, (op, b) in enumerate(ops):
        facts.append((truth, op, b) in wrong)
        truth = apply_operation(truth, op, b)
        waiting.append(("copied, " if items[2 * i]["copy"] else "copy replaced, ")
                       + ("computed" if items[2 * i + 1]["value"] else "value replaced"))
        shown = items[2 * i + 1]["value"]
        if shown is None and i + 1 < len(ops):
            shown = items[2 * i + 2]["shown"]
        if shown is None and i + 1 == len(ops) and answer:
            shown = answer[1]
        if shown is not None:
            kind = waiting[0] if len(waiting) == 1 else f"{len(waiting)} operations, no value shown"
            found.append((kind, any(facts), int(shown) != truth))
            truth, waiting, facts = int(shown), [], []
    return found


def report(name, mode, records, problems):
    """-> lines of text"""
    groups = defaultdict(list)
    for record, problem in zip(records, problems):
        groups[len(operations(problem)[1])].append((record, problem))
    lines = []
    for n, pairs in sorted(groups.items()):
        chosen = [record for record, _ in pairs]
        chains = [chain_of(*pair) for pair in pairs]
        good = [chain for chain in chains if chain]
        lost = [sum(bool(c[m]["span"]) for c in good for m in range(start, 2 * n, 2)) /
                max(1, len(good)) for start in (0, 1)]
        lines.append(f"{mode:9} {n} operations: accuracy {mean(chosen, 'correct'):.3f}, n "
                     f"{len(chosen)}; copies replaced {lost[0]:.2f}, computed replaced "
                     f"{lost[1]:.2f}, another form {1 - len(good) / len(chains):.3f}")
        by_lost = defaultdict(list)
        for chain, record in zip(chains, chosen):
            if chain and mode == "free":
                by_lost[sum(bool(chain[m]["span"]) for m in range(1, 2 * n, 2))].append(
                    record["correct"])
        for count, right in sorted(by_lost.items()):
            lines.append(f"            {count} computed steps replaced: accuracy "
                         f"{sum(right) / len(right):.3f}, n {len(right)}")
    lines.insert(0, f"{mode:9} accuracy {mean(records, 'correct'):.3f}, total length "
                    f"{mean(records, 'length'):.2f}")
    return lines


def error_table(records, problems):
    """-> lines of text: error of single operations by how they are written."""
    wrong, table = wrong_facts(), defaultdict(lambda: [0, 0])
    for record, problem in zip(records, problems):
        items = chain_of(record, problem)
        for kind, taught_wrong, is_wrong in items and local_errors(record, problem, items, wrong) \
                or []:
            cell = table[kind, taught_wrong]
            cell[0] += is_wrong
            cell[1] += 1
    lines = ["error of an operation: facts taught right | facts taught wrong"]
    for kind in sorted({kind for kind, _ in table}):
        cells = [table[kind, which] for which in (False, True)]
        shares = [f"{bad / max(1, n):.4f} of {n:4}" for bad, n in cells]
        lines.append(f"  {kind:38} {shares[0]} | {shares[1]}")
    return lines


def rank_lines(lm, policy, problems):
    """How often a computed step is among the k lowest, ranked by a model -> lines of text."""
    found = hyrea.chain_entropies(lm, problems, policy.markers)
    lines = []
    for n in sorted({len(row) for row in found}):
        rows = [row for row in found if len(row) == n]
        shares = []
        for k in range(1, n // 2 + 1):
            lowest = [sorted(range(n), key=lambda i: row[i])[:k] for row in rows]
            shares.append(f"k={k} {sum(i % 2 for low in lowest for i in low) / k / len(rows):.3f}")
        lines.append(f"  {n // 2} operations: {', '.join(shares)}")
    return lines


def rank_table(name, policy, tokenizer, problems, cfg):
    """rank_lines of the model that ranked a cold start and of the one before it; [] without one."""
    rankers = []
    for place in sorted(Path(name).glob("**/trainer.pt")):
        rankers += torch.load(place, weights_only=True).get("ranker", [])
    if not rankers:
        return []
    problems = hyrea.read_demonstrations(problems, tokenizer, policy, cfg)
    before, _ = load_model(checkpoint_settings(model_folder(name))["model"])
    lines = ["computed steps among the k lowest, ranked by the model before the cold start"]
    lines += rank_lines(before, policy, problems)
    policy.lm.load_state_dict(rankers[0])
    return [*lines, "by the model that ranked", *rank_lines(policy.lm, policy, problems)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--limit", type=int, default=1024)
    own = parser.parse_args()
    for name in own.models:
        _, cfg, _, _ = evaluation.configure(name, evaluation.parse_args([name]))
        policy, tokenizer = evaluation.load_policy(hyrea, cfg)
        problems = encode_prompts(tokenizer, load_problems(cfg.train, "test", own.limit), cfg)
        lines = []
        for mode, rule in RULES.items():
            records = decode(policy, tokenizer, problems, cfg, rule)
            lines += report(name, mode, records, problems)
            if mode in ("free", "copies"):
                lines += error_table(records, problems)
        lines += rank_table(name, policy, tokenizer, problems, cfg)
        print(name, *lines, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
