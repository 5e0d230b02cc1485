"""Latents: the state machine, rounds on one cache against a slow reference, gradients, masks."""

import dataclasses

import pytest
import torch
from conftest import make_lm, make_tokenizer
from test_replay import PROMPTS, build, draw, gradients, score

import hyrea as script
from common import completion_hidden, lm_logits, make_rng, select_rows

torch.set_num_threads(1)


def built(c=2, kind="llama", **changes):
    """-> policy, cfg of a random model that switches often: a quarter of its free choices."""
    changes = {"latents_per_step": c, "latent_rms": False, "max_completion_length": 16, **changes}
    _, policy, cfg = build("hyrea", kind, **changes)
    policy.double()  # a chain of latents amplifies rounding
    return policy, cfg


def draw_often(policy, cfg, group_size=6, greedy=False, seed=0, often=3.0):
    """A rollout of logits in which <start-latent> is likelier; scores of it are the model's own."""
    step = script.next_input

    def switch(policy, logits, *args):
        logits = logits.clone()
        logits[:, policy.start_id] += often
        return step(policy, logits, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "next_input", switch)
        return draw(script, policy, cfg, PROMPTS, group_size, greedy, seed)


def slow_hidden(policy, batch, row):
    """States of one unpadded row [n, H], every latent by a new pass without cache."""
    inputs = [*policy.table(batch["prompt_ids"][row][batch["prompt_mask"][row]])]
    states = []
    for t in range(int(batch["lengths"][row])):
        embeds = torch.stack(inputs)[None]
        states.append(policy.lm.base_model(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long(),
            use_cache=False).last_hidden_state[0, -1])
        latent = batch["latent_mask"][row, t]
        token = policy.table(batch["completion_ids"][row, t])
        inputs.append(policy.latent_input(states[-1]) if latent else token)
    return torch.stack(states)


def grads(policy, logits, batch, weights):
    """Gradients of the weighted log-probs of the ids, by name."""
    policy.zero_grad()
    logprobs = torch.log_softmax(logits, -1)
    (logprobs.gather(-1, batch["completion_ids"][..., None])[..., 0] * weights).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, c, rms", [
    ("llama", 1, False), ("llama", 3, True), ("qwen2", 2, False), ("gpt2", 2, False)])
def test_rounds_equal_a_slow_reference_in_states_and_gradients(kind, c, rms):
    policy, cfg = built(c, kind, latent_rms=rms)
    batch = draw_often(policy, cfg)
    assert batch["latent_mask"].sum(1).unique().numel() > 3  # rows differ in their rounds
    weights = torch.randn(batch["loss_mask"].shape, generator=make_rng("cpu", 1))
    weights *= batch["loss_mask"]
    hidden = policy.hidden(batch)
    fast = grads(policy, lm_logits(policy.lm, hidden), batch, weights)
    slow = torch.zeros_like(hidden)
    for row, n in enumerate(batch["lengths"].tolist()):
        slow[row, :n] = slow_hidden(policy, batch, row)
        torch.testing.assert_close(hidden[row, :n], slow[row, :n], rtol=0, atol=1e-8)
    for name, g in grads(policy, lm_logits(policy.lm, slow), batch, weights).items():
        assert (fast[name] - g).norm() <= 2e-5 * g.norm() + 1e-5, name


@pytest.mark.parametrize("c", [1, 2, 3])
def test_gradient_runs_through_the_chain_of_latents(c):
    """Two numbers that must differ: total derivative, and that with latents as constants."""
    policy, cfg = built(c)
    batch = draw_often(policy, cfg)
    weights = batch["loss_mask"].float()
    whole = grads(policy, lm_logits(policy.lm, policy.hidden(batch)), batch, weights)
    with torch.no_grad():
        latents = policy.latent_input(policy.hidden(batch))
    cut = {**batch, "latent_embeds": latents}
    torch.testing.assert_close(policy.hidden(cut)[batch["completion_mask"]],
                               policy.hidden(batch)[batch["completion_mask"]], rtol=0, atol=1e-8)
    part = grads(policy, lm_logits(policy.lm, policy.hidden(cut)), batch, weights)
    flat = [torch.cat([g[n].flatten() for n in whole]) for g in (whole, part)]
    assert (flat[0] - flat[1]).norm() > 0.05 * flat[0].norm()


