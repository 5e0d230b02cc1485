"""Batches: dropped rows, micro-batches, and the functions that select, join and pad rows."""

import pytest
import torch
from conftest import METHODS
from test_replay import EOS, PROMPTS, build, draw, gradients, score

from common import left_pad, micro_batches, select_rows
from latent_grpo import join_batches


@pytest.mark.parametrize("method", METHODS)
def test_dropping_finished_rows_changes_no_greedy_token(method):
    lengths = []
    for seed in range(3):
        module, policy, cfg = build(method, seed=seed, max_completion_length=20)
        batch = draw(module, policy, cfg, group_size=1, greedy=True)
        for row, prompt in enumerate(PROMPTS):
            alone = draw(module, policy, cfg, [prompt], group_size=1, greedy=True)
            length = int(batch["lengths"][row])
            assert alone["lengths"].tolist() == [length]
            for name in ("completion_ids", "latent_mask"):
                assert torch.equal(alone[name][0], batch[name][row, :length])
            lengths.append(length)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("method", METHODS)
def test_a_completion_may_be_one_eos_long(method):
    module, policy, cfg = build(method, eos=range(40))
    batch = draw(module, policy, cfg)
    assert batch["completion_ids"].shape[1] == 1 and batch["finished"].all()
    gap = score(policy, batch) - batch["rollout_logprobs"]
    assert gap.abs().max() <= 1e-5
    found, _ = gradients(module, policy, cfg, batch)
    assert sum(g.abs().sum() for g in found.values()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_micro_batches_does_not_change_the_gradient(method):
    module, policy, cfg = build(method)
    batch = draw(module, policy, cfg, group_size=4)
    whole, sums = gradients(module, policy, cfg, batch, 16)
    size = max(g.abs().max() for g in whole.values())
    assert size > 1e-3
    for micro_batch, max_tokens in ((1, 0), (8, 0), (16, 40)):
        parts, part_sums = gradients(module, policy, cfg, batch, micro_batch, max_tokens)
        for name, g in whole.items():
            torch.testing.assert_close(parts[name], g, rtol=1e-5, atol=2e-6 * float(size))
        for name, (total, count) in sums.items():
            assert part_sums[name] == pytest.approx([total, count], rel=1e-4)


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_completion_ends_at_the_first_of_any_eos_id(method, pad):
    module, policy, cfg = build(method, pad=pad)
    batch = draw(module, policy, cfg, group_size=8)
    ends = set()
    for ids, length, done in zip(*(batch[n].tolist() for n in
                                   ("completion_ids", "lengths", "finished"))):
        assert done == (ids[length - 1] in EOS) and not set(ids[: length - 1]) & set(EOS)
        assert done or length == cfg.max_completion_length
        assert set(ids[length:]) <= {pad}
        ends |= {ids[length - 1]} & set(EOS)
    assert len(ends) >= 3 and (batch["completion_mask"].sum(1) == batch["lengths"]).all()
    gap = (score(policy, batch) - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert gap.abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_eos_itself_is_trained_on(method):
    module, policy, cfg = build(method)
    batch = draw(module, policy, cfg)
    rows = batch["finished"].nonzero()[:, 0]
    last = batch["lengths"][rows] - 1
    assert batch["loss_mask"][rows, last].all() and (score(policy, batch)[rows, last] < 0).all()


def fake(prompt_lengths, lengths):
    """A batch with the given lengths; prompt ids 1, 2, ...; completion ids 10, 11, ..."""
    prompts = [list(range(1, n + 1)) for n in prompt_lengths]
    ids, mask = left_pad(prompts, 0, "cpu")
    lengths, T = torch.tensor(lengths), max(lengths)
    exists = torch.arange(T) < lengths[:, None]
    completion = (torch.arange(T) + 10).expand(len(prompts), T) * exists
    return {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": completion,
            "completion_mask": exists, "soft_embeds": completion[..., None] * torch.ones(2),
            "lengths": lengths, "rewards": torch.arange(len(prompts)).float()}


def test_left_pad_makes_masks_from_lengths_even_when_pad_is_a_token():
    ids, mask = left_pad([[7, 5], [5, 7, 7], [5]], 5, "cpu")
    assert ids.tolist() == [[5, 7, 5], [5, 7, 7], [5, 5, 5]]
    assert mask.tolist() == [[False, True, True], [True] * 3, [False, False, True]]


def test_select_rows_trims_what_is_padding_in_all_of_them():
    batch = fake([2, 5, 3], [4, 1, 2])
    for rows, P, T in (([2, 0], 3, 4), (range(1, 3), 5, 2), (torch.tensor([1]), 5, 1)):
        for name, value in select_rows(batch, rows).items():
            whole = batch[name][torch.as_tensor(rows)]
            if name not in ("lengths", "rewards"):
                whole = whole[:, -P:] if name.startswith("prompt") else whole[:, :T]
            assert torch.equal(value, whole), name
    assert batch["prompt_ids"].shape == (3, 5)  # the batch itself is left alone


def test_join_batches_pads_prompts_left_and_completions_right():
    one, two = fake([2, 4], [3, 1]), fake([1], [5])
    joined = join_batches([one, two])
    assert joined["prompt_mask"].sum(1).tolist() == [2, 4, 1]
    assert joined["prompt_ids"].tolist() == [[0, 0, 1, 2], [1, 2, 3, 4], [0, 0, 0, 1]]
    assert joined["completion_ids"].tolist()[:2] == [[10, 11, 12, 0, 0], [10, 0, 0, 0, 0]]
    assert joined["completion_mask"].sum(1).tolist() == [3, 1, 5]
    assert joined["soft_embeds"].shape == (3, 5, 2) and joined["rewards"].tolist() == [0, 1, 0]
    for rows, part in (([0, 1], one), ([2], two)):
        for name, value in select_rows(joined, rows).items():
            assert torch.equal(value, part[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_joined_rollouts_score_as_each_rollout_does(method):
    module, policy, cfg = build(method, eos=EOS)
    parts = [draw(module, policy, cfg, p, 2, seed=i) for i, p in enumerate((PROMPTS[:1], PROMPTS))]
    joined = score(policy, join_batches(parts))
    for rows, part in ((slice(0, 2), parts[0]), (slice(2, 10), parts[1])):
        width = part["completion_ids"].shape[1]
        torch.testing.assert_close(
            joined[rows, :width], score(policy, part), rtol=0, atol=1e-5)


def test_max_tokens_counts_the_padding_of_prompts_and_of_completions():
    batch = fake([20, 1, 19, 2], [1, 20, 2, 19])  # all rows 21 long, together 4 x 40
    for piece in micro_batches(batch, range(4), 100, 84):
        part = select_rows(batch, piece)
        width = part["prompt_ids"].shape[1] + part["completion_ids"].shape[1]
        assert len(piece) * width <= 84


@pytest.mark.parametrize("micro_batch, max_tokens", [(3, 0), (100, 60), (2, 30), (100, 1)])
def test_micro_batches_hold_every_row_once_within_their_bounds(micro_batch, max_tokens):
    rng = torch.Generator().manual_seed(0)
    batch = fake([4] * 20, torch.randint(1, 12, (20,), generator=rng).tolist())
    pieces = micro_batches(batch, range(0, 20), micro_batch, max_tokens)
    assert sorted(sum(pieces, [])) == list(range(20))
    for piece in pieces:
        part = select_rows(batch, piece)
        size = len(piece) * (part["prompt_ids"].shape[1] + part["completion_ids"].shape[1])
        assert len(piece) <= micro_batch
        assert max_tokens == 0 or size <= max_tokens or len(piece) == 1
    assert len(pieces) < 20 or max_tokens == 1
