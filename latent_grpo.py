"""Latent-GRPO: reinforcement learning of thoughts that are mixtures of a few token embeddings.

Paper    Latent-GRPO, arXiv 2604.27998; its start, Latent-SFT, is arXiv 2510.15522. [eq. n] points
         at the first, [code] at the authors' releases, [ours] marks our own choices.
Idea     Before </think> a step picks no token. It perturbs the log-probs with Gumbel noise, keeps
         the K best, and feeds the mean of their embeddings, weighted by the softmax of the scores.
GRPO +   1. the K perturbed scores have a likelihood: a ratio for each latent step   latent_logprob
         2. noise is shifted above 0, so that an advantage has one sign on all K    one_sided_noise
         3. completions cut off at the limit are left out of the advantages        valid_advantages
         4. one completion of a group, a right one, trains the first step        first_token_winner
Start    a model that can think in mixtures (Latent-SFT): supervised stage, section 2b   latent_sft
Words    ids shown at latent steps have the best score; d = score - log-prob is a margin.
Differs  labels are chunks of a written chain instead of a learned encoder's: docs/latent_grpo.md.
Run      python latent_grpo.py                      # both stages, tiny model, two CPU cores
         python latent_grpo.py --stage sft          # the start alone: --stage rl --model goes on
         python latent_grpo.py --preset soft_grpo   # two-sided noise, no masks: the baseline
         python latent_grpo.py --no-latent          # the explicit baseline: written chains, GRPO
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
from contextlib import nullcontext
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
    autocast, candidate_scores, checkpoint_settings, completion_hidden, completion_logprobs,
    encode_prompts, fail, find_resume, frozen_copy, grade, gumbel_like, join_batches,
    latest_checkpoint, left_pad, lm_hidden, lm_logits, load_checkpoint, load_method,
    load_model, load_problems, lock_run, log_rows, lora_disabled, make_rng, mean,
    micro_batches, open_run, peak_memory, run_program, save_checkpoint, select_rows,
    top_k_mixture, warn, weights_fingerprint)

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
    max_extra_rollouts: int = "auto"  # further draws a step to replace groups of equal rewards
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
    minibatches: int = "auto"  # updates in a pass
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
    stage: str = "all"  # sft: the supervised start, rl: from --model as it is, all: both [ours]
    latent: bool = True  # think in mixtures; --no-latent is plain GRPO over written chains [sec. 5]
    latent_top_k: int = "auto"  # embeddings in a mixture, K [eq. 1, code]
    latent_top_p: float = 0.95  # nucleus that noise may bring candidates in from [code]
    latent_tau: float = 1.0  # temperature of the weights, tau [eq. 2, code]
    noise_scale: float = "auto"  # factor on the Gumbel noise, lambda [code]
    latent_end: str = "either"  # who ends a thought: clean argmax, perturbed one, or either [code]
    one_sided: bool = "auto"  # shift the noise above 0 [eq. 12]
    ste: str = "paper"  # slope past the target: paper, released or none; with --one_sided [eq. 16]
    mask_invalid: bool = "auto"  # leave cut-off completions out of the advantages [eq. 9-11]
    first_token_selection: bool = "auto"  # one right completion trains the first step [eq. 18-21]
    floor: bool = False  # empty thought, the marker is given: what is known without one [ours]
    check_start: bool = True  # measure before RL what the model can do without it [ours]
    # the supervised stage
    sft_steps: int = "auto"  # updates [ours]
    cot_steps: int = "auto"  # the first of them learn the written chain, id by id, no noise [ours]
    sft_batch: int = "auto"  # demonstrations in an update, over all ranks [code]
    sft_lr: float = "auto"  # learning rate, cosine after 5 % warm-up [code]
    sft_noise: float = 1.0  # factor on the Gumbel noise of labels, which are the inputs too [code]
    sft_save_every: int = "auto"  # steps [ours]
    chunk: int = 2  # ids of the chain in one latent token; two of digits never share one [ours]

    def __post_init__(self):
        if self.warmup_steps < 0:
            self.warmup_steps = round(0.1 * self.steps)
        may_be_0 = ("seed", "max_extra_rollouts", "top_k", "warmup_steps", "max_tokens",
                    "lora_rank", "eval_limit", "stop_after", "cot_steps")
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
        for name, values in (("stage", "sft rl all"), ("ste", "paper released none"),
                             ("latent_end", "clean perturbed either")):
            if getattr(self, name) not in values.split():
                fail(f"--{name} {getattr(self, name)}: must be one of {values}")
        if self.sft_batch < int(os.environ.get("WORLD_SIZE", 1)):
            fail(f"--sft_batch {self.sft_batch}: is shared out, so at least one for each rank")
        if not self.latent_tau > 0 or not 0 < self.latent_top_p <= 1:
            fail(f"--latent_tau {self.latent_tau}, --latent_top_p {self.latent_top_p}: want > 0 "
                 "and in (0, 1]")
        if self.latent_end == "clean" and self.latent_top_k == 1:
            fail("--latent_end clean: needs --latent_top_k 2 or more")
        if not self.eval_data and re.search(r"\.(jsonl|json|csv|parquet)(\.gz)?$", self.train):
            fail(f"--train {self.train}: a file has no test split; name --eval_data")


PRESETS = {
    "tiny": dict(  # 0.5M parameters, two CPU cores [ours]
        train="arithmetic-verbose", answer_marker="</think>", steps=100, num_prompts=32,
        group_size=8, max_extra_rollouts=0, max_prompt_length=128, max_completion_length=32,
        temperature=1.0, top_k=0, lr=5e-5, weight_decay=0.0, max_grad_norm=1.0, kl_coef=0.1,
        minibatches=1, micro_batch=64, lora_rank=0, eval_every=20, eval_limit=1024,
        eval_batch=1024, save_every=50, latent_top_k=2, noise_scale=0.5, one_sided=True,
        mask_invalid=True, first_token_selection=True, sft_steps=800, cot_steps=0, sft_batch=64,
        sft_lr=2e-3, sft_save_every=200, share_prompts=False),
    "paper": dict(  # GSM8K with Llama-3.2-1B-Instruct [code]; lengths of prompts, stage 1 [ours]
        train="gsm8k", answer_marker="</think>", steps=10000, num_prompts=64, group_size=8,
        max_extra_rollouts=50, max_prompt_length=384, max_completion_length=128, temperature=1.0,
        top_k=0, lr=1e-6, weight_decay=0.01, max_grad_norm=1.0, kl_coef=0.0, minibatches=4,
        micro_batch=8, lora_rank=0, eval_every=100, eval_limit=512, eval_batch=64, save_every=200,
        latent_top_k=10, noise_scale=1.0, one_sided=True, mask_invalid=True,
        first_token_selection=True, sft_steps=2000, cot_steps=200, sft_batch=256, sft_lr=2e-5,
        sft_save_every=500, share_prompts=True),
}
TWO_SIDED = dict(one_sided=False, mask_invalid=False, first_token_selection=False)
# The baseline, at the rate that suits it, and ...
PRESETS["soft_grpo"] = {**PRESETS["tiny"], **TWO_SIDED, "lr": 3e-4}
PRESETS["soft_grpo_paper"] = {**PRESETS["paper"], **TWO_SIDED}  # ... for real models

# === 2. the method ================================================================================

NEEDS_OLD_LOGPROBS = True  # a ratio and a clip: several updates per rollout make sense
PLAIN = {"latent": False}  # the Config values that switch the method off
METHOD_METRICS = ("margin", "crossed_frac", "top_weight")
LOW, HIGH = 1.5, 3.0  # Gumbel noise is clipped to [-LOW, HIGH] [eq. 12]


def one_sided_noise(gumbel, low=LOW, high=HIGH, offset=0.0):
    """Clipped and shifted above 0 [eq. 12]: clip(g, -low, high) + low + offset, same shape.

    Softmax and top-k do not see the shift: what is fed stays the same. But every score starts above
    its log-prob, so a positive advantage pulls all K log-probs up, a negative one pushes all down.
    """
    # paper: + epsilon, not given; released code: epsilon 0. A clipped draw (1.1 %) starts at 0.
    return gumbel.clamp(-low, high) + low + offset


def draw_noise(logits, cfg, rng):
    """Noise [b, V] of a rollout step: clipped, shifted (--one_sided), then scaled [code]."""
    gumbel = gumbel_like(logits, rng)
    noise = one_sided_noise(gumbel) if cfg.one_sided else gumbel.clamp(-LOW, HIGH)
    return cfg.noise_scale * noise


def latent_step(logits, noise, top_k, top_p, tau):
    """One latent token: logits [b, V], noise [b, V] -> ids, scores, weights [b, K], best first.

    Scores are log-probs of the full vocabulary at temperature 1 plus noise [eq. 13]; the K best of
    nucleus and likeliest K are kept, weights = softmax(scores / tau) [eq. 2]. The nucleus lets
    noise bring in tokens beyond the K likeliest. Noise None: the K likeliest, weights of eq. 1.
    """
    scores = torch.log_softmax(logits, -1)
    if noise is None:
        scores, ids = scores.topk(top_k, -1)
    else:
        size = scores.shape[-1]
        for count in (min(size, max(1024, top_k)), size):  # sorting all ids is slow, rarely needed
            best, order = scores.topk(count, -1)
            probs = best.exp()
            outside = probs.cumsum(-1) - probs >= top_p
            if outside[:, -1].all():
                break  # and so is all that is less likely
        outside[:, :top_k] = False
        scores = (best + noise.gather(-1, order)).masked_fill(outside, -math.inf)
        scores, places = scores.topk(top_k, -1)
        ids = order.gather(-1, places)
    return ids, scores, (scores / tau).softmax(-1)


def latent_logprob(scores, logprobs, ste):
    """log pi of a latent token, up to a constant: mean over K of -m - exp(-m) [eq. 3, eq. 17].

    scores (constants), logprobs of the K ids (gradient): [..., K] -> [...]. m = d = scores -
    logprobs is the Gumbel noise that explains the score; its log-density is largest at d = 0.
    While d > 0 the slope 1 - exp(-d) towards logprobs is positive. Once updates push a log-prob
    past its score (d < 0), the value stays, and the slope becomes
      none      1 - exp(-d) < 0: turns back to the score, whatever the advantage [eq. 27]
      paper     exp(-d) - 1 > 0: goes on, in the direction of the advantage [eq. 16, eq. 31]
      released  exp(d) - 1 in (-1, 0): turns back, gently
    """
    # paper: sum over K; released code: mean, which keeps the ratio's size independent of K.
    d = scores - logprobs
    if ste == "paper":
        d = torch.where(d < 0, 2 * d.detach() - d, d)  # value d, slope -1
    value = -d - torch.exp(-d)
    if ste == "released":
        gentle = d - torch.exp(d.clamp(max=0))
        value = torch.where(d < 0, value.detach() + (gentle - gentle.detach()), value)
    return value.mean(-1)


class Policy(nn.Module):
    """Language model. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm, self.table, self.pad_id = lm, lm.get_input_embeddings(), lm.pad_id
        self.tokenizer = tokenizer
        self.cfg, self.top_k = cfg, min(cfg.latent_top_k, lm.num_tokens)
        if cfg.deterministic and lm.device.type == "cuda" and cfg.latent:
            fail("--deterministic: the nucleus of latent steps needs cumsum, which CUDA has not")
        # the first part of the marker ends the latent phase; the rest of it is ordinary text
        self.marker_ids = tokenizer(cfg.answer_marker, add_special_tokens=False)["input_ids"]
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        for module in (self.table, lm.get_output_embeddings()):  # the space of the mixtures
            module.weight.requires_grad_(cfg.train_embeddings)

    def completion_embeds(self, batch):
        """What the rollout fed at each completion position -> embeds [B, T, H].

        The stored scores are constants, so weights are too: the only way to the parameters is from
        the log-probs, not back through the thought. --train_embeddings opens the table as well.
        """
        tokens = self.table(batch["completion_ids"])
        if "topk_ids" not in batch:
            return tokens
        weights = (batch["topk_scores"] / self.cfg.latent_tau).softmax(-1)  # [B, T, K]
        mixed = top_k_mixture(batch["topk_ids"], weights, self.table)
        return torch.where(batch["latent_mask"][..., None], mixed, tokens)

    def hidden(self, batch):
        """The hidden states [B, T, H] that decide each completion position."""
        return completion_hidden(self.lm, batch, self.completion_embeds(batch))

    def score(self, lm, batch):
        """-> log-probs of the kept ids [B, T, K] or None, of completion_ids [B, T], entropy [B, T].

        The former belong to latent positions and temperature 1, as in latent_step; the latter to
        the others and the temperature that they were sampled at. Elsewhere both are 0.
        """
        hidden = completion_hidden(lm, batch, self.completion_embeds(batch))
        latent, mask = batch["latent_mask"] & batch["loss_mask"], batch["loss_mask"]
        # paper: one temperature; released code: answers sampled at 1 (a stale flag), scored at 0.6.
        logprobs, entropy = completion_logprobs(
            lm, hidden, batch["completion_ids"], mask & ~latent, self.cfg.temperature)
        if "topk_ids" not in batch:
            return None, logprobs, entropy
        kept, latent_entropy = completion_logprobs(lm, hidden, batch["topk_ids"], latent)
        return kept, logprobs, entropy + latent_entropy

    def surrogate(self, kept, logprobs, batch, ste, shift=0.0):
        """Log-probs [B, T]: latent_logprob at latent positions, those of the ids elsewhere."""
        if kept is None:
            return logprobs
        scale = self.cfg.noise_scale or 1.0  # the density is that of the noise before its scaling
        latent = latent_logprob(batch["topk_scores"] / scale - shift, kept / scale, ste)
        return torch.where(batch["latent_mask"] & batch["loss_mask"], latent, logprobs)

    def unshifted(self, kept, logprobs, batch):
        """As surrogate, but under the density that the noise really had, for the KL term.

        Under it the mean slope of what was drawn is 0: k3 is least where nothing has moved and
        pulls back all else. With the shift left in, k3 would push all kept log-probs, even away.
        """
        return self.surrogate(kept, logprobs, batch, "none", LOW * self.cfg.one_sided)

    def forward(self, batch):
        """-> {"logprobs" [B, T], "kl_logprobs" [B, T], "entropy" [B, T] (nats), "kept"}.

        logprobs is the surrogate with the slopes of --ste; kl_logprobs: see unshifted. kept
        [B, T, K]: log-probs of topk_ids, None without. Positions outside loss_mask are 0.
        """
        with autocast(self.lm):
            kept, logprobs, entropy = self.score(self.lm, batch)
        plain = self.surrogate(kept, logprobs, batch, "none")
        ste = self.cfg.ste if self.cfg.one_sided else "none"
        logprobs = plain if ste == "none" else self.surrogate(kept, logprobs, batch, ste)
        if ste == "released":  # only where the advantage is not positive
            advantages = batch.get("advantages", torch.zeros_like(plain))
            logprobs = torch.where(advantages > 0, plain, logprobs)
        return {"logprobs": logprobs, "kl_logprobs": self.unshifted(kept, logprobs, batch),
                "entropy": entropy, "kept": kept}


