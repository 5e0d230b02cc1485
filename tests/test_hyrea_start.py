"""The cold start: steps, entropies, what is replaced, labels, curriculum, files and resume."""

import math
import random
import time

import pytest
import torch
from conftest import make_lm, make_tokenizer
from test_replay import build
from torch.nn import functional as F

import common
import hyrea as script
from common import make_rng, select_rows

torch.set_num_threads(1)


def built(**changes):
    tokenizer = make_tokenizer()
    _, policy, cfg = build("hyrea", tokenizer=tokenizer, answer_marker="</think>",
                           max_completion_length=40, **changes)
    policy.start_id = policy.markers[0] = len(tokenizer) - 3  # the real one
    problems = common.encode_prompts(
        tokenizer, common.load_problems("arithmetic-restated:2", "train", 6), cfg)
    return policy, cfg, tokenizer, script.read_demonstrations(problems, tokenizer, policy, cfg)


def learn(policy, cfg, problems, optimizer):
    """One update on all problems, with two steps of each chain replaced -> its metrics."""
    cfg.sft_steps, cfg.sft_rounds, cfg.sft_batch = 3, 3, len(problems)
    row, records = script.sft_step(policy, policy, optimizer, problems, cfg, step=2)
    assert row["replaced"] == 2 and records == []
    return row


@pytest.mark.parametrize("text, steps", [
    ("Pi is 3.14. So what.\nThen 2", ["Pi is 3.14.", " So what.\n", "Then 2"]),
    ("a = .5, b\n\n1. First. e.g. x = y", ["a = .5,", " b\n\n1. First.", " e.g. x = y"]),
    ("12345.\nSo. it is. Ok.", ["12345.\nSo.", " it is. Ok."]),
    ("", []), ("no.", ["no."]), ("+8=3+8", ["+8=3+8"])])
def test_steps_end_at_newlines_and_full_stops_but_not_in_decimals(text, steps):
    assert script.split_steps(text) == steps


@pytest.mark.parametrize("text, steps", [
    ("He buys 4, so 3 + 4 = 7. Then he leaves.", ["He buys 4, so", " 3 + 4 = 7.",
                                                  " Then he leaves."]),
    ("48/2 = <<48/2=24>>24 clips in May", ["48/2 = <<48/2=24>>24", " clips in May"]),
    ("3 apples + 4 apples = 7 apples.", ["3 apples + 4 apples = 7 apples."]),
    ("We get a = b = 2.5. Also x=1, y=2.", ["We get", " a = b = 2.5.", " Also x=1,", " y=2."]),
    ("It is $5 + $3 = $8. He pays $10.", ["It is $5 + $3 = $8.", " He pays $10."]),
    ("Let $x$ be 3.1. Then $x + 1. = 4.1$ holds.", ["Let $x$ be 3.1.", " Then $x + 1. = 4.1$",
                                                   " holds."]),
    (r"So \[ x^2 = 9. \] That is \(y = 2\).", [r"So \[ x^2 = 9. \]", r" That is", r" \(y = 2\)."]),
    ("\\begin{align*}\na &= b \\\\\n&= c \\\\\n d &= e\n\\end{align*}\nSo it is.",
     ["\\begin{align*}\na &= b \\\\", "\n&= c \\\\", "\n d &= e\n\\end{align*}\n", "So it is."]),
    (r"Thus y=\frac{1}{2} \cdot 3. Done now", [r"Thus y=\frac{1}{2} \cdot 3.", " Done now"]),
    ("if x >= 3 holds", ["if x >= 3 holds"]),
    ("It is so (for x = 3, as seen) here", ["It is so (for", " x = 3,", " as seen) here"]),
    ("5 - 2 and 3, so 20 x .1 = 2. Then no", ["5 - 2 and 3, so", " 20 x .1 = 2.", " Then no"])])
def test_an_equation_is_a_step_of_its_own(text, steps):
    assert script.split_steps(text) == steps


@pytest.mark.parametrize("text, steps", [
    ("Ask Dr. Lee, i.e. him. See No. 5 there.", ["Ask Dr. Lee, i.e. him.", " See No. 5 there."]),
    ("It is so. No. Then we go", ["It is so.", " No. Then we go"])])
def test_abbreviations_end_no_step(text, steps):
    assert script.split_steps(text) == steps


@pytest.mark.parametrize("alphabet", [
    list("a1. \n.\t"), [*"ax1.,=+ \n$({})&", "\\\\", "\\[", "\\]", "\\(", "\\)", "\\frac", "Dr.",
                        "\\begin{align}", "\\end{align}", "<<", ">>"]])
def test_steps_joined_are_the_text(alphabet):
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 30)))
        steps = script.split_steps(text)
        assert "".join(steps) == text and "" not in steps


