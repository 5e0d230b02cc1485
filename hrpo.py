"""HRPO: reinforcement learning in which every thinking step feeds back a token and a soft token.

Paper    Hybrid Latent Reasoning via Reinforcement Learning, arXiv 2505.18454. [eq. n] and [tab. n]
         refer to the paper, [code] to the authors' code; [ours] marks our own choices.
Idea     A step samples a token from p as usual. Until the answer marker appears, the next input is
         not its embedding e alone but a gated mix of e and the soft token s = E^T p / ||p||.
GRPO +   1. s comes from the very distribution the token was sampled from       next_input   [eq. 3]
         2. a learned gate mixes e and s; it starts at nearly all e             HybridGate   [eq. 4]
         3. updates keep s as a constant and recompute the gate                 Policy
         4. no ratio, no clip; k3 KL to a reference that reads tokens only      policy_loss  [eq. 6]
Words    `hidden` is always the output of the transformer. The paper calls the soft token hidden
         too; here only the metric `hidden_ratio`, the mean of sqrt(1 - a^2), keeps that word.
Differs  padding is masked in rollout *and* update, gates are float32: see docs/hrpo.md.
Run      python hrpo.py                     # tiny model, arithmetic, two CPU cores, two minutes
         python hrpo.py --no-hybrid         # the explicit baseline: plain GRPO
         torchrun --standalone --nproc_per_node=8 hrpo.py --model Qwen/Qwen2.5-1.5B-Instruct
"""

import dataclasses
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import (
    INSTRUCTION, Marker, Progress, RoomyCache, add_up, all_reduce, autocast, candidate_scores,
    check_ranks, completion_hidden, completion_logprobs, data_fingerprint, embed_scale,
    encode_prompts, fail, find_resume, frozen_copy, gather, grade, largest, left_pad, live_rows,
    lm_hidden, lm_logits, load_checkpoint, load_method, load_model, load_problems, lock_run,
    log_rows, lora_disabled, make_rng, maxima, means, micro_batches, next_problems, open_run,
    parse_flags, peak_memory, record_sums, resolve_config, run_program, sample, save_checkpoint,
    select_rows, setup_distributed, stop_agreed, stop_requested, summarise, top_k_mixture,
    weights_fingerprint)

METHOD = Path(__file__).stem

# === 1. config ====================================================================================