def start_state(num_rows, policy, cfg):
    """What each row remembers between steps: is it still in its latent phase?"""
    if not cfg.latent or cfg.floor:
        return {}
    return {"latent": torch.ones(num_rows, dtype=torch.bool, device=policy.lm.device)}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    A row is latent from its first step until it emits the first id of the marker, which is fed and
    scored as a token, like all that follows. A latent row shows the id of its best score; EOS ends
    the row there too. Greedy: no noise, and the likeliest answer.
    """
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)
    choice = probs.argmax(-1) if greedy else torch.multinomial(probs, 1, generator=rng)[:, 0]
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    soft, scored = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    if cfg.floor and t < len(policy.marker_ids):  # an empty thought: the marker is no choice
        ids, scored = torch.full_like(ids, policy.marker_ids[t]), ~scored
    record = {}
    if cfg.latent and not cfg.floor:
        noise = None if greedy else draw_noise(logits, cfg, rng)
        topk_ids, topk_scores, weights = latent_step(
            logits, noise, policy.top_k, cfg.latent_top_p, cfg.latent_tau)
        clean = logits.argmax(-1) == policy.marker_ids[0]
        perturbed = topk_ids[:, 0] == policy.marker_ids[0]
        # paper: not said; released code: either for Llama, perturbed for Qwen (a literal id).
        ends = {"clean": clean, "perturbed": perturbed, "either": clean | perturbed}[cfg.latent_end]
        shown = torch.where(perturbed, topk_ids[:, min(1, policy.top_k - 1)], topk_ids[:, 0])
        shown = torch.where(ends, policy.marker_ids[0], shown)  # the marker only where it ends
        ids = torch.where(state["latent"], shown, ids)
        soft = state["latent"] & ~ends & ~torch.isin(ids, policy.eos_ids)
        state = {"latent": state["latent"] & ~ends}
        record = {"topk_ids": topk_ids * soft[:, None], "topk_scores": topk_scores * soft[:, None]}
    embeds = policy.table(ids)
    logprobs = torch.log_softmax(logits / cfg.temperature, -1).gather(1, ids[:, None])[:, 0]
    if record:
        embeds = torch.where(soft[:, None], top_k_mixture(topk_ids, weights, policy.table), embeds)
        kept = torch.log_softmax(logits, -1).gather(1, topk_ids)
        scale = cfg.noise_scale or 1.0
        latent_logprobs = latent_logprob(topk_scores / scale, kept / scale, "none")
        logprobs = torch.where(soft, latent_logprobs, logprobs)
    is_read = t + 1 < cfg.max_completion_length  # no input follows the last id: not latent
    record.update(rollout_logprobs=logprobs, latent_mask=soft & is_read,
                  loss_mask=scored & (~soft | is_read))
    return ids, embeds, record, state


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T] under the reference: a frozen copy, or (None) the model without adapters.

    It reads the same mixtures and scores the same perturbed candidates.
    """
    lm = policy.lm if reference is None else reference  # a copy keeps the adapters it was made with
    with nullcontext() if reference else lora_disabled(lm), autocast(lm):
        kept, logprobs, _ = policy.score(lm, batch)
    return policy.unshifted(kept, logprobs, batch)


