"""Rewards, the clipped loss, what teaches nothing, replayed latents, and gradients on two ranks."""

import pytest
import torch
from conftest import ROOT, make_tokenizer
from runs import flags, launch, rows, train
from test_hyrea import built, draw_often, grads
from test_replay import PROMPTS, draw, gradients, score

import hyrea as script
from common import grade, lm_logits

torch.set_num_threads(1)
S = script.MARKERS[0]


def record(correct, marker=True, switches=0, truncated=False):
    return {"correct": correct, "format_ok": marker, "truncated": truncated,
            "completion": S * 3, "switches": switches}


def reward(record, cfg):
    return script.reward({**record, "reward_parts": script.reward_parts(record, cfg)})


def test_default_rewards_put_a_right_answer_before_any_use_of_latents():
    cfg = script.Config()
    values = [reward(r, cfg) for r in (
        record(False, False), record(False, switches=1), record(True), record(True, switches=1))]
    assert values == sorted(values) and len(set(values)) == 4
    assert reward(record(False, switches=3), cfg) < reward(record(True, marker=False), cfg)
    assert reward(record(True), cfg) == pytest.approx(1.2)
    assert reward(record(True, truncated=True), cfg) == pytest.approx(1.0)  # no EOS: no format
    assert script.latent_reward(record(True), cfg) == 0
    assert script.latent_reward(record(True, True, 1), cfg) == 1
    weights = script.Config(reward_accuracy=2.0, reward_format=0.5, reward_latent=0.25)
    assert reward(record(True, switches=1), weights) == 2.75


@pytest.mark.parametrize("kind, expected", [("any", [0, 1, 1]), ("frac", [0, 0.25, 1])])
def test_the_latent_reward_counts_switches(kind, expected):
    _, cfg = built(reward_latent=0.5, latent_reward=kind, max_replaced_steps=4)
    found = [reward(record(False, False, n), cfg) for n in (0, 1, 9)]
    assert found == pytest.approx([0.5 * x for x in expected])
    _, cfg = built(max_replaced_steps=0, latent_reward=kind)
    assert reward(record(True), cfg) == 1.2  # the explicit baseline never switches


def test_spans_before_the_answer_do_not_touch_it():
    tokenizer = make_tokenizer()
    policy, cfg = built()
    script.Policy(policy.lm, tokenizer, cfg)
    ids = tokenizer(f"+8=1{S}<latent><end-latent></think>7<eos>")["input_ids"]
    batch = {"completion_ids": torch.tensor([ids]), "lengths": torch.tensor([len(ids)]),
             "finished": torch.tensor([True]), "latent_mask": torch.tensor([ids]) == 31}
    found, = grade(batch, [{"question": "", "answer": "7"}], tokenizer, "</think>")
    assert found["correct"] and found["format_ok"] and found["latent_spans"] == [[5, 6]]
    assert found["switches"] == 1
    assert script.latent_reward(found, cfg) == 1
    vocabulary = tokenizer.get_vocab()
    assert len({vocabulary[m] for m in script.MARKERS}) == 3


def test_greedy_decoding_is_deterministic_and_switches_are_spans():
    policy, cfg = built(1)
    one, two = (draw_often(policy, cfg, 2, True, s, 5.0) for s in (1, 2))
    assert torch.equal(one["completion_ids"], two["completion_ids"])
    latent, exists = one["latent_mask"], one["completion_mask"]
    opened = (one["completion_ids"] == policy.start_id) & exists
    opened[:, -3:] = latent[:, -2:] = False  # a span that the limit cuts off
    assert opened.sum() == latent.sum() > 0


def test_an_evaluation_counts_switches(monkeypatch):
    policy, cfg = built(1)
    often = draw_often(policy, cfg, 1, True, 0, 5.0)
    monkeypatch.setattr(script, "rollout", lambda *args: often)
    problems = [{"question": "", "answer": "7", "prompt_ids": p} for p in PROMPTS]
    result = script.evaluate(policy, make_tokenizer(), problems, cfg, None)
    assert result["switches"] == result["latent_steps"] == often["latent_mask"].sum() / 4 > 0


def outputs_of(ratio):
    return {"logprobs": torch.tensor([[ratio]]).log().requires_grad_()}


@pytest.mark.parametrize("ratio, advantage, loss, moves", [
    (1.0, 2.0, -2.0, True), (1.5, 2.0, -2.4, False), (0.5, 2.0, -1.0, True),
    (1.5, -2.0, 3.0, True), (0.5, -2.0, 1.6, False)])
def test_the_ratio_is_clipped_in_the_direction_of_the_advantage(ratio, advantage, loss, moves):
    _, cfg = built()
    outputs = outputs_of(ratio)
    batch = {"advantages": torch.tensor([[advantage]]), "old_logprobs": torch.zeros(1, 1)}
    found = script.policy_loss(outputs, batch, cfg)
    assert found.item() == pytest.approx(loss)
    slope, = torch.autograd.grad(found.sum(), outputs["logprobs"])
    assert bool(slope) == moves