@dataclasses.dataclass
class Config:
    """Every setting; each is a command-line flag of the same name. The values train `tiny`."""

    # model, data, length of the run
    model: str = "tiny"  # hub id, folder, checkpoint of ours, or tiny (0.5M, trained at first use)
    preset: str = "auto"  # where values start: tiny (as here), paper; auto chooses by the model
    train: str = "arithmetic"  # problems: arithmetic, a named set (gsm8k), a file, hub:OWNER/REPO/F
    eval_data: str = ""  # evaluation problems; "" = the test split of --train
    answer_marker: str = "</think>"  # text that ends the thinking and opens the answer
    instruction: str = INSTRUCTION  # what a prompt asks for, "" = nothing; {marker} is filled in
    template_args: str = ""  # JSON object for the chat template, as {"enable_thinking": false}
    prompt_suffix: str = ""  # text after the rendered prompt, as <think>
    prompt_date: str = "2025-01-01"  # date that a chat template writes, so that no day changes it
    steps: int = 100  # rollouts, each followed by an update
    seed: int = 0  # all randomness is a function of it, the step and the rank
    # rollout and update
    num_prompts: int = 32  # problems in a step, over all ranks
    group_size: int = 8  # completions per problem, G
    max_prompt_length: int = 128  # tokens; longer prompts are dropped and counted
    max_completion_length: int = 32  # tokens, latent steps included
    temperature: float = 1.0  # of sampling, > 0
    top_k: int = 0  # sample among the k likeliest ids; 0 = all
    top_p: float = 1.0  # then in this nucleus; 1 = off
    lr: float = 3e-4  # AdamW learning rate of the language model
    kl_coef: float = 0.005  # weight of the KL term, beta; 0 loads no reference
    # the method
    hybrid: bool = True  # mix soft tokens into the thinking; --no-hybrid is plain GRPO [sec. 3]
    r_min: float = 0.98  # a starts as u^r, u uniform in [r_min, r_max] [tab. 3]
    r_max: float = 0.999  # see r_min [sec. 4]
    lr_gate: float = 3e-3  # learning rate of gate_r and gate_i [tab. 4: 1e-4]
    lr_lambda: float = 3e-2  # learning rate of Lambda [tab. 4: 1e-3]
    lambda_weight_decay: float = 0.0  # weight decay of Lambda [tab. 4: 0.1]
    # optimizer and memory
    adam_beta2: float = 0.99  # AdamW beta2; beta1 is 0.9
    weight_decay: float = 0.0  # of matrices and gates, decoupled
    warmup_steps: int = -1  # linear warm-up of all rates, then a cosine to 0; -1 = a tenth of steps
    max_grad_norm: float = 1.0  # the global gradient norm is clipped to it
    lora_rank: int = 0  # 0 = full fine-tuning; alpha = 2 x rank
    train_embeddings: bool = False  # train the embedding table and head too (not with LoRA)
    micro_batch: int = 64  # sequences in one forward pass on one rank
    max_tokens: int = 0  # padded tokens in one forward pass on one rank; 0 = no bound
    zero: bool = False  # spread AdamW's moments over the ranks: 8 bytes a parameter / ranks on each
    gradient_checkpointing: bool = False  # recompute layers in backward: less memory, more time
    share_prompts: bool = False  # in updates, encode each prompt once for its whole group
    # evaluation
    eval_every: int = 20  # steps; also before the first and after the last
    eval_limit: int = 1024  # problems; 0 = all
    eval_batch: int = 1024  # problems decoded together on one rank
    num_samples: int = 1  # completions per evaluation problem
    greedy: bool = True  # evaluate with argmax instead of sampling
    # the run
    out_dir: str = ""  # run folder; "" = runs/<script>-<model>-s<seed>
    save_every: int = 50  # steps between checkpoints; one is also written at the end
    keep_checkpoints: int = 2  # the newest stay, older ones are deleted
    keep_best: bool = False  # the checkpoint with the best evaluation stays, too: eval.py --best
    track: str = ""  # tensorboard or wandb: show the metrics there, too
    resume: str = ""  # auto goes on from the newest valid checkpoint in --out_dir; or its path
    stop_after: int = 0  # save and stop after this step, as on a signal; 0 = off
    device: str = "auto"  # cuda, mps or cpu; auto = the first that is there
    dtype: str = "auto"  # float32, or bfloat16 (autocast, float32 weights); auto = that on cuda
    deterministic: bool = False  # torch.use_deterministic_algorithms
    dist_timeout: int = 30  # minutes a rank waits for the slowest one
    dry_run: bool = False  # two steps at the maximum lengths, prints its memory, writes nothing

    def __post_init__(self):
        resolve_config(self, METHOD)  # fills in "auto", checks what is shared
        if not 0 < self.r_min < self.r_max < 1:
            fail(f"--r_min {self.r_min}, --r_max {self.r_max}: want 0 < r_min < r_max < 1")


PRESETS = {
    "tiny": {},
    "paper": dict(  # GSM8K with Qwen2.5-1.5B-Instruct [tab. 4, tab. 5]; top_k, lengths [code]
        train="gsm8k", answer_marker="####", steps=934, num_prompts=8, group_size=4,
        max_prompt_length=1024, max_completion_length=1024, temperature=0.5, top_k=50, lr=5e-6,
        r_min=0.99, lr_gate=1e-4, lr_lambda=1e-3, lambda_weight_decay=0.1,
        weight_decay=0.1, max_grad_norm=0.1, lora_rank=32, micro_batch=8, share_prompts=True,
        eval_every=100, eval_limit=200, eval_batch=64, save_every=250),
}


def parse_config(argv=None):
    """The settings of a run, from the command line."""
    return parse_flags(Config, PRESETS, __doc__, argv)


# === 2. the method ================================================================================

METHOD_METRICS = ("gate_a", "hidden_ratio")  # what `measure` adds to those of every script
PLAIN_GRPO = {"hybrid": False}  # the settings that switch the method off


def soft_embedding(probs, table, ids=None):
    """Soft token [eq. 3]: the expected embedding over the norm of p, s = E^T p / ||p||_2.

    probs [..., V], table module -> [..., H], dtype of the table. With ids [..., K], probs [..., K]
    belong to those rows and all others are 0. A one-hot p gives the embedding of its token. An
    average of embeddings is shorter than one of them; dividing by the norm makes up for it, except
    for what all embeddings have in common, which grows. No gradient is stopped here.
    """
    norm = probs.float().norm(dim=-1, keepdim=True)
    if ids is None:
        expected = probs.to(table.weight.dtype) @ table.weight[: probs.shape[-1]]
        expected = expected * embed_scale(table)
    else:
        expected = top_k_mixture(ids, probs, table)
    return (expected / norm).to(table.weight.dtype)


