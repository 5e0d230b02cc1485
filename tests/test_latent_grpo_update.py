"""Latent-GRPO's advantages, clip, KL and gradients; several updates on one rollout."""

import itertools

import pytest
import torch
from test_replay import PROMPTS, build, draw, score
from torch import nn

import latent_grpo as script
from common import add_lora, frozen_copy, select_rows

torch.set_num_threads(1)


def rollout(group_size=4, **changes):
    """-> policy, cfg, batch with rewards (the first two of a group are right) and advantages."""
    _, policy, cfg = build("latent_grpo", **{"kl_coef": 0.0, **changes})
    cfg.group_size = group_size
    batch = draw(script, policy, cfg, group_size=group_size)
    batch["rewards"] = (torch.arange(len(batch["lengths"])) % group_size < 2).float()
    batch["advantages"] = script.compute_advantages(batch, cfg)
    batch["weights"] = script.loss_weights(batch, cfg)
    return policy, cfg, batch


def grads(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def shift(policy, scale=0.3):
    """Move the policy, as earlier updates of the same rollout would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.lm.model.layers.parameters():
            p += scale * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("rewards, valid, expected", [
    ([1, 1, 0, 1], [1, 1, 1, 0], [0.5773, 0.5773, -1.1547, 0]),  # the specification's example
    ([1, 1, 0, 0], [1, 1, 1, 0], [0.5773, 0.5773, -1.1547, 0]),  # whatever the invalid one got
    ([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]),  # one valid: nothing to compare it with
    ([1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]), ([1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]),
    ([1, 0, 0, 0], [1, 1, 1, 1], [1.4997, -0.4999, -0.4999, -0.4999])])
def test_advantages_are_those_of_the_valid_completions(rewards, valid, expected):
    rewards, valid = torch.tensor(rewards).float(), torch.tensor(valid).bool()
    found = script.valid_advantages(rewards, valid)
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert (found[~valid] == 0).all() and abs(found.sum()) < 1e-6


def test_the_winner_is_the_best_scored_right_and_valid_completion():
    scores = torch.tensor([-1.0, -2.0, -2.0, -0.1])
    right, valid = torch.tensor([0, 1, 1, 1]).bool(), torch.tensor([1, 1, 1, 0]).bool()
    assert script.first_token_winner(scores, right, valid) == 1  # the first of equals
    assert script.first_token_winner(scores.flip(0), right.flip(0), valid.flip(0)) == 1
    assert script.first_token_winner(scores, right, ~valid) == 3
    assert script.first_token_winner(scores, ~right, valid) == 0
    assert script.first_token_winner(scores, right & ~right, valid) is None


def test_only_the_winner_keeps_the_advantage_of_its_first_position():
    policy, cfg, batch = rollout(max_completion_length=14)
    mask, lengths, A = batch["loss_mask"], batch["lengths"], batch["advantages"]
    assert A.shape == mask.shape and (A[~mask] == 0).all()
    cfg.first_token_selection = False
    whole = script.compute_advantages(batch, cfg)
    assert torch.equal(A[:, 1:], whole[:, 1:])
    winners = 0
    for group in torch.arange(len(lengths)).view(-1, 4):
        eligible = [r for r in group.tolist() if batch["rewards"][r] and lengths[r] < 14]
        paths = {r: batch["rollout_logprobs"][r][mask[r]].mean()
                 for r in eligible}
        if not eligible:
            assert torch.equal(A[group], whole[group])
            continue
        winner = max(paths, key=lambda r: paths[r])
        winners += bool(A[winner, 0])
        assert A[winner, 0] == whole[winner, 0]
        assert all(A[r, 0] == 0 for r in group.tolist() if r != winner)
    assert winners > 1


@pytest.mark.parametrize("flag, value", [
    ("latent", False), ("mask_invalid", False), ("dry_run", True)])
def test_without_the_devices_advantages_are_plain_group_advantages(flag, value):
    _, cfg, batch = rollout(**{flag: value, "first_token_selection": False,
                                "max_completion_length": 5})
    plain = script.group_advantages(batch["rewards"], 4)[:, None] * batch["loss_mask"]
    assert torch.equal(batch["advantages"], plain)
    assert (batch["lengths"] == cfg.max_completion_length).any()  # masking would be seen


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.0, 1.0, -1.0), (1.0, -1.0, 1.0), (1.3, 1.0, 0.0), (1.3, -1.0, 1.3), (0.7, 1.0, -0.7),
    (0.7, -1.0, 0.0), (2.9, -1.0, 2.9), (3.1, -1.0, 0.0)])
def test_clip_and_dual_clip_stop_the_gradient_where_they_must(ratio, advantage, slope):
    cfg = script.Config(**{**script.PRESETS["tiny"], "kl_coef": 0.0})
    logprobs = torch.zeros(1, 1, requires_grad=True)
    batch = {"advantages": torch.tensor([[advantage]]),
             "old_logprobs": -torch.tensor([[ratio]]).log()}
    script.policy_loss({"logprobs": logprobs}, batch, cfg).sum().backward()
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-5)


def test_on_policy_the_gradient_is_that_of_advantage_times_surrogate():
    policy, cfg, batch = rollout()
    outputs = policy(batch)
    loss = (script.policy_loss(outputs, batch, cfg) * batch["weights"]).sum()
    found = grads(policy, loss)
    again = policy(batch)["logprobs"]
    expected = grads(policy, -(again * batch["advantages"] * batch["weights"]).sum())
    assert len(found) > 10 and not any("embed" in n or "lm_head" in n for n in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_ste_changes_gradients_after_an_update_and_never_values():
    grad, value = {}, {}
    for ste in ("none", "paper", "released"):
        policy, cfg, batch = rollout(ste=ste, noise_scale=0.3)
        batch["old_logprobs"] = score(policy, batch)
        shift(policy)
        outputs = policy(batch)
        crossed = (batch["topk_scores"] - outputs["kept"] < -1e-3)[batch["latent_mask"]]
        assert 0.01 < crossed.float().mean() < 0.9
        value[ste] = outputs["logprobs"].detach()
        cfg.clip_eps = 1e9
        loss = (script.policy_loss(outputs, batch, cfg) * batch["weights"]).sum()
        grad[ste] = torch.cat([g.flatten() for g in grads(policy, loss).values()])
    assert torch.equal(value["none"], value["paper"])
    assert torch.equal(value["none"], value["released"])
    for one, two in (("none", "paper"), ("none", "released"), ("paper", "released")):
        assert (grad[one] - grad[two]).norm() > 0.001 * grad[one].norm()
    policy, cfg, batch = rollout(ste="paper", one_sided=False)  # two-sided: d < 0 from the start
    kept, token_logprobs, _ = policy.score(batch, policy.lm)
    plain = policy.surrogate(kept, token_logprobs, batch, "none").sum()
    plain, found = grads(policy, plain), grads(policy, policy(batch)["logprobs"].sum())
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_released_ste_acts_only_where_the_advantage_is_not_positive():
    policy, cfg, batch = rollout(ste="released", noise_scale=0.3)
    shift(policy)
    found = {}
    for sign in (1.0, -1.0):
        batch["advantages"] = torch.full_like(batch["advantages"], sign)
        for ste in ("released", "none"):
            cfg.ste = ste
            loss = policy(batch)["logprobs"][batch["latent_mask"]].sum()
            found[sign, ste] = torch.cat([g.flatten() for g in grads(policy, loss).values()])
    assert torch.equal(found[1.0, "released"], found[1.0, "none"])
    assert not torch.allclose(found[-1.0, "released"], found[-1.0, "none"])


def test_the_kl_knows_no_ste_and_is_flat_at_the_reference():
    policy, cfg, batch = rollout(kl_coef=1.0)
    reference = frozen_copy(policy.lm)
    batch["ref_logprobs"] = script.reference_logprobs(policy, reference, batch, cfg)
    at_start = script.kl_estimate(policy(batch), batch)
    assert at_start.abs().max() < 1e-6
    assert all(g.abs().max() < 1e-4 for g in grads(policy, at_start.sum()).values())
    shift(policy)
    slope = {}
    for ste in ("paper", "none"):
        cfg.ste = ste
        kl = script.kl_estimate(policy(batch), batch)
        assert kl.min() > -1e-6 and (kl[~batch["loss_mask"]] == 0).all()
        assert kl[batch["latent_mask"]].mean() > 0.01
        assert kl[batch["loss_mask"] & ~batch["latent_mask"]].mean() > 0.01
        slope[ste] = grads(policy, kl.sum())
    assert all(torch.equal(slope["paper"][n], slope["none"][n]) for n in slope["none"])


def exact_kl(logits, reference):
    """KL over the vocabulary, and its gradient for the logits: p (log p - log ref - KL)."""
    logprobs, other = logits.log_softmax(-1), reference.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - other)).sum(-1)
    return kl, logprobs.exp() * (logprobs - other - kl)


def test_the_kl_of_kept_ids_is_that_of_them_and_any_other_id():
    """All sets of three of six ids; the value by hand, and never above the exact one."""
    rng = torch.Generator().manual_seed(0)
    logits, reference = 2 * torch.randn(2, 6, generator=rng, dtype=torch.float64)
    p, q = logits.softmax(-1), reference.softmax(-1)
    for kept in itertools.combinations(range(6), 3):
        expected = sum(p[k] * torch.log(p[k] / q[k]) for k in kept)
        rest = [sum(x[k] for k in range(6) if k not in kept) for x in (p, q)]
        expected += rest[0] * torch.log(rest[0] / rest[1])
        found = script.kept_kl(p[list(kept)].log(), q[list(kept)].log())
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        assert 0 <= found <= exact_kl(logits, reference)[0]


@pytest.mark.parametrize("ids", [list(range(6)), [0, 1]])
def test_the_kl_is_exact_where_the_other_ids_have_no_mass_or_keep_their_proportions(ids):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=rng)
    reference = logits.clone()
    reference[ids] += torch.randn(len(ids), generator=rng)
    logits.requires_grad_()
    found = script.kept_kl(logits.log_softmax(-1)[ids], reference.log_softmax(-1)[ids])
    found.backward()
    value, slope = exact_kl(logits.detach(), reference)
    assert found.item() == pytest.approx(value.item(), abs=1e-6)
    torch.testing.assert_close(logits.grad, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_sided", [True, False])
def test_the_expected_gradient_of_the_kl_under_the_noise_is_nearly_the_exact_one(one_sided):
    """K = 10 of 40 ids, two of which hold .7 of the mass; every id of the reference differs."""
    rng, size = torch.Generator().manual_seed(2), 4000
    cfg = script.Config(one_sided=one_sided, noise_scale=1.0)
    mass = torch.cat([torch.tensor([0.4, 0.3]), torch.full((38,), 0.3 / 38)])
    logits = mass.log()
    reference = logits + 0.5 * torch.randn(40, generator=rng)
    rows = logits.expand(size, -1).clone().requires_grad_()
    ids, scores = script.latent_step(
        rows.detach(), lambda ids: script.draw_noise(ids, cfg, rng), 10, cfg.latent_top_p)
    ref = torch.cat([reference.log_softmax(-1)[ids], torch.zeros(size, 1)], -1)[None]
    outputs = {"kept": rows.log_softmax(-1).gather(1, ids)[None], "logprobs": -scores[None, :, 0]}
    batch = {"ref_logprobs": ref, "latent_mask": torch.ones(1, size).bool()}
    script.kl_estimate(outputs, batch).mean().backward()
    found, (_, exact) = rows.grad.sum(0), exact_kl(logits, reference)
    assert torch.cosine_similarity(found, exact, 0) > 0.97
    assert 0.9 < found.norm() / exact.norm() < 1.1


def ref_score(policy, batch):
    """Log-probs of kept ids and tokens, as reference_logprobs has them."""
    with torch.no_grad():
        kept, token_logprobs, _ = policy.score(batch, policy.lm)
    return torch.cat([kept, token_logprobs[..., None]], -1)


def test_a_reference_is_the_copy_with_its_adapters_or_the_model_without():
    policy, cfg, batch = rollout()
    before = ref_score(policy, batch)
    add_lora(policy.lm, 4)
    for name, p in policy.lm.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    moved = ref_score(policy, batch)
    assert not torch.allclose(moved, before)
    torch.testing.assert_close(script.reference_logprobs(policy, None, batch, cfg), before)
    reference = frozen_copy(policy.lm)
    torch.testing.assert_close(script.reference_logprobs(policy, reference, batch, cfg), moved)


def test_no_gradient_reaches_the_table_through_a_mixture_unless_embeddings_train():
    policy, cfg, batch = rollout()
    assert not policy.completion_embeds(batch).requires_grad
    policy, cfg, batch = rollout(train_embeddings=True)
    found = grads(policy, policy(batch)["logprobs"].sum())
    assert any("embed" in name for name in found)


def test_old_logprobs_of_several_updates_are_those_before_the_first(monkeypatch):
    policy, cfg, batch = rollout(update_epochs=2, minibatches=2, num_prompts=4, micro_batch=3,
                                 noise_scale=0.3)
    del batch["advantages"], batch["weights"]
    records = [{"correct": r, "format_ok": 1, "length": n, "latent_steps": 1, "truncated": 0}
               for r, n in zip(batch.pop("rewards").tolist(), batch["lengths"].tolist())]
    monkeypatch.setattr(script, "rollout", lambda *args: dict(batch))
    monkeypatch.setattr(script, "grade", lambda *args: records)
    before, seen, update = score(policy, batch), [], script.update

    def spy(policy, ddp, reference, optimizer, part, *rest):
        if "old_logprobs" in part:
            seen.append({n: part[n] for n in ("old_logprobs", "prompt_ids", "lengths")})
        return update(policy, ddp, reference, optimizer, part, *rest)

    monkeypatch.setattr(script, "update", spy)
    cfg.lr = 0.02
    optimizer = torch.optim.AdamW(script.param_groups(policy, cfg))
    problems = [{"prompt_ids": [1]}]
    row, _ = script.train_step(policy, policy, None, optimizer, problems, cfg, 50)
    assert len(seen) == 4 and row["ratio_max"] > 1.01 and row["crossed_frac"] > 0
    for number, part in enumerate(seen):  # two passes over two halves of whole groups
        rows = range(number % 2 * 8, number % 2 * 8 + 8)
        expected = select_rows({**batch, "old_logprobs": before}, rows)["old_logprobs"]
        torch.testing.assert_close(part["old_logprobs"], expected, rtol=0, atol=1e-5)
    assert len(batch["lengths"]) == 4 * len(PROMPTS)


def test_the_path_score_is_a_mean_over_positions():
    cfg = script.Config(**{**script.PRESETS["tiny"], "group_size": 3})
    mask = torch.arange(5) < torch.tensor([2, 4, 3])[:, None]
    batch = {"rewards": torch.tensor([1.0, 1.0, 0.0]), "lengths": mask.sum(1), "loss_mask": mask,
             "rollout_logprobs": torch.tensor([-1.0, -0.8, -0.1])[:, None] * mask}
    first = script.compute_advantages(batch, cfg)[:, 0].tolist()  # sums: -2, -3.2; means -1, -0.8
    assert first[0] == first[2] == 0 < first[1]


def filtered(monkeypatch, reward, **changes):
    """replace_dead_groups on 4 groups of 3 -> their batch and records, the new ones, and cfg."""
    _, policy, cfg = build("latent_grpo", group_size=3, max_extra_rollouts=3, **changes)
    numbers = itertools.count()
    monkeypatch.setattr(script, "reward", lambda record: reward(next(numbers)))
    problems = [{"question": str(p), "answer": "7", "prompt_ids": p} for p in PROMPTS]
    batch = draw(script, policy, cfg, group_size=3)
    records = script.grade(batch, problems, policy.tokenizer, "7")
    for record in records:
        record["reward"] = script.reward(record)
    batch["rewards"] = torch.tensor([record["reward"] for record in records])
    found = script.replace_dead_groups(policy, problems, batch, records, cfg, 5)
    return batch, records, *found, cfg, policy


def test_extra_rollouts_replace_groups_of_equal_rewards(monkeypatch):
    """Groups 1, 4, 7, 10, 13 are live: one of the first draw, then two, then one, in this order."""
    batch, records, found, graded, cfg, policy = filtered(
        monkeypatch, lambda n: float(n // 3 % 3 == 1 and n % 3 == 0))
    assert graded[:12] == records and len(graded) == 3 * 12
    live = [record for n, record in enumerate(graded) if n // 3 in (1, 4, 7, 10)]
    assert found["lengths"].tolist() == [record["length"] for record in live]
    assert found["rewards"].view(4, 3).tolist() == [[1.0, 0.0, 0.0]] * 4
    kept = select_rows(batch, [3, 4, 5])  # the live group of the first draw is still there
    for name, value in select_rows(found, [0, 1, 2]).items():
        assert torch.equal(value, kept[name]), name
    gap = (score(policy, found) - found["rollout_logprobs"])[found["loss_mask"]]
    assert gap.abs().max() <= 1e-5


def test_dead_groups_stay_where_too_few_are_live(monkeypatch):
    batch, records, found, graded, *_ = filtered(monkeypatch, lambda n: float(n == 40))
    assert len(graded) == 4 * 12  # all draws that are allowed; the group of row 40 is live
    lengths = [record["length"] for record in graded]
    assert found["lengths"].tolist() == lengths[:9] + lengths[39:42]
    assert found["rewards"].tolist() == [0.0] * 10 + [1.0, 0.0]


def test_live_groups_and_a_stop_signal_need_no_extra_rollout(monkeypatch):
    batch, records, found, graded, *_ = filtered(monkeypatch, lambda n: float(n % 3 == 0))
    assert graded == records and found is batch
    monkeypatch.setattr(script, "stop_requested", lambda: True)
    batch, records, found, graded, *_ = filtered(monkeypatch, lambda n: 0.0)
    assert graded == records and found is batch


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("num_live", [0, 1])
def test_peaks_are_null_if_no_group_has_an_advantage(monkeypatch, updates, num_live):
    policy, cfg, batch = rollout(minibatches=updates, num_prompts=4, mask_invalid=False)
    del batch["advantages"], batch["weights"]
    cfg.kl_coef = 0.0
    batch["rewards"] = torch.zeros(len(batch["lengths"]))
    batch["rewards"][:num_live] = 1.0
    records = [{"correct": 0, "format_ok": 1, "length": 3, "latent_steps": 1, "truncated": 0,
                "reward": r} for r in batch.pop("rewards").tolist()]
    monkeypatch.setattr(script, "rollout", lambda *args: dict(batch))
    monkeypatch.setattr(script, "grade", lambda *args: records)
    monkeypatch.setattr(script, "reward", lambda record: record["reward"])
    optimizer = torch.optim.AdamW(script.param_groups(policy, cfg))
    row, _ = script.train_step(policy, policy, None, optimizer, [{"prompt_ids": [1]}], cfg, 50)
    for name in ("ratio_max", "logprob_gap", "grad_norm"):
        assert (row[name] is None) == (num_live == 0), name
