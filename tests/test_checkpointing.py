"""--gradient_checkpointing: less is kept for backward, nothing else changes."""

import pytest
import torch
from conftest import METHODS
from runs import OFF, flags, rows, train
from test_replay import build, draw, gradients

CASES = [(name, {}) for name in METHODS if name != "hyrea"] + [("hyrea", {"max_replaced_steps": 0})]
CASES.append(("hyrea", {"gradient_checkpointing": True, "latents_per_step": 2}))


def saved(policy, batch):
    """How many numbers a forward pass keeps for its backward pass."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy(batch)
    return sum(sizes)


@pytest.mark.parametrize("method, changes", CASES)
def test_it_keeps_less_and_changes_no_gradient(method, changes):
    module, policy, cfg = build(method, max_completion_length=20, **changes)
    batch = draw(module, policy, cfg, group_size=4)
    policy.train()
    plain, sums = gradients(module, policy, cfg, batch)
    kept = saved(policy, batch)
    policy.lm.activation_checkpointing_enable()
    found, found_sums = gradients(module, policy, cfg, batch)
    assert saved(policy, batch) < kept / 2
    size = max(g.abs().max() for g in plain.values())
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g, rtol=1e-5, atol=1e-6 * float(size))
    for name, values in sums.items():
        assert found_sums[name] == pytest.approx(values, rel=1e-5)
    again = draw(module, policy, cfg, group_size=4)  # decoding keeps its cache
    assert all(torch.equal(again[name], value) for name, value in batch.items())


@pytest.mark.parametrize("more", ["", "--lora_rank 2"])
def test_a_run_with_it_is_the_run_without(method, model, tmp_path, more):
    results, off = {}, OFF[method] if method == "hyrea" else ""
    for name, extra in (("off", ""), ("on", "--gradient_checkpointing")):
        argv = flags(model, tmp_path / name, f"{off} {more} {extra}")
        assert isinstance(train(method, argv), dict)
        results[name] = rows(tmp_path / name, "train")
    for old, new in zip(results["off"], results["on"], strict=True):
        for name in ("reward", "length", "grad_norm", "entropy"):
            assert new[name] == pytest.approx(old[name], rel=1e-4), name


@pytest.mark.parametrize("more", ["", "--lora_rank 2", "--stage all --sft_steps 4 --sft_batch 4"])
def test_a_run_with_latents_with_it_is_the_run_without(model, tmp_path, more):
    results, argv = {}, f"{more} --latents_per_step 1 --train arithmetic-restated:2 " \
        "--sft_rounds 2 --max_completion_length 28"
    for name, extra in (("off", ""), ("on", "--gradient_checkpointing")):
        assert isinstance(train("hyrea", flags(model, tmp_path / name, f"{argv} {extra}")), dict)
        results[name] = rows(tmp_path / name, "train")
    for old, new in zip(results["off"], results["on"], strict=True):
        for name in ("reward", "length", "grad_norm", "entropy"):
            assert new[name] == pytest.approx(old[name], rel=1e-4), name
