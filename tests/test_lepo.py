"""LEPO's mixtures and rollouts: support, noise, frequencies, what is shown, stored and scored."""

import dataclasses
import math

import pytest
import torch
from conftest import make_lm, make_tokenizer
from test_replay import PROMPTS, build, draw, score, survivors

import lepo
from common import encode_prompts, grade, make_rng

torch.set_num_threads(1)
KINDS = ["soft", "concrete", "gumbel", "token", "none"]
CUTS = [(0, 1.0), (6, 1.0), (0, 0.7), (9, 0.7)]  # top_k, top_p


def rollout(group_size=4, **changes):
    """-> policy, cfg, batch with the advantages and weights of rewards 1, 0, 0, 0 in a group."""
    _, policy, cfg = build("lepo", **{"group_size": group_size, **changes})
    batch = draw(lepo, policy, cfg, group_size=group_size)
    batch["rewards"] = (torch.arange(len(batch["lengths"])) % group_size == 0).float()
    batch["advantages"] = lepo.compute_advantages(batch, cfg)
    batch["weights"] = lepo.loss_weights(batch, cfg)
    return policy, cfg, batch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_logits(n=1, seed=3):
    """n equal rows; the likeliest of the 29 ids has about a third of the mass."""
    return (2 * torch.randn(1, 29, generator=rng(seed))).expand(n, -1)


def no_noise(*args):
    raise AssertionError("noise was drawn")


@pytest.mark.parametrize("top_k, top_p", CUTS)
def test_weights_are_a_distribution_over_the_survivors(top_k, top_p):
    _, _, cfg = build("lepo", top_k=top_k, top_p=top_p, temperature=0.6)
    logits = 3 * torch.randn(50, 29, generator=rng())
    ids, u = lepo.gumbel_softmax_scores(logits, 0.5, top_k, top_p, 0.6, rng())
    z, sizes = lepo.mixture_weights(u, 0.5), set()
    assert ids.shape == u.shape == (50, top_k or 29) and u.dtype == torch.float32
    assert (z >= 0).all() and (z.sum(-1) - 1).abs().max() < 1e-6
    for row in range(50):
        kept, _ = survivors(logits[row], cfg)
        assert set(ids[row][u[row].isfinite()].tolist()) == set(kept)
        assert len(set(ids[row].tolist())) == len(ids[row])
        assert not z[row][~u[row].isfinite()].any() and not u[row].isnan().any()
        sizes.add(len(kept))
    assert (len(sizes) > 3) == (top_p < 1)
    flat = lepo.gumbel_softmax_scores(logits.view(5, 10, 29), 0.5, top_k, top_p, 0.6, rng())
    assert torch.equal(flat[1].view(50, -1), u) and torch.equal(flat[0].view(50, -1), ids)


@pytest.mark.parametrize("top_k, top_p", CUTS)
def test_the_heaviest_token_is_an_exact_sample_of_pi_for_every_tau(top_k, top_p):
    _, _, cfg = build("lepo", top_k=top_k, top_p=top_p, temperature=0.8)
    n, logits = 20000, some_logits()
    kept, log_p = survivors(logits[0], cfg)
    one, two = (lepo.gumbel_softmax_scores(logits.expand(n, -1), tau, top_k, top_p, 0.8, rng())
                for tau in (0.1, 1.0))
    assert torch.equal(one[1], two[1]) and torch.equal(one[0], two[0])  # tau plays no part
    ids, u = one
    for tau in (1e-4, 0.1, 0.5, 2.0):
        z = lepo.mixture_weights(u, tau)
        assert torch.equal(z.argmax(-1), u.argmax(-1))
        assert tau > 1e-4 or (z.max(-1).values > 0.99).float().mean() > 0.99
    counts = ids.gather(1, u.argmax(-1, keepdim=True))[:, 0].bincount(minlength=29)[kept]
    expected = n * log_p.exp()
    assert counts.sum() == n
    chi, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(kept) - 1
    assert chi < degrees + 4 * (2 * degrees) ** 0.5