def kl_estimate(outputs, batch):
    """k3 estimate [B, T] of KL(policy || reference): exp(d) - d - 1 >= 0, d = reference - now."""
    # paper: KL of the distributions; released code: k3 of the surrogate, through its STE, clamped
    # to 10. Here k3 under the density of the noise, without shift and STE.
    difference = batch["ref_logprobs"] - outputs["kl_logprobs"]
    return torch.exp(difference) - difference - 1


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position [eq. 8, eq. 22], not yet reduced: PPO's clip, and k3.

    ratio = exp(logprobs - old_logprobs), at latent positions of the surrogate [eq. 23]; with one
    update per rollout the old ones are today's, the ratio is 1 and clips nothing. A negative
    advantage also stops pushing at a ratio of 3 (dual clip) [code].
    """
    logprobs, advantages = outputs["logprobs"], batch["advantages"]
    ratio = torch.exp(logprobs - batch.get("old_logprobs", logprobs.detach()))
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss)
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices and vectors of the language model."""
    if cfg.floor or cfg.latent and cfg.noise_scale == 0:  # only training needs an optimizer
        fail("--floor, --noise_scale 0: are ways of decoding, for eval.py; they are not trained")
    lm = [p for p in policy.lm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in lm if p.dim() > 1], "lr": cfg.lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in lm if p.dim() == 1], "lr": cfg.lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def method_metrics(policy, outputs, batch, cfg, step):
    """METHOD_METRICS as values [B, T], averaged over latent positions; None with --no-latent.

    margin: mean d = score - log-prob over the K kept ids. crossed_frac: share of them that updates
    pushed past their score, d < -0.001: with one-sided noise and one update 0, but for bfloat16.
    top_weight: largest weight of the mixture; near 1, thoughts are single tokens.
    """
    if outputs["kept"] is None:
        return None
    margins = batch["topk_scores"] - outputs["kept"]
    weights = (batch["topk_scores"] / cfg.latent_tau).softmax(-1)
    return margins.mean(-1), (margins < -1e-3).float().mean(-1), weights.amax(-1)


