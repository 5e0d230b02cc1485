"""HRPO: sampling, LoRA, and log-probs in chunks."""

import copy

import pytest
import torch
from conftest import make_lm
from test_hrpo import STRONG, grads, loss_of, rollout
from test_replay import build, draw, score

import hrpo
from common import LoRALinear, add_lora, completion_logprobs, lora_disabled, merged_state_dict

torch.set_num_threads(1)
IDS = torch.arange(3, 9)[None]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 0.8)])
def test_no_hybrid_is_bit_identical_to_never_thinking(top_k, top_p, monkeypatch):
    found = []
    for hybrid in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(hrpo.Marker, "completed", lambda self, tail: tail[:, -1] >= 0)
            policy, cfg, batch = rollout(0.1, hybrid=hybrid, top_k=top_k, top_p=top_p)
        assert not batch["latent_mask"].any() and ("soft_embeds" in batch) == hybrid
        loss = loss_of(policy, cfg, batch)
        found.append((batch, loss, grads(policy, loss)))
    (one, loss, g), (two, plain_loss, plain_g) = found
    assert torch.equal(loss, plain_loss) and all(torch.equal(two[n], one[n]) for n in two)
    for name, value in plain_g.items():
        if value is not None:
            assert torch.equal(g[name], value)
        elif name.startswith("gate."):
            assert not g[name].any()


def test_gate_near_1_is_the_token_model_up_to_eps():
    policy, _, batch = rollout()
    tokens = {n: v for n, v in batch.items() if n != "soft_embeds"}
    policy.gate.Lambda.data.fill_(100.0)
    gap = (score(policy, batch) - score(policy, tokens)).abs().max()
    assert 0 < gap < 0.02


def test_flipped_advantages_lower_the_rewarded_rows():
    policy, cfg, batch = rollout()
    rewarded, before = batch["rewards"] > 0, score(policy, batch).sum(1)
    for sign in (1, -1):
        moved = copy.deepcopy(policy)
        flipped = {**batch, "advantages": sign * batch["advantages"]}
        optimizer = torch.optim.SGD(moved.parameters(), 1e-3)
        loss_of(moved, cfg, flipped).backward()
        optimizer.step()
        change = (score(moved, batch).sum(1) - before)[rewarded]
        assert sign * change.sum() > 0


def test_greedy_is_deterministic_and_has_the_tokens_of_top_1_but_another_s():
    _, policy, cfg = build("hrpo", r_min=0.99, r_max=0.999, temperature=0.5)
    one = draw(hrpo, policy, cfg, greedy=True, group_size=1, seed=0)
    two = draw(hrpo, policy, cfg, greedy=True, group_size=1, seed=1)
    assert all(torch.equal(one[n], two[n]) for n in one)
    cfg.top_k = 1
    top = draw(hrpo, policy, cfg, greedy=False, group_size=1)
    assert torch.equal(top["completion_ids"][:, 0], one["completion_ids"][:, 0])
    live = top["completion_mask"]
    e = policy.table(top["completion_ids"])[live]
    assert torch.equal(top["soft_embeds"][live], e)
    assert (one["soft_embeds"][:, 0] - top["soft_embeds"][:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (6, 1.0), (0, 0.7), (9, 0.7)])
