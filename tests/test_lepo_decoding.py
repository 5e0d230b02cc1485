"""Soft Thinking and its cold stop, the presets, and refusals of lepo.py."""

import dataclasses

import pytest
import torch
from conftest import make_tokenizer
from runs import flags, rows, train
from test_cli import refusal
from test_lepo import KINDS
from test_replay import build, draw, hash_tokenizer, survivors
from test_resume import few_problems, odd_length

import lepo

torch.set_num_threads(1)


def decode(monkeypatch, greedy=False, group_size=8, tokenizer=None, **changes):
    """Roll out with --until_marker -> policy, cfg, batch with the logits and inputs of each step.

    The last input of a row is among them, though the model never reads it.
    """
    _, policy, cfg = build("lepo", tokenizer=tokenizer, until_marker=True, **changes)
    step = lepo.next_input

    def keep(policy, logits, *args):
        ids, embeds, record, state = step(policy, logits, *args)
        return ids, embeds, {**record, "logits": logits, "embeds": embeds}, state

    monkeypatch.setattr(lepo, "next_input", keep)
    return policy, cfg, draw(lepo, policy, cfg, group_size=group_size, greedy=greedy)


@pytest.mark.parametrize("noise_scale, greedy", [(1.0, True), (0.0, False), (1.0, False)])
@pytest.mark.parametrize("marker", ["##", "####", "#"])
def test_soft_thinking_is_latent_until_the_marker_stands_in_the_decoded_text(
        marker, noise_scale, greedy, monkeypatch):
    tokenizer = hash_tokenizer()
    policy, cfg, batch = decode(
        monkeypatch, greedy, 16, tokenizer, answer_marker=marker, noise_scale=noise_scale,
        eos=(2,), temperature=1.5, top_k=9, top_p=0.9, max_completion_length=20)
    E, seen, mixtures, sampled = policy.table.weight, 0, 0, 0
    noise = noise_scale > 0 and not greedy
    for row, length in enumerate(batch["lengths"].tolist()):
        ids = batch["completion_ids"][row].tolist()
        for t in range(length):
            latent = marker not in tokenizer.decode(ids[: t + 1])
            assert bool(batch["latent_mask"][row, t]) == latent
            kept, log_p = survivors(batch["logits"][row, t], cfg)
            assert ids[t] in kept
            thinking = marker not in tokenizer.decode(ids[:t])
            if thinking or greedy:
                assert ids[t] == kept[0]
            sampled += not thinking and ids[t] != kept[0]
            mixed, found = log_p.exp().float() @ E[kept], batch["embeds"][row, t]
            if not latent:  # the id that completes the marker is fed plain
                torch.testing.assert_close(found, E[ids[t]])
            elif not noise:
                torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-5)
            else:
                mixtures += (found - mixed).abs().max() > 0.01
        seen += marker in tokenizer.decode(ids[:length])
    assert seen > 0 and (mixtures > 20) == noise
    assert greedy == (sampled == 0)


def test_soft_thinking_ends_a_row_at_a_shown_eos_and_starts_from_the_prompt_alone(monkeypatch):
    policy, cfg, batch = decode(monkeypatch, answer_marker="####", max_completion_length=20)
    ended = batch["finished"] & (batch["lengths"] < 20)
    assert ended.any() and batch["latent_mask"][ended, 0].all()
    policy, cfg, _ = decode(monkeypatch, answer_marker="####", eos=(2,))
    batch = draw(lepo, policy, cfg, [[1, 17, 17, 17, 17], [17, 17, 17]], greedy=True)
    assert batch["latent_mask"][:, 0].all()  # a marker in the prompt ends nothing


@pytest.mark.parametrize("marker, make", [
    ("</think>", make_tokenizer), ("####", make_tokenizer), ("##", hash_tokenizer)])
@pytest.mark.parametrize("length", [1, 3])
def test_cold_stop_forces_the_marker_after_calm_steps_in_a_row(marker, make, length, monkeypatch):
    tokenizer, limit, T = make(), 2.85, 1.5  # nats; the entropies are spread around it
    policy, cfg, batch = decode(
        monkeypatch, False, 16, tokenizer, answer_marker=marker, eos=(2,), temperature=T,
        cold_stop_entropy=limit, cold_stop_length=length, max_completion_length=20)
    pieces = tokenizer(marker, add_special_tokens=False)["input_ids"]
    stops, late, interrupted = 0, 0, 0
    for row, n in enumerate(batch["lengths"].tolist()):
        ids, calm, queue, text = batch["completion_ids"][row, :n].tolist(), 0, [], ""
        for t in range(n):
            p = (batch["logits"][row, t].double() / T).softmax(-1)
            cold = float(-(p * p.log()).sum()) < limit
            interrupted += calm > 0 and not cold
            calm = calm + 1 if cold else 0
            thinking = marker not in text
            if thinking and calm == length and not queue:
                queue, stops, late = list(pieces), stops + 1, late + (t > length)
            text = tokenizer.decode(ids[: t + 1])
            forced = thinking and bool(queue)
            if forced:
                assert ids[t] == queue.pop(0)
            elif thinking:
                assert ids[t] == batch["logits"][row, t].argmax()
            assert bool(batch["latent_mask"][row, t]) == (marker not in text and not forced)
            if forced or marker in text:
                torch.testing.assert_close(batch["embeds"][row, t], policy.table.weight[ids[t]])
            queue = queue if marker not in text else []
        assert not queue or n == 20
    assert stops > 2 and (late > 0 and interrupted > 2 or length == 1)


