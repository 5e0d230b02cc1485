"""The cold start: steps, entropies, what is replaced, labels, curriculum, files and resume."""

import math
import random

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
    ("a = .5, b\n\n1. First. e.g. x = y", ["a = .5, b\n\n", "1. First.", " e.g. x = y"]),
    ("12345.\nSo. it is. Ok.", ["12345.\nSo.", " it is. Ok."]),
    ("", []), ("no.", ["no."]), ("+8=3+8", ["+8=3+8"])])
def test_steps_end_at_newlines_and_full_stops_but_not_in_decimals(text, steps):
    assert script.split_steps(text) == steps


def test_steps_joined_are_the_text():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("a1. \n.\t") for _ in range(rng.randint(0, 30)))
        assert "".join(script.split_steps(text)) == text


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
@pytest.mark.parametrize("k, ends", [(0, True), (2, True), (2, False), (4, False)])
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
    cfg.replace = "all"
    assert script.round_of(cfg.sft_steps - 1, cfg)[3] == 9
    cfg.max_replaced_steps = 0
    assert script.round_of(cfg.sft_steps, cfg)[3] == 0


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
