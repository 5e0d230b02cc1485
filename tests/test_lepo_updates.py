"""LEPO: the token baseline, several updates on a rollout, the reference, one short run."""

import copy
from importlib import import_module

import pytest
import torch
from runs import checkpoint_values, flags, rows, train
from test_hrpo import grads
from test_lepo import KINDS, rollout
from test_lepo_gradients import loss_of
from test_replay import PROMPTS, build, draw, gradients, score
from test_resume import few_problems, odd_length

import hrpo
import lepo
from common import (
    add_lora,
    completion_hidden,
    completion_logprobs,
    frozen_copy,
    lm_logits,
    select_rows,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("changes", [
    {}, {"top_k": 9, "top_p": 0.8}, {"train_embeddings": True}])  # HRPO scores at temperature 1
def test_no_latent_steps_is_the_token_model_of_the_other_scripts_bit_for_bit(changes):
    found = []
    for module, off in ((hrpo, {"hybrid": False}), (lepo, {"latent_steps": 0})):
        _, policy, cfg = build(module.METHOD, **changes, **off, kl_coef=0.1, group_size=4)
        batch = draw(module, policy, cfg, group_size=4)
        batch["rewards"] = (torch.arange(16) % 3 == 0).float()
        batch["advantages"] = module.compute_advantages(batch, cfg)
        batch["weights"] = module.loss_weights(batch, cfg)
        reference = frozen_copy(policy.lm)
        reference.lm_head.weight.data.mul_(1.1)
        batch["ref_logprobs"] = module.reference_logprobs(policy, reference, batch, cfg)
        loss = (module.policy_loss(policy(batch), batch, cfg) * batch["weights"]).sum()
        found.append((batch, loss, grads(policy, loss)))
    (one, loss, g), (two, lepo_loss, lepo_g) = found
    assert two.keys() - one.keys() <= {"topk_ids", "topk_scores"}  # one-hot, if there at all
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not two["latent_mask"].any() and torch.equal(loss, lepo_loss)
    for name, value in lepo_g.items():
        assert (value is None) == (g[name] is None)
        if "embed_tokens" in name and value is not None:  # a sum of rows, in another order
            torch.testing.assert_close(value, g[name], rtol=1e-5, atol=1e-7)
        else:
            assert value is None or torch.equal(value, g[name]), name


def test_runs_without_latent_steps_equal_those_of_hrpo(model, tmp_path, monkeypatch):
    same = "--top_k 20 --top_p 0.9 --temperature 1 --weight_decay 0.1 --max_grad_norm 1"
    for name, off in (("hrpo", "--no-hybrid"), ("lepo", "--latent_steps 0")):
        monkeypatch.setattr(import_module(name), "reward", odd_length)
        monkeypatch.setattr(import_module(name), "load_problems", few_problems)
        train(name, flags(model, tmp_path / name, f"{same} {off}"))
    one, two = (checkpoint_values(tmp_path / n / "step_000004") for n in ("hrpo", "lepo"))
    weights = [n for n in two if n.startswith("model.safetensors")]
    assert len(weights) > 8 and all(torch.equal(one[n], two[n]) for n in weights)
    for a, b in zip(rows(tmp_path / "hrpo"), rows(tmp_path / "lepo")):
        assert {k: v for k, v in a.items() if k in b} == {k: v for k, v in b.items() if k in a}


def test_one_hot_candidates_are_scored_exactly_as_tokens():
    policy, cfg, batch = rollout(latent_steps=0)
    ids = batch["completion_ids"]
    with torch.no_grad():
        hidden = completion_hidden(policy.lm, batch, policy.table(ids))
        tokens, _ = completion_logprobs(policy.lm, hidden, ids, batch["loss_mask"])
    assert torch.equal(score(policy, batch), tokens)
    u = torch.full((*ids.shape, 29), -torch.inf)
    u[..., 0] = 0.0
    padded = torch.nn.functional.pad(ids[..., None], (0, 28))
    for latent in (torch.zeros_like(batch["latent_mask"]), batch["loss_mask"]):
        one_hot = {**batch, "topk_ids": padded, "topk_scores": u, "latent_mask": latent}
        assert torch.equal(score(policy, one_hot), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_loss_alone_and_whatever_stands_behind_its_end(kind):
    policy, cfg, batch = rollout(latent_grad=kind)
    dead = ~batch["completion_mask"]
    other = {**batch, "topk_ids": lepo.candidate_ids(batch).clone()}
    other["topk_scores"] = batch["topk_scores"].clone()
    other["topk_ids"][dead], other["topk_scores"][dead] = 7, 1.5
    rows = [lepo.policy_loss(policy(b), b, cfg) * b["weights"] for b in (batch, other)]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-7)
    assert dead.any() and not rows[1][dead].any()
    for row in range(16):
        alone = select_rows(batch, [row])
        found = (lepo.policy_loss(policy(alone), alone, cfg) * alone["weights"]).sum()
        assert abs(found - rows[0][row].sum()) < 1e-5
    one, two = (gradients(lepo, policy, cfg, b)[0] for b in (batch, other))
    for name, g in one.items():
        torch.testing.assert_close(two[name], g, rtol=1e-5, atol=1e-6)

def some_updates(monkeypatch, **changes):
    """train_step with two passes of two updates -> the update parts, and per call of policy_loss
    the logprobs, old ones and latent mask."""
    _, policy, cfg = build("lepo", **{**dict(
        update_epochs=2, minibatches=2, num_prompts=4, group_size=4, lr=0.02, warmup_steps=0,
        kl_coef=0.0, micro_batch=1, eos=(2,)), **changes})
    calls, parts, loss, update = [], [], lepo.policy_loss, lepo.update
    start = copy.deepcopy(policy)

    def keep_loss(outputs, batch, cfg):
        calls.append((outputs["logprobs"].detach(), batch))
        return loss(outputs, batch, cfg)

    def keep_update(*args):
        if args[5].update_epochs * args[5].minibatches == 1:  # else it calls itself with parts
            parts.append((args[4], len(calls)))
        return update(*args)

    monkeypatch.setattr(lepo, "policy_loss", keep_loss)
    monkeypatch.setattr(lepo, "update", keep_update)
    monkeypatch.setattr(lepo, "reward", odd_length)
    problems = [{"question": "q", "answer": "5", "prompt_ids": p} for p in PROMPTS]
    optimizer = torch.optim.AdamW(lepo.param_groups(policy, cfg))
    row, _ = lepo.train_step(policy, policy, None, optimizer, problems, cfg, 0)
    return start, row, parts, calls


@pytest.mark.parametrize("micro_batch, max_tokens", [(1, 0), (16, 0), (5, 60)])
def test_old_logprobs_are_those_before_the_first_update(monkeypatch, micro_batch, max_tokens):
    start, row, parts, calls = some_updates(
        monkeypatch, micro_batch=micro_batch, max_tokens=max_tokens, eos=(2, 5, 8, 11))
    assert [len(part["lengths"]) for part, _ in parts] == [8] * 4
    for part, _ in parts:
        torch.testing.assert_close(part["old_logprobs"], score(start, part), rtol=0, atol=2e-5)
        assert part["old_logprobs"].any() and not part["old_logprobs"].requires_grad
        assert torch.equal(part["old_logprobs"] != 0, part["loss_mask"])
    gaps = [max(float((now - b["old_logprobs"])[b["loss_mask"]].abs().max()) for now, b in
                calls[a:b]) for (_, a), (_, b) in zip(parts, [*parts[1:], (0, len(calls))])]
    assert gaps[0] == 0 if micro_batch == 1 else gaps[0] < 2e-5
    assert min(gaps[1:]) > 1e-2 and row["ratio_max"] > 1.01
    widths = torch.cat([part["prompt_mask"].sum(1) for part, _ in parts[:2]]).tolist()
    assert sorted(widths) == sorted(len(p) for p in PROMPTS for _ in range(4))  # all rows, once
    for first, again in ((0, 2), (1, 3)):  # the second pass has the rows of the first
        assert torch.equal(parts[first][0]["completion_ids"], parts[again][0]["completion_ids"])


def test_one_update_needs_no_old_logprobs(monkeypatch):
    _, row, parts, _ = some_updates(monkeypatch, update_epochs=1, minibatches=1)
    assert len(parts) == 1 and "old_logprobs" not in parts[0][0] and row["ratio_max"] == 1


@pytest.mark.parametrize("clip_latents", [False, True])
def test_clipping_stops_tokens_and_latent_steps_only_if_wanted(clip_latents):
    _, _, cfg = build("lepo", clip_eps=0.2, clip_latents=clip_latents, kl_coef=0.0)
    change = torch.linspace(-0.5, 0.5, 11).repeat(4, 1)
    logprobs = (change - 2.0).requires_grad_()
    A = torch.tensor([1.5, -1.5, 1.5, -1.5])[:, None].expand(4, 11)
    latent = torch.tensor([True, True, False, False])[:, None].expand(4, 11)
    batch = {"old_logprobs": torch.full((4, 11), -2.0), "advantages": A, "latent_mask": latent}
    loss = lepo.policy_loss({"logprobs": logprobs}, batch, cfg)
    loss.sum().backward()
    for row in range(4):
        for t in range(11):
            d, a, x = change[row, t].exp().item(), A[row, t].item(), logprobs[row, t].item()
            value, slope = -a * x, -a
            if clip_latents or row > 1:
                value = -min(d * a, min(max(d, 0.8), 1.2) * a)
                slope = 0 if (a > 0 and d > 1.2) or (a < 0 and d < 0.8) else -a * d
            assert loss[row, t].item() == pytest.approx(value, rel=1e-5)
            assert logprobs.grad[row, t].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_reads_the_same_mixtures_and_nothing_that_is_trained(lora_rank):
    _, policy, cfg = build("lepo", train_embeddings=lora_rank == 0, top_k=9, temperature=1.3)
    plain = copy.deepcopy(policy.lm)
    if lora_rank:
        add_lora(policy.lm, lora_rank)
    reference = None if lora_rank else frozen_copy(policy.lm)
    batch = draw(lepo, policy, cfg)
    before = lepo.reference_logprobs(policy, reference, batch, cfg)
    with torch.no_grad():
        outputs = policy(batch)
        z = (batch["topk_scores"] / cfg.latent_tau).softmax(-1)[..., None]
        mixed = (z * plain.get_input_embeddings().weight[batch["topk_ids"]]).sum(2)
        every = lm_logits(plain, completion_hidden(plain, batch, mixed)) / 1.3
    heaviest = batch["topk_ids"].gather(-1, batch["topk_scores"].argmax(-1)[..., None])
    slow = every.log_softmax(-1).gather(-1, heaviest)[..., 0] * batch["loss_mask"]
    torch.testing.assert_close(before, slow, rtol=0, atol=2e-5)
    kl = lepo.kl_estimate(outputs, {"ref_logprobs": before})
    assert kl.max() < 1e-9 and (heaviest[..., 0] != batch["completion_ids"])[
        batch["latent_mask"]].any()
    for p in policy.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    after = lepo.reference_logprobs(policy, reference, batch, cfg)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    kl = lepo.kl_estimate(policy(batch), {"ref_logprobs": before})
    assert (kl[batch["latent_mask"]] > 1e-3).any() and (kl >= 0).all()


@pytest.mark.parametrize("kind", ["soft", "none"])
def test_the_loss_adds_beta_times_k3_at_every_position(kind):
    policy, cfg, batch = rollout(kl_coef=0.3, latent_grad=kind)
    reference = frozen_copy(policy.lm)
    reference.lm_head.weight.data.mul_(1.2)
    batch["ref_logprobs"] = lepo.reference_logprobs(policy, reference, batch, cfg)
    outputs = policy(batch)
    with_kl = lepo.policy_loss(outputs, batch, cfg)
    cfg.kl_coef = 0.0
    extra = (with_kl - lepo.policy_loss(outputs, batch, cfg))[batch["loss_mask"]]
    d = (batch["ref_logprobs"] - outputs["token_logprobs"])[batch["loss_mask"]].double()
    torch.testing.assert_close(extra, (0.3 * (d.exp() - d - 1)).float(), rtol=1e-3, atol=1e-5)
    assert loss_of(policy, cfg, batch).isfinite() and (extra > 1e-3).any()