class HybridGate(nn.Module):
    """Elementwise gate between token embedding e and soft token s, all vectors [H] [eq. 4]:

    r = sigmoid(W_r e + b_r),  i = sigmoid(W_i e + b_i),  a = exp(-8 softplus(-Lambda) r),
    x = a e + sqrt(1 - a^2 + 1e-8) (i s)

    An a near 1 feeds the token; a smaller a feeds more of the soft token. paper: softplus(Lambda);
    released code: softplus(-Lambda). We follow the code, so a smaller Lambda means more of the soft
    token, and weight decay, which pulls Lambda to 0, feeds more of it. The gate computes in
    float32: bfloat16 has only three values from 0.99 to 1, and at a = 1 the root's slope is -1e4.
    """

    def __init__(self, hidden_size, r_min, r_max):
        super().__init__()
        self.gate_r = nn.Linear(hidden_size, hidden_size)
        self.gate_i = nn.Linear(hidden_size, hidden_size)
        for linear in (self.gate_r, self.gate_i):
            # paper: Uniform[-1/sqrt(H), 1/sqrt(H)]; released code: N(0, 0.02), bias 0. As the code.
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        # The gate starts as a = u^r, u uniform in [r_min, r_max]. So exp(-8 softplus(-Lambda)) = u,
        # which gives log(1 + exp(-Lambda)) = -log(u) / 8 and Lambda = -log(u^(-1/8) - 1).
        u = torch.empty(hidden_size, dtype=torch.float64).uniform_(r_min, r_max)
        self.Lambda = nn.Parameter(-torch.log(u ** (-1 / 8) - 1).float())  # [H]

    def forward(self, token_embeds, soft_embeds):
        """token_embeds, soft_embeds [..., H] -> mixed_embeds (dtype of the first), a (float32)."""
        with torch.autocast(token_embeds.device.type, enabled=False):
            e = token_embeds.to(self.Lambda.dtype)
            s = soft_embeds.to(self.Lambda.dtype)
            r = torch.sigmoid(self.gate_r(e))  # both gates read the token only
            i = torch.sigmoid(self.gate_i(e))
            a = torch.exp(-8 * F.softplus(-self.Lambda) * r)
            mixed = a * e + torch.sqrt(1 - a**2 + 1e-8) * (i * s)
        return mixed.to(token_embeds.dtype), a