def test_equal_rewards_in_a_group_teach_nothing():
    policy, cfg = built(group_size=6)
    batch = draw_often(policy, cfg, 6)
    batch["rewards"] = torch.full((24,), 1.4)
    batch["advantages"] = script.compute_advantages(batch, cfg)
    assert not batch["advantages"].any()
    batch["rewards"][::2] = 0.2
    batch["advantages"] = script.compute_advantages(batch, cfg)
    assert not batch["advantages"][~batch["loss_mask"]].any()


def test_replayed_latents_score_the_same_and_differ_in_gradient():
    policy, cfg = built(2, replay_latents=True)
    batch = draw_often(policy, cfg)
    own = {n: v for n, v in batch.items() if n != "latent_embeds"}
    torch.testing.assert_close(score(policy, batch), score(policy, own), rtol=0, atol=1e-6)
    weights = batch["loss_mask"].float()
    cheap, exact = (grads(policy, lm_logits(policy.lm, policy.hidden(b)), b, weights)
                    for b in (batch, own))
    flat = [torch.cat([g[n].flatten() for n in exact]) for g in (cheap, exact)]
    assert 0.05 < (flat[0] - flat[1]).norm() / flat[1].norm() < 2


def test_the_reference_reads_its_own_latents():
    policy, cfg = built(2, replay_latents=True)
    batch = draw_often(policy, cfg)
    batch["ref_logprobs"] = script.reference_logprobs(policy, None, batch, cfg)
    torch.testing.assert_close(batch["ref_logprobs"], score(policy, batch), rtol=0, atol=1e-6)
    other, _ = built(2, seed=1)
    before = script.reference_logprobs(policy, other.lm, batch, cfg)
    own = {n: v for n, v in batch.items() if n != "latent_embeds"}
    assert torch.equal(script.reference_logprobs(policy, other.lm, own, cfg), before)
    with torch.no_grad():
        policy.lm.model.layers[0].mlp.up_proj.weight.mul_(3)
    assert torch.equal(script.reference_logprobs(policy, other.lm, batch, cfg), before)
    kl = script.kl_estimate(policy(batch), batch)[batch["loss_mask"]]
    assert kl.min() >= 0 and kl.max() > 0.01


