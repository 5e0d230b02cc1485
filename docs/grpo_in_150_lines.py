"""GRPO in 150 lines: sample some answers, compare them, make the better ones likelier.

Start here. Sections and names are those of hrpo.py. That file adds soft tokens and what a real
run needs: flags, GPUs, a KL term, clipped gradients, a schedule, checkpoints, records.

Run      python docs/grpo_in_150_lines.py     # the built-in model and task, on a CPU
"""

import dataclasses
import random
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import (  # noqa: E402, I001
    completion_hidden, completion_logprobs, grade, left_pad, lm_hidden, lm_logits,
    load_model, load_problems, mean)

# === 1. config ====================================================================================

@dataclasses.dataclass
class Config:
    model: str = "tiny"  # 0.5M parameters, taught by a teacher who makes mistakes
    train: str = "arithmetic"  # chains of five operations modulo 10
    answer_marker: str = "</think>"  # ends the thinking and opens the answer
    steps: int = 100  # rollouts, each followed by one update
    num_prompts: int = 32  # problems in a step, N
    group_size: int = 8  # completions of a problem, G
    max_completion_length: int = 16  # tokens, T; a complete answer has 13
    lr: float = 3e-4
    eval_every: int = 20

# === 2. the method ================================================================================

class Policy(torch.nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.table = lm.get_input_embeddings()

    def forward(self, batch):
        """Log-prob of each token of a rollout under the present weights, with gradient: [B, T]."""
        ids = batch["completion_ids"]
        hidden = completion_hidden(self.lm, batch, self.table(ids))  # what decides each position
        return completion_logprobs(self.lm, hidden, ids, batch["completion_mask"])[0]


def next_input(policy, logits, greedy):
    """One step: logits [B, V] -> ids [B], next input [B, H]. Here the four methods differ."""
    probs = logits.softmax(-1)
    ids = probs.argmax(-1) if greedy else torch.multinomial(probs, 1)[:, 0]
    return ids, policy.table(ids)  # GRPO feeds the embedding of the token


def policy_loss(logprobs, batch):
    """Loss [B, T]: -ratio * advantage. The ratio is 1, and its gradient that of the log-prob."""
    ratio = torch.exp(logprobs - logprobs.detach())
    return -ratio * batch["advantages"]

# === 3. rollout ===================================================================================

@torch.no_grad()
def rollout(policy, problems, cfg, greedy=False):
    """Complete the prompt of each problem -> batch: tensors with B rows."""
    lm = policy.lm
    prompts = [problem["prompt_ids"] for problem in problems]
    prompt_ids, prompt_mask = left_pad(prompts, lm.pad_id, lm.device)  # [B, P]
    cache = DynamicCache()
    hidden = lm_hidden(lm, policy.table(prompt_ids), prompt_mask, cache=cache)
    ids = prompt_ids[:, :0]  # [B, 0]: no position yet
    for _ in range(cfg.max_completion_length):
        new, embeds = next_input(policy, lm_logits(lm, hidden[:, -1]), greedy)
        ids = torch.cat([ids, new[:, None]], 1)
        exists = torch.cat([prompt_mask, ids >= 0], 1)
        hidden = lm_hidden(lm, embeds[:, None], exists, cache=cache)
    ends = torch.isin(ids, torch.tensor(lm.eos_ids))
    batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids}
    batch["completion_mask"] = ends.cumsum(1) - ends.long() == 0  # up to the first EOS, with it
    batch["lengths"] = batch["completion_mask"].sum(1)
    batch["finished"] = ends.any(1)
    batch["latent_mask"] = torch.zeros_like(ends)  # no position is latent
    return batch

# === 4. rewards and advantages ====================================================================

def reward(record):
    """1 if the answer is right and the marker occurs exactly once, else 0."""
    return float(record["correct"] and record["format_ok"])


def group_advantages(rewards, group_size):
    """(r - group mean) / (group std + 1e-4): rewards [B] -> [B]. Equal rewards give 0."""
    groups = rewards.view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def loss_weights(batch):
    """Mean over completions of the mean over positions -> [B, T]."""
    lengths = batch["lengths"][:, None]
    return batch["completion_mask"] / (lengths * len(lengths))

# === 5. evaluation ================================================================================

def evaluate(policy, tokenizer, problems, cfg):
    """Share of the problems that greedy decoding answers right."""
    batch = rollout(policy, problems, cfg, greedy=True)
    records = grade(batch, problems, tokenizer, cfg.answer_marker)
    return mean(records, "correct")

# === 6. training ==================================================================================

def train_step(policy, optimizer, tokenizer, problems, cfg):
    """One rollout and one update."""
    problems = [problem for problem in problems for _ in range(cfg.group_size)]
    batch = rollout(policy, problems, cfg)
    records = grade(batch, problems, tokenizer, cfg.answer_marker)
    rewards = torch.tensor([reward(record) for record in records])
    batch["advantages"] = group_advantages(rewards, cfg.group_size)[:, None]
    loss = policy_loss(policy(batch), batch) * loss_weights(batch)  # [B, T]
    loss.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def main(cfg):
    """Train, and evaluate now and then."""
    random.seed(0)
    torch.manual_seed(0)
    lm, tokenizer = load_model(cfg.model)
    problems = load_problems(cfg.train)
    held_out = load_problems(cfg.train, "test", 512)
    for problem in [*problems, *held_out]:
        prompt = f"<bos>{problem['question']}<think>"  # the form that tiny knows
        problem["prompt_ids"] = tokenizer.encode(prompt, add_special_tokens=False)
    policy = Policy(lm)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr)
    for step in range(1, cfg.steps + 1):
        chosen = random.sample(problems, cfg.num_prompts)
        train_step(policy, optimizer, tokenizer, chosen, cfg)
        if step % cfg.eval_every == 0:
            accuracy = evaluate(policy, tokenizer, held_out, cfg)
            print(f"step {step}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Config())
