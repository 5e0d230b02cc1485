"""Where a model switches to latents, how sure it is there, and which steps are foreseeable.

python tests/hyrea_report.py runs/hyrea-tiny-arithmetic-restated-3-s0 [more models] [--limit 512]

For each model, greedy on the test split of its --train: accuracy, tokens, switches; a histogram of
the switches over tenths of the completion; the entropy of the positions that open a span and of
all others. How far the policy gradient of 16 training problems x 8 completions is off if latents
are stored instead of recomputed. The mean entropies of the written chain's steps, on the built-in
task split into the two kinds of steps; a model that is no checkpoint of ours shows only these.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402
import hyrea  # noqa: E402
from common import (  # noqa: E402
    checkpoint_settings,
    encode_prompts,
    grade,
    load_problems,
    make_rng,
    mean,
    model_folder,
)


def switches(policy, tokenizer, problems, cfg):
    """Greedy completions -> lines of text."""
    prompts = [p["prompt_ids"] for p in problems]
    batch = hyrea.rollout(policy, prompts, cfg, make_rng(policy.lm.device, 0), greedy=True)
    records = grade(batch, problems, tokenizer, cfg.answer_marker)
    with torch.no_grad():
        entropy = policy(batch)["entropy"]
    opened = (batch["completion_ids"] == policy.start_id) & batch["loss_mask"]
    places = torch.arange(opened.shape[1], device=opened.device) / batch["lengths"][:, None]
    tenths = torch.histc(places[opened].float().cpu(), 10, 0, 1).long().tolist()
    accuracy, latent = mean(records, "correct"), mean(records, "latent_steps")
    error = (accuracy * (1 - accuracy) / len(records)) ** 0.5
    others = batch["loss_mask"] & ~opened
    lines = [f"accuracy {accuracy:.3f} +- {error:.3f}, n {len(records)}; per completion: explicit "
             f"tokens {mean(records, 'length') - latent:.2f}, latent slots {latent:.2f}, switches "
             f"{opened.sum().item() / len(records):.2f}",
             f"switches over tenths of the completion: {tenths}"]
    if opened.any():
        lines.append(f"entropy (nats) where a span opens {entropy[opened].mean():.4f}, at the other"
                     f" tokens {entropy[others].mean():.4f}")
    return lines


def replay_gap(policy, tokenizer, problems, cfg):
    """Gradient with stored latents against the exact one -> line of text."""
    cfg = dataclasses.replace(cfg, replay_latents=True, kl_coef=0.0, group_size=8)
    policy.cfg = cfg
    batch = hyrea.rollout(policy, [p["prompt_ids"] for p in problems], cfg,
                          make_rng(policy.lm.device, 0), 8)
    records = grade(batch, problems, tokenizer, cfg.answer_marker)
    rewards = [sum(hyrea.reward_parts(record, cfg).values()) for record in records]
    batch["rewards"] = torch.tensor(rewards, device=policy.lm.device)
    batch["advantages"] = hyrea.compute_advantages(batch, cfg)
    weights, found = hyrea.loss_weights(batch, cfg), []
    for part in (batch, {n: v for n, v in batch.items() if n != "latent_embeds"}):
        policy.zero_grad()
        (hyrea.policy_loss(policy(part), part, cfg) * weights).sum().backward()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    gap = (found[0] - found[1]).norm() / found[1].norm()
    return f"stored latents: gradient off by {gap:.2f} of its length"


def step_table(policy, tokenizer, problems, cfg):
    """Histogram of the mean entropies of steps -> lines of text."""
    problems = hyrea.read_demonstrations(problems, tokenizer, policy, cfg)
    found = hyrea.chain_entropies(policy.lm, problems, policy.markers[policy.markers >= 0])
    restated = cfg.train.startswith("arithmetic-restated")
    kinds = {"copied": [], "computed": []} if restated else {"all": []}
    wrong = total = 0
    for row in found:
        for i, value in enumerate(row):
            kinds[list(kinds)[i % len(kinds)]].append(value)
        lowest = sorted(range(len(row)), key=lambda i: row[i])[: max(cfg.max_replaced_steps, 1)]
        wrong, total = wrong + sum(i % 2 for i in lowest), total + len(lowest)
    edges = [0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 99]
    bounds = " ".join(f"{e:>6}" for e in edges[1:-1])
    lines = [f"mean entropy of a written step, below {bounds}   more"]
    for kind, values in kinds.items():
        counts = torch.histogram(torch.tensor(values), torch.tensor(edges).float())[0]
        lines.append(f"  {kind:8} {sum(values) / len(values):.4f} on average; shares   " + " ".join(
            f"{x:6.3f}" for x in (counts / len(values)).tolist()))
    if restated:
        lines.append(f"  share of computed steps among the lowest: {wrong / total:.3f}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--limit", type=int, default=512)
    own = parser.parse_args()
    for name in own.models:
        ours = checkpoint_settings(model_folder(name)).get("method") == "hyrea"
        if ours:
            _, cfg, _, _ = evaluation.configure(name, evaluation.parse_args([name]))
        else:
            cfg = hyrea.parse_config(["--model", name, "--train", name.partition(":")[2]])
        policy, tokenizer = evaluation.load_policy(hyrea, cfg)
        problems = encode_prompts(tokenizer, load_problems(cfg.train, "test", own.limit), cfg)
        lines = step_table(policy, tokenizer, problems, cfg)
        if ours:
            lines = switches(policy, tokenizer, problems, cfg) + lines
        if ours and cfg.max_replaced_steps:
            train = encode_prompts(tokenizer, load_problems(cfg.train, "train", 16), cfg)
            lines.append(replay_gap(policy, tokenizer, train, cfg))
        print(name, *lines, sep="\n  ")


if __name__ == "__main__":
    main()
