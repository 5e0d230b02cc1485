"""HRPO: what is constant, what carries gradient, what the reference and the optimizer see."""

import copy
import re

import pytest
import torch
from conftest import make_lm, make_tokenizer
from test_hrpo import STRONG, grads, loss_of, rollout
from test_replay import build, draw, score

import hrpo
from common import (
    add_lora,
    completion_hidden,
    frozen_copy,
    lm_logits,
)

torch.set_num_threads(1)


def full_bptt_logprobs(policy, batch, cfg):
    """Log-probs when s is recomputed, with gradient, from the logits that sampled its token."""
    logits = [None] * batch["completion_ids"].shape[1]
    embeds = policy.completion_embeds(batch)
    embeds = [embeds[:, t].detach() for t in range(len(logits))]
    for t in range(len(logits)):
        hidden = completion_hidden(policy.lm, batch, torch.stack(embeds, 1))
        logits[t] = lm_logits(policy.lm, hidden[:, t])
        s = hrpo.soft_embedding((logits[t] / cfg.temperature).softmax(-1), policy.table)
        mixed, _ = policy.gate(policy.table(batch["completion_ids"][:, t]), s)
        keep = batch["latent_mask"][:, t, None]
        embeds[t] = torch.where(keep, mixed, embeds[t])
    logprobs = torch.stack(logits, 1).log_softmax(-1)
    return logprobs.gather(-1, batch["completion_ids"][..., None])[..., 0] * batch["loss_mask"]


def test_lambda_gradient_matches_finite_differences_with_s_held_fixed():
    policy, cfg, batch = rollout()
    policy.double()
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    gate = policy.gate

    def loss():
        with torch.no_grad():  # from log-probs alone: the loss itself has a constant value
            embeds = policy.completion_embeds(batch)
            logits = policy.lm.lm_head(completion_hidden(policy.lm, batch, embeds))[..., :29]
            lp = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
            return -(batch["advantages"] * lp * batch["weights"]).sum()

    found = grads(policy, loss_of(policy, cfg, batch))
    checked = {"gate.Lambda": gate.Lambda, "gate.gate_r.bias": gate.gate_r.bias,
               "gate.gate_i.weight": gate.gate_i.weight, "gate.gate_r.weight": gate.gate_r.weight}
    for name, p in checked.items():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()
        step = 2e-3 * direction  # RMSNorm computes in float32 even here
        p.data.add_(step)
        up = loss()
        p.data.sub_(2 * step)
        slope = (up - loss()) / 4e-3
        p.data.add_(step)
        assert abs(slope) > 1e-3
        torch.testing.assert_close((found[name] * direction).sum(), slope, rtol=2e-3, atol=2e-5)


def test_no_gradient_flows_through_s_or_into_the_embeddings():
    policy, cfg, batch = rollout(max_completion_length=8)
    assert all(v.grad_fn is None and not v.requires_grad for v in batch.values())
    found = grads(policy, loss_of(policy, cfg, batch))
    assert found["lm.model.embed_tokens.weight"] is None and found["lm.lm_head.weight"] is None
    through = full_bptt_logprobs(policy, batch, cfg)
    torch.testing.assert_close(through, score(policy, batch), rtol=0, atol=2e-5)  # the same value
    other = grads(policy, -(batch["advantages"] * through * batch["weights"]).sum())
    for name in ("gate.Lambda", "lm.model.layers.0.self_attn.q_proj.weight"):
        cosine = torch.cosine_similarity(found[name].flatten(), other[name].flatten(), 0)
        assert cosine < 0.99


