"""Gradients of LEPO's latent steps against closed forms, from one step up to the whole loss."""

import copy
import math

import pytest
import torch
from test_hrpo import grads
from test_lepo import KINDS, rng, rollout
from test_replay import PROMPTS, build, draw, score
from torch.distributions import Gumbel

import common
import lepo
from common import completion_hidden

torch.set_num_threads(1)
DENSITIES = ["concrete", "gumbel"]


def one_step(n=40, K=12, dropped=3, tau=0.5, seed=0):
    """-> logits [n, 29] with gradient, ids and u [n, K] as a rollout stores them, noise g; S."""
    logits = torch.randn(n, 29, generator=rng(seed), dtype=torch.float64) * 2
    ids = logits.argsort(descending=True)[:, :K]
    S = (torch.arange(K) < K - dropped).expand(n, K)
    log_pi = logits.gather(1, ids).masked_fill(~S, -math.inf).log_softmax(-1)
    g = -torch.empty(n, K, dtype=torch.float64).exponential_(generator=rng(seed + 1)).log()
    return logits.requires_grad_(), ids, log_pi + g, g, S


def logit_gradient(logits, ids, u, tau, kind):
    value = lepo.latent_logprob(u, logits.log_softmax(-1).gather(1, ids), tau, kind)
    assert value.shape == u.shape[:-1]
    return torch.autograd.grad(value.sum(), logits)[0]


def closed_form(kind, logits, ids, u, tau):
    """The gradient that the specification states, [n, 29]; written row by row."""
    rows = []
    for a, where, scores in zip(logits.detach(), ids, u):
        found, pi = torch.zeros_like(a), a.softmax(0)
        S = where[scores > -math.inf]
        n, scores = len(S), scores[: len(S)]
        g = scores - a[S].log_softmax(0)  # the noise, if the policy has not moved since
        if kind == "soft":
            found[S] = (scores / tau).softmax(0)
            found -= pi
        elif kind == "token":
            found[S[scores.argmax()]] = 1
            found -= pi
        elif kind == "concrete":
            found[S] = (1 - n * (-g).softmax(0)) / n
        elif kind == "gumbel":
            v = 1 - (-g).exp()
            found[S] = (v - a[S].softmax(0) * v.sum()) / n
        rows.append(found)
    return torch.stack(rows)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_latent_step_is_the_closed_form(kind, tau, moved):
    logits, ids, u, _, _ = one_step()
    if moved:  # by an update since the rollout
        logits = (logits.detach() + torch.randn(29, generator=rng(9))).requires_grad_()
    found = logit_gradient(logits, ids, u, tau, kind)
    torch.testing.assert_close(found, closed_form(kind, logits, ids, u, tau), rtol=0, atol=1e-12)
    assert (kind == "none") == (not found.any())


def test_the_exact_score_is_1_minus_n_softmax_of_minus_the_noise_for_every_tau():
    logits, ids, u, g, S = one_step()
    q, n = (-g).masked_fill(~S, -math.inf).softmax(-1), 9
    expected = torch.zeros_like(logits).scatter(1, ids, (S.double() - n * q) / n)
    for tau in (1e-3, 0.1, 0.5, 5.0):
        found = logit_gradient(logits, ids, u, tau, "concrete")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tau", [0.3, 0.8])
def test_the_values_are_log_densities_up_to_what_does_not_depend_on_the_policy(tau):
    logits, ids, u, _, _ = one_step(dropped=0)
    y, n, values = (u / tau).softmax(-1), 12, {k: [] for k in ("concrete", "gumbel", "y", "u")}
    for a in (logits.detach(), logits.detach() + torch.randn(29, generator=rng(5))):
        lp = a.log_softmax(-1).gather(1, ids)
        for kind in DENSITIES:
            values[kind].append(n * lepo.latent_logprob(u, lp, tau, kind))
        density = (lp - (tau + 1) * y.log()).sum(-1) - n * (lp - tau * y.log()).logsumexp(-1)
        values["y"].append(density + math.lgamma(n) + (n - 1) * math.log(tau))
        values["u"].append(Gumbel(lp.log_softmax(-1), 1.0).log_prob(u).sum(-1))
    for kind, density in (("concrete", "y"), ("gumbel", "u")):
        change, expected = (values[k][1] - values[k][0] for k in (kind, density))
        torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values["gumbel"][0], values["u"][0])