def test_noise_is_standard_gumbel_on_the_log_probs_and_scaled_by_noise_scale():
    logits = some_logits(40000)
    log_pi = (logits / 0.7).log_softmax(-1)
    _, u = lepo.gumbel_softmax_scores(logits, 0.5, 0, 1.0, 0.7, rng())
    g = (u - log_pi).double()
    assert g.mean() == pytest.approx(0.5772, abs=0.005)
    assert g.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert (g < 0).double().mean() == pytest.approx(math.exp(-1), abs=0.003)
    assert torch.corrcoef(g[:, :4].T).fill_diagonal_(0).abs().max() < 0.03
    _, half = lepo.gumbel_softmax_scores(logits, 0.5, 0, 1.0, 0.7, rng(), noise_scale=0.5)
    torch.testing.assert_close(half - log_pi, 0.5 * g.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("top_k, top_p", CUTS)
def test_without_noise_the_weights_are_pi_whatever_tau_is(top_k, top_p, tau, monkeypatch):
    monkeypatch.setattr(lepo, "gumbel_like", no_noise)
    _, policy, cfg = build("lepo", top_k=top_k, top_p=top_p, temperature=0.6, latent_tau=tau)
    logits = some_logits(2)
    kept, log_p = survivors(logits[0], cfg)
    ids, u = lepo.gumbel_softmax_scores(logits, tau, top_k, top_p, 0.6, rng(), noise_scale=0.0)
    z = torch.zeros(2, 29).scatter(1, ids, lepo.mixture_weights(u, tau))
    expected = torch.zeros(29).index_put((torch.tensor(kept),), log_p.exp().float())
    torch.testing.assert_close(z[0], expected, rtol=1e-4, atol=1e-6)
    for cfg.noise_scale, greedy in ((1.0, True), (0.0, False), (0.0, True)):
        shown, embeds, _, _ = lepo.next_input(policy, logits, None, 0, {}, cfg, rng(), greedy)
        assert shown.tolist() == [kept[0]] * 2
        torch.testing.assert_close(embeds[0], expected @ policy.table.weight[:29], atol=1e-5,
                                   rtol=1e-4)


def test_the_mean_mixture_is_flatter_than_pi_the_more_the_larger_tau_is():
    logits = some_logits(40000)
    pi = logits[0].softmax(-1)
    _, u = lepo.gumbel_softmax_scores(logits, 0.5, 0, 1.0, 1.0, rng())
    means = [lepo.mixture_weights(u, tau).mean(0) for tau in (0.01, 0.1, 0.3, 0.5, 1.0)]
    entropies = [float(-(p * p.log()).sum()) for p in (pi, *means)]
    assert entropies[0] == pytest.approx(entropies[1], abs=0.02)
    assert entropies[1:] == sorted(entropies[1:]) and entropies[4] > entropies[0] + 0.02
    sizes = [(1 / lepo.mixture_weights(u, tau).square().sum(-1)).mean() for tau in (0.1, 0.3, 1.0)]
    assert 1 < sizes[0] < sizes[1] < sizes[2]


def test_noise_alone_makes_the_completions_of_a_group_differ_from_the_first_step_on():
    _, policy, cfg = build("lepo", eos=(2,), latent_steps=6)
    one, same, other = (draw(lepo, policy, cfg, PROMPTS, 4, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["topk_scores"][:, 0], other["topk_scores"][:, 0])
    assert len(one["topk_scores"][:4, 0].unique(dim=0)) == 4
    assert len(one["completion_ids"][:4, 0].unique()) == 1  # shown: the likeliest, without noise
    cfg.noise_scale = 0.0
    calm = draw(lepo, policy, cfg, PROMPTS, 4)
    for name in ("completion_ids", "topk_scores"):
        groups = calm[name][:, :6].reshape(4, 4, -1)
        torch.testing.assert_close(groups, groups[:, :1].expand_as(groups), rtol=1e-4, atol=1e-5)
    assert len(calm["completion_ids"].unique(dim=0)) > 6  # tokens are sampled as before


def test_greedy_decoding_draws_nothing(monkeypatch):
    monkeypatch.setattr(lepo, "gumbel_like", no_noise)
    monkeypatch.setattr(torch, "multinomial", no_noise)
    _, policy, cfg = build("lepo", eos=(2,), noise_scale=1.0)
    one, two = (draw(lepo, policy, cfg, greedy=True, group_size=1, seed=s) for s in (0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("latent_steps", [1, 5, 99])
@pytest.mark.parametrize("top_k", [0, 6])
def test_the_first_steps_of_every_row_are_latent_and_the_rest_is_one_hot(latent_steps, top_k):
    _, policy, cfg = build("lepo", latent_steps=latent_steps, top_k=top_k, eos=range(2, 12))
    batch = draw(lepo, policy, cfg, group_size=8)
    exists, u = batch["completion_mask"], batch["topk_scores"]
    latent = (torch.arange(exists.shape[1]) < latent_steps) & exists
    assert torch.equal(batch["latent_mask"], latent) and torch.equal(batch["loss_mask"], exists)
    assert ("topk_ids" in batch) == (top_k > 0)  # else candidate k is id k
    assert lepo.candidate_ids(batch).shape == (*exists.shape, top_k or 29) == u.shape
    assert (u.isfinite().sum(-1)[latent] == (top_k or 29)).all() and not u[~exists].any()
    token = exists & ~latent
    assert token.any() == (latent_steps < 14)
    one_hot = torch.tensor([0.0] + [-math.inf] * (u.shape[-1] - 1))
    assert (u[token].sort(-1, descending=True).values == one_hot).all()
    assert torch.equal(lepo.heaviest_ids(batch)[token], batch["completion_ids"][token])


def test_a_shown_eos_ends_the_row_inside_the_latent_steps_and_shown_ids_are_graded():
    _, policy, cfg = build("lepo", latent_steps=10, max_completion_length=12)
    batch = draw(lepo, policy, cfg, group_size=8)
    inside = batch["lengths"] < 10
    assert inside.any() and batch["finished"][inside].all()
    last = batch["completion_ids"].gather(1, batch["lengths"][:, None] - 1)[:, 0]
    assert torch.isin(last[inside], policy.eos_ids).all()
    tokenizer = make_tokenizer()
    problems = encode_prompts(tokenizer, [{"question": "1", "answer": "2"}] * 4, cfg)
    for row, record in enumerate(grade(batch, problems, tokenizer, "7")):
        n = int(batch["lengths"][row])
        ids = batch["completion_ids"][row, :n]
        assert record["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert record["latent_steps"] == min(n, 10) and record["latent_spans"] == [[0, min(n, 10)]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_score_is_that_of_the_update_and_of_the_formula(kind):
    policy, cfg, batch = rollout(
        latent_grad=kind, temperature=1.3, top_k=12, top_p=0.9, latent_tau=0.3)
    mask, found = batch["loss_mask"], score(policy, batch)
    assert (found - batch["rollout_logprobs"])[mask].abs().max() <= 2e-5
    assert not found[~mask].any()
    with torch.no_grad():
        logits = policy.lm.get_output_embeddings()(policy.hidden(batch))[..., :29].double()
    full = (logits / 1.3).log_softmax(-1)  # of all ids, at the sampling temperature
    for row, t in mask.nonzero().tolist():
        u = batch["topk_scores"][row, t].double()
        S = u.isfinite()
        u, lp = u[S], full[row, t, batch["topk_ids"][row, t]][S]
        if not batch["latent_mask"][row, t]:
            value = full[row, t, batch["completion_ids"][row, t]]
        elif kind == "soft":
            value = ((u / 0.3).softmax(0) * lp).sum()
        elif kind == "token":
            value = lp[u.argmax()]
        elif kind == "concrete":
            value = (lp.sum() - len(u) * (lp - u).exp().sum().log()) / len(u)
        else:
            g = u - lp.log_softmax(0)
            value = (-g - (-g).exp()).mean() if kind == "gumbel" else 0 * u[0]
        assert abs(float(value) - float(found[row, t])) < 1e-4 * max(1, abs(float(value)))


def test_scores_stay_in_float32_for_a_bfloat16_model():
    _, policy, cfg = build("lepo")
    lm = make_lm().bfloat16()
    lm.compute_dtype = torch.bfloat16
    policy = lepo.Policy(lm, make_tokenizer(), cfg)
    batch = draw(lepo, policy, cfg)
    z = lepo.mixture_weights(batch["topk_scores"], cfg.latent_tau)
    assert batch["topk_scores"].dtype == z.dtype == torch.float32
    assert (z.sum(-1) - 1).abs().max() < 1e-6
    assert policy.completion_embeds(batch).dtype == torch.bfloat16
    gap = (score(policy, batch) - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert gap.abs().max() < 0.3


def test_metrics_describe_the_mixtures():
    policy, cfg, batch = rollout(top_k=9, top_p=0.8)
    outputs = {"entropy": torch.zeros(batch["loss_mask"].shape)}
    found = lepo.measure(policy, outputs, batch, dataclasses.replace(cfg, kl_coef=0.0))
    size, kept, shown = (found[name][0] for name in lepo.METHOD_METRICS)
    for row, t in batch["latent_mask"].nonzero().tolist():
        u = batch["topk_scores"][row, t]
        z = (u / cfg.latent_tau).softmax(0)
        assert size[row, t].item() == pytest.approx(1 / sum(x * x for x in z.tolist()), rel=1e-5)
        assert kept[row, t] == sum(x > 0 for x in u.exp().tolist())
        heaviest = batch["topk_ids"][row, t, z.argmax()]
        assert shown[row, t] == float(heaviest == batch["completion_ids"][row, t])
    some = shown[batch["latent_mask"]].mean()
    assert 0 < some < 1


def test_a_sampled_evaluation_is_repeatable():
    _, policy, cfg = build("lepo", eval_batch=2, greedy=False, num_samples=2)
    problems = [{"question": "q", "answer": "5", "prompt_ids": p} for p in PROMPTS]
    one, two, other = (lepo.evaluate(policy, make_tokenizer(), problems, cfg, make_rng("cpu", s))
                       for s in (0, 0, 1))
    assert one == two and one["records"] != other["records"]
