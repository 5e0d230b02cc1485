"""HRPO: reinforcement learning in which every thinking step feeds back a token and a soft token.

Paper    Hybrid Latent Reasoning via Reinforcement Learning, arXiv 2505.18454. [eq. n], [tab. n]
         point there, [code] at the authors' release, [ours] marks our own choices.
Idea     A step samples a token from p as usual. Until the answer marker appears, the next input is
         not its embedding e alone but a gated mix of e and the soft token s = E^T p / ||p||.
GRPO +   1. s comes from the very distribution the token was sampled from       next_input   [eq. 3]
         2. a learned gate mixes e and s; it starts at nearly all e             HybridGate   [eq. 4]
         3. updates replay s as a constant and recompute the gate               Policy
         4. no ratio, no clip; k3 KL to a reference that reads tokens only     policy_loss  [eq. 6]
Words    `hidden` is always the transformer's output, never the soft token; only `hidden_ratio`
         keeps the paper's word, for the weight sqrt(1 - a^2) of the soft token.
Differs  padding is masked in rollout *and* update, gates are float32: see docs/hrpo.md.
Run      python hrpo.py                     # tiny model, arithmetic, two CPU cores, two minutes
         python hrpo.py --no-hybrid         # the explicit baseline: plain GRPO
         torchrun --standalone --nproc_per_node=8 hrpo.py --model Qwen/Qwen2.5-1.5B-Instruct
"""

import argparse
import dataclasses
import hashlib
import inspect
import math
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import DynamicCache

from common import (
    Marker, autocast, candidate_scores, checkpoint_settings, completion_hidden,
    completion_logprobs, encode_prompts, fail, find_resume, frozen_copy, grade, join_batches,
    left_pad, lm_hidden, lm_logits, load_checkpoint, load_method, load_model, load_problems,
    lock_run, log_rows, lora_disabled, make_rng, mean, micro_batches, open_run, peak_memory,
    run_program, save_checkpoint, select_rows, soft_embedding, warn, weights_fingerprint)

METHOD = Path(__file__).stem

# === 1. config ====================================================================================


@dataclasses.dataclass
class Config:
    """Every setting; each is a command-line flag of the same name."""

    # model and data
    model: str = "tiny"  # hub id, folder, checkpoint of ours, or tiny (0.5M, trained at first use)
    preset: str = "auto"  # row of PRESETS that sets what is (auto); auto = tiny or paper, by model
    train: str = "auto"  # problems: arithmetic, a named set (gsm8k), a file, hub:owner/repo/file
    eval_data: str = ""  # evaluation problems; "" = the test split of --train
    answer_marker: str = "auto"  # text that ends the thinking and opens the answer
    out_dir: str = ""  # run folder; "" = runs/<script>-<model>-s<seed>
    seed: int = 0  # all randomness is a function of it, the step and the rank
    device: str = "auto"  # cuda, mps or cpu; auto = the first that is there
    dtype: str = "auto"  # float32, or bfloat16 (autocast, float32 weights); auto = that on cuda
    deterministic: bool = False  # torch.use_deterministic_algorithms
    dry_run: bool = False  # one update at the maximum lengths, prints its memory, writes nothing
    # rollout
    steps: int = "auto"  # rollout phases, each followed by its updates
    num_prompts: int = "auto"  # problems in a step, over all ranks
    group_size: int = "auto"  # completions per problem, G
    max_extra_rollouts: int = 0  # further draws a step to replace groups of equal rewards
    max_prompt_length: int = "auto"  # tokens; longer prompts are dropped and counted
    max_completion_length: int = "auto"  # tokens, latent steps included
    temperature: float = "auto"  # of sampling, > 0
    top_k: int = "auto"  # sample among the k likeliest ids; 0 = all
    top_p: float = 1.0  # then in this nucleus; 1 = off
    # update
    lr: float = "auto"  # AdamW learning rate of the language model
    adam_beta2: float = 0.99  # AdamW beta2; beta1 is 0.9
    weight_decay: float = "auto"  # decoupled, on matrices and gates
    warmup_steps: int = -1  # linear, of all rates; cosine to 0 follows; -1 = a tenth of steps
    max_grad_norm: float = "auto"  # the global gradient norm is clipped to it
    clip_eps: float = 0.2  # ratio clip; matters with several updates per rollout
    kl_coef: float = "auto"  # weight of the KL term, beta; 0 loads no reference
    update_epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates in a pass
    micro_batch: int = "auto"  # sequences in one forward pass on one rank
    max_tokens: int = 0  # padded tokens in one forward pass on one rank; 0 = no bound
    gradient_checkpointing: bool = False  # recompute layers in backward: memory for time
    share_prompts: bool = "auto"  # a prompt's pass serves its group in updates (auto: real models)
    lora_rank: int = "auto"  # 0 = full fine-tuning; alpha = 2 x rank
    train_embeddings: bool = False  # train the embedding table and head too (not with LoRA)
    # evaluation and records
    eval_every: int = "auto"  # steps; also before the first and after the last
    eval_limit: int = "auto"  # problems; 0 = all
    eval_batch: int = "auto"  # problems decoded together on one rank
    num_samples: int = 1  # completions per evaluation problem
    greedy: bool = True  # evaluate with argmax instead of sampling
    save_every: int = "auto"  # steps; also after the last
    keep_checkpoints: int = 2  # the newest stay, older ones are deleted
    print_every: int = 50  # steps between printed sample completions
    resume: str = ""  # auto = newest valid checkpoint in --out_dir, or the path of the newest
    stop_after: int = 0  # checkpoint and stop after this step, as on a signal; 0 = off
    dist_timeout: int = 30  # minutes a rank waits for the slowest one
    # the method
    hybrid: bool = True  # mix soft tokens into the thinking; --no-hybrid is plain GRPO [sec. 3]
    r_min: float = "auto"  # a starts as u^r, u uniform in [r_min, r_max] [tab. 3]
    r_max: float = 0.999  # see r_min [sec. 4]
    proj_tau: float = 0.0  # temperature of the soft token; 0 = that of sampling [eq. 3, code]
    lr_gate: float = "auto"  # learning rate of gate_r and gate_i [tab. 4]
    lr_lambda: float = "auto"  # learning rate of Lambda [tab. 4]
    lambda_weight_decay: float = "auto"  # on Lambda; by itself it raises the hidden ratio [tab. 4]
    ref_hybrid: bool = False  # feed the reference the hybrid inputs instead of tokens [ours]

    def __post_init__(self):
        if self.warmup_steps < 0:
            self.warmup_steps = round(0.1 * self.steps)
        may_be_0 = ("seed", "max_extra_rollouts", "top_k", "warmup_steps", "max_tokens",
                    "lora_rank", "eval_limit", "stop_after")
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), int(f.type is int and f.name not in may_be_0)
            if f.type in (int, float) and not value >= least:
                fail(f"--{f.name} {value}: must be at least {least}")
        if self.group_size < 2:
            fail(f"--group_size {self.group_size}: advantages need 2 or more completions a problem")
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            fail(f"--temperature {self.temperature}, --top_p {self.top_p}: want > 0 and in (0, 1]")
        if self.lora_rank and self.train_embeddings:
            fail("--train_embeddings: embeddings stay frozen with LoRA; use --lora_rank 0")
        if not self.answer_marker:
            fail("--answer_marker: must not be empty")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            fail(f"--dtype {self.dtype}: must be auto, float32 or bfloat16")
        if self.device.split(":")[0] not in ("auto", "cuda", "mps", "cpu"):
            fail(f"--device {self.device}: must be auto, cuda, mps or cpu")
        if not 0 < self.r_min < self.r_max < 1:
            fail(f"--r_min {self.r_min}, --r_max {self.r_max}: want 0 < r_min < r_max < 1")
        if not self.eval_data and re.search(r"\.(jsonl|json|csv|parquet)(\.gz)?$", self.train):
            fail(f"--train {self.train}: a file has no test split; name --eval_data")
        if self.update_epochs * self.minibatches > 1:  # s depends on the weights: on-policy only
            fail("--update_epochs, --minibatches: this method has no ratio, only one update a step")