# === 2b. supervised stage =========================================================================
# Latent-SFT with chunks of a written chain as labels. A demonstration is laid out as a rollout is:
# N mixtures, then the marker, the answer and EOS; topk_scores / tau are the log-weights of a label.


def chunk_labels(ids, size, is_digits):
    """Chain of ids -> chunks of at most `size`, with at most one id of digits in each [ours].

    The ids of a chunk share one latent token, which forgets their order: 18 would equal 81.
    """
    # paper: labels of a learned encoder, top-10; fixed size 2 (GSM8K). CoLaR has chunk averages.
    chunks = []
    for i in ids:
        full = not chunks or len(chunks[-1]) == size
        if full or is_digits[i] and any(is_digits[j] for j in chunks[-1]):
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def read_demonstrations(problems, tokenizer, policy, cfg):
    """Problems with chain_ids and answer_ids (marker, answer, EOS); those without a chain go.

    Parts are tokenised one by one, so that nothing merges across a border. The answer is the marked
    answer only: the thought has to do the work. The built-in task's teacher errs, and is imitated.
    """
    kept, pieces = [], tokenizer.batch_decode([[i] for i in range(policy.lm.num_tokens)])
    for problem in problems:
        space = "" if "teacher_answer" in problem else " "
        chain = space.join(problem["steps"] or []) or problem["solution"] or ""
        answer = problem.get("teacher_answer", problem["answer"])
        chain, answer = tokenizer([chain, answer], add_special_tokens=False)["input_ids"]
        answer = [*policy.marker_ids, *answer, policy.lm.eos_ids[0]]
        fits = len(chain) + len(answer) < cfg.max_completion_length  # also id by id
        if chain and fits and policy.marker_ids[0] not in chain:  # it would end the thought
            kept.append({**problem, "chain_ids": chain, "answer_ids": answer})
    if not kept:
        fail(f"--stage {cfg.stage}: no problem of --train {cfg.train} has steps or a solution that "
             f"fits into --max_completion_length {cfg.max_completion_length}; or use --stage rl")
    if len(kept) < len(problems):
        warn(f"{len(problems) - len(kept)} of {len(problems)} problems demonstrate nothing: no "
             "chain, or over --max_completion_length")
    return kept, [piece.strip().isdigit() for piece in pieces]