@pytest.mark.parametrize("kind", [*DENSITIES, "token", "soft"])
def test_scores_have_mean_zero_except_that_of_the_flatter_label(kind):
    n, (logits, ids, _, _, _) = 200000, one_step(n=1, K=8, dropped=0)
    log_pi = logits.detach().gather(1, ids).log_softmax(-1)
    u = log_pi + lepo.gumbel_like(torch.empty(n, 8), rng()).double()
    many = log_pi.expand(n, -1).clone().requires_grad_()  # as logits: the 8 ids are all there are
    score = logit_gradient(many, torch.arange(8).expand(n, -1), u, 0.5, kind)
    error = score.std(0) / n**0.5
    far = (score.mean(0).abs() > 4 * error)
    assert far.any() == (kind == "soft")
    pi = log_pi[0].exp()
    if kind == "concrete":  # Dirichlet(1, ..., 1) whatever pi is; the value has a factor 1 / 8
        torch.testing.assert_close((8 * score).var(0), torch.full_like(pi, 7 / 9), rtol=0.05,
                                   atol=0)
    if kind == "soft":  # the label is flatter than pi: less on the likely, more on the unlikely
        assert score.mean(0)[pi.argmax()] < -0.005 and score.mean(0)[pi.argmin()] > 0.0005
    if kind in DENSITIES:  # given the token i that won, their mean is its categorical score
        for i in pi.argsort(descending=True)[:3].tolist():
            part = 8 * score[u.argmax(-1) == i]
            gap = part.mean(0) - (torch.eye(8)[i] - pi)
            assert (gap.abs() < 4.5 * part.std(0) / len(part) ** 0.5).all()


def loss_of(policy, cfg, batch):
    return (lepo.policy_loss(policy(batch), batch, cfg) * batch["weights"]).sum()