@pytest.mark.parametrize("limit, length", [(0.0, 1), (100.0, 21)])
def test_cold_stop_is_off_at_0_and_waits_for_its_length(limit, length, monkeypatch):
    one, two = (decode(monkeypatch, eos=(2,), answer_marker="####", max_completion_length=20,
                       cold_stop_entropy=x, cold_stop_length=length)[2] for x in (0.0, limit))
    assert torch.equal(one["completion_ids"], two["completion_ids"])
    assert one["latent_mask"][one["completion_mask"]].any()


def test_plain_switches_off_what_is_latent():
    _, policy, cfg = build("lepo", until_marker=True, eos=(2,))
    batch = draw(lepo, policy, dataclasses.replace(cfg, **lepo.PLAIN_GRPO))
    assert not batch["latent_mask"].any()
    exists, ids = batch["completion_mask"], batch["completion_ids"]
    assert torch.equal(policy.completion_embeds(batch)[exists], policy.table(ids)[exists])


@pytest.mark.parametrize("more", [
    "--until_marker", "--until_marker --dry_run", "--until_marker --cold_stop_entropy 0.1",
    "--noise_scale 0.5", "--noise_scale 0 --latent_grad concrete"])
def test_what_only_decodes_is_not_trained(model, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(lepo, "load_problems", few_problems)
    line = refusal("lepo", flags(model, tmp_path / "run", more), capsys)
    assert more.split()[0] in line and "eval.py" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, words", [
    ("--latent_tau 0", "--latent_tau 0.0"), ("--latent_tau -0.3", "--latent_tau"),
    ("--latent_tau nan", "--latent_tau nan"), ("--latent_grad foo", "--latent_grad foo soft"),
    ("--latent_steps -1", "--latent_steps -1"), ("--noise_scale -1", "--noise_scale"),
    ("--noise_scale nan", "--noise_scale nan"), ("--cold_stop_length 0", "--cold_stop_length 0"),
    ("--cold_stop_entropy -1", "--cold_stop_entropy"), ("--clip_eps -0.1", "--clip_eps"),
    ("--num_prompts 4 --minibatches 3", "--num_prompts 4 minibatches 3"),
    ("--update_epochs 0", "--update_epochs 0")])
def test_bad_values_of_the_method_end_in_one_line(model, tmp_path, capsys, more, words):
    line = refusal("lepo", flags(model, tmp_path / "run", more), capsys)
    assert all(word in line for word in words.split()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset, model, latent_steps, tau", [
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B", 64, 0.3), ("qwen2.5-7b", "Qwen/Qwen2.5-7B", 64, 0.5),
    ("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 32, 0.5)])
def test_presets_are_the_published_triples(preset, model, latent_steps, tau):
    cfg = lepo.parse_config(["--preset", preset])
    assert (cfg.model, cfg.latent_steps, cfg.latent_tau) == (model, latent_steps, tau)
    published = dict(group_size=8, temperature=1.0, top_k=30, top_p=0.95, lr=1e-6, kl_coef=0.0,
                     max_prompt_length=1024, max_completion_length=2048, weight_decay=0.1,
                     clip_eps=0.2, max_grad_norm=1.0, adam_beta2=0.99, num_prompts=128)
    assert {name: getattr(cfg, name) for name in published} == published
    assert (cfg.latent_grad, cfg.noise_scale, cfg.clip_latents, cfg.update_epochs) == (
        "soft", 1.0, False, 1)
    assert lepo.parse_config(["--preset", preset, "--model", "./other"]).model == "./other"


def test_a_run_with_several_updates_and_every_estimator_ends(model, tmp_path, monkeypatch):
    monkeypatch.setattr(lepo, "load_problems", few_problems)
    monkeypatch.setattr(lepo, "reward", odd_length)
    for kind in KINDS:
        more = f"--latent_grad {kind} --update_epochs 2 --minibatches 2 --steps 1 --latent_steps 3"
        result = train("lepo", flags(model, tmp_path / kind, more))
        assert isinstance(result, dict) and result["latent_steps"] > 0
        row, = rows(tmp_path / kind, "train")
        assert row["grad_norm"] > 0 and row["ratio_max"] > 1.001 and row["skipped"] == 0