@pytest.mark.parametrize("piece", ["1", "1 + ", "(", "\\[", "a ", "$a", " ", "a.", "{a ", "(1 "])
def test_a_long_text_without_an_equation_is_split_at_once(piece):
    started = time.time()
    for text in (piece * 6000, piece * 6000 + "\nx = 3"):
        assert "".join(script.split_steps(text)) == text
    assert time.time() - started < 1.5  # the square of its length would take 3 s and more


def test_entropy_of_a_step_is_that_of_the_distributions_that_predict_its_tokens():
    entropies, lm, prompt = script.step_entropies, make_lm(), [1, 4, 6]
    steps = [[7, 8, 9], [10], [11, 12]]
    with torch.no_grad():
        ids = torch.tensor([prompt + sum(steps, [])])
        logprobs = lm(input_ids=ids).logits[0, :, : lm.num_tokens].log_softmax(-1)
    token = -(logprobs.exp() * logprobs).sum(-1)[len(prompt) - 1 :]
    wanted = [float(x) for x in (token[:3].mean(), token[3], token[4:6].mean())]
    assert entropies(lm, prompt, steps) == pytest.approx(wanted, abs=1e-5)
    many = script.chain_entropies(lm, [{"prompt_ids": prompt, "steps_ids": steps},
                                       {"prompt_ids": [5] * 6, "steps_ids": [[3] * 9]}])
    assert many[0] == pytest.approx(wanted, abs=1e-5)
    head = lm.get_output_embeddings().weight
    head.data.zero_()
    assert entropies(lm, prompt, steps) == pytest.approx([math.log(29)] * 3)
    lm.model.norm.weight.data.zero_()[0] = 1000.0  # one state decides all: a certain model
    head.data[7, 0], head.data[8, 0] = 1000.0, -1000.0
    assert entropies(lm, prompt, steps) == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("k", range(6))
def test_the_least_uncertain_steps_are_replaced(k):
    steps, entropies = list("abcde"), [0.3, 0.1, 0.2, 0.1, 0.5]
    found = script.replace_steps(steps, entropies, k, "entropy")
    gone = [e for e, x in zip(entropies, found) if x is None]
    kept = [e for e, x in zip(entropies, found) if x is not None]
    assert len(gone) == k and max(gone, default=0) <= min(kept, default=1)
    assert [x for x in found if x] == [x for x, y in zip(steps, found) if y]
    assert k != 1 or found == ["a", None, "c", "d", "e"]  # the first of equals
    assert script.replace_steps(steps, entropies, k, "all") == [None] * k + steps[k:]
    assert script.replace_steps(steps, entropies, 9, "all") == [None] * 5


def test_random_replacement_ignores_entropy_and_only_grows_with_k():
    counts = torch.zeros(5)
    for seed in range(400):
        sets = [{i for i, x in enumerate(script.replace_steps(
            list("abcde"), [0, 1, 2, 3, 4], k, "random", make_rng("cpu", seed))) if x is None}
            for k in range(6)]
        assert all(a < b for a, b in zip(sets, sets[1:]))
        counts[list(sets[2])] += 1
    assert (counts - 160).abs().max() < 5 * (400 * 0.4 * 0.6) ** 0.5


@pytest.mark.parametrize("c", [0, 1, 3])
@pytest.mark.parametrize("k, ends", [(0, True), (2, True), (2, False), (3, False)])
def test_a_demonstration_has_k_spans_and_the_whole_answer(c, k, ends):
    policy, cfg, tokenizer, problems = built(latents_per_step=c, label_ends=ends)
    batch = script.sft_examples(problems, policy, k, cfg)
    S, E, L = policy.start_id, policy.end_id, policy.latent_id
    for ids, n, problem in zip(batch["completion_ids"].tolist(), batch["lengths"], problems):
        ids = ids[:n]
        assert (ids.count(S), ids.count(E), ids.count(L)) == (k, k, k * c)
        for t in [t for t, i in enumerate(ids) if i == S]:
            assert ids[t + 1 : t + c + 2] == [L] * c + [E]
        assert tokenizer.decode(ids[-3:]) == f"</think>{problem['teacher_answer']}<eos>"
        if k == 0:
            assert ids == sum(problem["steps_ids"], []) + problem["answer_ids"]
            assert tokenizer.decode(ids[:-3]) == "".join(problem["steps"])
    weights = script.label_weights(batch, policy, 4.0)
    ids = batch["completion_ids"]
    assert set(weights[ids == S].tolist()) == set([4.0] * min(k, 1))
    assert set(weights[ids == E].tolist()) == set([4.0 * ends] * min(k, 1))
    assert not weights[(ids == L) | ~batch["completion_mask"]].any()
    others = batch["completion_mask"] & (ids != S) & (ids != E) & (ids != L)
    assert set(weights[others].tolist()) == {1.0}


