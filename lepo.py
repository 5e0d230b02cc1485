"""LEPO: reinforcement learning in which the first thinking steps are soft mixtures of tokens.

Paper    LEPO, arXiv 2604.17892 (Findings of ACL 2026). [fig.] points at the objective in its method
         figure, [code] at the authors' release, [ours] marks our own choices.
Idea     The first L_g steps sample no token: Gumbel noise on the log-probs of the likeliest tokens
         and a softmax give weights z, and the mean embedding under z is the next input. The noise
         makes completions differ, so that rewards can rank them. Then tokens follow as usual.
GRPO +   1. a latent step keeps K candidates and their perturbed log-probs   gumbel_softmax_scores
         2. it feeds their weighted mean embedding                           mixture_weights
         3. z is a soft label: the update raises sum_k z_k log pi_k by A      latent_logprob [fig.]
         4. no ratio and no clip there; ratio and clip on tokens             policy_loss    [code]
Words    u are the perturbed log-probs (topk_scores in a batch), z = softmax(u / tau) the weights.
         A token is the case u = (0, -inf, ...): z is one-hot. Departures: see docs/lepo.md.
Run      python lepo.py                     # tiny model, arithmetic, two CPU cores, two minutes
         python lepo.py --latent_steps 0    # the explicit baseline: plain GRPO
         torchrun --standalone --nproc_per_node=8 lepo.py --preset qwen2.5-3b
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
    completion_logprobs, encode_prompts, fail, find_resume, frozen_copy, grade, gumbel_like,
    join_batches, left_pad, lm_hidden, lm_logits, load_checkpoint, load_method, load_model,
    load_problems, lock_run, log_rows, lora_disabled, make_rng, mean, micro_batches, open_run,
    peak_memory, run_program, save_checkpoint, select_rows, top_k_mixture, warn,
    weights_fingerprint)

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
    top_p: float = "auto"  # then in this nucleus; 1 = off
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
    latent_steps: int = "auto"  # latent positions at the start of a completion, L_g; 0: GRPO [code]
    latent_tau: float = "auto"  # Gumbel-Softmax temperature tau; near 0 one token is fed [code]
    noise_scale: float = 1.0  # factor of the Gumbel noise; at 0, and when greedy, z = pi [ours]
    latent_grad: str = "soft"  # latent score: soft [fig.]; or token, concrete, gumbel, none [ours]
    clip_latents: bool = False  # ratio and clip on latent positions too [ours]
    until_marker: bool = False  # latent until the answer marker: Soft Thinking, in eval.py [ours]
    cold_stop_entropy: float = 0.0  # with it: nats; a step below is calm; 0 = off [ours]
    cold_stop_length: int = 256  # so many calm steps in a row force the marker [ours]

    def __post_init__(self):
        if self.warmup_steps < 0:
            self.warmup_steps = round(0.1 * self.steps)
        may_be_0 = ("seed", "max_extra_rollouts", "top_k", "warmup_steps", "max_tokens",
                    "lora_rank", "eval_limit", "stop_after", "latent_steps")
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
        if not 1e-4 <= self.latent_tau < math.inf:
            fail(f"--latent_tau {self.latent_tau}: want 0.0001 or more; 0.3 and 0.5 are published")
        if self.latent_grad not in LATENT_GRADS:
            fail(f"--latent_grad {self.latent_grad}: must be one of {', '.join(LATENT_GRADS)}")
        if not self.eval_data and re.search(r"\.(jsonl|json|csv|parquet)(\.gz)?$", self.train):
            fail(f"--train {self.train}: a file has no test split; name --eval_data")


PRESETS = {
    "tiny": dict(  # 0.5M parameters, two CPU cores [ours]
        train="arithmetic", answer_marker="</think>", steps=100, num_prompts=32, group_size=8,
        max_prompt_length=128, max_completion_length=32, temperature=1.0, top_k=0, top_p=1.0,
        lr=3e-4,
        weight_decay=0.0, max_grad_norm=1.0, kl_coef=0.0, micro_batch=64, lora_rank=0,
        eval_every=20, eval_limit=1024, eval_batch=1024, save_every=50, latent_steps=8,
        latent_tau=0.5, share_prompts=False),
    "paper": dict(  # the release, for other models [code]; data, marker, evaluation, sizes [ours]
        train="gsm8k", answer_marker="####", steps=99, num_prompts=128, group_size=8, top_p=0.95,
        max_prompt_length=1024, max_completion_length=2048, temperature=1.0, top_k=30, lr=1e-6,
        weight_decay=0.1, max_grad_norm=1.0, kl_coef=0.0, micro_batch=8, lora_rank=0,
        warmup_steps=3, eval_every=5, eval_limit=200, eval_batch=64, save_every=25,
        latent_steps=32, latent_tau=0.5, share_prompts=True),
}
PRESETS["qwen2.5-3b"] = PRESETS["paper"] | dict(  # the published triples [code]
    model="Qwen/Qwen2.5-3B", latent_steps=64, latent_tau=0.3)
PRESETS["qwen2.5-7b"] = PRESETS["paper"] | dict(
    model="Qwen/Qwen2.5-7B", latent_steps=64, latent_tau=0.5)
PRESETS["llama-3.2-3b"] = PRESETS["paper"] | dict(
    model="meta-llama/Llama-3.2-3B-Instruct", latent_steps=32, latent_tau=0.5)

# === 2. the method ================================================================================

NEEDS_OLD_LOGPROBS = True  # tokens have a ratio, which several updates per rollout need
PLAIN = {"latent_steps": 0, "until_marker": False}  # the Config values that switch the method off
METHOD_METRICS = ("mixture_size", "survivors", "top_is_shown")
LATENT_GRADS = ("soft", "token", "concrete", "gumbel", "none")  # see latent_logprob


def gumbel_softmax_scores(
        logits, tau, top_k=0, top_p=1.0, temperature=1.0, generator=None, noise_scale=1.0):
    """Perturbed log-probs of the candidates that survive temperature, top-k and top-p [code].

    logits [..., V] -> ids [..., K], u [..., K] float32, constants. u = log pi_S + g on the
    survivors S, over which pi_S sums to 1, and -inf elsewhere; g is iid standard Gumbel noise.
    K = top_k, or V without it. argmax u is an exact sample of pi_S. noise_scale 0 is another rule,
    not the limit: u = tau log pi_S, for which mixture_weights gives pi_S itself: Soft Thinking.
    """
    scores, ids = candidate_scores(logits.detach().float(), temperature, top_k, top_p)
    if ids is None:
        ids = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    log_pi = scores.log_softmax(-1)
    if noise_scale > 0:
        return ids, log_pi + noise_scale * gumbel_like(log_pi, generator)
    return ids, tau * log_pi


def mixture_weights(u, tau):
    """z = softmax(u / tau): u [..., K] -> [..., K], sums to 1; one-hot where one u is finite."""
    return (u / tau).softmax(-1)


def latent_logprob(u, logprobs, tau, kind):
    """What the update raises by the advantage at a latent step: u, logprobs [..., K] -> [...].

    u is constant; logprobs = log pi of the same ids over the *full* vocabulary V, with gradient. n
    is the size of S, where u is finite. Each kind with its gradient for the logits:
    soft      sum_k z_k log pi_k; z - pi. The mixture is the label of a cross-entropy: LEPO [fig.].
              Little noise; its mean is too small, for z shares the credit among all that is mixed.
    token     log pi_i, i = argmax u; e_i - pi. REINFORCE as if token i alone had been fed, the
              limit of soft for tau -> 0. Blind to the rest of the mixture.
    concrete  (log density of z) / n; (1 - n q) / n on S, q = softmax_S(logprobs - u). 1/n of the
              exact score. Undivided, its noise grows like n: where inside the mixture g fell.
    gumbel    (log density of u) / n; (v - pi_S sum v) / n, v = 1 - exp(-g): as SofT-GRPO's code.
              Also 1/n of an exact score; concrete is its mean given z, so this has more noise.
    none      0. Latent steps are not trained, only tokens learn, from what the noise brought:
              the ablation that shows what a latent gradient is worth.
    """
    kept = u.isfinite()  # S
    n = kept.sum(-1)
    if kind == "soft":
        return (mixture_weights(u, tau) * logprobs).sum(-1)
    if kind == "token":
        return logprobs.gather(-1, u.argmax(-1, keepdim=True))[..., 0]
    if kind == "none":
        return 0 * logprobs.sum(-1)
    if kind == "concrete":
        normaliser = torch.logsumexp((logprobs - u).masked_fill(~kept, -math.inf), -1)
        return (logprobs * kept).sum(-1) / n - normaliser
    assert kind == "gumbel", kind
    inside = torch.logsumexp(logprobs.masked_fill(~kept, -math.inf), -1, keepdim=True)
    g = (u - logprobs + inside).masked_fill(~kept, math.inf)  # exp(-inf) = 0: nothing outside S
    return -(g.masked_fill(~kept, 0) + torch.exp(-g)).sum(-1) / n


def heaviest_ids(batch):
    """argmax u -> ids [B, T]: the token, or what a mixture holds most of, a sample of pi_S."""
    return batch["topk_ids"].gather(-1, batch["topk_scores"].argmax(-1, keepdim=True))[..., 0]


class Policy(nn.Module):
    """The language model. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm, self.table, self.pad_id = lm, lm.get_input_embeddings(), lm.pad_id
        self.tokenizer = tokenizer
        self.temperature, self.tau, self.kind = cfg.temperature, cfg.latent_tau, cfg.latent_grad
        self.num_candidates = min(cfg.top_k or lm.num_tokens, lm.num_tokens)  # K
        if cfg.latent_steps == 0:
            self.num_candidates = 1  # only tokens
        elif self.num_candidates > 1000:
            warn(f"{self.num_candidates} candidates are stored for each position: set --top_k")
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        if cfg.until_marker:
            self.marker = Marker(tokenizer, cfg.answer_marker, lm.num_tokens, lm.device)
            marker_ids = tokenizer(cfg.answer_marker, add_special_tokens=False)["input_ids"]
            self.marker_ids = torch.tensor(marker_ids, device=lm.device)
        for module in (self.table, lm.get_output_embeddings()):
            module.weight.requires_grad_(cfg.train_embeddings)

    def completion_embeds(self, batch, table=None):
        """What the rollout fed at each completion position -> [B, T, H].

        released code: stored embeddings; here: the same, mixed again from the stored candidates.
        """
        weights = mixture_weights(batch["topk_scores"], self.tau)  # [B, T, K]
        return top_k_mixture(batch["topk_ids"], weights, table or self.table)

    def hidden(self, batch):
        """The hidden states [B, T, H] that decide each completion position."""
        return completion_hidden(self.lm, batch, self.completion_embeds(batch))

    def forward(self, batch):
        """-> {"logprobs", "token_logprobs", "entropy" (nats)}, all [B, T], 0 outside loss_mask.

        logprobs: a token's, or latent_logprob. token_logprobs: that of argmax u: the token, or an
        exact sample of a latent step's pi. At the sampling temperature, but over the full
        vocabulary, whatever top-k and top-p cut [code].
        """
        u = batch["topk_scores"]
        with autocast(self.lm):
            candidates, entropy = completion_logprobs(
                self.lm, self.hidden(batch), batch["topk_ids"], batch["loss_mask"],
                self.temperature)  # [B, T, K], [B, T]
        tokens = latent_logprob(u, candidates, self.tau, "token")
        latents = latent_logprob(u, candidates, self.tau, self.kind)
        return {"logprobs": torch.where(batch["latent_mask"], latents, tokens),
                "token_logprobs": tokens, "entropy": entropy}