class Policy(nn.Module):
    """Language model and gate. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.table = lm.get_input_embeddings()
        self.gate = HybridGate(self.table.embedding_dim, cfg.r_min, cfg.r_max).to(lm.device)
        self.gate.requires_grad_(cfg.hybrid)
        self.marker = Marker(tokenizer, cfg.answer_marker, lm.num_tokens, lm.device)
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        for module in (self.table, lm.get_output_embeddings()):
            module.weight.requires_grad_(cfg.train_embeddings)

    def completion_embeds(self, batch):
        """What the rollout fed at each completion position -> embeds [B, T, H].

        soft_embeds are constants that the rollout stored; the gate is recomputed with gradient. So
        log pi(y_t) reaches the gate at earlier thinking steps through attention, and no gradient
        flows through s. paper: the mapping "ensures differentiability"; released code: s constant.
        """
        tokens = self.table(batch["completion_ids"])  # [B, T, H]
        if "soft_embeds" not in batch:
            return tokens
        mixed, _ = self.gate(tokens, batch["soft_embeds"])
        return torch.where(batch["latent_mask"][..., None], mixed, tokens)

    def hidden(self, batch):
        """The hidden states [B, T, H] that decide each completion position."""
        return completion_hidden(self.lm, batch, self.completion_embeds(batch))

    def forward(self, batch):
        """-> {"logprobs" [B, T], "entropy" [B, T] in nats}, both 0 outside loss_mask.

        Scored at temperature 1 over the full vocabulary [code]. With another temperature, top-k or
        top-p the gradient is biased: samples come from one distribution, scores from another.
        """
        with autocast(self.lm):
            hidden = self.hidden(batch)
            logprobs, entropy = completion_logprobs(
                self.lm, hidden, batch["completion_ids"], batch["loss_mask"])
        if "soft_embeds" in batch:  # DDP wants each parameter used, even if no row thinks
            touched = sum(p.sum() for p in self.gate.parameters())
            logprobs = logprobs + 0 * touched
        return {"logprobs": logprobs, "entropy": entropy}


def start_state(num_rows, policy, cfg):
    """What each row remembers between steps: has the marker appeared, and its last few ids."""
    if not cfg.hybrid:
        return {}
    device = policy.lm.device
    marker_seen = torch.zeros(num_rows, dtype=torch.bool, device=device)
    last_ids = torch.full((num_rows, policy.marker.width), -1, device=device)
    return {"marker_seen": marker_seen, "last_ids": last_ids}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    s and the id come from the same logits and are fed together, one position later. The token that
    completes the marker and all that follow are fed plain; so is the prompt. `hidden` [b, H], which
    made the logits, is unused here.
    """
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, K]; K = V without top-k
    choice = probs.argmax(-1) if greedy else sample(probs, rng)
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    embeds = policy.table(ids)  # [b, H]
    logprobs = torch.log_softmax(logits, -1)  # [b, V]
    record = {
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),  # every id was sampled
        "latent_mask": torch.zeros_like(ids, dtype=torch.bool),
        "rollout_logprobs": logprobs.gather(1, ids[:, None])[:, 0],
    }
    if not cfg.hybrid:
        return ids, embeds, record, state
    # eq. 3; a constant for the update, as the id is
    soft = soft_embedding(probs, policy.table, candidates).detach()  # [b, H]
    last_ids = torch.cat([state["last_ids"][:, 1:], ids[:, None]], 1)
    marker_seen = state["marker_seen"] | policy.marker.completed(last_ids)
    mixed, _ = policy.gate(embeds, soft)
    embeds = torch.where(marker_seen[:, None], embeds, mixed)

    # After EOS and at the limit nothing reads the next input, so these positions are not latent.
    is_last = t + 1 == cfg.max_completion_length
    is_fed = ~torch.isin(ids, policy.eos_ids) & (not is_last)
    record["latent_mask"] = ~marker_seen & is_fed
    record["soft_embeds"] = soft
    return ids, embeds, record, {"marker_seen": marker_seen, "last_ids": last_ids}


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T] under the reference: a frozen copy, or (None) the model without adapters.

    It reads plain tokens, so the KL term is above 0 from the first step and taxes the mixing too.
    """
    lm = policy.lm if reference is None else reference
    ids = batch["completion_ids"]
    with lora_disabled(lm), autocast(lm):
        tokens = lm.get_input_embeddings()(ids)  # its own table
        hidden = completion_hidden(lm, batch, tokens)
        return completion_logprobs(lm, hidden, ids, batch["loss_mask"])[0]


def kl_estimate(outputs, batch):
    """k3 estimate [B, T] of KL(policy || reference): exp(d) - d - 1 >= 0, d = reference - now."""
    difference = batch["ref_logprobs"] - outputs["logprobs"]
    return torch.exp(difference) - difference - 1


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position [eq. 6]: -(exp(lp - sg[lp]) A - beta k3), not yet reduced.

    lp: logprobs, sg: no gradient. The factor exp(lp - sg[lp]) is 1 and its gradient that of lp:
    REINFORCE with group advantages. A rollout is used once: after an update its stored s would be
    another policy's. lp is taken at temperature 1, also where the paper preset samples at 0.5.
    """
    logprobs = outputs["logprobs"]
    loss = -torch.exp(logprobs - logprobs.detach()) * batch["advantages"]
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices and vectors of the language model, gates, Lambda."""
    trained = [p for p in policy.lm.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() == 1]
    groups = [(matrices, cfg.lr, cfg.weight_decay), (vectors, cfg.lr, 0.0)]
    if cfg.hybrid:
        gates = [*policy.gate.gate_r.parameters(), *policy.gate.gate_i.parameters()]
        groups.append((gates, cfg.lr_gate, cfg.weight_decay))
        groups.append(([policy.gate.Lambda], cfg.lr_lambda, cfg.lambda_weight_decay))
    return [{"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups if params]


@torch.no_grad()
def measure(policy, outputs, batch, cfg):
    """Metrics of a micro-batch -> {name: (values [B, T], mask [B, T] of those that count)}.

    gate_a: mean a. hidden_ratio: mean of sqrt(1 - a^2) (the release logs sqrt(1 - mean(a)^2)).
    """
    found = {"entropy": (outputs["entropy"], batch["loss_mask"])}
    if cfg.kl_coef > 0:
        found["kl"] = (kl_estimate(outputs, batch), batch["loss_mask"])
    if cfg.hybrid:
        tokens = policy.table(batch["completion_ids"])
        _, a = policy.gate(tokens, batch["soft_embeds"])  # [B, T, H]
        found["gate_a"] = (a.mean(-1), batch["latent_mask"])
        found["hidden_ratio"] = ((1 - a**2).sqrt().mean(-1), batch["latent_mask"])
    return found


@torch.no_grad()
def describe(policy, outputs, batch, cfg):
    """What latent steps were fed, for eval.py show -> ids, weights [B, T, K]; ids None: k is id k.

    Of the soft token: the distribution that it was made from, which the replay finds again.
    """
    logits = lm_logits(policy.lm, policy.hidden(batch))  # [B, T, V]
    scores, ids = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    return ids, scores.softmax(-1)


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
    device = policy.table.weight.device
    limit = cfg.max_completion_length
    with torch.no_grad(), autocast(policy.lm):
        # The prompts, once each; then every prompt and its keys and values for group_size rows.
        prompt_ids, prompt_mask = left_pad(prompts, policy.lm.pad_id, device)  # [N, P]
        cache = RoomyCache()
        hidden = lm_hidden(policy.lm, policy.table(prompt_ids), prompt_mask, cache=cache)
        cache.batch_repeat_interleave(group_size)
        hidden = hidden[:, -1].repeat_interleave(group_size, 0)  # [B, H]
        prompt_ids = prompt_ids.repeat_interleave(group_size, 0)  # [B, P]
        prompt_mask = prompt_mask.repeat_interleave(group_size, 0)

        num_rows, prompt_width = prompt_ids.shape
        rows = torch.arange(num_rows, device=device)  # the live rows, b of them
        mask = F.pad(prompt_mask, (0, limit), value=True)  # [b, P + limit], no padding behind P
        positions = prompt_mask.sum(1, keepdim=True)  # [b, 1], of completion position 0
        state = start_state(num_rows, policy, cfg)
        lengths = torch.full((num_rows,), limit, device=device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        ids = torch.full((num_rows, limit), policy.lm.pad_id, device=device)
        columns = {"completion_ids": ids}  # what is recorded at each position
        for t in range(limit):
            logits = lm_logits(policy.lm, hidden)  # [b, V]
            is_finite = logits.sum(1).isfinite()  # one NaN or inf shows in the sum
            for row in rows[~is_finite].tolist():
                prompt = policy.tokenizer.decode(prompts[row // group_size])
                raise FloatingPointError(f"NaN or inf logits at position {t} after {prompt!r:.300}")
            ids, embeds, record, state = next_input(
                policy, logits, hidden, t, state, cfg, rng, greedy)
            for name, value in {"completion_ids": ids, **record}.items():
                if name not in columns:
                    columns[name] = value.new_zeros((num_rows, limit, *value.shape[1:]))
                columns[name][rows, t] = value
            ended = torch.isin(ids, policy.eos_ids)
            if ended.any():
                lengths[rows[ended]] = t + 1
                finished[rows[ended]] = True
                live = live_rows(ended, prompt_width + limit)
                if len(live) == 0:
                    break  # selecting no row would reset the cache
                rows = rows[live]
                embeds = embeds[live]
                mask = mask[live]
                positions = positions[live]
                state = {name: value[live] for name, value in state.items()}
                cache.batch_select_indices(live)
            if t + 1 == limit or stop_requested():
                break  # the caller throws an interrupted batch away
            so_far = mask[:, : prompt_width + t + 1]
            hidden = lm_hidden(policy.lm, embeds[:, None], so_far, positions + t, cache)
            hidden = hidden[:, -1]  # [b, H]
    longest = int(lengths.max())
    batch = {name: value[:, :longest] for name, value in columns.items()}
    batch["completion_mask"] = torch.arange(longest, device=device) < lengths[:, None]
    batch.update(prompt_ids=prompt_ids, prompt_mask=prompt_mask, lengths=lengths, finished=finished)
    return batch


# === 4. rewards and advantages ====================================================================


def reward(record):
    """1 if the answer is right and the marker occurs exactly once, else 0 [sec. 4, code]."""
    return float(record["correct"] and record["format_ok"])


def group_advantages(rewards, group_size, eps=1e-4):
    """(r - group mean) / (group std + eps), std with ddof = 1.  rewards [B] -> [B]"""
    groups = rewards.view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    # In a group of equal rewards rounding leaves a difference to the mean: exactly 0 instead.
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + eps)
    return torch.where(differ, advantages, 0).view(-1)


def compute_advantages(batch, cfg):
    """One advantage per completion, at every position that was sampled -> [B, T]."""
    advantages = group_advantages(batch["rewards"], cfg.group_size)  # [B]
    return advantages[:, None] * batch["loss_mask"]


def loss_weights(batch, cfg):
    """Weight of each position in the loss -> [B, T]: the mean over positions of each completion,
    then the mean over the completions of all ranks."""
    num_positions = batch["loss_mask"].sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    num_completions = all_reduce(len(num_positions))
    return batch["loss_mask"] / (num_positions * num_completions)


# === 5. evaluation ================================================================================


def evaluate(policy, tokenizer, problems, cfg, rng):
    """Complete every problem cfg.num_samples times, greedily or not -> metrics, equal on all ranks.

    With them "records", one per completion in the order of the problems. A stop signal ends it
    early, after a part of the problems: the caller then drops the result.
    """
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt_ids"]))
    mine = order[dist.get_rank() :: dist.get_world_size()]  # similar lengths on all ranks
    records = []
    for start in range(0, len(mine), cfg.eval_batch):
        indices = mine[start : start + cfg.eval_batch]
        chosen = [problems[i] for i in indices]
        prompts = [problem["prompt_ids"] for problem in chosen]
        batch = rollout(policy, prompts, cfg, rng, cfg.num_samples, cfg.greedy)
        for row, record in enumerate(grade(batch, chosen, tokenizer, cfg.answer_marker)):
            index, sample = indices[row // cfg.num_samples], row % cfg.num_samples
            records.append({
                "index": index, "sample": sample, **record, "reward": reward(record)})
        if stop_requested():
            break
    records = sorted(gather(records), key=lambda record: (record["index"], record["sample"]))
    return {**summarise(records, cfg.num_samples), "records": records}


# === 6. training ==================================================================================

# settings that a resumed run may change
CAN_CHANGE = ("out_dir", "resume", "stop_after", "device", "eval_data", "eval_limit", "eval_every",
              "eval_batch", "num_samples", "greedy", "save_every", "keep_checkpoints",
              "micro_batch", "max_tokens", "gradient_checkpointing", "share_prompts",
              "dist_timeout", "zero", "track", "keep_best")


def lr_factor(step, cfg):
    """Linear warm-up, then cosine to 0 at the end of the run."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step):
    """One rollout and its update -> (metrics row, records), or (None, None) when told to stop."""
    started = time.time()
    device = policy.table.weight.device

    # Sample and grade this rank's share of the completions.
    chosen = next_problems(problems, cfg.num_prompts, cfg.seed, step)
    prompts = [problem["prompt_ids"] for problem in chosen]
    rng = make_rng(device, cfg.seed, "rollout", step, dist.get_rank(), 0)
    batch = rollout(policy, prompts, cfg, rng, cfg.group_size)
    records = grade(batch, chosen, policy.tokenizer, cfg.answer_marker)
    for record in records:
        record["reward"] = reward(record)
    batch["rewards"] = torch.tensor([r["reward"] for r in records], device=device)
    if stop_agreed():
        return None, None  # the rollout is dropped; a resumed run repeats it with the same noise
    rollout_seconds = time.time() - started

    # Learn from them.
    if cfg.dry_run:
        batch["rewards"][::2] += 1.0  # some advantage, so that the update has work to do
    batch["advantages"] = compute_advantages(batch, cfg)
    sums, peaks = update(policy, ddp_policy, reference, optimizer, batch, cfg, step)

    # Metrics, over all ranks.
    seconds = time.time() - started
    update_seconds = seconds - rollout_seconds
    world_size = dist.get_world_size()
    num_tokens = sum(record["length"] for record in records)
    sums.update(record_sums(records, cfg.group_size))
    sums["tokens_per_s_rollout"] = [num_tokens, rollout_seconds / world_size]
    sums["tokens_per_s_update"] = [num_tokens, update_seconds / world_size]
    peaks["peak_mem_gib"] = peak_memory(device)
    row = {"kind": "train", "step": step + 1, **means(sums), **maxima(peaks)}
    return {**row, "lr": cfg.lr * lr_factor(step, cfg), "seconds": seconds}, records