def test_token_and_soft_token_share_one_distribution(top_k, top_p):
    _, policy, cfg = build("hrpo", **STRONG, temperature=0.6, top_k=top_k, top_p=top_p)
    logits, n = 2 * torch.randn(1, 29, generator=torch.Generator().manual_seed(3)), 20000
    p, order = (logits[0] / 0.6).softmax(-1), logits[0].argsort(descending=True)
    if top_k:
        p[order[top_k:]] = 0
    p, taken = p / p.sum(), 0.0
    for v in order.tolist():  # the nucleus: ids until their mass reaches top_p
        p[v], taken = (p[v] if taken < top_p else 0.0), taken + p[v].item()
    p /= p.sum()
    rows = logits.expand(n, -1)
    rng, state = torch.Generator().manual_seed(0), hrpo.start_state(n, policy, cfg)
    with torch.no_grad():
        ids, _, record, _ = hrpo.next_input(policy, rows, None, 0, state, cfg, rng, False)
    share = ids.bincount(minlength=29) / n
    assert not share[p == 0].any()
    assert (share - p).abs().max() < 5 * 0.5 / n**0.5
    s = (p @ policy.table.weight[:29]) / p.norm()
    torch.testing.assert_close(record["soft_embeds"][0], s.detach(), rtol=1e-4, atol=1e-5)
    lp = logits[0].log_softmax(-1)[ids]  # at temperature 1, over all ids
    torch.testing.assert_close(record["rollout_logprobs"], lp)


def make(seed):
    return torch.Generator().manual_seed(seed)


def adapted():
    """A model with adapters that do something, and the same model without them."""
    plain = make_lm("qwen2").requires_grad_(False)
    lm = copy.deepcopy(plain)
    add_lora(lm, 4)
    return plain, lm


def test_fresh_adapters_change_nothing_and_disabled_ones_neither():
    plain, lm = adapted()
    assert torch.equal(lm(IDS).logits, plain(IDS).logits)
    wrapped = [m for m in lm.modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == 2 * 7 and not isinstance(lm.lm_head, LoRALinear)
    assert all(p.requires_grad == ("lora_" in n) for n, p in lm.named_parameters())
    for module in wrapped:
        torch.nn.init.normal_(module.lora_B, std=0.3)
    changed = lm(IDS).logits
    assert (changed - plain(IDS).logits).abs().max() > 0.1
    with lora_disabled(lm):
        assert torch.equal(lm(IDS).logits, plain(IDS).logits)
    assert torch.equal(lm(IDS).logits, changed)


def test_merged_weights_reproduce_the_adapted_logits():
    plain, lm = adapted()
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.3)
            x = torch.randn(5, module.lora_A.shape[1])
            slow = module.base(x) + 2 * (x @ module.lora_A.T) @ module.lora_B.T  # alpha = 2 r
            torch.testing.assert_close(module(x), slow)
    plain.load_state_dict(merged_state_dict(lm))
    torch.testing.assert_close(plain(IDS).logits, lm(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_in_chunks_equal_a_plain_log_softmax(shape, temperature):
    found, lm, ids = [], make_lm(), torch.randint(29, shape, generator=make(0))
    mask = torch.rand(3, 7, generator=make(1)) < 0.6
    weight = torch.randn(shape, generator=make(3))
    for chunk in (None, 29 * 2, 1, 1 << 24):
        hidden = torch.randn(3, 7, 32, generator=make(2)).requires_grad_()
        lm.zero_grad()
        if chunk:
            logprobs, entropy = completion_logprobs(lm, hidden, ids, mask, temperature, chunk)
        else:
            logits = (hidden @ lm.lm_head.weight.T)[..., :29] / temperature
            every = logits.log_softmax(-1)
            logprobs = every.gather(-1, ids.view(3, 7, -1)).view(shape)
            logprobs = logprobs * mask.view(3, 7, *[1] * (len(shape) - 2))
            entropy = (-(every.exp() * every).sum(-1) * mask).detach()
        (logprobs * weight).sum().backward()
        assert not entropy.requires_grad
        found.append((logprobs.detach(), entropy, hidden.grad, lm.lm_head.weight.grad.clone()))
    for values in found[1:]:
        for value, naive in zip(values, found[0]):
            torch.testing.assert_close(value, naive, rtol=1e-5, atol=1e-5)


def test_logprobs_of_an_empty_mask_are_zeros():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    logprobs, entropy = completion_logprobs(make_lm(), torch.randn(2, 3, 32), ids, mask)
    assert torch.equal(logprobs, torch.zeros(2, 3)) and torch.equal(entropy, torch.zeros(2, 3))
