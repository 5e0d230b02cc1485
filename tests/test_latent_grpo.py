"""Latent-GRPO's noise, mixtures, surrogate and its slopes against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from test_replay import EOS, build, draw, hash_tokenizer, score

import latent_grpo as script
from common import gumbel_like, make_rng, top_k_mixture

torch.set_num_threads(1)
D = [-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0, 4.5]


def slopes(d, ste):
    """d value / d log-prob of components whose margin is d, times their number K."""
    d = torch.tensor(d, dtype=torch.float64)
    logprobs = torch.full_like(d, -3.0, requires_grad=True)
    script.latent_logprob(logprobs.detach() + d, logprobs, ste).backward()
    return (logprobs.grad * len(d)).tolist()


def test_surrogate_is_the_mean_gumbel_log_density_and_the_same_under_every_ste():
    scores, logprobs = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    found = script.latent_logprob(scores, logprobs, "none")
    d = scores - logprobs
    expected = torch.distributions.Gumbel(0.0, 1.0).log_prob(d).mean(-1)
    torch.testing.assert_close(found, expected)
    assert found.shape == (5, 3) and (found <= -1).all()  # -1 where all margins are 0
    for ste in ("paper", "released"):
        assert torch.equal(script.latent_logprob(scores, logprobs, ste), found)
    twice = script.latent_logprob(scores.repeat(1, 1, 2), logprobs.repeat(1, 1, 2), "none")
    torch.testing.assert_close(twice, found)  # a mean over K, not a sum


def test_slopes_are_those_of_eq_27_31_and_the_released_code():
    assert slopes(D, "none") == pytest.approx([1 - math.exp(-d) for d in D])  # eq. 27
    assert slopes(D, "paper") == pytest.approx([abs(1 - math.exp(-d)) for d in D])  # eq. 31
    assert slopes(D, "released") == pytest.approx(
        [math.exp(d) - 1 if d < 0 else 1 - math.exp(-d) for d in D])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_with_the_paper_s_ste_every_kept_logprob_moves_with_the_advantage(advantage):  # eq. 32
    cfg = script.Config(**{**script.PRESETS["tiny"], "kl_coef": 0.0})
    scores, logprobs = torch.randn(2, 3, 4), torch.randn(2, 3, 4).requires_grad_()
    assert ((scores - logprobs) < 0).any() and ((scores - logprobs) > 0).any()
    for ste, steady in (("paper", True), ("none", False)):
        outputs = {"logprobs": script.latent_logprob(scores, logprobs, ste)}
        batch = {"advantages": torch.full((2, 3), advantage)}
        loss = script.policy_loss(outputs, batch, cfg).sum()
        slope = torch.autograd.grad(-loss, logprobs)[0]
        assert ((slope.sign() == advantage).all().item()) == steady


def of(noise):
    """Noise [b, V] of all ids -> the function that latent_step asks for that of its candidates."""
    return lambda ids: noise.gather(-1, ids)


def test_gradient_on_the_logits_is_eq_35_to_37():
    z = torch.randn(12, dtype=torch.float64, requires_grad=True)
    noise = script.one_sided_noise(gumbel_like(z, make_rng("cpu", 0)).double())
    ids, scores = script.latent_step(z.detach()[None], of(noise[None]), 4, 0.95)
    script.latent_logprob(scores[0], torch.log_softmax(z, -1)[ids[0]], "paper").backward()
    d = scores[0] - torch.log_softmax(z, -1)[ids[0]]
    alpha, p = (1 - torch.exp(-d)).abs().detach(), z.softmax(-1).detach()
    expected = torch.zeros(12, dtype=torch.float64).index_add(0, ids[0], alpha) - p * alpha.sum()
    torch.testing.assert_close(z.grad, expected / 4)
    assert abs(z.grad.sum()) < 1e-12
    others = [v for v in range(12) if v not in ids[0].tolist()]
    assert (z.grad[others] <= 0).all()


def test_noise_is_clipped_shifted_and_scaled():
    g = torch.tensor([-9.0, -1.5, 0.0, 3.0, 9.0])
    assert script.one_sided_noise(g).tolist() == [0.0, 0.0, 1.5, 4.5, 4.5]
    cfg = script.Config(**{**script.PRESETS["tiny"], "noise_scale": 2.0})
    logits = torch.zeros(99, 99)
    high = script.draw_noise(logits, cfg, make_rng("cpu", 0))
    cfg.one_sided = False
    both = script.draw_noise(logits, cfg, make_rng("cpu", 0))
    torch.testing.assert_close(high - both, torch.full_like(both, 3.0))
    assert high.min() == 0 and high.max() == 9 and both.min() == -3 and both.max() == 6
    # expected slope of eq. 27: about 0 with two sides, 0.78 with one, as the specification computes
    one, two = 1 - torch.exp(-high / 2), 1 - torch.exp(-both / 2)
    torch.testing.assert_close(one, 1 - math.exp(-1.5) + math.exp(-1.5) * two)
    assert one.mean() == pytest.approx(0.779, abs=0.01)
    assert two.mean() == pytest.approx(0.0105, abs=0.03)


def test_the_shift_changes_scores_and_nothing_else():
    logits, g = torch.randn(64, 30) * 2, gumbel_like(torch.zeros(64, 30), make_rng("cpu", 1))
    ids, scores = script.latent_step(logits, of(g.clamp(-1.5, 3.0)), 5, 0.95)
    same, shifted = script.latent_step(logits, of(script.one_sided_noise(g)), 5, 0.95)
    weights = script.mixture_weights(scores, 0.7)
    assert torch.equal(ids, same)
    torch.testing.assert_close(shifted, scores + 1.5)
    torch.testing.assert_close(
        weights, script.mixture_weights(shifted, 0.7), rtol=1e-4, atol=1e-6)
    assert (scores.diff() <= 0).all() and weights.sum(-1).allclose(torch.ones(64))


def test_candidates_are_the_nucleus_and_the_likeliest_k():
    logits = torch.tensor([[5.0, 4.0, 0.0, -1.0, -2.0, -3.0], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])
    seen = [set(), set()]
    for seed in range(200):
        noise = gumbel_like(logits, make_rng("cpu", seed))
        ids, _ = script.latent_step(logits, of(noise), 3, 0.9)
        for row in range(2):
            seen[row].add(tuple(sorted(ids[row].tolist())))
    assert seen[0] == {(0, 1, 2)}  # the nucleus holds 2: noise only changes the weights
    assert len(seen[1]) == 20  # the nucleus holds all 6: every set of 3
    ids, scores = script.latent_step(logits, None, 6, 0.9)
    weights = script.mixture_weights(scores, 1.0)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))
    table = torch.nn.Embedding(6, 8)
    expected = logits.softmax(-1) @ table.weight
    torch.testing.assert_close(top_k_mixture(ids, weights, table), expected)


@pytest.mark.parametrize("end", ["clean", "perturbed", "either"])
@pytest.mark.parametrize("marker", ["##", "b"])
def test_latent_positions_are_those_before_the_first_id_of_the_marker(end, marker, monkeypatch):
    tokenizer = hash_tokenizer()
    module, policy, cfg = build("latent_grpo", tokenizer=tokenizer, answer_marker=marker, seed=3,
                                latent_end=end, eos=(2, 8, 11), max_completion_length=20)
    step, first = module.next_input, tokenizer(marker)["input_ids"][0]

    def keep_logits(policy, logits, *args):
        ids, embeds, record, state = step(policy, logits + 2 * (torch.arange(29) == first), *args)
        return ids, embeds, {**record, "likeliest": logits.argmax(-1)}, state

    monkeypatch.setattr(module, "next_input", keep_logits)
    batch = draw(module, policy, cfg, group_size=16)
    switches, dropped_before = 0, 0
    for row, length in enumerate(batch["lengths"].tolist()):
        ids = batch["completion_ids"][row, :length].tolist()
        latents = ids.index(first) if first in ids else length
        latents = min(latents, 19, length - (ids[-1] in (2, 8, 11)))
        expected = torch.arange(batch["latent_mask"].shape[1]) < latents
        assert torch.equal(batch["latent_mask"][row], expected)
        if first in ids[:-1]:
            switches += 1
            dropped_before += bool((batch["lengths"] <= latents).any())
        unscored = [t for t in range(length) if not batch["loss_mask"][row, t]]
        assert unscored == ([19] if latents == 19 and ids[-1] not in (2, 8, 11, first) else [])
    assert switches > 5 and dropped_before > 5
    assert batch["topk_scores"].isfinite().all()


@pytest.mark.parametrize("one_sided", [True, False])
def test_stored_margins_stay_within_the_noise(one_sided):
    module, policy, cfg = build("latent_grpo", one_sided=one_sided, noise_scale=0.5)
    batch = draw(module, policy, cfg, group_size=8)
    with torch.no_grad():
        kept = policy(batch)["kept"]
    margins = (batch["topk_scores"] - kept)[batch["latent_mask"]] / 0.5
    low, high = (0, 4.5) if one_sided else (-1.5, 3)
    assert low - 1e-4 <= margins.min() < low + 0.5 and high - 1.5 < margins.max() <= high + 1e-4
    assert (score(policy, batch)[batch["latent_mask"]] <= -1 + 1e-6).all()


def test_without_noise_decoding_depends_on_no_seed_and_one_candidate_is_its_embedding():
    module, policy, cfg = build("latent_grpo", latent_top_k=1)
    one, two = (draw(module, policy, cfg, greedy=True, seed=s) for s in (0, 1))
    assert torch.equal(one["completion_ids"], two["completion_ids"])
    assert torch.equal(policy.completion_embeds(one), policy.table(one["completion_ids"]))
    _, policy, cfg = build("latent_grpo", noise_scale=0.0)
    still, greedy = draw(module, policy, cfg), draw(module, policy, cfg, greedy=True)
    assert torch.equal(still["topk_scores"][:, 0], greedy["topk_scores"][:, 0])


def test_the_floor_forces_the_marker_and_scores_only_what_follows():
    tokenizer = make_tokenizer()
    module, policy, cfg = build("latent_grpo", answer_marker="####", floor=True, eos=EOS[:1])
    batch = draw(module, policy, cfg)
    marker = tokenizer("####")["input_ids"]
    assert batch["completion_ids"][:, :4].tolist() == [marker] * 12
    assert not batch["latent_mask"].any() and not batch["loss_mask"][:, :4].any()
    assert torch.equal(batch["loss_mask"][:, 4:], batch["completion_mask"][:, 4:])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])  # the nucleus holds most, many, few of the ids
def test_a_large_vocabulary_is_only_sorted_as_far_as_the_nucleus_needs(spread):
    logits, noise = spread * torch.randn(5, 3000), torch.randn(5, 3000)
    logits[0] *= 10  # one row alone is sure
    ids, scores = script.latent_step(logits, of(noise), 4, 0.95)
    logprobs, order = logits.log_softmax(-1).sort(-1, descending=True)
    outside = logprobs.exp().cumsum(-1) - logprobs.exp() >= 0.95
    outside[:, :4] = False
    wanted, places = (logprobs + noise.gather(-1, order)).masked_fill(outside, -1e9).topk(4, -1)
    assert torch.equal(scores, wanted) and torch.equal(ids, order.gather(-1, places))


def test_renormalised_scores_are_log_probs_among_the_likeliest_ids_plus_noise():
    logits, noise = 2 * torch.randn(6, 50), torch.randn(6, 50)
    ids, scores = script.latent_step(logits, of(noise), 4, 0.95, True)
    likeliest, chosen = logits.topk(4, -1)
    among = likeliest.softmax(-1).log() + noise.gather(-1, chosen)
    wanted, places = among.sort(-1, descending=True)
    assert torch.equal(ids, chosen.gather(-1, places))
    torch.testing.assert_close(scores, wanted)


def test_renormalised_thoughts_are_scored_as_they_were_drawn_and_know_no_other_id():
    module, policy, cfg = build(
        "latent_grpo", renormalise=True, one_sided=False, noise_scale=1.0, latent_tau=0.1,
        kl_coef=0.0)
    batch = draw(module, policy, cfg)
    outputs = policy(batch)
    mask = batch["latent_mask"]
    torch.testing.assert_close(
        outputs["logprobs"][batch["loss_mask"]], batch["rollout_logprobs"][batch["loss_mask"]],
        rtol=0, atol=1e-4)
    margins = (batch["topk_scores"] - policy.before_noise(outputs["kept"]))[mask]
    assert mask.sum() > 20 and margins.min() >= -1.5 - 1e-4 and margins.max() <= 3 + 1e-4
    found, _ = script.measure(policy, outputs, batch, cfg)["margin"]
    torch.testing.assert_close(found[mask], margins.mean(-1))

    # What the kept ids lose together, to ids that are not kept, changes nothing.
    lower = outputs["kept"] - 5.0
    values = [policy.surrogate(kept, outputs["logprobs"], batch, "none")
              for kept in (outputs["kept"], lower)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("renormalise", [False, True])
def test_in_a_large_vocabulary_only_candidates_draw_noise_and_the_law_is_the_same(
        renormalise, monkeypatch):
    cfg = script.Config(**{**script.PRESETS["tiny"], "latent_top_k": 4, "latent_top_p": 0.9,
                           "renormalise": renormalise})
    policy = SimpleNamespace(top_k=4, marker_ids=[0], eos_ids=torch.tensor([1]))
    logits = (torch.randn(1, 2000, generator=make_rng("cpu", 4)) * 3).expand(4000, -1)
    state = {"thinks": torch.ones(4000, dtype=torch.bool)}
    widths, drawn = [], script.gumbel_like
    monkeypatch.setattr(
        script, "gumbel_like", lambda x, rng: widths.append(x.shape[1]) or drawn(x, rng))
    ids = torch.zeros(4000, dtype=torch.long)
    _, record, _ = script.think(policy, logits, ids, 0, state, cfg, make_rng("cpu", 5), False)
    assert widths == [4 if renormalise else 1024]
    noise = script.draw_noise(logits, cfg, make_rng("cpu", 6))
    ids, scores = script.latent_step(logits, of(noise), 4, 0.9, renormalise)
    for column in range(4):
        found, expected = record["topk_scores"][:, column], scores[:, column]
        assert abs(found.mean() - expected.mean()) < 4 * expected.std() * (2 / 4000) ** 0.5
        assert found.std() == pytest.approx(expected.std().item(), rel=0.1)
    counts = [torch.bincount(x.flatten(), minlength=2000) for x in (record["topk_ids"], ids)]
    often = counts[1] > 400
    assert often.sum() >= 4
    assert ((counts[0] - counts[1])[often].abs() < 5 * (2 * counts[1][often]).sqrt()).all()