def demonstrate(chosen, policy, cfg, size, noise_scale, is_digits, rng):
    """Problems -> batch with the keys of a rollout; chunks of `size`, log-weights plus noise."""
    rows = [chunk_labels(p["chain_ids"], size, is_digits) for p in chosen]
    latents = torch.tensor([len(row) for row in rows])
    rows = [row + [[i] for i in p["answer_ids"]] for row, p in zip(rows, chosen)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), size, dtype=torch.long)
    weights = torch.zeros(ids.shape)  # [B, T, K], K = size
    for row, chunks in enumerate(rows):
        for t, chunk in enumerate(chunks):
            ids[row, t, : len(chunk)] = torch.tensor(chunk)
            weights[row, t, : len(chunk)] = 1 / len(chunk)
    positions, device = torch.arange(ids.shape[1]), policy.lm.device
    batch = {"completion_ids": ids[..., 0], "lengths": lengths, "topk_ids": ids,
             "completion_mask": positions < lengths[:, None],
             "latent_mask": positions < latents[:, None]}
    batch = {name: value.to(device) for name, value in batch.items()}
    noise = (noise_scale * gumbel_like(batch["topk_ids"], rng)).clamp(-LOW, HIGH)
    batch["topk_scores"] = (weights.to(device) + 1e-10).log() + noise  # padding stays below -20
    batch["loss_mask"] = batch["completion_mask"]
    batch["prompt_ids"], batch["prompt_mask"] = left_pad(
        [p["prompt_ids"] for p in chosen], policy.pad_id, device)
    return batch


def soft_label_loss(logprobs, weights, latent_mask):
    """KL(label || policy) of the latent tokens, mean over those of a row: [B, T, K] -> [B].

    weights: the noisy label, the same draw as the input, a constant; logprobs: full vocabulary. A
    one-hot label (chunks of 1, no noise) makes it the cross entropy of the written chain.
    """
    kl = (torch.xlogy(weights, weights) - weights * logprobs).sum(-1)  # [B, T]
    return (kl * latent_mask).sum(1) / latent_mask.sum(1).clamp(min=1)


def check_start(policy, tokenizer, problems, cfg, step):
    """What RL needs from its start, on up to 256 problems -> metrics row; warns if it is missing.

    Thoughts that end in one marker (exit rate), under noise, and some right ones among 8 samples
    (pass@8): clearly more than with an empty thought (floor), or there is nothing to reinforce.
    """
    rng = make_rng(policy.table.weight.device, cfg.seed, "check", step, dist.get_rank())
    modes = {"clean": dict(greedy=True, num_samples=1), "noisy": dict(greedy=False, num_samples=8),
             "floor": dict(greedy=False, num_samples=8, floor=True)}
    problems, configs = problems[:256], [dataclasses.replace(cfg, **m) for m in modes.values()]
    found = {name: evaluate(policy, tokenizer, problems, changed, rng)
             for name, changed in zip(modes, configs)}
    row = {**found["clean"], "exit_rate": found["noisy"]["format_ok"]}
    for name in ("noisy", "floor"):
        right = torch.tensor([r["correct"] for r in found[name]["records"]]).view(-1, 8)
        row[f"{name}_accuracy"] = found[name]["accuracy"]
        row[f"{name}_pass@8"] = right.any(1).float().mean().item()
    del row["records"]
    if dist.get_rank() == 0:
        print("start of RL: " + "  ".join(f"{name} {row[name]:.3f}" for name in (
            "accuracy", "noisy_accuracy", "floor_accuracy", "noisy_pass@8", "floor_pass@8",
            "exit_rate")))
        if row["exit_rate"] < 0.95 or row["noisy_pass@8"] < row["floor_pass@8"] + 0.1:
            warn("a weak start for RL: want an exit rate of 0.95 and a noisy pass@8 clearly above "
                 "that of the floor (no thought); a new run with more --sft_steps may have it")
    return row