@pytest.mark.parametrize("clip_latents", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_loss_pulls_each_logit_by_the_closed_form(kind, clip_latents, monkeypatch):
    policy, cfg, batch = rollout(latent_grad=kind, temperature=1.3, top_k=12, top_p=0.9,
                                 clip_latents=clip_latents, latent_tau=0.4)
    kept, head = [], common.lm_logits

    def keep(*args):
        kept.append(head(*args))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(common, "lm_logits", keep)
    loss_of(policy, cfg, batch).backward()
    logits, = kept  # [n, 29], of the positions that count
    mask, latent = batch["loss_mask"], batch["latent_mask"][batch["loss_mask"]]
    ids, u = lepo.candidate_ids(batch)[mask], batch["topk_scores"][mask]
    steps = logits.detach() / 1.3
    expected = torch.where(latent[:, None], closed_form(kind, steps, ids, u, 0.4),
                           closed_form("soft", steps, ids, u, 0.4))
    share = batch["advantages"] / (batch["lengths"][:, None] * len(mask))  # A / (|o| B)
    assert len(set(batch["lengths"].tolist())) > 3 and latent.any() and (~latent).any()
    torch.testing.assert_close(
        logits.grad, -share[mask][:, None] * expected / 1.3, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_the_ratio_changes_no_bit_of_the_gradient(kind):
    policy, cfg, batch = rollout(latent_grad=kind)
    found = []
    for cfg.clip_latents in (False, True):
        found.append(grads(policy, loss_of(policy, cfg, batch)))
    for name, g in found[0].items():
        assert (g is None) == (found[1][name] is None)
        if g is not None:
            torch.testing.assert_close(found[1][name], g, rtol=1e-6, atol=1e-8)
    assert found[0]["lm.model.norm.weight"].abs().max() > 1e-4


def test_in_a_group_the_first_step_only_sees_differences_of_the_mixtures():
    policy, cfg, batch = rollout(latent_steps=3, max_completion_length=3, eos=(2,))
    assert (batch["lengths"] == 3).all()
    ids, u = lepo.candidate_ids(batch)[:, 0], batch["topk_scores"][:, 0]
    z = torch.zeros(16, 29).scatter(1, ids, lepo.mixture_weights(u, cfg.latent_tau))
    A = batch["advantages"][:, :1]
    with torch.no_grad():
        pi = policy.lm.lm_head(policy.hidden(batch)[:, 0])[:, :29].softmax(-1)
    one, two = ((A * x).view(4, 4, 29).sum(1) for x in (z - pi, z))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert two.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_zero_gradient(kind):
    policy, cfg, batch = rollout(latent_grad=kind)
    batch["rewards"] = torch.ones_like(batch["rewards"])
    batch["advantages"] = lepo.compute_advantages(batch, cfg)
    found = grads(policy, loss_of(policy, cfg, batch))
    assert all(g is None or not g.any() for g in found.values())


@pytest.mark.parametrize("trained", [False, True])
def test_mixing_again_trains_the_same_as_stored_embeddings_do_and_the_table_if_wanted(trained):
    policy, cfg, batch = rollout(train_embeddings=trained)
    mixed = policy.completion_embeds(batch)
    z = (batch["topk_scores"].double() / cfg.latent_tau).softmax(-1)
    slow = (z[..., None] * policy.table.weight.double()[lepo.candidate_ids(batch)]).sum(2)
    exists = batch["completion_mask"]
    torch.testing.assert_close(mixed[exists], slow[exists].float(), rtol=1e-5, atol=1e-6)
    stored = copy.deepcopy(policy)
    stored.hidden = lambda b: completion_hidden(stored.lm, b, mixed.detach())
    assert torch.equal(score(stored, batch), score(policy, batch))
    one, two = (grads(p, loss_of(p, cfg, batch)) for p in (policy, stored))
    for name, g in one.items():
        if "embed_tokens" not in name:
            assert (g is None) == (two[name] is None) and (g is None or torch.equal(g, two[name]))
    table, head = one["lm.model.embed_tokens.weight"], one["lm.lm_head.weight"]
    assert (table is not None) == (head is not None) == trained
    if trained:  # ids that only mixtures hold get a gradient through them
        fed = {*batch["completion_ids"][exists].tolist(), *sum(PROMPTS, [])}
        rest = [i for i in range(29) if i not in fed]
        assert rest and table[rest].abs().sum(1).min() > 0 and not table[29:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rewarding_a_token_with_the_largest_weight_makes_it_likelier(kind):
    for sign in (1, -1):
        module, policy, cfg = build("lepo", latent_grad=kind, latent_steps=1, top_k=5,
                                    max_completion_length=1, group_size=64)
        prompt, target, chances = [1, 4, 6], None, []
        for step in range(8):
            batch = draw(module, policy, cfg, [prompt], 64, seed=step)
            ids, u = batch["topk_ids"][:, 0], batch["topk_scores"][:, 0]
            target = ids[0, 1] if target is None else target
            heaviest = ids.gather(1, u.argmax(-1, keepdim=True))[:, 0]
            with torch.no_grad():
                logits = policy.lm(input_ids=torch.tensor([prompt])).logits[0, -1, :29]
            chances.append(logits.softmax(-1)[target].item())
            batch["rewards"] = (heaviest == target).float()
            batch["advantages"] = sign * lepo.compute_advantages(batch, cfg)
            batch["weights"] = lepo.loss_weights(batch, cfg)
            for name, g in grads(policy, loss_of(policy, cfg, batch)).items():
                if g is not None:
                    policy.get_parameter(name).data -= 0.03 * g
        if kind == "none":
            assert chances[-1] == chances[0]
        else:
            assert sign * (chances[-1] - chances[0]) > 0.02, chances