def test_s_of_a_position_matters_only_to_later_positions_of_its_row():
    policy, cfg, batch = rollout()
    before, k = score(policy, batch), 2
    thinks = batch["latent_mask"][:, k] & (batch["lengths"] > k + 1)
    row = int(thinks.nonzero()[0])
    other = {**batch, "soft_embeds": batch["soft_embeds"].clone()}
    other["soft_embeds"][row, k] += 3.0
    changed = score(policy, other) != before
    assert changed[row, k + 1 : int(batch["lengths"][row])].all()
    assert not changed[row, : k + 1].any()
    changed[row] = False
    assert not changed.any()
    plain = ~batch["latent_mask"]
    last = torch.arange(plain.shape[1]) == batch["lengths"][:, None] - 1
    other["soft_embeds"] = torch.where((plain | last)[..., None], 7.0, batch["soft_embeds"])
    assert (plain & batch["completion_mask"]).any()
    assert torch.equal(score(policy, other), before)
    policy.gate.Lambda.data.fill_(0.0)
    assert torch.equal(score(policy, batch)[:, 0], before[:, 0])  # log pi(y_1) knows no gate
    assert not torch.equal(score(policy, batch), before)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_reads_tokens_and_depends_on_nothing_that_is_trained(lora_rank):
    _, policy, cfg = build("hrpo", **STRONG, train_embeddings=lora_rank == 0)
    plain = copy.deepcopy(policy.lm)
    if lora_rank:
        add_lora(policy.lm, lora_rank)
    reference = None if lora_rank else frozen_copy(policy.lm)
    batch = draw(hrpo, policy, cfg)
    before = hrpo.reference_logprobs(policy, reference, batch, cfg)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=mask.long(),
                       position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits[..., :29]
    P = batch["prompt_ids"].shape[1]
    slow = logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
    torch.testing.assert_close(before, slow * batch["loss_mask"], rtol=0, atol=2e-5)
    kl = hrpo.kl_estimate({"logprobs": score(policy, batch)}, {"ref_logprobs": before})
    assert kl[batch["loss_mask"]].mean() > 1e-3  # at step 0
    tokens = {n: v for n, v in batch.items() if n != "soft_embeds"}
    kl = hrpo.kl_estimate({"logprobs": score(policy, tokens)}, {"ref_logprobs": before})
    assert kl.max() < 1e-6
    batch["soft_embeds"] = batch["soft_embeds"] + 1.0
    for p in policy.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    torch.testing.assert_close(
        hrpo.reference_logprobs(policy, reference, batch, cfg), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {}, {"hybrid": False}, {"train_embeddings": True}, {"lora_rank": 4}, {"kind": "gpt2"}])
def test_every_trained_parameter_is_in_one_optimizer_group(changes):
    lm = make_lm(changes.get("kind", "llama"))
    if changes.get("lora_rank"):
        add_lora(lm, 4)
    own = {k: v for k, v in changes.items() if k != "kind"}
    cfg = hrpo.Config(**{**hrpo.PRESETS["paper"], "lora_rank": 0, **own, "answer_marker": "7"})
    policy = hrpo.Policy(lm, make_tokenizer(), cfg)
    groups = hrpo.param_groups(policy, cfg)
    names = {id(p): n for n, p in policy.named_parameters()}
    listed = [(names[id(p)], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert sorted(n for n, _, _ in listed) == sorted(trained)
    for name, lr, decay in listed:
        rate = 1e-3 if name == "gate.Lambda" else 1e-4 if "gate." in name[:5] else 5e-6
        vector = name.startswith("lm.") and policy.get_parameter(name).dim() == 1
        assert lr == rate and decay == (0.0 if vector else 0.1), name
    whole, lora = "train_embeddings" in changes, "lora_rank" in changes
    for part, expected in {"lm.*(embed_tokens|wte)": whole, "lm.lm_head": whole,
                           "gate.": changes.get("hybrid", True), "lm.*lora_": lora,
                           "lm.*(q_proj|c_attn)": True, "lm.*(norm|ln_)": not lora}.items():
        assert any(re.match(part, n) for n in trained) == expected, part


def test_weight_decay_alone_lets_more_of_the_soft_token_in():
    torch.manual_seed(0)
    cfg = hrpo.Config(**hrpo.PRESETS["paper"])  # 934 steps, decay 0.1 at 1e-3, cosine
    start = hrpo.HybridGate(2048, 0.99, 0.999).Lambda.detach()
    a = torch.exp(-4 * torch.nn.functional.softplus(-start))  # r = 1/2
    assert (1 - a.mean() ** 2).sqrt() == pytest.approx(0.074, abs=1e-3)
    now = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([now], weight_decay=cfg.lambda_weight_decay)
    for step in range(934):
        optimizer.param_groups[0]["lr"] = cfg.lr_lambda * hrpo.lr_factor(step, cfg)
        now.grad = torch.zeros_like(now)
        optimizer.step()
    decayed = torch.exp(-4 * torch.nn.functional.softplus(-now.detach()))
    assert (1 - decayed.mean() ** 2).sqrt() == pytest.approx(0.087, abs=1e-3)
