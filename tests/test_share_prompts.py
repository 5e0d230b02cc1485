"""--share_prompts: the prompt of a group is computed once in an update, nothing else changes."""

import pytest
import torch
from conftest import METHODS
from runs import flags, rows, train
from test_hyrea import draw_often
from test_replay import build, draw, gradients, score

import common
import hyrea
from common import first_of_each, micro_batches

CASES = [(name, {}) for name in METHODS if name != "hyrea"] + [("hyrea", {"replay_latents": True})]
ALL = [*CASES, ("hyrea", {})]


def passes(monkeypatch, module=common):
    """-> a list to which each pass through the model, by this module, adds its rows."""
    seen, plain = [], common.lm_hidden

    def noted(lm, embeds, *args, **kwargs):
        seen.append(len(embeds))
        return plain(lm, embeds, *args, **kwargs)

    monkeypatch.setattr(module, "lm_hidden", noted)
    return seen


@pytest.mark.parametrize("method, changes", CASES)
def test_it_computes_a_prompt_once_and_changes_no_gradient(method, changes, monkeypatch):
    module, policy, cfg = build(method, max_completion_length=20, **changes)
    batch = draw(module, policy, cfg, group_size=4)
    policy.train()
    plain, sums = gradients(module, policy, cfg, batch)
    policy.lm.share_prompts = cfg.share_prompts = True
    seen = passes(monkeypatch)
    found, found_sums = gradients(module, policy, cfg, batch)  # 8 rows a pass
    assert seen == [2, 8] * (len(batch["prompt_ids"]) // 8)
    size = max(g.abs().max() for g in plain.values())
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-5 * float(size))
    for name, values in sums.items():
        assert found_sums[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mpt"])
def test_rounds_of_latents_share_prompts_too(kind, monkeypatch):
    _, policy, cfg = build("hyrea", kind, latents_per_step=2, max_completion_length=16)
    if kind == "llama":
        policy.double()  # a chain of latents amplifies rounding
    batch = draw_often(policy, cfg, 4)
    rounds = int(batch["latent_mask"].sum(1).max()) + 1
    assert rounds > 3 and len(set(batch["latent_mask"].sum(1).tolist())) > 2
    exists = batch["completion_mask"][..., None]
    noise = torch.randn(exists.shape[0], exists.shape[1], 32)
    trained = [p for p in policy.lm.parameters() if p.requires_grad]
    results = []
    for policy.lm.share_prompts in (False, True):
        seen = passes(monkeypatch, hyrea)
        hidden = policy.hidden(batch)
        loss = (hidden * exists * noise).sum()
        results.append((hidden * exists, *torch.autograd.grad(loss, trained, allow_unused=True)))
    assert len(batch["lengths"]) == 16 and seen == [4, *[16] * rounds]
    for plain, shared in zip(*results):
        if plain is not None:
            assert (plain - shared).norm() <= 1e-3 * plain.norm()


@pytest.mark.parametrize("limit, eos", [(1, (2,)), (14, range(40))])
@pytest.mark.parametrize("method, changes", ALL)
def test_completions_of_one_token_share_prompts_too(method, changes, limit, eos, monkeypatch):
    module, policy, cfg = build(method, eos=eos, max_completion_length=limit, **changes)
    batch = draw(module, policy, cfg, group_size=4)
    assert batch["lengths"].max() == 1
    plain = score(policy, batch)
    policy.lm.share_prompts = True
    seen = passes(monkeypatch)
    torch.testing.assert_close(score(policy, batch), plain, rtol=0, atol=1e-6)
    assert seen == [4]  # prompts; nothing else is fed


def test_a_run_with_completions_of_one_token_trains(method, model, tmp_path):
    argv = flags(model, tmp_path / "run", "--share_prompts --max_completion_length 1")
    assert isinstance(train(method, argv), dict)


def test_prompts_that_differ_in_the_mask_or_by_a_leading_pad_id_are_told_apart():
    ids = torch.tensor([[0, 0, 5], [0, 0, 5], [0, 0, 5], [0, 0, 6]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]]).bool()
    first, same = first_of_each(ids, mask)
    assert first.tolist() == [0, 1, 3] and same.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("longest_row", [2, 50])  # 2: all are equally long
def test_micro_batches_keep_rows_of_a_prompt_together(longest_row):
    prompts = torch.arange(6).repeat_interleave(4)[torch.randperm(24)]
    batch = {"prompt_ids": prompts[:, None], "prompt_mask": torch.ones(24, 1).bool(),
             "lengths": torch.randint(1, longest_row, (24,))}
    pieces = micro_batches(batch, range(24), 8, 0, True)
    assert sorted(sum(pieces, [])) == list(range(24))
    assert all(len(set(prompts[piece].tolist())) == 2 for piece in pieces)
    longest = [batch["lengths"][piece].max() for piece in pieces]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("more", ["", "--lora_rank 2", "--gradient_checkpointing",
                                  "--kl_coef 0.1"])
def test_a_run_with_it_is_the_run_without(model, tmp_path, more):
    results = {}
    for name in ("no-share_prompts", "share_prompts"):
        argv = flags(model, tmp_path / name, f"{more} --{name}")
        assert isinstance(train("hrpo", argv), dict)
        results[name] = rows(tmp_path / name, "train")
    for old, new in zip(*results.values(), strict=True):
        for name in ("reward", "length", "grad_norm", "entropy"):
            assert new[name] == pytest.approx(old[name], rel=1e-4), name