def update(policy, ddp_policy, reference, optimizer, batch, cfg, step):
    """One optimizer update on a batch with advantages -> its metrics in two dicts.

    {metric: [sum, count]} for means, {metric: largest value} for peaks. logprob_gap is the largest
    difference between the log-probs of update and rollout: rounding, or something is wrong.
    """
    names = ("entropy", "kl", *METHOD_METRICS, "grad_norm", "skipped")
    sums = {name: [0.0, 0] for name in names}
    peaks = {"logprob_gap": -math.inf}
    batch["weights"] = loss_weights(batch, cfg)

    # Without a KL term, rows without advantage have no gradient. If no rank has any other row,
    # there is nothing to learn: no update, and so no weight decay either.
    live = batch["advantages"].any(1) | (cfg.kl_coef > 0)  # [B]
    if all_reduce(int(live.sum())) == 0:
        return sums, peaks
    # A rank without live rows computes one all the same: DDP waits for its backward pass.
    rows = live.nonzero()[:, 0].tolist() or [0]

    # Forward and backward by micro-batch: the gradients add up to those of the whole batch.
    policy.train()
    pieces = micro_batches(batch, rows, cfg.micro_batch, cfg.max_tokens, cfg.share_prompts)
    for piece in pieces:
        micro = select_rows(batch, piece)
        if cfg.kl_coef > 0:
            micro["ref_logprobs"] = reference_logprobs(policy, reference, micro, cfg)
        # DDP would all-reduce after each backward; only the last one needs it.
        ddp_policy.require_backward_grad_sync = piece is pieces[-1]
        outputs = ddp_policy(micro)
        loss = (policy_loss(outputs, micro, cfg) * micro["weights"]).sum()
        (loss * dist.get_world_size()).backward()  # DDP averages, but the weights count all ranks
        add_up(sums, measure(policy, outputs, micro, cfg))
        logprobs = outputs["logprobs"].detach()
        gap = (logprobs - micro["rollout_logprobs"]).abs()
        peaks["logprob_gap"] = max(peaks["logprob_gap"], largest(gap, micro["loss_mask"]))

    grad_norm = optimizer_step(optimizer, cfg, step)
    if grad_norm is not None:
        sums["grad_norm"] = [grad_norm, 1]
    sums["skipped"] = [int(grad_norm is None), 1]
    return sums, peaks