PRESETS = {
    "tiny": dict(  # 0.5M parameters, two CPU cores [ours]
        train="arithmetic", answer_marker="</think>", steps=100, num_prompts=32, group_size=8,
        max_prompt_length=128, max_completion_length=32, temperature=1.0, top_k=0, lr=3e-4,
        weight_decay=0.0, max_grad_norm=1.0, kl_coef=0.005, micro_batch=64, lora_rank=0,
        eval_every=20, eval_limit=1024, eval_batch=1024, save_every=50, r_min=0.98,
        lr_gate=3e-3, lr_lambda=3e-2, lambda_weight_decay=0.0, share_prompts=False),
    "paper": dict(  # GSM8K with Qwen2.5-1.5B-Instruct [tab. 4, tab. 5]; top_k, lengths [code]
        train="gsm8k", answer_marker="####", steps=934, num_prompts=8, group_size=4,
        max_prompt_length=1024, max_completion_length=1024, temperature=0.5, top_k=50, lr=5e-6,
        weight_decay=0.1, max_grad_norm=0.1, kl_coef=0.005, micro_batch=8, lora_rank=32,
        eval_every=100, eval_limit=200, eval_batch=64, save_every=250, r_min=0.99,
        lr_gate=1e-4, lr_lambda=1e-3, lambda_weight_decay=0.1, share_prompts=True),
}

# === 2. the method ================================================================================

NEEDS_OLD_LOGPROBS = False  # no ratio: one update per rollout; section 7 has it for other methods
PLAIN = {"hybrid": False}  # the Config values that switch the method off
METHOD_METRICS = ("gate_a", "hidden_ratio", "hidden_ratio_decay_only")


class HybridGate(nn.Module):
    """Elementwise gate between token embedding e and soft token s, in float32 [eq. 4]:

    r = sigmoid(W_r e + b_r),  i = sigmoid(W_i e + b_i),  a = exp(-8 softplus(-Lambda) r),
    x = a e + sqrt(1 - a^2 + 1e-8) (i s)

    paper: softplus(Lambda); here and in the released code Lambda = -(the paper's), so a smaller
    Lambda means more of the soft token. It starts so that a = u^r with u ~ Uniform[r_min, r_max]; r
    starts near 1/2. Between 0.99 and 1 bfloat16 has only two values of a, and at a = 1 the root's
    slope is -1e4: hence float32.
    """

    def __init__(self, hidden_size, r_min, r_max):
        super().__init__()
        self.gate_r = nn.Linear(hidden_size, hidden_size)
        self.gate_i = nn.Linear(hidden_size, hidden_size)
        for linear in (self.gate_r, self.gate_i):
            # paper: Uniform[-1/sqrt(H), 1/sqrt(H)]; released code: N(0, 0.02), bias 0. As the code.
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        u = torch.empty(hidden_size, dtype=torch.float64).uniform_(r_min, r_max)
        self.Lambda = nn.Parameter(-torch.log(u ** (-1 / 8) - 1).float())  # [H]
        self.register_buffer("initial_Lambda", self.Lambda.detach().clone())  # for a metric only

    def forward(self, token_embeds, soft_embeds):
        """token_embeds, soft_embeds [..., H] -> mixed_embeds (dtype of the first), a (float32)."""
        with torch.autocast(token_embeds.device.type, enabled=False):
            e, s = token_embeds.to(self.Lambda.dtype), soft_embeds.to(self.Lambda.dtype)
            r = torch.sigmoid(self.gate_r(e))  # both gates read the token only
            i = torch.sigmoid(self.gate_i(e))
            a = torch.exp(-8 * F.softplus(-self.Lambda) * r)
            mixed = a * e + torch.sqrt(1 - a**2 + 1e-8) * (i * s)
        return mixed.to(token_embeds.dtype), a