def sft_gradients(policy, batch, cfg):
    """Add this rank's share of the gradient, for each micro-batch -> both losses, of all ranks.

    soft_label_loss, mean over all demonstrations of the step, and the cross entropy of marker,
    answer and EOS, mean over all these tokens.
    """
    num_answers = all_reduce(int((batch["loss_mask"] & ~batch["latent_mask"]).sum()))
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in micro_batches(batch, range(len(batch["lengths"])), cfg.micro_batch, cfg.max_tokens):
        micro = select_rows(batch, rows)
        latent = micro["latent_mask"]
        with autocast(policy.lm):
            kept, logprobs, _ = policy.score(policy.lm, micro)
        weights = (micro["topk_scores"] / cfg.latent_tau).softmax(-1)
        kl = soft_label_loss(kept, weights, latent).sum() / cfg.sft_batch
        ce = -logprobs[micro["loss_mask"] & ~latent].sum() / num_answers
        (kl + ce).backward()
        sums += torch.tensor([kl.item(), ce.item()], dtype=torch.float64)
    return all_reduce(sums.tolist())


def latent_sft(policy, tokenizer, problems, eval_problems, settings, cfg):
    """Supervised stage, in its own run folder -> last metrics row ({} if it was complete already).

    The first --cot_steps steps read single ids without noise: plain supervised chains, as all do
    with --no-latent. Inputs are the labels, with their noise, never the model's own mixtures.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = Path(cfg.out_dir) if cfg.stage == "sft" else Path(cfg.out_dir) / "sft"
    cfg = dataclasses.replace(
        cfg, steps=cfg.sft_steps, lr=cfg.sft_lr, warmup_steps=round(0.05 * cfg.sft_steps))
    groups = [{**group, "initial_lr": group["lr"]} for group in param_groups(policy, cfg)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.adam_beta2))
    trained = [p for group in groups for p in group["params"]]
    state, newest, row = {"stage": "sft", "step": 0}, latest_checkpoint(folder), {}
    if newest:
        state = load_checkpoint(newest, policy, optimizer, settings, CAN_CHANGE)
    if state["step"] == cfg.steps and folder != Path(cfg.out_dir):
        return row
    demonstrations, is_digits = read_demonstrations(problems, tokenizer, policy, cfg)
    dist.barrier()  # all ranks have looked for the checkpoint
    if rank == 0:
        print(f"supervised stage: steps {state['step']} to {cfg.steps}, in {folder}", flush=True)
        open_run(folder, settings, __file__, state["step"])
    bar = tqdm(total=cfg.steps, initial=state["step"], desc="supervised", disable=rank > 0 or None)
    for step in range(state["step"], cfg.steps):
        policy.train()
        plain = not cfg.latent or step < cfg.cot_steps
        size, noise_scale = (1, 0.0) if plain else (cfg.chunk, cfg.sft_noise)
        indices = batch_indices(len(demonstrations), cfg.sft_batch, (cfg.seed, "sft"), step)
        rng = make_rng(policy.table.weight.device, cfg.seed, "sft", step, rank)
        chosen = [demonstrations[i] for i in indices[rank::world_size]]
        batch = demonstrate(chosen, policy, cfg, size, noise_scale, is_digits, rng)
        kl, ce = sft_gradients(policy, batch, cfg)
        for p in trained if world_size > 1 else []:  # shares of the global means: to be summed
            dist.all_reduce(p.grad)
        grad_norm = nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm).item()
        if not math.isfinite(grad_norm):  # the same on all ranks
            raise SystemExit(f"supervised step {step + 1}: no finite gradient; lower --sft_lr")
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        state = {"stage": "sft", "step": step + 1}
        row = {"kind": "train", "step": step + 1, "kl": kl, "ce": ce, "grad_norm": grad_norm}
        if rank == 0:
            bar.update()
            bar.set_postfix_str(f"kl {kl:.3f}  ce {ce:.3f}")
            if (step + 1) % 20 == 0:
                log_rows(folder, row, [])
        stopping = stop_agreed() or (cfg.stage == "sft" and step + 1 == cfg.stop_after)
        if stopping or (step + 1) % cfg.sft_save_every == 0 or step + 1 == cfg.steps:
            saved = rank > 0 or save_checkpoint(
                folder, policy, tokenizer, optimizer, settings, state, cfg.keep_checkpoints)
            if not all_reduce(saved, dist.ReduceOp.MIN):
                raise SystemExit(f"{folder}: the checkpoint could not be written")
        if stopping:
            break
    bar.close()
    if state["step"] == cfg.steps and not stop_agreed():
        row = {"kind": "eval", "step": cfg.steps,
               **check_start(policy, tokenizer, eval_problems, cfg, cfg.steps)}
    if signum := stop_agreed():
        raise SystemExit(128 + signum)
    if rank == 0 and row.get("kind") == "eval":
        log_rows(folder, row, [])
    if rank == 0:
        print(f"supervised stage: done up to step {state['step']} of {cfg.steps}; more steps: "
              f"--resume auto; RL from it: --stage rl --model {folder}", flush=True)
    dist.barrier()  # nobody leaves, which ends the job, while rank 0 still writes
    return row


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
        cache = DynamicCache()
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
            for row in rows[~logits.sum(1).isfinite()].tolist():
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
                live = (~ended).nonzero()[:, 0]
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
    """1 if the answer is right and the marker occurs exactly once, else 0."""
    # paper: exact match; released code: also finds an answer in the ids shown at latent steps.
    return float(record["correct"] and record["format_ok"])


def group_advantages(rewards, group_size, eps=1e-4):
    """(r - group mean) / (group std + eps), std with ddof = 1.  rewards [B] -> [B]"""
    groups = rewards.view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)  # else rounding is left
    return (centred * differ / (groups.std(1, keepdim=True) + eps)).view(-1)


def valid_advantages(rewards, valid):
    """Advantages of one group [eq. 9-11]: rewards [G], valid [G] bool -> [G], 0 where not valid.

    Mean and std are those of the valid completions; with fewer than two of them all get 0.
    """
    # paper: 0 if only one is valid; released code: that one gets its reward, and the 1B script has
    # cut-off completions in mean and std and zeroes them later.
    advantages = torch.zeros_like(rewards)
    if valid.sum() >= 2:
        advantages[valid] = group_advantages(rewards[valid], int(valid.sum()))
    return advantages


def first_token_winner(path_scores, correct, valid):
    """Index of the right and valid completion with the best score, the first of equals; or None.

    path_scores, correct, valid [G] [eq. 19]. Training the first step of several right completions
    at once would pull towards their average, which may be no right thought.
    """
    # paper: among the right ones; released code: among those of positive advantage.
    eligible = correct & valid
    if not eligible.any():
        return None
    return int(path_scores.masked_fill(~eligible, -math.inf).argmax())


def compute_advantages(batch, cfg):
    """Advantages of the completions, at every position that was sampled -> [B, T].

    Without the method's devices (the flags, or --no-latent) one number per completion. The score of
    a path is its mean log-prob in the rollout [eq. 18].
    """
    rewards, mask = batch["rewards"], batch["loss_mask"]
    valid = batch["lengths"] < cfg.max_completion_length  # [eq. 9]
    advantages = group_advantages(rewards, cfg.group_size)
    groups = torch.arange(len(rewards), device=rewards.device).view(-1, cfg.group_size)
    if cfg.latent and cfg.mask_invalid and not cfg.dry_run:  # there, all are cut off
        advantages = torch.cat([valid_advantages(rewards[g], valid[g]) for g in groups])
    advantages = advantages[:, None] * mask
    path_scores = (batch["rollout_logprobs"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    for group in groups if cfg.latent and cfg.first_token_selection else []:
        winner = first_token_winner(path_scores[group], rewards[group] > 0, valid[group])
        if winner is not None:  # eq. 20 silences wrong completions too, as the released code does
            advantages[group[group != group[winner]], 0] = 0
    return advantages


def loss_weights(batch, cfg):
    """The reduction: mean over completions, of all ranks, of the mean over positions -> [B, T]."""
    counts = batch["loss_mask"].sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return batch["loss_mask"] / (counts * all_reduce(len(counts)))


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
              "dist_timeout")


def lr_factor(step, cfg):
    """Linear warm-up, then cosine to 0 at the end of the run."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step):
    """One rollout and its update -> (metrics row, records), or (None, None) when told to stop."""
    if cfg.stage == "sft":
        return sft_step(policy, ddp_policy, optimizer, problems, cfg, step)
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