def optimizer_step(optimizer, cfg, step):
    """Clip, set rates, step -> gradient norm, or None: not finite on some rank, no rank steps."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm).item()
    is_bad = all_reduce(not math.isfinite(grad_norm), dist.ReduceOp.MAX)
    if not is_bad:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step, cfg)
        optimizer.step()
    optimizer.zero_grad(set_to_none=dist.get_world_size() == 1)  # as in `train`
    return None if is_bad else grad_norm


def dry_run(policy, ddp_policy, reference, optimizer, problems, cfg):
    """Two steps with every prompt and completion at its limit -> metrics row: does it fit?

    The optimizer makes its moments at the end of the first step.
    """
    prompt = policy.tokenizer.decode(problems[0]["prompt_ids"])
    policy.eos_ids = policy.eos_ids[:0]  # no completion ends before the limit
    for problem in problems:
        repeated = problem["prompt_ids"] * cfg.max_prompt_length
        problem["prompt_ids"] = repeated[: cfg.max_prompt_length]
    for step in range(2):
        row, _ = train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step)
        if row is None:
            raise SystemExit(128 + stop_agreed())
    if dist.get_rank() == 0:
        print(f"a prompt: {prompt!r}")
        print(f"dry run, without evaluation: peak memory {row['peak_mem_gib']:.2f} GiB, "
              f"{row['seconds']:.1f} s a step")
    return row


def train(policy, reference, problems, eval_problems, settings, cfg, resumed):
    """Evaluate, update, save, until the last step -> the last evaluation (without its records)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = policy.table.weight.device
    out_dir = Path(cfg.out_dir)
    check_ranks(settings, resumed)
    groups = param_groups(policy, cfg)
    adamw = {"betas": (0.9, cfg.adam_beta2), "foreach": False}  # True would copy all moments
    if cfg.zero and world_size > 1:  # each parameter's moments lie on one rank, which updates it
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw)
    else:
        optimizer = torch.optim.AdamW(groups, **adamw)
    ddp_policy = policy
    if world_size > 1 and device.type != "mps":
        # find_unused_parameters keeps the gradient buckets as they are. DDP otherwise regroups them
        # after the first update, and a resumed run would sum over 3 or more ranks in another order.
        # It warns on every rank if all parameters are used, so it is given one that is not.
        # gradient_as_bucket_view: gradients lie in the buckets, instead of there and once more, if
        # they are there from the start; and 0 instead of None between updates.
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        policy.unused = nn.Parameter(torch.zeros(1, device=device))
        ddp_policy = DistributedDataParallel(
            policy, broadcast_buffers=False, find_unused_parameters=True,
            gradient_as_bucket_view=True)
        del policy.unused  # DDP keeps it; no checkpoint holds it
    # skipped: updates in a row whose gradient was not finite; best: evaluation, and its step
    state = {"step": 0, "skipped": 0, "best": [-1.0, 0]}
    if resumed:
        state = load_checkpoint(resumed, policy, optimizer, settings, CAN_CHANGE)
    if cfg.dry_run:
        return dry_run(policy, ddp_policy, reference, optimizer, problems, cfg)
    if rank == 0:
        open_run(out_dir, settings, __file__, state["step"])

    result = {}
    progress = Progress(METHOD, state["step"], cfg.steps, cfg.dtype)
    for step in range(state["step"], cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            started = time.time()
            rng = make_rng(device, cfg.seed, "eval", step, rank)
            result = evaluate(policy, policy.tokenizer, eval_problems, cfg, rng)
            if stop_agreed():
                break  # the evaluation is incomplete; a resumed run repeats it
            records = result.pop("records")
            row = {"kind": "eval", "step": step, **result, "seconds": time.time() - started}
            if rank == 0:
                log_rows(out_dir, row, records[:8])
                progress.show(row, records)
            if result["accuracy"] > state["best"][0]:
                state["best"] = [result["accuracy"], step]
                if cfg.keep_best and step > 0:
                    save_checkpoint(out_dir, policy, policy.tokenizer, optimizer, settings, state,
                                    cfg.keep_checkpoints)
        if step == cfg.steps:
            break
        row, records = train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step)
        if row is None:
            break  # told to stop
        state["step"] = step + 1
        state["skipped"] = state["skipped"] + 1 if row["skipped"] else 0
        if not row["skipped"]:
            records = records[:: cfg.group_size][:2]  # the first of two groups; else all of them
        records = gather(records)
        if rank == 0:
            log_rows(out_dir, row, records)
            progress.show(row, records)
        if stop_agreed() or state["skipped"] == 5 or step + 1 == cfg.stop_after:
            break
        if (step + 1) % cfg.save_every == 0:
            save_checkpoint(out_dir, policy, policy.tokenizer, optimizer, settings, state,
                            cfg.keep_checkpoints)

    # The last checkpoint, also of a run that was stopped; save_checkpoint keeps one that is there.
    signum = stop_agreed()
    saved = save_checkpoint(
        out_dir, policy, policy.tokenizer, optimizer, settings, state, cfg.keep_checkpoints)
    dist.barrier()  # nobody leaves, which ends the job, while rank 0 still writes
    progress.bar.close()
    if rank == 0:
        end = "done" if state["step"] == cfg.steps else "stopped: --resume auto goes on"
        print(f"step {state['step']}, {end}; python eval.py {out_dir} --data "
              f"{cfg.eval_data or cfg.train}", flush=True)
    if state["skipped"] == 5:
        raise SystemExit(f"stopped: 5 updates in a row without a finite gradient, step {step + 1}; "
                         "samples.jsonl has all completions of these steps")
    if not saved:
        raise SystemExit(f"{out_dir}: the last checkpoint could not be written")
    if signum:
        raise SystemExit(128 + signum)
    return result