class Policy(nn.Module):
    """Language model and gate. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm, self.table, self.pad_id = lm, lm.get_input_embeddings(), lm.pad_id
        self.tokenizer = tokenizer
        self.gate = HybridGate(self.table.embedding_dim, cfg.r_min, cfg.r_max).to(lm.device)
        self.gate.requires_grad_(cfg.hybrid)
        self.marker = Marker(tokenizer, cfg.answer_marker, lm.num_tokens, lm.device)
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        for module in (self.table, lm.get_output_embeddings()):
            module.weight.requires_grad_(cfg.train_embeddings)

    def completion_embeds(self, batch):
        """What the rollout fed at each completion position -> embeds [B, T, H], a (same) or None.

        soft_embeds are constants, stored by the rollout; the gate is recomputed with gradient. So
        log pi(y_t) reaches the gate at earlier thinking steps through attention, and no weight
        through s. paper: the mapping "ensures differentiability"; released code: s is constant.
        """
        tokens = self.table(batch["completion_ids"])  # [B, T, H]
        if "soft_embeds" not in batch:
            return tokens, None
        mixed, a = self.gate(tokens, batch["soft_embeds"])
        return torch.where(batch["latent_mask"][..., None], mixed, tokens), a

    def hidden(self, batch):
        """The hidden states [B, T, H] that decide each completion position."""
        return completion_hidden(self.lm, batch, self.completion_embeds(batch)[0])

    def forward(self, batch):
        """-> {"logprobs" [B, T], "entropy" [B, T] (nats), "a" [B, T, H] or None}.

        Scored at temperature 1 over the full vocabulary, whatever the samples' temperature and
        top-k [code]: unless those are 1 and 0 this is biased. Positions outside loss_mask are 0.
        """
        with autocast(self.lm):
            embeds, a = self.completion_embeds(batch)
            hidden = completion_hidden(self.lm, batch, embeds)
            ids, mask = batch["completion_ids"], batch["loss_mask"]
            logprobs, entropy = completion_logprobs(self.lm, hidden, ids, mask)
        if a is not None:  # DDP wants each parameter used, even if no row thought for one step
            logprobs = logprobs + 0 * sum(p.sum() for p in self.gate.parameters())
            a = a.detach()
        return {"logprobs": logprobs, "entropy": entropy, "a": a}


def start_state(num_rows, policy, cfg):
    """What each row remembers between steps: has the marker appeared, and its last few ids."""
    if not cfg.hybrid:
        return {}
    tail = torch.full((num_rows, policy.marker.width), -1, device=policy.lm.device)
    return {"marker_seen": torch.zeros_like(tail[:, 0], dtype=torch.bool), "tail": tail}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    s and ids come from the same logits and are fed together, one position later. The token that
    completes the marker and all that follow are fed plain; so is the prompt. `hidden` [b, H], which
    made the logits, is there for methods that feed it back.
    """
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, K]; K = V without top-k
    choice = probs.argmax(-1) if greedy else torch.multinomial(probs, 1, generator=rng)[:, 0]
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    embeds = policy.table(ids)  # [b, H]
    record = {"loss_mask": torch.ones_like(ids, dtype=torch.bool),  # every id was sampled
              "latent_mask": torch.zeros_like(ids, dtype=torch.bool),
              "rollout_logprobs": torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]}
    if not cfg.hybrid:
        return ids, embeds, record, state
    if cfg.proj_tau > 0:  # scores are logits / temperature
        probs = (scores * (cfg.temperature / cfg.proj_tau)).softmax(-1)
    # eq. 3: s = E^T p / ||p|| (soft_embedding divides); a constant for the update, like the id
    soft = soft_embedding(probs, policy.table, candidates).detach()  # [b, H]
    tail = torch.cat([state["tail"][:, 1:], ids[:, None]], 1)
    seen = state["marker_seen"] | policy.marker.completed(tail)
    mixed, _ = policy.gate(embeds, soft)
    embeds = torch.where(seen[:, None], embeds, mixed)
    is_read = ~torch.isin(ids, policy.eos_ids) & (t + 1 < cfg.max_completion_length)
    record.update(latent_mask=~seen & is_read, soft_embeds=soft)  # nothing reads the last input
    return ids, embeds, record, {"marker_seen": seen, "tail": tail}


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T] under the reference: a frozen copy, or (None) the model without adapters.

    It reads plain tokens (but for --ref_hybrid), so the KL term is above 0 from the first step and
    taxes the mixing too.
    """
    lm = policy.lm if reference is None else reference
    embeds = lm.get_input_embeddings()(batch["completion_ids"])  # its own table
    if cfg.ref_hybrid:
        embeds, _ = policy.completion_embeds(batch)
    with lora_disabled(lm), autocast(lm):
        hidden = completion_hidden(lm, batch, embeds)
        return completion_logprobs(lm, hidden, batch["completion_ids"], batch["loss_mask"])[0]


def kl_estimate(outputs, batch):
    """k3 estimate [B, T] of KL(policy || reference): exp(d) - d - 1 >= 0, d = reference - now."""
    difference = batch["ref_logprobs"] - outputs["logprobs"]
    return torch.exp(difference) - difference - 1


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position [eq. 6]: -(exp(lp - sg[lp]) A - beta k3), not yet reduced.

    The factor exp(lp - sg[lp]) is 1 and its gradient that of lp: REINFORCE with group advantages. A
    rollout is used once: after an update its stored s would be another policy's. lp is taken at
    temperature 1, also where the paper preset samples at 0.5 (see Policy.forward).
    """
    logprobs = outputs["logprobs"]
    loss = -torch.exp(logprobs - logprobs.detach()) * batch["advantages"]
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices and vectors of the language model, gates, Lambda."""
    lm = [p for p in policy.lm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in lm if p.dim() > 1], "lr": cfg.lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in lm if p.dim() == 1], "lr": cfg.lr, "weight_decay": 0.0}]
    if cfg.hybrid:
        gates = [*policy.gate.gate_r.parameters(), *policy.gate.gate_i.parameters()]
        groups += [
            {"params": gates, "lr": cfg.lr_gate, "weight_decay": cfg.weight_decay},
            {"params": [policy.gate.Lambda], "lr": cfg.lr_lambda,
             "weight_decay": cfg.lambda_weight_decay}]
    return [group for group in groups if group["params"]]


def method_metrics(policy, outputs, batch, cfg, step):
    """METHOD_METRICS as values [B, T], averaged over latent positions; None with --no-hybrid.

    gate_a: mean a. hidden_ratio: mean of sqrt(1 - a^2) (the release logs sqrt(1 - mean(a)^2)).
    hidden_ratio_decay_only: the same with today's r, had Lambda felt only the weight decay of all
    steps so far. The gap between the two is what gradients did to Lambda.
    """
    a, gate = outputs["a"], policy.gate
    if a is None:
        return None
    lost = (cfg.lr_lambda * lr_factor(s, cfg) * cfg.lambda_weight_decay for s in range(step))
    decayed = gate.initial_Lambda * math.prod(1 - x for x in lost)
    unlearned = a ** (F.softplus(-decayed) / F.softplus(-gate.Lambda))  # the same r, other Lambda
    return a.mean(-1), (1 - a**2).sqrt().mean(-1), (1 - unlearned**2).sqrt().mean(-1)


# === 3. rollout ===================================================================================
# Index t of a completion is one decision: logits at absolute position P + t - 1 decide it, its id
# is completion_ids[:, t], its embedding is the input at absolute position P + t.


def rollout(policy, prompts, cfg, rng, group_size=1, greedy=False):
    """Complete each prompt, a list of ids, group_size times -> batch, tensors with B rows.

    prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, T], and what next_input
    records (latent_mask, loss_mask, rollout_logprobs, ...) [B, T, ...]; lengths [B], EOS included;
    finished [B], EOS seen. Rows of a group are neighbours and share one prefill of their prompt;
    finished rows leave the batch and the cache, so noise is drawn for live rows only.
    """
    policy.eval()  # train() with gradient checkpointing would silently drop the cache
    device, limit = policy.table.weight.device, cfg.max_completion_length
    with torch.no_grad(), autocast(policy.lm):
        prompt_ids, prompt_mask = left_pad(prompts, policy.pad_id, device)  # [N, P]
        cache = DynamicCache()
        hidden = lm_hidden(policy.lm, policy.table(prompt_ids), prompt_mask, cache=cache)[:, -1]
        cache.batch_repeat_interleave(group_size)
        prompt_ids, prompt_mask, hidden = (
            x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask, hidden))  # [B, .]
        total, width = prompt_ids.shape
        rows = torch.arange(total, device=device)  # the live rows, b of them
        mask = F.pad(prompt_mask, (0, limit), value=True)  # [b, P + limit]
        positions = prompt_mask.sum(1, keepdim=True)  # [b, 1], of completion position 0
        state = start_state(total, policy, cfg)
        lengths = torch.full((total,), limit, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        steps = {"completion_ids": torch.full((total, limit), policy.pad_id, device=device)}
        for t in range(limit):
            logits = lm_logits(policy.lm, hidden)  # [b, V]
            for row in rows[~logits.sum(1).isfinite()].tolist():
                prompt = policy.tokenizer.decode(prompts[row // group_size])
                raise FloatingPointError(f"NaN or inf logits at position {t} after {prompt!r:.300}")
            ids, embeds, record, state = next_input(
                policy, logits, hidden, t, state, cfg, rng, greedy)
            for name, value in {"completion_ids": ids, **record}.items():
                if name not in steps:
                    steps[name] = value.new_zeros((total, limit, *value.shape[1:]))
                steps[name][rows, t] = value
            ended = torch.isin(ids, policy.eos_ids)
            if ended.any():
                finished[rows[ended]], lengths[rows[ended]] = True, t + 1
                live = (~ended).nonzero()[:, 0]
                if len(live) == 0:
                    break  # selecting no row would reset the cache
                rows, embeds, mask, positions = (x[live] for x in (rows, embeds, mask, positions))
                state = {name: value[live] for name, value in state.items()}
                cache.batch_select_indices(live)
            if t + 1 == limit or stop_requested():
                break  # the caller throws an interrupted batch away
            exists = mask[:, : width + t + 1]
            hidden = lm_hidden(policy.lm, embeds[:, None], exists, positions + t, cache)[:, -1]
    longest = int(lengths.max())
    batch = {name: value[:, :longest] for name, value in steps.items()}
    batch["completion_mask"] = torch.arange(longest, device=device) < lengths[:, None]
    batch.update(prompt_ids=prompt_ids, prompt_mask=prompt_mask, lengths=lengths, finished=finished)
    assert all(len(value) == total for value in batch.values())
    return batch


# === 4. rewards and advantages ====================================================================


def reward(record):
    """1 if the answer is right and the marker occurs exactly once, else 0 [sec. 4, code]."""
    return float(record["correct"] and record["format_ok"])


def group_advantages(rewards, group_size, eps=1e-4):
    """(r - group mean) / (group std + eps), std with ddof = 1.  rewards [B] -> [B]"""
    groups = rewards.view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)  # else rounding is left
    return (centred * differ / (groups.std(1, keepdim=True) + eps)).view(-1)


def compute_advantages(batch, cfg):
    """One advantage per completion, at every position that was sampled -> [B, T]."""
    return group_advantages(batch["rewards"], cfg.group_size)[:, None] * batch["loss_mask"]


def loss_weights(batch, cfg):
    """The reduction: mean over completions, of all ranks, of the mean over positions -> [B, T]."""
    counts = batch["loss_mask"].sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return batch["loss_mask"] / (counts * all_reduce(len(counts)))


def collect_batch(policy, tokenizer, problems, cfg, step):
    """Roll out and grade this rank's share of a step -> (batch, records of all that was drawn).

    A group of equal rewards teaches nothing: up to --max_extra_rollouts further draws replace such
    groups as far as they find others. The size of the batch is fixed; no collective in here.
    """
    rank, share = dist.get_rank(), cfg.num_prompts // dist.get_world_size()
    indices = batch_indices(len(problems), cfg.num_prompts, cfg.seed, step)
    indices = indices[rank * share : (rank + 1) * share]
    batches, records, live, dead = [], [], [], []
    for draw in range(1 + cfg.max_extra_rollouts):
        if draw > 0:
            rng = make_rng("cpu", cfg.seed, "extra problems", step, rank, draw)
            indices = torch.randint(len(problems), (share,), generator=rng).tolist()
        rng = make_rng(policy.table.weight.device, cfg.seed, "rollout", step, rank, draw)
        prompts = [problems[i]["prompt_ids"] for i in indices]
        batch = rollout(policy, prompts, cfg, rng, cfg.group_size)
        graded = grade(batch, [problems[i] for i in indices], tokenizer, cfg.answer_marker)
        for record in graded:
            record["reward"] = reward(record)
        batch["rewards"] = torch.tensor([r["reward"] for r in graded], device=rng.device)
        for group, values in enumerate(batch["rewards"].view(share, -1).tolist()):
            (live if min(values) < max(values) else dead).append(draw * share + group)
        batches.append(batch)
        records += graded
        if len(live) >= share or stop_requested():
            break
    if len(batches) == 1:
        return batches[0], records
    groups = torch.tensor(sorted((live + dead)[:share]), device=rng.device)
    rows = groups[:, None] * cfg.group_size + torch.arange(cfg.group_size, device=rng.device)
    return select_rows(join_batches(batches), rows.view(-1)), records


# === 5. evaluation ================================================================================


def evaluate(policy, tokenizer, problems, cfg, rng):
    """Complete every problem cfg.num_samples times, greedily or not -> metrics, equal on all ranks.

    With them "records", one per completion in the order of the problems. stderr is over problems. A
    stop signal ends it early, after a part of the problems: the caller then drops the result.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt_ids"]))
    mine, records = order[rank::world_size], []
    for start in range(0, len(mine), cfg.eval_batch):
        chosen = mine[start : start + cfg.eval_batch]
        prompts = [problems[i]["prompt_ids"] for i in chosen]
        batch = rollout(policy, prompts, cfg, rng, cfg.num_samples, cfg.greedy)
        graded = grade(batch, [problems[i] for i in chosen], tokenizer, cfg.answer_marker)
        for row, record in enumerate(graded):
            place = {"index": chosen[row // cfg.num_samples], "sample": row % cfg.num_samples}
            records.append({**place, **record, "reward": reward(record)})
        if stop_requested():
            break
    gathered = [None] * world_size
    dist.all_gather_object(gathered, records)
    records = sorted(sum(gathered, []), key=lambda r: (r["index"], r["sample"]))
    scores = torch.tensor([float(r["correct"]) for r in records]).view(-1, cfg.num_samples).mean(1)
    latent, length = mean(records, "latent_steps"), mean(records, "length")
    return {
        "accuracy": scores.mean().item(), "n": len(scores),
        "stderr": scores.std(correction=0).item() / len(scores) ** 0.5,
        "latent_steps": latent, "visible_tokens": length - latent, "total_length": length,
        "truncated_frac": mean(records, "truncated"), "format_ok": mean(records, "format_ok"),
        "unanswered_frac": mean(records, "unanswered"),
        "switches": mean(records, "switches"), "records": records}


# === 6. plumbing ==================================================================================


def parse_config(argv=None):
    """Every Config field is a flag of the same name; the comment beside the field is its help."""
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", inspect.getsource(Config), re.M))
    style, usage = argparse.RawTextHelpFormatter, f"{METHOD}.py [--flag value ...]"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=style, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f"{notes[f.name]} ({f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    parser.set_defaults(**PRESETS["tiny"])
    first = parser.parse_args(argv)
    saved = checkpoint_settings(first.model).get("preset")
    by_model = "tiny" if first.model.split(":")[0] == "tiny" else "paper"
    by_model = saved if saved in PRESETS else by_model
    preset = by_model if first.preset == "auto" else first.preset
    if preset not in PRESETS:
        fail(f"--preset {preset}: must be auto or one of {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    cfg = Config(**{**vars(parser.parse_args(argv)), "preset": preset})
    if cfg.model == "tiny" and cfg.train.startswith("arithmetic"):
        cfg.model = f"tiny:{cfg.train}"  # each arithmetic task has its own base model
    if cfg.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        cfg.device = "cuda" if torch.cuda.is_available() else mps
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device.startswith("cuda") else "float32"
    name = re.sub(r"[^\w.-]+", "-", cfg.model.rstrip("/").split("/")[-1])
    cfg.out_dir = cfg.out_dir or f"runs/{METHOD}-{name}-s{cfg.seed}"
    shares = int(os.environ.get("WORLD_SIZE", 1)) * cfg.minibatches
    if cfg.num_prompts % shares:
        fail(f"--num_prompts {cfg.num_prompts}: must divide by ranks x minibatches = {shares}, "
             "since a group of completions stays together")
    return cfg


def setup_distributed(cfg):
    """Join torchrun's process group, or make a group of one: no later line asks `if ddp`."""
    device = torch.device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            fail(f"--device {cfg.device}: {here} ranks on this machine but {gpus} GPUs")
        torch.cuda.set_device(device)
    if cfg.deterministic:
        if device.type == "cuda" and cfg.top_p < 1:
            fail("--deterministic: CUDA has no deterministic cumsum, so --top_p must be 1")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=cfg.dist_timeout), **alone)
    SIGNALS.clear()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    return dist.get_rank(), dist.get_world_size(), device


SIGNALS = []  # stop signals that this process received
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # pid of torchrun


def on_signal(signum, frame):
    """Only note it: the ranks agree on stopping once a step. A second Ctrl-C does not wait."""
    SIGNALS.append(signum)
    if SIGNALS.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt


def stop_requested():
    """Was this process told to stop, or its launcher killed, which would leave it an orphan?"""
    return bool(SIGNALS) or LAUNCHER not in (0, os.getppid())


def stop_agreed():
    """The stop signal of some rank, or 0: the same answer on all ranks."""
    signum = SIGNALS[0] if SIGNALS else signal.SIGTERM
    return int(all_reduce(signum if stop_requested() else 0, dist.ReduceOp.MAX))


def all_reduce(number, op=dist.ReduceOp.SUM):
    """Sum, or another op, of a number (or lists of them) over the ranks, float64 on the CPU."""
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total, op=op)
    return total.tolist()