def start_state(num_rows, policy, cfg):
    """Nothing: latent steps go by the clock. Soft Thinking: the marker and calm steps of a row."""
    if not cfg.until_marker:
        return {}
    tail = torch.full((num_rows, policy.marker.width), -1, device=policy.lm.device)
    zeros = torch.zeros_like(tail[:, 0])
    return {"marker_seen": zeros.bool(), "tail": tail, "calm": zeros, "forced": zeros}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    `hidden` [b, H], which made the logits, is there for methods that feed it back.
    """
    if cfg.until_marker:
        return soft_thinking_input(policy, logits, state, cfg, rng, greedy)
    step = latent_input if t < cfg.latent_steps else token_input
    return *step(policy, logits, cfg, rng, greedy), state


def token_input(policy, logits, cfg, rng, greedy):
    """A sampled token, or the likeliest, and its embedding -> ids [b], embeds [b, H], record."""
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, K]; K = V without top-k
    choice = probs.argmax(-1) if greedy else torch.multinomial(probs, 1, generator=rng)[:, 0]
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / cfg.temperature, -1).gather(1, ids[:, None])[:, 0]
    padding = (0, policy.num_candidates - 1)
    return ids, policy.table(ids), {
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),  # every step was sampled
        "latent_mask": torch.zeros_like(ids, dtype=torch.bool),
        "topk_ids": F.pad(ids[:, None], padding),  # [b, K]
        "topk_scores": F.pad(torch.zeros_like(logprobs)[:, None], padding, value=-math.inf),
        "rollout_logprobs": logprobs}


def latent_input(policy, logits, cfg, rng, greedy):
    """A mixture of embeddings (greedy: without noise) -> ids [b], embeds [b, H], record.

    The id shown is the likeliest before the noise: graded with the text, and the end of the row if
    it is EOS, but neither fed nor scored for itself [code].
    """
    topk_ids, topk_scores = gumbel_softmax_scores(
        logits, policy.tau, cfg.top_k, cfg.top_p, cfg.temperature, rng,
        0.0 if greedy else cfg.noise_scale)  # [b, K] each
    embeds = top_k_mixture(topk_ids, mixture_weights(topk_scores, policy.tau), policy.table)
    logprobs = torch.log_softmax(logits / cfg.temperature, -1).gather(1, topk_ids)  # [b, K]
    ids = topk_ids.gather(1, logprobs.argmax(-1, keepdim=True))[:, 0]
    logprobs = latent_logprob(topk_scores, logprobs, policy.tau, policy.kind)  # [b]
    mask = torch.ones_like(ids, dtype=torch.bool)
    return ids, embeds, {
        "loss_mask": mask, "latent_mask": mask, "topk_ids": topk_ids, "topk_scores": topk_scores,
        "rollout_logprobs": logprobs}


def soft_thinking_input(policy, logits, state, cfg, rng, greedy):
    """As next_input, but latent until the answer marker: Soft Thinking (arXiv 2505.15778).

    The id that completes the marker is fed plain, like all that follow. Cold stop: from the
    cold_stop_length-th step in a row whose entropy is below cold_stop_entropy, the marker's ids are
    fed one by one, whatever the model says. Only for decoding: nothing is kept for a loss.
    """
    shown, mixed, _ = latent_input(policy, logits, cfg, rng, greedy)
    sampled = token_input(policy, logits, cfg, rng, greedy)[0]
    seen, forced = state["marker_seen"], state["forced"]  # forced: ids of the marker fed so far
    entropy = torch.distributions.Categorical(logits=logits / cfg.temperature).entropy()  # [b]
    calm = torch.where(entropy < cfg.cold_stop_entropy, state["calm"] + 1, 0)
    force = ~seen & ((forced > 0) | (calm >= cfg.cold_stop_length))
    marker_ids = policy.marker_ids[forced % len(policy.marker_ids)]
    ids = torch.where(force, marker_ids, torch.where(seen, sampled, shown))
    tail = torch.cat([state["tail"][:, 1:], ids[:, None]], 1)
    seen = seen | policy.marker.completed(tail)
    latent = ~seen & ~force
    embeds = torch.where(latent[:, None], mixed, policy.table(ids))
    state = {"marker_seen": seen, "tail": tail, "calm": calm, "forced": forced + force.long()}
    return ids, embeds, {"latent_mask": latent}, state


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T] of argmax u under a frozen copy, or (None) the model without adapters.

    It reads what the policy read, mixed from its own table. released code: the shown ids.
    """
    lm = policy.lm if reference is None else reference
    with lora_disabled(lm), autocast(lm):
        embeds = policy.completion_embeds(batch, lm.get_input_embeddings())
        hidden = completion_hidden(lm, batch, embeds)
        return completion_logprobs(
            lm, hidden, heaviest_ids(batch), batch["loss_mask"], cfg.temperature)[0]