@pytest.mark.parametrize("ends", [True, False])
def test_the_loss_is_the_weighted_cross_entropy_and_never_reads_the_row_of_the_latent_token(ends):
    policy, cfg, _, problems = built(
        latents_per_step=2, latent_rms=False, label_ends=ends, temperature=0.7)  # not used here
    batch = script.sft_examples(problems, policy, 2, cfg)
    weights = script.label_weights(batch, policy, 4.0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained, "initial_lr": 0.0}], 0.0)
    with torch.no_grad():
        logits = common.lm_logits(policy.lm, policy.hidden(batch))
        logits[..., policy.latent_id] = -torch.inf  # ends compete with all text
        ce = F.cross_entropy(logits.transpose(1, 2), batch["completion_ids"], reduction="none")
        wanted = (ce * weights)[weights > 0].sum() / weights.sum()
        before = policy.hidden(batch)
        policy.table.weight[policy.latent_id] += 3.0
        assert torch.equal(policy.hidden(batch), before)
    for size in (64, 2):
        cfg.micro_batch = size
        row = learn(policy, cfg, problems, optimizer)
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-4) and row["grad_norm"] > 0


def test_curriculum_adds_a_tenth_of_the_data_and_a_step_a_round():
    cfg = script.Config(sft_steps=95, max_replaced_steps=3)
    seen = [script.round_of(step, cfg) for step in range(95)]
    numbers, firsts, shares, ks = zip(*seen)
    assert numbers[0] == ks[0] == 0 and numbers[-1] == 9 and max(ks) == 3
    assert list(ks) == sorted(ks) and list(shares) == sorted(shares)
    assert shares[0] == pytest.approx(0.1) and shares[-1] == pytest.approx(1.0)
    assert len(set(firsts)) == len(set(numbers)) == 10
    for cfg.sft_steps in (11, 95, 300):  # no step count leaves rounds out or makes one long
        found = [script.round_of(step, cfg)[0] for step in range(cfg.sft_steps)]
        assert {found.count(n) for n in range(10)} <= {cfg.sft_steps // 10, cfg.sft_steps // 10 + 1}
    for cfg.replace in ("all", "block"):
        assert script.round_of(cfg.sft_steps - 1, cfg)[3] == 9
    cfg.max_replaced_steps = 0
    assert script.round_of(cfg.sft_steps, cfg)[3] == 0


def test_the_preset_goes_through_s_plus_1_rounds_and_adds_a_tenth_of_the_data_in_each():
    cfg = script.parse_config(["--preset", "paper", "--model", "tiny"])
    assert (cfg.max_replaced_steps, cfg.sft_rounds) == (5, 6)
    seen = sorted({script.round_of(step, cfg) for step in range(cfg.sft_steps)})
    assert [k for *_, k in seen] == [0, 1, 2, 3, 4, 5]
    assert [share for _, _, share, _ in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    more = script.parse_config(["--preset", "paper", "--model", "tiny", "--sft_rounds", "12"])
    assert script.round_of(cfg.sft_steps, more)[2:] == (1.0, 5)  # never more than all
    assert script.Config(sft_rounds=0, max_replaced_steps=0).sft_rounds == 1


def test_the_preset_has_the_numbers_of_section_4_1():
    cfg = script.parse_config(["--preset", "paper", "--model", "tiny"])
    assert (cfg.sft_lr, cfg.sft_batch, cfg.lr) == (4e-7, 32, 1e-6)
    assert (cfg.num_prompts, cfg.group_size, cfg.temperature) == (128, 8, 1.0)
    assert (cfg.update_epochs, cfg.minibatches, cfg.marker_weight) == (1, 1, 4.0)
    assert not cfg.entropy_once


@pytest.mark.parametrize("c", [0, 1, 2])
def test_neighbouring_replaced_steps_become_one_span(c):
    more = dict(latents_per_step=c, end_latent="sampled", max_replaced_steps=4)
    S, E, L = 29, 30, 31
    for replace, k in (("all", 3), ("block", 3), ("block", 4), ("random", 2)):
        policy, cfg, _, problems = built(replace=replace, merge_spans=True, **more)
        plain, apart, _, _ = built(replace=replace.replace("block", "all"), **more)
        ids, old = (script.sft_examples(problems, p, k, x)["completion_ids"].flatten().tolist()
                    for p, x in ((policy, cfg), (plain, apart)))
        assert (policy.start_id, policy.end_id, policy.latent_id) == (S, E, L)
        text = [i for i in ids if i not in (0, S, E, L)]
        assert text == [i for i in old if i not in (0, S, E, L)]
        assert ids.count(L) == old.count(L) == len(problems) * k * c
        assert not any(a == E and b == S for a, b in zip(ids, ids[1:]))
        if replace != "random":  # one span, c latents for each step of it
            assert ids.count(S) == ids.count(E) == len(problems)
            assert all(ids[t + 1 : t + 2 + k * c] == [L] * (k * c) + [E]
                       for t, i in enumerate(ids) if i == S)


def test_block_replaces_a_whole_chain_by_a_single_span_in_the_last_round():
    """Coconut, as the paper compares with it: one switch, c latents for each step."""
    policy, cfg, _, problems = built(
        replace="block", end_latent="sampled", latents_per_step=2, sft_rounds=9)
    *_, k = script.round_of(cfg.sft_steps, cfg)
    batch = script.sft_examples(problems, policy, k, cfg)
    S, E, L = policy.start_id, policy.end_id, policy.latent_id
    for ids, n, problem in zip(batch["completion_ids"].tolist(), batch["lengths"], problems):
        size = 2 * len(problem["steps_ids"])
        assert ids[:n] == [S, *[L] * size, E, *problem["answer_ids"]]
    assert script.span_limit(cfg) == 16  # 2 x 8, the steps of the last round


def test_the_end_of_a_span_below_the_limit_is_a_choice_and_has_a_label():
    policy, cfg, _, problems = built(
        replace="all", end_latent="sampled", merge_spans=True, max_replaced_steps=4,
        sft_rounds=5, latents_per_step=1)
    assert script.span_limit(cfg) == 4
    for k, labelled in ((3, True), (4, False)):  # 4 latents: the end is forced
        batch = script.sft_examples(problems, policy, k, cfg)
        at_end = batch["completion_ids"] == policy.end_id
        assert at_end.sum() == len(problems)
        assert batch["loss_mask"][at_end].all() == labelled == batch["loss_mask"][at_end].any()
        assert batch["loss_mask"][batch["latent_mask"]].all()
        with torch.no_grad():  # ends and latents compete with each other only
            logits = common.lm_logits(policy.lm, policy.hidden(batch))
            wanted = logits[..., [policy.latent_id, policy.end_id]].log_softmax(-1)
            found = policy(batch, labels=True)["logprobs"]
        torch.testing.assert_close(
            found[batch["latent_mask"]], wanted[..., 0][batch["latent_mask"]])
        if labelled:
            torch.testing.assert_close(found[at_end], wanted[..., 1][at_end])


def test_demonstrations_need_a_chain_that_fits_and_does_not_hold_the_marker(capsys):
    policy, cfg, tokenizer, _ = built()
    problem = {"question": "1", "steps": None, "solution": None, "answer": "7", "prompt_ids": [1]}
    chains = [{"solution": "1+2.\n3"}, {"steps": ["1", "2"]}, {}, {"solution": "1</think>2"},
              {"solution": "1" * 50}]
    policy.lm.eos_ids = [2]
    kept = script.read_demonstrations([{**problem, **c} for c in chains], tokenizer, policy, cfg)
    assert {len(p["steps_ids"]) for p in kept} == {1, 2} and kept[0]["answer_ids"][-1] == 2
    assert "3 of 5 problems" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.read_demonstrations([problem], tokenizer, policy, cfg)
    chains = [{**problem, "steps": ["1", "2", "3"]}]  # 3 + 4 tokens; with spans of 3 instead, 13
    for cfg.max_completion_length, S in ((13, 3), (12, 2), (7, 0)):
        cfg.max_replaced_steps = S
        assert script.read_demonstrations(chains, tokenizer, policy, cfg)
        cfg.max_replaced_steps = S + 1
        with pytest.raises(SystemExit):
            script.read_demonstrations(
                [{**chains[0], "steps": list("1234")}], tokenizer, policy, cfg)


def test_the_two_kinds_of_steps_of_the_built_in_chain():
    problem = common.load_problems("arithmetic-restated:3", "train", 4)[3]
    value = problem["question"][0]
    for copied, computed in zip(problem["steps"][::2], problem["steps"][1::2]):
        operation = copied[:2]
        assert copied == f"{operation}={value}{operation}" and operation in problem["question"]
        assert computed[0] == "=" and len(computed) == 2
        value = computed[1]
    assert value == problem["teacher_answer"]


def test_rows_of_a_batch_do_not_change_each_others_demonstration():
    policy, cfg, _, problems = built()
    whole = script.sft_examples(problems, policy, 2, cfg)
    for row in range(6):
        alone = script.sft_examples(problems[row : row + 1], policy, 2, cfg)
        for name, value in select_rows(whole, [row]).items():
            assert torch.equal(value, alone[name]), name