def main(argv=None):
    """Load, train, evaluate -> the last evaluation (metrics, without its records)."""
    cfg = parse_config(argv)
    out_dir = Path(cfg.out_dir)
    resumed, lock = None, None
    settings = {"method": METHOD, "world_size": int(os.environ.get("WORLD_SIZE", 1)), **vars(cfg)}
    if not cfg.dry_run:
        resumed, lock = find_resume(out_dir, cfg.resume, settings, CAN_CHANGE)
    problems = load_problems(cfg.train, "train")
    eval_problems = load_problems(cfg.eval_data or cfg.train, "test", cfg.eval_limit)
    rank, world_size, device = setup_distributed(cfg)  # past it, all ranks have read the run folder

    torch.manual_seed(cfg.seed)  # the same adapters and method parameters on every rank
    lm, tokenizer = load_model(cfg.model, getattr(torch, cfg.dtype), device, cfg.lora_rank)
    if cfg.gradient_checkpointing:  # only in train(): rollouts and evaluations need the cache
        lm.activation_checkpointing_enable()
    lm.share_prompts = cfg.share_prompts and not cfg.gradient_checkpointing  # needs a cache, too
    policy = Policy(lm, tokenizer, cfg)
    load_method(policy, cfg.model, METHOD)
    problems = encode_prompts(tokenizer, problems, cfg)
    eval_problems = encode_prompts(tokenizer, eval_problems, cfg)
    settings.update(model_sha=weights_fingerprint(lm), data_sha=data_fingerprint(problems))
    if rank == 0:
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{cfg.num_prompts} prompts x {cfg.group_size} completions a step on {world_size} x "
              f"{device}, {len(problems)} training and {len(eval_problems)} evaluation problems")
    if rank == 0 and not cfg.dry_run:
        lock = lock or lock_run(out_dir)  # held until the process ends
    reference = frozen_copy(lm) if cfg.kl_coef > 0 and cfg.lora_rank == 0 else None
    return train(policy, reference, problems, eval_problems, settings, cfg, resumed)


if __name__ == "__main__":
    run_program(main)