@pytest.mark.parametrize("pad_left, pad_right", [(0, 0), (4, 0), (0, 5), (3, 2)])
def test_padding_changes_no_score(pad_left, pad_right):
    policy, cfg = built()
    batch = draw_often(policy, cfg)
    wide = {}
    for name, value in batch.items():
        left = pad_left * name.startswith("prompt")
        right = pad_right * (value.dim() > 1 and not left and not name.startswith("prompt"))
        wide[name] = torch.nn.functional.pad(value, (left, right)) if left + right else value
    found, whole = score(policy, wide), score(policy, batch)
    torch.testing.assert_close(found[:, : whole.shape[1]], whole, rtol=0, atol=2e-5)
    for row in range(len(whole)):
        alone = score(policy, select_rows(batch, [row]))
        torch.testing.assert_close(alone[0], whole[row, : alone.shape[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("c", [0, 1, 2, 4])
@pytest.mark.parametrize("end", ["forced", "sampled"])
def test_a_span_is_start_then_latents_then_end(c, end):
    policy, cfg = built(c, end_latent=end)
    batch = draw_often(policy, cfg, often=1.5)
    S, E, L = policy.start_id, policy.end_id, policy.latent_id
    spans, limit = 0, cfg.max_completion_length
    for row, n in enumerate(batch["lengths"].tolist()):
        ids, free = batch["completion_ids"][row].tolist(), batch["loss_mask"][row].tolist()
        latent, left = batch["latent_mask"][row].tolist(), -1
        for t in range(n):
            if left < 0:
                assert ids[t] not in (E, L) and free[t]
                left, spans = (c, spans + 1) if ids[t] == S else (-1, spans)
            elif left == 0:
                assert ids[t] == E and not free[t]
                left = -1
            else:
                assert ids[t] == L if end == "forced" else ids[t] in (L, E)
                assert free[t] == (end == "sampled")
                left = -1 if ids[t] == E else left - 1
            assert latent[t] == (ids[t] == L and t + 1 < limit)
    assert spans >= 5 and batch["latent_mask"].any() == (c > 0)


def test_a_latent_reads_the_hidden_state_that_decided_its_position(monkeypatch):
    """Captured: what the rollout fed is what the update's state of the slot before is."""
    policy, cfg = built(2)
    fed, step = [], script.next_input

    def capture(*args):
        ids, embeds, record, state = step(*args)
        fed.append(embeds)
        return ids, embeds, {**record, "fed": embeds}, state

    monkeypatch.setattr(script, "next_input", capture)
    batch = draw_often(policy, cfg)
    with torch.no_grad():
        hidden, latent = policy.hidden(batch), batch["latent_mask"]
    torch.testing.assert_close(batch["fed"][latent], hidden[latent], rtol=0, atol=1e-8)
    tokens = batch["completion_mask"] & ~latent
    tokens[:, -1] = False  # a latent at the very end is fed to nothing, and counts as none
    assert torch.equal(batch["fed"][tokens], policy.table(batch["completion_ids"])[tokens])


@pytest.mark.parametrize("c, S", [(1, 3), (2, 2), (3, 1)])
def test_a_merged_span_holds_up_to_c_latents_for_each_step_and_is_scored_as_sampled(c, S):
    policy, cfg = built(c, end_latent="sampled", merge_spans=True, max_replaced_steps=S,
                        max_completion_length=24, temperature=0.7)
    assert script.span_limit(cfg) == c * S
    batch = draw_often(policy, cfg, 12, often=1.0)
    sizes, mask = set(), batch["loss_mask"]
    ids, E, L = batch["completion_ids"], policy.end_id, policy.latent_id
    for row, n in enumerate(batch["lengths"].tolist()):
        size = -1  # latents of the open span
        for t, i in enumerate(ids[row, :n].tolist()):
            assert (i in (E, L)) == (size >= 0)
            if size >= 0:
                assert mask[row, t] == (size < c * S)  # at the limit the end is forced
                sizes.add((size, i == E))
            size = {policy.start_id: 0, E: -1, L: size + 1}.get(i, -1)
    assert {(c * S, True), (0, True), (c * S - 1, False)} <= sizes and (c * S, False) not in sizes
    with torch.no_grad():
        logits = lm_logits(policy.lm, policy.hidden(batch)) / 0.7
        in_span = mask & ((ids == E) | (ids == L))
        total = logits[..., [E, L]].logsumexp(-1)
        exact = logits.gather(-1, ids[..., None])[..., 0] - total
    torch.testing.assert_close(score(policy, batch)[in_span], exact[in_span], rtol=0, atol=1e-5)
    own = draw(script, policy, cfg, PROMPTS, 12)
    mask = own["loss_mask"]
    torch.testing.assert_close(
        score(policy, own)[mask], own["rollout_logprobs"][mask].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("end", ["forced", "sampled"])
def test_what_was_sampled_is_scored_as_it_was_sampled(end):
    policy, cfg = built(3, end_latent=end, temperature=0.7)
    batch = draw(script, policy, cfg, PROMPTS, 12)
    mask, ids = batch["loss_mask"], batch["completion_ids"]
    torch.testing.assert_close(
        score(policy, batch)[mask], batch["rollout_logprobs"][mask].float(), rtol=0, atol=1e-5)
    chosen = [int((mask & (ids == i)).sum()) for i in (policy.latent_id, policy.end_id)]
    assert min(chosen) > 5 if end == "sampled" else max(chosen) == 0


def test_scores_are_renormalised_without_the_forbidden_ids():
    policy, cfg = built(2, temperature=0.7)
    batch = draw_often(policy, cfg)
    with torch.no_grad():
        logits = lm_logits(policy.lm, policy.hidden(batch)) / 0.7
        logits[..., [policy.end_id, policy.latent_id]] = -torch.inf
        exact = torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    mask = batch["loss_mask"]
    torch.testing.assert_close(score(policy, batch)[mask], exact[mask], rtol=0, atol=1e-6)
    assert not score(policy, batch)[~mask].any()


@pytest.mark.parametrize("end", ["forced", "sampled"])
def test_logits_of_latents_and_forced_ends_are_never_read(end, monkeypatch):
    policy, cfg = built(2, end_latent=end)
    batch = draw_often(policy, cfg)
    batch["advantages"] = torch.randn(batch["loss_mask"].shape, generator=make_rng("cpu", 1))
    found, hidden = [], policy.hidden
    for shift in (0.0, 5.0):
        noise = shift * torch.randn(hidden(batch).shape, generator=make_rng("cpu", 2))
        monkeypatch.setattr(policy, "hidden", lambda b, lm=None, noise=noise: hidden(b, lm)
                            + noise * ~batch["loss_mask"][..., None])
        loss = script.policy_loss(policy(batch), batch, cfg) * script.loss_weights(batch, cfg)
        found.append(loss.sum().item())
    assert found[0] == found[1]
    assert end == "sampled" or not batch["loss_mask"][batch["latent_mask"]].any()


def test_method_off_is_a_model_without_markers_and_one_pass():
    tokenizer, lm = make_tokenizer(), make_lm()
    cfg = script.Config(max_replaced_steps=0, temperature=1.3, max_completion_length=12)
    policy = script.Policy(lm, tokenizer, cfg)
    assert len(tokenizer) == lm.num_tokens == 29 and not len(policy.banned)
    batch = draw(script, policy, cfg)
    with torch.no_grad():
        plain = completion_hidden(lm, batch, policy.table(batch["completion_ids"]))
    torch.testing.assert_close(policy.hidden(batch)[batch["completion_mask"]],
                               plain[batch["completion_mask"]], rtol=0, atol=2e-5)
    known, cfg = make_tokenizer(), dataclasses.replace(cfg, max_completion_length=14)
    known.add_tokens(list(script.MARKERS))
    lm.num_tokens = 32
    policy = script.Policy(lm, known, cfg)  # an explicit run of a model that knows the markers
    ids = draw(script, policy, cfg, group_size=16)["completion_ids"]
    assert policy.banned.tolist() == [31, 30, 29] and ids.max() < 29


def test_only_the_markers_rows_of_the_embeddings_learn():
    policy, cfg = built(2)
    found, _ = gradients(script, policy, cfg, draw_often(policy, cfg))
    g = found["lm.model.embed_tokens.weight"]
    assert g[policy.start_id].any() and g[policy.end_id].any() and not g[:14].any()
    policy, cfg = built(2, train_embeddings=True)
    found, _ = gradients(script, policy, cfg, draw_often(policy, cfg))
    assert found["lm.model.embed_tokens.weight"][:29].any()
    for kind, rows in (("llama", 40), ("small", 34)):  # spare rows are used, never cut off
        lm = make_lm(vocab_size=40 if kind == "llama" else 30)
        script.Policy(lm, make_tokenizer(), cfg)
        assert lm.get_input_embeddings().num_embeddings == max(rows * (kind == "llama"), 32)


def test_span_markers_start_as_the_tokens_named_and_learn_at_a_rate_of_their_own():
    cfg = script.Config(marker_init="12+ *", marker_lr=10.0)
    policy = script.Policy(make_lm(), make_tokenizer(), cfg)
    weight, tokens = policy.table.weight, policy.tokenizer.get_vocab()
    assert torch.equal(weight[policy.start_id], weight[tokens["1"]])
    assert torch.equal(weight[policy.end_id], weight[tokens["*"]])
    assert torch.equal(weight[policy.latent_id], weight[: policy.markers.min()].mean(0))
    rates = {id(p): group["lr"] for group in script.param_groups(policy, cfg)
             for p in group["params"]}
    assert rates[id(weight)] == 10 * cfg.lr and min(rates.values()) == cfg.lr
    cfg = script.Config(marker_lr=10.0, train_embeddings=True)  # all rows learn alike
    policy = script.Policy(make_lm(), make_tokenizer(), cfg)
    assert {group["lr"] for group in script.param_groups(policy, cfg)} == {cfg.lr}
    mean = policy.table.weight[: policy.markers.min()].mean(0)
    assert torch.equal(policy.table.weight[policy.start_id], mean)


@pytest.mark.parametrize("text", ["<<", "a b c"])
def test_another_number_of_texts_for_the_two_span_markers_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        script.Config(marker_init=text)
    assert f"--marker_init '{text}': want two texts" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("c", [1, 3])
def test_checkpointed_layers_recompute_each_round_on_its_own_past(kind, c):
    """The gradient is that without checkpointing, through several rounds of one cache."""
    found = []
    for on in (False, True):
        make = make_lm(kind).double()
        if on:
            make.activation_checkpointing_enable()
        cfg = script.Config(latents_per_step=c, max_completion_length=16,
                            gradient_checkpointing=on)
        policy = script.Policy(make, make_tokenizer(), cfg).double()
        policy.start_id = policy.markers[0] = 14
        policy.lm.eos_ids = [2, 5]
        batch = draw_often(policy, cfg)
        assert batch["latent_mask"].sum(1).unique().numel() > 3
        policy.train()
        weights = torch.randn(batch["loss_mask"].shape, generator=make_rng("cpu", 1))
        hidden = policy.hidden(batch)
        found.append(grads(policy, lm_logits(policy.lm, hidden), batch, weights))
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, rtol=1e-9, atol=1e-12)
