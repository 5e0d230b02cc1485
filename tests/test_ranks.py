"""Two ranks compute what one rank computes on the union batch, whatever the lengths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import METHODS, make_tokenizer
from test_replay import build, draw
from torch.nn.parallel import DistributedDataParallel

from common import frozen_copy, make_rng, select_rows

torch.set_num_threads(1)
PROMPTS = [[1, 4, 6], [4], [1, 6, 7, 12, 9, 10, 13, 3, 9, 9, 6], [1, 17, 17, 12, 5, 5, 5, 5]]
UPDATES = {  # name: kl_coef, max_tokens, rows with advantage, optimizer
    "all rows, no KL": (0.0, 0, range(16), "sgd"),
    "all rows, KL": (0.2, 0, range(16), "sgd"),
    "all rows, KL, unequal numbers of micro-batches": (0.2, 30, range(16), "sgd"),
    "two live groups on rank 0, none on rank 1": (0.0, 0, range(8), "sgd"),
    "none on rank 0, two live groups on rank 1": (0.0, 0, range(8, 16), "sgd"),
    "one live group against two": (0.0, 24, [*range(4), *range(8, 16)], "sgd"),
    "no live group": (0.0, 0, [], "sgd"),
    "AdamW, KL": (0.2, 0, range(16), "adamw"),
    "AdamW, one live group": (0.0, 0, range(12, 16), "adamw"),
    "embeddings too, KL": (0.2, 0, range(16), "sgd"),
}


def one_update(method, name):
    """This rank's half of 16 rows -> change of every parameter, weights, micro-batches, metrics."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    kl_coef, max_tokens, live, optimizer = UPDATES[name]
    every = {"mask_invalid": False} if method == "latent_grpo" else {}  # no row is left out
    module, policy, cfg = build(
        method, **every, kl_coef=kl_coef, micro_batch=3, max_tokens=max_tokens, max_grad_norm=1e9,
        warmup_steps=0, group_size=4, lr=1e-3, train_embeddings="embeddings" in name)
    batch = draw(module, policy, cfg, PROMPTS, 4)
    batch["rewards"] = torch.tensor([1.0, 0, 0, 0] * 4)
    for row in set(range(16)) - set(live):
        batch["rewards"][row] = 1.0  # a group of equal rewards
    share = 16 // world_size
    batch = select_rows(batch, list(range(rank * share, (rank + 1) * share)))
    batch["advantages"] = module.compute_advantages(batch, cfg)
    reference = frozen_copy(policy.lm)
    for p in reference.parameters():
        p.data.mul_(1.1)  # so that the KL term has a gradient of some size
    groups = module.param_groups(policy, cfg)
    chosen = torch.optim.AdamW(groups, eps=1e-4)
    if optimizer == "sgd":
        groups = [{"params": g["params"], "initial_lr": 1.0} for g in groups]
        chosen = torch.optim.SGD(groups, 1.0)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    ddp = DistributedDataParallel(policy, broadcast_buffers=False) if world_size > 1 else policy
    calls = []
    policy.register_forward_hook(lambda *_: calls.append(1))
    sums, _ = module.update(policy, ddp, reference, chosen, batch, cfg, 0)
    moved = {n: policy.get_parameter(n).detach() - p for n, p in before.items()}
    return {"moved": moved, "weights": batch["weights"].sum(1), "calls": len(calls),
            "lengths": batch["lengths"], "grad_norm": sums["grad_norm"]}


def one_evaluation(method):
    """Greedy metrics on 7 problems, an odd number, with prompts of different lengths."""
    module, policy, cfg = build(method, eval_batch=2, answer_marker="b")
    prompts = [*PROMPTS, [1, 3], [1, 9, 9], [6, 6, 6, 6]]
    problems = [{"question": str(i), "answer": "5", "prompt_ids": p} for i, p in enumerate(prompts)]
    return module.evaluate(policy, make_tokenizer(), problems, cfg, make_rng("cpu", 0))


def everything():
    found = {(method, name): one_update(method, name) for method in METHODS for name in UPDATES}
    return {**found, **{(method, "evaluation"): one_evaluation(method) for method in METHODS}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What `everything` returns on rank 0 and on rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    workers = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_on_two_ranks_equals_one_rank_on_the_union(method, name, two_ranks):
    one, both = one_update(method, name), [rank[method, name] for rank in two_ranks]
    size = max(float(v.abs().max()) for v in one["moved"].values())
    assert (size > 1e-4) == (name != "no live group")
    assert "embeddings" not in name or one["moved"]["lm.model.embed_tokens.weight"].any()
    for parameter, moved in one["moved"].items():
        for rank in both:
            torch.testing.assert_close(
                rank["moved"][parameter], moved, rtol=1e-5, atol=2e-6 * max(size, 1.0))
        assert torch.equal(both[0]["moved"][parameter], both[1]["moved"][parameter])
    for rank in both:
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_loss_weights_count_the_completions_of_all_ranks(method, name, two_ranks):
    for rank in two_ranks:
        torch.testing.assert_close(rank[method, name]["weights"], torch.full((8,), 1 / 16))
    lengths = [rank[method, name]["lengths"] for rank in two_ranks]
    assert lengths[0].sum() != lengths[1].sum()  # a token mean would weigh ranks differently


@pytest.mark.parametrize("method", METHODS)
def test_each_rank_skips_its_rows_without_advantage_and_computes_at_least_one(method, two_ranks):
    for name, calls in {"all rows, no KL": {3}, "two live groups on rank 0, none on rank 1": {1, 3},
                        "no live group": {0}, "AdamW, one live group": {1, 2}}.items():
        found = {rank[method, name]["calls"] for rank in two_ranks}
        assert found == calls, name
    unequal = [rank[method, "all rows, KL, unequal numbers of micro-batches"]["calls"]
               for rank in two_ranks]
    assert unequal[0] != unequal[1]


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_the_same_on_one_and_on_two_ranks(method, two_ranks):
    one = one_evaluation(method)
    for rank in two_ranks:
        found = dict(rank[method, "evaluation"])
        assert found.pop("records") == one["records"]
        assert found == pytest.approx({k: v for k, v in one.items() if k != "records"})
    assert [r["index"] for r in one["records"]] == list(range(7)) and one["n"] == 7
    assert 0 < one["latent_steps"] < one["total_length"] and 0 < one["accuracy"] < 1


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(everything(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