def batch_indices(num_problems, num_prompts, seed, step):
    """This step's problems, over all ranks: a fresh shuffle for each pass over the data."""
    indices, orders = [], {}
    for position in range(step * num_prompts, (step + 1) * num_prompts):
        epoch, place = divmod(position, num_problems)
        if epoch not in orders:
            rng = make_rng("cpu", seed, "order", epoch)
            orders[epoch] = torch.randperm(num_problems, generator=rng).tolist()
        indices.append(orders[epoch][place])
    return indices


def lr_factor(step, cfg):
    """Linear warm-up, then cosine to 0 at the end of the run."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def show(row, records, stalls, cfg, bar):
    """Rank 0: progress, now and then completions, and a warning when nothing can be learned."""
    text = (f"reward {row['reward']:.3f}  length {row['length']:.1f}  latent "
            f"{row['latent_steps']:.1f}  zero-std groups {row['zero_std_frac']:.2f}  "
            f"{row['seconds']:.2f} s")
    bar.set_postfix_str(text)
    bar.update()
    if bar.disable and (row["step"] == 1 or row["step"] % 10 == 0):
        print(f"train step {row['step']:4d}  {text}", flush=True)
    for record in records[:2] if (row["step"] - 1) % cfg.print_every == 0 else []:
        tqdm.write(f"  {record['question'][-200:]!r} -> {record['completion'][-600:]!r}\n"
                   f"  extracted {record['extracted']!r}, gold {record['gold']!r}, "
                   f"reward {record['reward']}, latent steps {record['latent_steps']}")
    for name, bad in (("reward is 0", row["reward"] == 0),
                      ("over 30 % are truncated", row["truncated_frac"] > 0.3),
                      ("no position is plain", row["latent_steps"] >= row["length"])):
        stalls[name] = stalls.get(name, 0) + 1 if bad else 0
        if stalls[name] == 10:
            warn(f"{name} for 10 steps: read samples.jsonl, check --answer_marker and the lengths")


# === 7. training ==================================================================================

CAN_CHANGE = ("out_dir", "resume", "stop_after", "device", "eval_data", "eval_limit", "eval_every",
              "eval_batch", "num_samples", "greedy", "save_every", "keep_checkpoints",
              "print_every", "micro_batch", "max_tokens", "gradient_checkpointing",
              "share_prompts", "dist_timeout")  # by a resumed run


def train_step(policy, ddp_policy, reference, optimizer, tokenizer, problems, cfg, step):
    """Rollout, advantages, updates -> (metrics row, records), or None when told to stop."""
    clock, world_size = time.time(), dist.get_world_size()
    batch, records = collect_batch(policy, tokenizer, problems, cfg, step)
    if stop_agreed():
        return None  # the rollout is dropped; a resumed run repeats it with the same noise
    rollout_seconds = time.time() - clock
    if cfg.dry_run:
        batch["rewards"][::2] += 1.0  # some advantage, so that the update has work to do
    batch["advantages"] = compute_advantages(batch, cfg)
    if NEEDS_OLD_LOGPROBS and cfg.update_epochs * cfg.minibatches > 1:
        batch["old_logprobs"] = torch.zeros_like(batch["advantages"])
        every = range(len(batch["rewards"]))  # records may hold more: of groups that were replaced
        for rows in micro_batches(batch, every, cfg.micro_batch, cfg.max_tokens, cfg.share_prompts):
            with torch.no_grad():
                scored = policy(select_rows(batch, rows))["logprobs"]  # [b, T'], T' <= T
            batch["old_logprobs"][rows, : scored.shape[1]] = scored
    policy.train()
    names = ("entropy", "kl", *METHOD_METRICS, "grad_norm", "skipped")
    sums, peaks = {name: [0.0, 0.0] for name in names}, {"ratio_max": 0.0, "logprob_gap": 0.0}
    size = len(batch["rewards"]) // cfg.minibatches
    for start in [*range(0, size * cfg.minibatches, size)] * cfg.update_epochs:
        part = select_rows(batch, range(start, start + size))
        update(policy, ddp_policy, reference, optimizer, part, cfg, step, sums, peaks)
    seconds, tokens = time.time() - clock, sum(r["length"] for r in records)
    for name in ("reward", "correct", "format_ok", "length", "latent_steps", "truncated"):
        sums[name] = [sum(r[name] for r in records), len(records)]
    groups = torch.tensor([r["reward"] for r in records]).view(-1, cfg.group_size)
    sums["zero_std_frac"] = [int((groups.amax(1) == groups.amin(1)).sum()), len(groups)]
    sums["tokens_per_s_rollout"] = [tokens, rollout_seconds / world_size]
    sums["tokens_per_s_update"] = [tokens, (seconds - rollout_seconds) / world_size]
    totals = all_reduce(list(sums.values()))  # [number of means, 2]
    means = {name: s / n if n else None for name, (s, n) in zip(sums, totals)}
    means["truncated_frac"] = means.pop("truncated")
    peaks["peak_mem_gib"] = peak_memory(policy.table.weight.device)
    peaks = dict(zip(peaks, all_reduce(list(peaks.values()), dist.ReduceOp.MAX)))
    row = {"kind": "train", "step": step + 1, **means, **peaks, "seconds": seconds}
    return {**row, "lr": cfg.lr * lr_factor(step, cfg)}, records


def update(policy, ddp_policy, reference, optimizer, batch, cfg, step, sums, peaks):
    """One optimizer update, skipped on all ranks when its gradient is not finite.

    All ranks work on equally many rows, so each takes part in the one all-reduce of gradients.
    """
    batch["weights"] = loss_weights(batch, cfg)
    rows = list(range(len(batch["weights"])))
    if cfg.kl_coef == 0:  # rows without advantage have no gradient: leave out what all ranks can
        live = batch["advantages"].abs().sum(1) > 0
        rows = live.int().argsort(descending=True, stable=True).tolist()
        rows = rows[: int(all_reduce(int(live.sum()), dist.ReduceOp.MAX))]
        if not rows:
            return  # nothing to learn: no update, and so no weight decay either
    pieces = micro_batches(batch, rows, cfg.micro_batch, cfg.max_tokens, cfg.share_prompts)
    for number, piece in enumerate(pieces, 1):
        micro = select_rows(batch, piece)
        if cfg.kl_coef > 0:
            micro["ref_logprobs"] = reference_logprobs(policy, reference, micro, cfg)
        # DDP would all-reduce after each backward; only the last one of the update needs it.
        ddp_policy.require_backward_grad_sync = number == len(pieces)
        outputs = ddp_policy(micro)
        loss = (policy_loss(outputs, micro, cfg) * micro["weights"]).sum()
        (loss * dist.get_world_size()).backward()  # DDP averages over ranks
        measure(policy, outputs, micro, cfg, step, sums, peaks)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm).item()
    bad = all_reduce(not math.isfinite(grad_norm), dist.ReduceOp.MAX)
    if not bad:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step, cfg)
        optimizer.step()
        sums["grad_norm"] = [sums["grad_norm"][0] + grad_norm, sums["grad_norm"][1] + 1]
    sums["skipped"] = [sums["skipped"][0] + bad, 1]
    optimizer.zero_grad()


@torch.no_grad()
def measure(policy, outputs, micro, cfg, step, sums, peaks):
    """Add a micro-batch to sums {name: [sum, count]} over positions, and to peaks {name: max}."""
    mask, logprobs = micro["loss_mask"], outputs["logprobs"]
    values = {"entropy": (outputs["entropy"], mask)}
    if cfg.kl_coef > 0:
        values["kl"] = (kl_estimate(outputs, micro), mask)
    for name, value in zip(METHOD_METRICS, method_metrics(policy, outputs, micro, cfg, step) or ()):
        values[name] = (value, micro["latent_mask"])
    for name, (value, where) in values.items():
        total = value[where].sum().item()
        if math.isfinite(total):
            sums[name] = [sums[name][0] + total, sums[name][1] + int(where.sum())]
    old_logprobs = micro.get("old_logprobs", logprobs)  # before the first update of the rollout
    gaps = {"logprob_gap": (old_logprobs - micro["rollout_logprobs"]).abs(),
            "ratio_max": (logprobs - old_logprobs).exp()}
    for name, value in gaps.items():
        peaks[name] = max(peaks[name], value[mask].max().clamp(max=1e9).item())


def main(argv=None):
    """Train, evaluate, checkpoint -> the last evaluation (metrics, without its records)."""
    cfg = parse_config(argv)
    settings = {"method": METHOD, "world_size": int(os.environ.get("WORLD_SIZE", 1))}
    settings.update(dataclasses.asdict(cfg))
    resumed, lock, out_dir = None, None, Path(cfg.out_dir)
    if not cfg.dry_run:
        resumed, lock = find_resume(out_dir, cfg.resume, settings, CAN_CHANGE)
    problems = load_problems(cfg.train, "train")
    eval_problems = load_problems(cfg.eval_data or cfg.train, "test", cfg.eval_limit)
    rank, world_size, device = setup_distributed(cfg)  # past it, all ranks have read the run folder

    torch.manual_seed(cfg.seed)  # the same adapters and method parameters on every rank
    lm, tokenizer = load_model(cfg.model, getattr(torch, cfg.dtype), device, cfg.lora_rank)
    if cfg.gradient_checkpointing:  # only in train(): rollouts and evaluations need the cache
        lm.activation_checkpointing_enable()
    lm.share_prompts = cfg.share_prompts and not cfg.gradient_checkpointing  # no cache there
    policy = Policy(lm, tokenizer, cfg)
    load_method(policy, cfg.model, METHOD)
    problems = encode_prompts(tokenizer, problems, cfg.answer_marker, cfg.max_prompt_length)
    eval_problems = encode_prompts(
        tokenizer, eval_problems, cfg.answer_marker, cfg.max_prompt_length)
    settings["model_sha"] = weights_fingerprint(lm)
    settings["data_sha"] = hashlib.sha256(repr(problems).encode()).hexdigest()[:16]
    reference = frozen_copy(lm) if cfg.kl_coef > 0 and cfg.lora_rank == 0 else None
    groups = [{**group, "initial_lr": group["lr"]} for group in param_groups(policy, cfg)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.adam_beta2))
    state = {"step": 0, "skipped": 0}  # skipped: updates in a row whose gradient was not finite
    if resumed:
        state = load_checkpoint(resumed, policy, optimizer, settings, CAN_CHANGE)
    if rank == 0 and not cfg.dry_run:
        lock = lock or lock_run(out_dir)  # held until the process ends
        open_run(out_dir, settings, __file__, state["step"])
    if rank == 0:
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{cfg.num_prompts} prompts x {cfg.group_size} completions a step on {world_size} x "
              f"{device}, {len(problems)} training and {len(eval_problems)} evaluation problems")
    if cfg.dry_run:
        cfg.steps, cfg.max_extra_rollouts = 1, 0
        policy.eos_ids = policy.eos_ids[:0]  # no completion ends before the limit
        for problem in problems:
            copies = 1 + cfg.max_prompt_length // len(problem["prompt_ids"])
            problem["prompt_ids"] = (problem["prompt_ids"] * copies)[: cfg.max_prompt_length]
    ddp_policy = policy
    if world_size > 1 and device.type != "mps":
        # find_unused_parameters keeps the gradient buckets as they are. DDP otherwise regroups them
        # after the first update, and a resumed run would sum over 3 or more ranks in another order.
        ddp_policy = DistributedDataParallel(
            policy, broadcast_buffers=False, find_unused_parameters=True)

    hide = None if rank == 0 else True  # None: hidden when stderr is no terminal
    bar = tqdm(total=cfg.steps, initial=state["step"], desc=METHOD, disable=hide)
    result, saved, stalls, stopping = {}, True, {}, False
    for step in range(state["step"], cfg.steps + 1):
        if (step % cfg.eval_every == 0 or step == cfg.steps) and not cfg.dry_run:
            clock, rng = time.time(), make_rng(device, cfg.seed, "eval", step, rank)
            metrics = evaluate(policy, tokenizer, eval_problems, cfg, rng)
            if stop_agreed():
                break  # the evaluation is incomplete; a resumed run repeats it
            records, result = metrics.pop("records"), metrics
            row = {"kind": "eval", "step": step, **result, "seconds": time.time() - clock}
            if rank == 0:
                log_rows(out_dir, row, records[:8])
                tqdm.write("eval  " + "  ".join(f"{name} {row[name]:.4g}" for name in (
                    "step", "accuracy", "stderr", "n", "latent_steps", "visible_tokens")))
        if step == cfg.steps:
            break
        done = train_step(policy, ddp_policy, reference, optimizer, tokenizer, problems, cfg, step)
        if done is not None:
            row, records = done
            state = {"step": step + 1, "skipped": state["skipped"] + 1 if row["skipped"] else 0}
            kept = [records[:: cfg.group_size][:2]]
            if row["skipped"]:  # by all ranks: keep what each of them drew
                kept = [None] * world_size
                dist.all_gather_object(kept, records)
            if rank == 0 and not cfg.dry_run:
                log_rows(out_dir, row, sum(kept, []))
            if rank == 0:
                show(row, records[:: cfg.group_size], stalls, cfg, bar)
        stopping = stop_agreed() or state["skipped"] >= 5 or step + 1 == cfg.stop_after
        due = stopping or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if due and rank == 0 and not cfg.dry_run:
            saved = save_checkpoint(out_dir, policy, tokenizer, optimizer, settings, state,
                                    cfg.keep_checkpoints)
        if stopping:
            break
    bar.close()
    signum = stop_agreed()
    if signum and rank == 0 and not cfg.dry_run:
        saved = save_checkpoint(out_dir, policy, tokenizer, optimizer, settings, state,
                                cfg.keep_checkpoints)
    dist.barrier()  # nobody leaves, which ends the job, while rank 0 still writes
    if cfg.dry_run and rank == 0 and not signum:
        print(f"dry run, without evaluation: peak memory {row['peak_mem_gib']:.2f} GiB, "
              f"{row['seconds']:.1f} s a step")
    elif rank == 0:
        print(f"{'stopped' if stopping or signum else 'done'} after step {state['step']}; go on "
              f"with --resume auto, or: python eval.py {out_dir} --data "
              f"{cfg.eval_data or cfg.train}", flush=True)
    if state["skipped"] >= 5:
        raise SystemExit(f"stopped: 5 updates in a row without a finite gradient, step {step + 1}; "
                         "samples.jsonl has all completions of these steps")
    if not saved:
        raise SystemExit(f"{out_dir}: the last checkpoint could not be written")
    if signum:
        raise SystemExit(128 + signum)
    return result


if __name__ == "__main__":
    run_program(main)
