"""HRPO's gate, soft token, loss and gradients against closed forms and slow references."""

import pytest
import torch
from conftest import make_lm
from test_replay import build, draw, score
from torch import nn

import hrpo
from common import frozen_copy

torch.set_num_threads(1)
STRONG = dict(r_min=0.2, r_max=0.9)


def rollout(kl_coef=0.0, group_size=4, **changes):
    """-> policy, cfg, batch with advantages, weights and (kl_coef > 0) reference log-probs."""
    _, policy, cfg = build("hrpo", **{**STRONG, "kl_coef": kl_coef, **changes})
    cfg.group_size = group_size
    batch = draw(hrpo, policy, cfg, group_size=group_size)
    batch["rewards"] = (torch.arange(len(batch["lengths"])) % group_size == 0).float()
    batch["advantages"] = hrpo.compute_advantages(batch, cfg)
    batch["weights"] = hrpo.loss_weights(batch, cfg)
    reference = frozen_copy(policy.lm)
    batch["ref_logprobs"] = hrpo.reference_logprobs(policy, reference, batch, cfg)
    return policy, cfg, batch


def loss_of(policy, cfg, batch):
    return (hrpo.policy_loss(policy(batch), batch, cfg) * batch["weights"]).sum()


def grads(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()}


@pytest.mark.parametrize("r_min", [0.95, 0.98, 0.99])
def test_gate_starts_at_u_where_r_is_1(r_min):
    torch.manual_seed(0)
    gate = hrpo.HybridGate(64, r_min, 0.999)
    u = torch.exp(-8 * torch.log1p(torch.exp(-gate.Lambda.double())))  # a at r = 1
    assert r_min - 1e-5 <= u.min() < r_min + 0.01 and 0.99 < u.max() <= 0.999 + 1e-5
    nn.init.zeros_(gate.gate_r.weight)
    nn.init.constant_(gate.gate_r.bias, 50.0)
    _, a = gate(torch.randn(3, 64), torch.randn(3, 64))
    torch.testing.assert_close(a.double(), u.expand(3, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("r_min, mean_a, ratio, low, high", [
    (0.99, 0.99724, 0.0719, 6.68, 8.99), (0.98, 0.9947, 0.0982, 5.98, 8.99),
    (0.95, 0.9871, 0.152, 5.05, 8.99)])
def test_initial_mixing_is_that_of_the_specification(r_min, mean_a, ratio, low, high):
    torch.manual_seed(0)
    gate = hrpo.HybridGate(4096, r_min, 0.999).requires_grad_(False)
    _, a = gate(torch.zeros(1, 4096), torch.zeros(1, 4096))  # r = 1/2 exactly
    assert 1 - a.mean() == pytest.approx(1 - mean_a, rel=0.04)  # 3 standard errors
    assert (1 - a**2).sqrt().mean() == pytest.approx(ratio, rel=0.02)
    assert gate.Lambda.min() == pytest.approx(low, abs=0.02)
    assert gate.Lambda.max() == pytest.approx(high, abs=0.02)


def test_gates_read_the_token_and_not_the_soft_token():
    policy, _, _ = rollout()
    e, s, other = torch.randn(3, 5, 32)
    (x, a), (y, b), (zero, _) = (policy.gate(e, v) for v in (s, other, torch.zeros_like(s)))
    assert torch.equal(a, b) and not torch.equal(a, policy.gate(other, s)[1])
    torch.testing.assert_close(zero, a * e)
    i = torch.sigmoid(policy.gate.gate_i(e))
    torch.testing.assert_close(x - y, (1 - a**2 + 1e-8).sqrt() * i * (s - other))


def test_gate_computes_in_float32_for_a_bfloat16_model():
    gate, e = hrpo.HybridGate(64, 0.99, 0.999), torch.randn(8, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, a = gate(e, torch.randn(8, 64).bfloat16())
    assert mixed.dtype == torch.bfloat16 and a.dtype == torch.float32
    assert a.unique().numel() > 300 and a.bfloat16().unique().numel() <= 2
    torch.testing.assert_close(a, gate(e.float(), e.float())[1], rtol=0, atol=0)
    lm = make_lm().bfloat16()
    lm.compute_dtype = torch.bfloat16
    _, policy, cfg = build("hrpo")
    policy = hrpo.Policy(lm, policy.marker.tokenizer, cfg)
    batch = draw(hrpo, policy, cfg)
    assert policy.gate.gate_r.weight.dtype == torch.float32
    loss = -policy(batch)["logprobs"].sum()
    assert all(g.isfinite().all() for n, g in grads(policy, loss).items() if "gate" in n)


def test_soft_embedding_is_the_expected_embedding_over_the_norm_of_p():
    torch.manual_seed(0)
    E, p = torch.randn(50, 16), torch.rand(7, 40).softmax(-1)  # the table has spare rows

    def soft_embedding(probs, weight, ids=None):
        return hrpo.soft_embedding(probs, torch.nn.Embedding.from_pretrained(weight), ids)

    slow = torch.stack([sum(p[b, v] * E[v] for v in range(40)) / sum(p[b] ** 2).sqrt()
                        for b in range(7)])
    torch.testing.assert_close(soft_embedding(p, E), slow)
    torch.testing.assert_close(soft_embedding(5 * p, E), slow)
    assert torch.equal(soft_embedding(torch.eye(50), E), E)
    assert torch.equal(soft_embedding(torch.ones(50, 1), E, torch.arange(50)[:, None]), E)
    top, ids = p.topk(5)
    sparse = torch.zeros_like(p).scatter(1, ids, top)
    torch.testing.assert_close(soft_embedding(top, E, ids), soft_embedding(sparse, E))
    size = soft_embedding(torch.randn(200, 2000).softmax(-1), torch.randn(2000, 256)).norm(dim=1)
    assert 0.9 < size.mean() / 16 < 1.1  # about the size of one embedding


@pytest.mark.parametrize("rewards, expected", [
    ([1, 0, 0, 0], [1.4997, -0.4999, -0.4999, -0.4999]),
    ([1, 1, 0, 0], [0.8659, 0.8659, -0.8659, -0.8659]),
    ([0] * 3 + [1] + [0] * 4, [-0.3535] * 3 + [2.4742] + [-0.3535] * 4), ([1] * 4, [0] * 4)])
def test_advantages_are_the_closed_form(rewards, expected):
    found = hrpo.group_advantages(torch.tensor(rewards).float(), len(rewards))
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    two = hrpo.group_advantages(torch.tensor([0] * len(rewards) + rewards).float(), len(rewards))
    assert two.tolist() == [0] * len(rewards) + found.tolist()


@pytest.mark.parametrize("size", range(2, 17))
def test_equal_rewards_have_advantages_of_exactly_zero(size):
    for reward in (0.1, 0.2, 0.4, 1.2, 1.4, 1 / 3):  # a float32 mean of equal ones may be off
        assert not hrpo.group_advantages(torch.full((2 * size,), reward), size).any()


def test_k3_and_its_gradient():
    now, ref = torch.linspace(-4, 0, 9, dtype=torch.float64, requires_grad=True), torch.tensor(-2.0)
    value = hrpo.kl_estimate({"logprobs": now}, {"ref_logprobs": ref})
    value.sum().backward()
    assert (value >= 0).all() and value[4] == 0
    torch.testing.assert_close(now.grad, 1 - torch.exp(ref - now.detach()))


def test_loss_is_minus_mean_advantage_plus_beta_mean_kl():
    policy, cfg, batch = rollout(kl_coef=0.3)
    batch["advantages"] = batch["advantages"] + 0.25  # its mean would be 0
    lp, lengths = score(policy, batch), batch["lengths"].tolist()
    by_hand = 0.0
    for row, n in enumerate(lengths):
        d = (batch["ref_logprobs"] - lp)[row, :n].double()
        by_hand += float(-batch["advantages"][row, 0] + 0.3 * (d.exp() - d - 1).mean())
    assert loss_of(policy, cfg, batch).item() == pytest.approx(by_hand / len(lengths), rel=1e-5)


def test_policy_gradient_is_advantage_times_gradient_of_logprob():
    policy, cfg, batch = rollout()
    loss = loss_of(policy, cfg, batch)
    assert abs(loss.item()) < 1e-5
    found = grads(policy, loss)
    surrogate = -(batch["advantages"] * policy(batch)["logprobs"]).sum(1) / batch["lengths"]
    for name, g in grads(policy, surrogate.mean()).items():
        if g is not None:
            torch.testing.assert_close(found[name], g, rtol=1e-5, atol=1e-6)
    assert found["gate.Lambda"].abs().max() > 1e-4 and found["gate.gate_r.bias"].abs().max() > 1e-5


def test_equal_rewards_give_exactly_zero_gradient():
    policy, cfg, batch = rollout()
    batch["rewards"] = torch.ones_like(batch["rewards"])
    batch["advantages"] = hrpo.compute_advantages(batch, cfg)
    found = grads(policy, loss_of(policy, cfg, batch))
    assert all(g is None or not g.any() for g in found.values())


def test_long_and_short_rows_weigh_the_same():
    _, cfg, batch = rollout()
    assert len(set(batch["lengths"].tolist())) > 3
    total = batch["weights"].sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 1 / len(total)))
    assert not batch["weights"][~batch["loss_mask"]].any()
    twice = {n: torch.cat([v, v]) for n, v in batch.items()}
    torch.testing.assert_close(hrpo.loss_weights(twice, cfg).sum(), torch.tensor(1.0))


def test_thinking_nowhere_is_the_token_model_bit_for_bit():
    policy, cfg, batch = rollout()
    tokens = {n: v for n, v in batch.items() if n != "soft_embeds"}
    batch["latent_mask"] = torch.zeros_like(batch["latent_mask"])
    assert torch.equal(score(policy, batch), score(policy, tokens))
    one = grads(policy, loss_of(policy, cfg, batch))
    two = grads(policy, loss_of(policy, cfg, tokens))
    for name, g in one.items():
        if name.startswith("gate."):
            assert not g.any() and (two[name] is None or not two[name].any())
        else:
            assert (g is None) == (two[name] is None) and (g is None or torch.equal(g, two[name]))