def several_updates(policy, ddp_policy, reference, optimizer, batch, cfg, step):
    """--update_epochs passes over a rollout, each in --minibatches updates -> as update.

    The ratio compares with the log-probs from before the first of them: old_logprobs [B, T].
    """
    batch["old_logprobs"] = torch.zeros_like(batch["advantages"])
    rows = range(len(batch["rewards"]))
    for piece in micro_batches(batch, rows, cfg.micro_batch, cfg.max_tokens, cfg.share_prompts):
        with torch.no_grad():
            logprobs = policy(select_rows(batch, piece))["logprobs"]  # [b, T'], T' <= T
        batch["old_logprobs"][piece, : logprobs.shape[1]] = logprobs
    once = dataclasses.replace(cfg, update_epochs=1, minibatches=1)
    size = len(rows) // cfg.minibatches
    updates = []
    for start in [*range(0, size * cfg.minibatches, size)] * cfg.update_epochs:
        part = select_rows(batch, range(start, start + size))
        updates.append(update(policy, ddp_policy, reference, optimizer, part, once, step))
    return combine(updates)


def update(policy, ddp_policy, reference, optimizer, batch, cfg, step):
    """One optimizer update on a batch with advantages -> its metrics in two dicts.

    {metric: [sum, count]} for means, {metric: largest value} for peaks. logprob_gap is the largest
    difference between the log-probs of update and rollout: rounding, or something is wrong.
    """
    if cfg.update_epochs * cfg.minibatches > 1:
        return several_updates(policy, ddp_policy, reference, optimizer, batch, cfg, step)
    names = ("entropy", "kl", *METHOD_METRICS, "grad_norm", "skipped")
    sums = {name: [0.0, 0] for name in names}
    peaks = {"logprob_gap": -math.inf}
    peaks["ratio_max"] = -math.inf
    batch["weights"] = loss_weights(batch, cfg)

    # Without a KL term, rows without advantage have no gradient. If no rank has any other row,
    # there is nothing to learn: no update, and so no weight decay either.
    live = batch["advantages"].any(1) | (cfg.kl_coef > 0)  # [B]
    if all_reduce(int(live.sum())) == 0:
        return sums, peaks
    rows = live.nonzero()[:, 0].tolist() or [0]  # DDP wants a backward pass of each rank

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
        old_logprobs = micro.get("old_logprobs", logprobs)
        ratio = torch.exp(logprobs - old_logprobs)
        peaks["ratio_max"] = max(peaks["ratio_max"], largest(ratio, micro["loss_mask"]))
        logprobs = old_logprobs  # from before the first update: those that the rollout had
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
    optimizer.zero_grad()
    return None if is_bad else grad_norm


