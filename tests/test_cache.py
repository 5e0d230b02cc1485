"""The cache of a rollout: free columns, rows that leave, windows, padding, bfloat16."""

import pytest
import torch
from conftest import METHODS, make_lm
from test_replay import PROMPTS, build, draw
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import common
from common import RoomyCache, RoomyLayer, left_pad, live_rows, lm_hidden

KINDS = ["llama", "qwen2", "gpt2", "mistral", "gemma2", "mpt"]
ENDED = {3: [0, 4, 11], 4: [8], 9: [1, 2, 5, 6, 10], 15: [3]}  # {step: rows that end}


@torch.no_grad()
def decode(lm, cache, wide):
    """Four padded prompts, three rows each, 20 steps -> {row: its hidden states [H]}, inputs."""
    rng = torch.Generator().manual_seed(0)
    ids, mask = left_pad(PROMPTS, 0, "cpu")
    lm_hidden(lm, lm.get_input_embeddings()(ids), mask, cache=cache)
    cache.batch_repeat_interleave(3)
    rows = torch.arange(12)
    mask = torch.nn.functional.pad(mask.repeat_interleave(3, 0), (0, 20), value=True)
    fed = torch.randn(12, 20, 32, generator=rng)
    found = {row: [] for row in range(12)}
    for t in range(20):
        so_far = mask[rows, : ids.shape[1] + t + 1]
        states = lm_hidden(lm, fed[rows, t : t + 1], so_far, cache=cache)[:, -1]
        for row, state in zip(rows.tolist(), states):
            found[row].append(state)
        if t in ENDED:
            ended = torch.isin(rows, torch.tensor(ENDED[t]))
            live = live_rows(ended, 512 if wide else 100)
            rows = rows[live]
            cache.batch_select_indices(live)
    return {row: torch.stack(states) for row, states in found.items()}, fed


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("spare", [0, 1, 7, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_a_cache_that_is_copied_at_each_step_gives(kind, spare, wide, monkeypatch):
    monkeypatch.setattr(RoomyLayer, "spare", spare)
    lm = make_lm(kind)
    found, _ = decode(lm, RoomyCache(), wide)
    expected, _ = decode(lm, DynamicCache(), False)
    assert sorted({len(states) for states in found.values()}) == [4, 5, 10, 16, 20]
    for row, states in expected.items():
        torch.testing.assert_close(found[row], states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gives_what_one_pass_over_it_alone_gives(kind):
    lm = make_lm(kind, **({"sliding_window": 8} if kind == "mistral" else {}))
    found, fed = decode(lm, RoomyCache(), True)
    for row, states in found.items():
        prompt = lm.get_input_embeddings()(torch.tensor([PROMPTS[row // 3]]))
        inputs = torch.cat([prompt, fed[row : row + 1, : len(states)]], 1)
        with torch.no_grad():
            alone = lm_hidden(lm, inputs, torch.ones(inputs.shape[:2]).bool())[0]
        torch.testing.assert_close(states, alone[-len(states) :], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_step_and_rows_that_leave_copy_nothing_that_stays():
    lm, cache = make_lm(), RoomyCache()
    embeds = torch.randn(6, 160, 32)
    lm_hidden(lm, embeds, torch.ones(6, 160).bool(), cache=cache)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    kept = cache.layers[0].keys.clone()
    live = live_rows(torch.tensor([False, True, False, False, True, False]), 512)
    assert live.tolist() == [0, 5, 2, 3]
    cache.batch_select_indices(live)
    assert torch.equal(cache.layers[0].keys, kept[live])
    for step in range(161, 188):  # an eighth of 160, and 8, are free
        lm_hidden(lm, embeds[:4, :1], torch.ones(4, step).bool(), cache=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert cache.layers[0].keys.shape[:3] == (4, 4, 187) and cache.get_seq_length() == 187


def test_rows_keep_their_order_in_a_narrow_cache_and_their_places_in_a_wide_one():
    rng = torch.Generator().manual_seed(0)
    for number in (1, 2, 9, 30):
        for share in (0.1, 0.5, 0.9):
            ended = torch.rand(number, generator=rng) < share
            live = (~ended).nonzero()[:, 0].tolist()
            assert live_rows(ended, 511).tolist() == live
            order = live_rows(ended, 512).tolist()
            assert sorted(order) == live
            stay = [row for row in live if row < len(live)]
            assert all(order[row] == row for row in stay)


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_in_which_rows_change_places_is_the_same(method, monkeypatch):
    lengths = set()
    for seed in range(2):
        module, policy, cfg = build(method, seed=seed, max_completion_length=20)
        plain = draw(module, policy, cfg, group_size=1, greedy=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, "live_rows", lambda ended, width: live_rows(ended, 512))
            moved = draw(module, policy, cfg, group_size=1, greedy=True)
        assert moved.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-5)
        lengths |= set(plain["lengths"].tolist())
    assert len(lengths) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_is_that_on_a_plain_cache(method, monkeypatch):
    module, policy, cfg = build(method, max_completion_length=20)
    found = draw(module, policy, cfg, group_size=4)
    monkeypatch.setattr(module, "RoomyCache", DynamicCache)
    expected = draw(module, policy, cfg, group_size=4)
    assert len(set(found["lengths"].tolist())) > 3
    assert torch.equal(found["completion_ids"], expected["completion_ids"])
    gap = found["rollout_logprobs"] - expected["rollout_logprobs"]
    assert gap.abs().max() <= 1e-5


def test_the_model_is_tried_on_the_cache_of_rollouts(monkeypatch):
    def keep_the_first(cache, indices):
        DynamicCache.batch_select_indices(cache, indices * 0)

    monkeypatch.setattr(RoomyCache, "batch_select_indices", keep_the_first)
    assert "cache of keys and values" in common.find_fault(make_lm())


class Conversions(TorchDispatchMode):
    """Counts how often a tensor of some shape is converted to another dtype."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_conversion = func is torch.ops.aten._to_copy.default
        self.number += is_conversion and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_a_rollout_in_bfloat16_converts_the_head_once(method, train_embeddings):
    changes = {"train_embeddings": train_embeddings, "max_completion_length": 8}
    if method == "hrpo":
        changes["hybrid"] = False  # its soft tokens read the table as a matrix
    module, policy, cfg = build(method, eos=(2,), **changes)
    policy.lm.compute_dtype = torch.bfloat16
    weight = policy.lm.get_output_embeddings().weight
    was_trained = weight.requires_grad
    with Conversions(weight.shape) as conversions:
        batch = draw(module, policy, cfg)
    assert batch["lengths"].max() > 3 and conversions.number == 1
    assert weight.requires_grad == was_trained and weight.grad is None


@pytest.mark.parametrize("kind, lora", [
    *((kind, False) for kind in KINDS), ("llama", True), ("qwen2", True), ("mistral", True)])
def test_in_bfloat16_the_cache_is_bfloat16_too_and_gives_the_same(kind, lora):
    lm = make_lm(kind)
    if lora:
        lm = lm.to(torch.bfloat16)
        common.add_lora(lm, 2)
    lm.compute_dtype = torch.bfloat16
    cache = RoomyCache()
    with common.autocast(lm):
        found, _ = decode(lm, cache, False)
        expected, _ = decode(lm, DynamicCache(), False)
    for layer in cache.layers:
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
    for row, states in expected.items():
        torch.testing.assert_close(found[row].float(), states.float(), rtol=0, atol=0)