def kl_estimate(outputs, batch):
    """k3 estimate [B, T] of KL(policy || reference) at argmax u, or the token: exp(d) - d - 1."""
    difference = batch["ref_logprobs"] - outputs["token_logprobs"]
    return torch.exp(difference) - difference - 1


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position, not yet reduced; both kinds share one divisor (loss_weights).

    paper: -A logprobs at latent steps and tokens [fig.]; released code: GRPO's ratio and clip at
    tokens. As the code. With one update the ratio is 1 and the gradient that of the paper.
    """
    logprobs, advantages = outputs["logprobs"], batch["advantages"]
    ratio = torch.exp(logprobs - batch.get("old_logprobs", logprobs.detach()))
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if not cfg.clip_latents:
        loss = torch.where(batch["latent_mask"], -logprobs * advantages, loss)
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices and vectors of the language model; the method adds nothing."""
    if cfg.until_marker:  # refused here, since only training needs an optimizer
        fail("--until_marker: Soft Thinking is not trained; see eval.py --mode soft_thinking")
    no_noise = cfg.noise_scale == 0 and cfg.latent_grad == "soft" and cfg.kl_coef == 0
    if cfg.noise_scale != 1 and not no_noise:
        fail(f"--noise_scale {cfg.noise_scale}: is for eval.py --no-greedy; training wants 1, or 0 "
             "with --latent_grad soft and --kl_coef 0")
    lm = [p for p in policy.lm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in lm if p.dim() > 1], "lr": cfg.lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in lm if p.dim() == 1], "lr": cfg.lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def method_metrics(policy, outputs, batch, cfg, step):
    """METHOD_METRICS as values [B, T], averaged over latent positions.

    mixture_size: 1 / sum z^2, in tokens. survivors: n. top_is_shown: is argmax u the id shown?
    """
    size = 1 / mixture_weights(batch["topk_scores"], policy.tau).square().sum(-1)
    shown = heaviest_ids(batch) == batch["completion_ids"]
    return size, batch["topk_scores"].isfinite().sum(-1), shown.float()


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
    """1 if the answer is right, else 0; the graded text holds the shown latent ids too [code]."""
    return float(record["correct"])


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