def dry_run(policy, ddp_policy, reference, optimizer, problems, cfg):
    """One step with every prompt and completion at its limit -> its metrics row: does it fit?"""
    policy.eos_ids = policy.eos_ids[:0]  # no completion ends before the limit
    for problem in problems:
        repeated = problem["prompt_ids"] * cfg.max_prompt_length
        problem["prompt_ids"] = repeated[: cfg.max_prompt_length]
    row, _ = train_step(policy, ddp_policy, reference, optimizer, problems, cfg, 0)
    if row is None:
        raise SystemExit(128 + stop_agreed())
    if dist.get_rank() == 0:
        print(f"dry run, without evaluation: peak memory {row['peak_mem_gib']:.2f} GiB, "
              f"{row['seconds']:.1f} s a step")
    return row


def train(policy, reference, problems, eval_problems, settings, cfg, resumed):
    """Evaluate, update, save, until the last step -> the last evaluation (without its records)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = policy.table.weight.device
    out_dir = Path(cfg.out_dir)
    optimizer = torch.optim.AdamW(param_groups(policy, cfg), betas=(0.9, cfg.adam_beta2))
    state = {"step": 0, "skipped": 0}  # skipped: updates in a row whose gradient was not finite
    if resumed:
        state = load_checkpoint(resumed, policy, optimizer, settings, CAN_CHANGE)
    ddp_policy = policy
    if world_size > 1 and device.type != "mps":
        # find_unused_parameters keeps the gradient buckets as they are. DDP otherwise regroups them
        # after the first update, and a resumed run would sum over 3 or more ranks in another order.
        ddp_policy = DistributedDataParallel(
            policy, broadcast_buffers=False, find_unused_parameters=True)
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
        if step == cfg.steps:
            break
        row, records = train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step)
        if row is None:
            break  # told to stop
        state = {"step": step + 1, "skipped": state["skipped"] + 1 if row["skipped"] else 0}
        records = gather(records if row["skipped"] else records[:: cfg.group_size][:2])
        if rank == 0:
            log_rows(out_dir, row, records)
            progress.show(row, records)
        if stop_agreed() or state["skipped"] == 5 or step + 1 == cfg.stop_after:
            break
        if rank == 0 and (step + 1) % cfg.save_every == 0:
            save_checkpoint(out_dir, policy, policy.tokenizer, optimizer, settings, state,
                            cfg.keep_checkpoints)

    # The last checkpoint, also of a run that was stopped; save_checkpoint keeps one that is there.
    signum = stop_agreed()
    saved = rank > 0 or save_checkpoint(
        out_dir, policy, policy.tokenizer, optimizer, settings, state, cfg.keep_checkpoints)
    dist.barrier()  # nobody leaves, which ends the job, while rank 0 still writes
    progress.bar.close()
    if rank == 0:
        end = "done" if state["step"] == cfg.steps else "stopped"
        print(f"{end} after step {state['step']}; go on with --resume auto, or: python eval.py "
              f"{out_dir} --data {cfg.eval_data or cfg.train}", flush=True)
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
    problems = encode_prompts(tokenizer, problems, cfg.answer_marker, cfg.max_prompt_length)
    eval_problems = encode_prompts(
        tokenizer, eval_problems, cfg.answer_marker, cfg.max_prompt_length)
    settings.update(model_sha=weights_fingerprint(lm), data_sha=fingerprint(problems))
    if rank == 0:
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{cfg.num_prompts} prompts x {cfg.group_size} completions a step on {world_size} x "
              f"{device}, {len(problems)} training and {len(eval_problems)} evaluation problems")
    if rank == 0 and not cfg.dry_run:
        lock = lock or lock_run(out_dir)  # held until the process ends
    if cfg.stage != "rl" and not cfg.dry_run:
        start = start_config(cfg)
        trained = latest_checkpoint(Path(start.out_dir))
        if resumed and cfg.stage == "all":  # the start is complete; the reference is a copy of it
            load_checkpoint(trained, policy, None, settings, CAN_CHANGE)
        else:
            examples = read_demonstrations(problems, tokenizer, policy, cfg)
            result = train(policy, None, examples, eval_problems, settings, start, trained)
            if cfg.stage == "sft":
                return result
        settings["start_sha"] = weights_fingerprint(lm)
    reference = frozen_copy(lm) if cfg.kl_coef > 0 and cfg.lora_rank == 0 else None
    return train(policy, reference, problems, eval_problems, settings, cfg, resumed)


if __name__ == "__main__":
    run_program(main)