@pytest.mark.parametrize("flag", ["", "--replay_latents", "--end_latent sampled"])
def test_several_updates_on_a_rollout_move_the_ratio_and_stay_finite(
        model, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(script, "reward", lambda record: float(record["length"] % 2))
    more = f"--stage rl --update_epochs 2 --minibatches 2 --latents_per_step 1 {flag}"
    assert isinstance(train("hyrea", flags(model, tmp_path / "run", more)), dict)
    assert max(r["ratio_max"] for r in rows(tmp_path / "run", "train")) > 1.001


TWO_RANKS = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_hyrea import built, draw_often
from common import select_rows
import gc
dist.init_process_group("gloo")
policy, cfg = built(2)
batch = draw_often(policy, cfg)
half = select_rows(batch, range(12 * dist.get_rank(), 12 * dist.get_rank() + 12))
ddp = DistributedDataParallel(policy, broadcast_buffers=False, find_unused_parameters=True)
ddp(half)["logprobs"].sum().backward()
found = {{n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}}
policy.zero_grad()
(policy(batch)["logprobs"].sum() / 2).backward()
for n, p in policy.named_parameters():
    if p.requires_grad:
        assert (found[n] - p.grad).abs().max() <= 1e-6 * (1 + p.grad.abs().max()), n
dist.barrier()
dist.destroy_process_group()
gc.collect()
"""


def test_the_gradient_on_two_ranks_is_the_mean_of_the_local_ones(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(TWO_RANKS.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    job = launch(driver, [], tmp_path / "log", ranks=2)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()


def test_a_bound_on_the_entropy_limits_what_is_replaced():
    from test_hyrea_start import built as demonstrate
    policy, cfg, _, problems = demonstrate(max_entropy=1e-9)
    assert not script.sft_examples(problems, policy, 3, cfg)["latent_mask"].any()


@pytest.mark.parametrize("share, lost", [(0.24, 0), (0.5, 2), (0.74, 2), (1.0, 3)])
def test_a_chain_loses_no_more_than_its_share_of_steps(share, lost):
    from test_hyrea_start import built as demonstrate
    policy, cfg, _, problems = demonstrate(max_replaced_share=share)
    assert {len(problem["steps_ids"]) for problem in problems} == {4}
    batch = script.sft_examples(problems, policy, 3, cfg)
    assert set((batch["completion_ids"] == policy.start_id).sum(1).tolist()) == {lost}


@pytest.mark.parametrize("replace, lost", [("entropy", 3), ("random", 3), ("all", 4)])
def test_entropy_and_chance_never_replace_a_whole_chain(replace, lost):
    from test_hyrea_start import built as demonstrate
    policy, cfg, _, problems = demonstrate(replace=replace)
    batch = script.sft_examples(problems, policy, 4, cfg)
    assert set((batch["completion_ids"] == policy.start_id).sum(1).tolist()) == {lost}


def test_sampled_ends_are_demonstrated_as_going_on_for_c_slots_and_then_ending():
    """A small cold start: greedy decoding uses all c latents, and the forced end is certain."""
    from test_hyrea_start import built as demonstrate
    policy, cfg, _, problems = demonstrate(
        latents_per_step=2, end_latent="sampled", label_ends=True, max_replaced_steps=4,
        replace="all",
        sft_rounds=5, sft_steps=300, sft_batch=6, steps=600, warmup_steps=0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "initial_lr": 0.015}], weight_decay=0)
    batch = script.sft_examples(problems, policy, 4, cfg)
    assert batch["loss_mask"].equal(batch["completion_mask"])
    for step in range(240, 300):  # the last round: all four steps are replaced
        script.sft_step(policy, policy, optimizer, problems, cfg, step)
    ids, labels = batch["completion_ids"], policy(batch, labels=True)["logprobs"].exp()
    assert labels[ids == policy.end_id].min() > 0.9 < labels[ids == policy.latent_id].min()
    found = script.rollout(policy, [p["prompt_ids"] for p in problems], cfg, None, greedy=True)
    opened = (found["completion_ids"] == policy.start_id).sum()
    assert found["latent_mask"].sum() == 2 * opened >= 2 * len(problems)


def test_rl_refuses_a_checkpoint_of_other_spans_in_one_line(model, tmp_path, capsys):
    more = "--max_replaced_steps 2 --latents_per_step 1"
    train("hyrea", flags(model, tmp_path / "one", f"{more} --steps 1"))
    for flag in ("--max_replaced_steps 1", "--latents_per_step 2", "--latent_rms"):
        capsys.readouterr()
        argv = flags(tmp_path / "one", tmp_path / "two", f"{more} {flag}")
        assert train("hyrea", argv) == 2
        line, = capsys.readouterr().err.splitlines()
        assert flag.split()[0] in line
    assert not (tmp_path / "two").exists()


def test_rl_refuses_a_start_with_other_bounds_of_merged_spans(model, tmp_path, capsys):
    more = "--max_replaced_steps 2 --latents_per_step 1 --end_latent sampled --sft_rounds 3"
    train("hyrea", flags(model, tmp_path / "one", f"{more} --merge_spans --steps 1"))
    for flag, word in (("", "--merge_spans False"), ("--replace block", "--replace block"),
                       ("--merge_spans --sft_rounds 2", "--sft_rounds 2")):
        capsys.readouterr()
        assert train("hyrea", flags(tmp_path / "one", tmp_path / "two", f"{more} {flag}")) == 2
        line, = capsys.readouterr().err.splitlines()
        assert word in line
    assert not (tmp_path / "two").exists()


def test_markers_learn_in_float32_and_have_a_reference_beside_adapters(
        model, tmp_path, monkeypatch):
    references, make = [], script.reference_logprobs
    monkeypatch.setattr(script, "reward", lambda record: float(record["length"] % 2))
    monkeypatch.setattr(script, "reference_logprobs", lambda policy, reference, *args: (
        references.append(reference) or make(policy, reference, *args)))
    train("hyrea", flags(model, tmp_path / "run", "--lora_rank 2 --dtype bfloat16 --stage rl"))
    assert references[0] is not None
    state = torch.load(tmp_path / "run/step_000004/trainer.pt", weights_only=True)["policy"]
    assert {v.dtype for v in state.values()} == {torch.float32}
    rows_ = next(v for n, v in state.items() if "embed_tokens" in n)[29:32]
    assert not torch.equal(rows_, rows_.bfloat16().float())


@pytest.mark.parametrize("more, words", [
    ("--stage both", "--stage both sft rl all"), ("--replace some", "--replace some entropy"),
    ("--end_latent never", "--end_latent never forced sampled"),
    ("--latent_reward much", "--latent_reward much any frac"),
    ("--latents_per_step -1", "--latents_per_step -1: at least 0"),
    ("--merge_spans", "--merge_spans --end_latent sampled"),
    ("--replace block", "--replace block --end_latent sampled")])
def test_wrong_settings_are_refused_and_long_spans_warned_of(
        model, tmp_path, capsys, more, words):
    assert train("hyrea", flags(model, tmp_path / "run", more)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words.split())
    script.start_config(script.parse_config(["--latents_per_step", "8"]))
    assert "--latents_per_step 8" in capsys.readouterr().err


def test_markers_are_learned_when_the_rest_of_the_table_is_frozen():
    policy, cfg = built(2)
    found, sums = gradients(script, policy, cfg, draw(script, policy, cfg))
    assert sums["latent_size"][1] > 0 and found["lm.model.norm.weight"].any()
    table = policy.table.weight
    torch.testing.assert_close(table[29:32], table[:29].mean(0).expand(3, -1))
