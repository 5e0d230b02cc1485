"""Latent-GRPO: reinforcement learning of thoughts that are mixtures of a few token embeddings.

Paper    Latent-GRPO, arXiv 2604.27998; its start, Latent-SFT, is arXiv 2510.15522. [eq. n] points
         at the first, [code] at the authors' releases, [ours] marks our own choices.
Idea     Before </think> a step picks no token. It perturbs the log-probs with Gumbel noise, keeps
         the K best, and feeds the mean of their embeddings, weighted by the softmax of the scores.
GRPO +   1. the K perturbed scores have a likelihood: a ratio for each latent step   latent_logprob
         2. noise is made positive: an advantage moves all K log-probs alike        one_sided_noise
         3. completions cut off at the limit are left out of the advantages        valid_advantages
         4. one completion of a group, a right one, trains the first step        first_token_winner
Start    a model that can think in mixtures (Latent-SFT): supervised stage, section 2b     sft_step
Words    A score is a log-prob plus noise; the margin d is score - log-prob. A thought is the latent
         steps of a completion; each of them shows the id of its best score, for the reader only.
Differs  Labels are chunks of a written chain. --labels encoder learns them as the paper does, in
         three rounds (section 2c); docs/latent_grpo.md has what else differs.
Run      python latent_grpo.py                      # both stages, tiny model, two CPU cores
         python latent_grpo.py --stage sft          # the start alone; then --stage rl --model RUN
         python latent_grpo.py --preset soft_grpo   # two-sided noise, no masks: the baseline
         python latent_grpo.py --no-latent          # the explicit baseline: written chains, GRPO
"""

import copy
import dataclasses
import functools
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
    INSTRUCTION, Progress, RoomyCache, add_up, all_reduce, autocast, candidate_scores, check_ranks,
    checkpoint_settings, combine, completion_hidden, completion_logprobs, data_fingerprint,
    encode_prompts, fail, find_resume, first_line, frozen_copy, gather, grade, gumbel_like, largest,
    latest_checkpoint, left_pad, live_rows, lm_hidden, lm_logits, load_checkpoint, load_method,
    load_model, load_problems, lock_run, log_rows, lora_disabled, make_rng, maxima, means,
    micro_batches, next_problems, open_run, parse_flags, peak_memory, record_sums, resolve_config,
    run_program, sample, save_checkpoint, select_rows, setup_distributed, stop_agreed,
    stop_requested, summarise, taught_answer, top_k_mixture, warn, weights_fingerprint)

METHOD = Path(__file__).stem

# === 1. config ====================================================================================


@dataclasses.dataclass
class Config:
    """Every setting; each is a command-line flag of the same name. The values train `tiny`."""

    # model, data, length of the run
    model: str = "tiny"  # hub id, folder, checkpoint of ours, or tiny (0.5M, trained at first use)
    preset: str = "auto"  # where values start: tiny (as here) or another of PRESETS; auto: by model
    train: str = "arithmetic-verbose"  # problems: arithmetic, gsm8k, a file, hub:OWNER/REPO/F
    eval_data: str = ""  # evaluation problems; "" = the test split of --train
    answer_marker: str = "</think>"  # text that ends the thinking and opens the answer
    instruction: str = INSTRUCTION  # what a prompt asks for, "" = nothing; {marker} is filled in
    template_args: str = ""  # JSON object for the chat template, as {"enable_thinking": false}
    prompt_suffix: str = ""  # text after the rendered prompt, as <think>
    prompt_date: str = "2025-01-01"  # date that a chat template writes, so that no day changes it
    steps: int = 100  # rollouts, each followed by its updates
    seed: int = 0  # all randomness is a function of it, the step and the rank
    # rollout and update
    num_prompts: int = 32  # problems in a step, over all ranks
    group_size: int = 8  # completions per problem, G
    max_extra_rollouts: int = 0  # further draws in a step, to replace groups of equal rewards
    max_prompt_length: int = 128  # tokens; longer prompts are dropped and counted
    max_completion_length: int = 32  # tokens, latent steps included
    temperature: float = 1.0  # of sampling, > 0
    top_k: int = 0  # sample among the k likeliest ids; 0 = all
    top_p: float = 1.0  # then in this nucleus; 1 = off
    lr: float = 5e-5  # AdamW learning rate of the language model
    clip_eps: float = 0.2  # ratio clip; matters with several updates per rollout
    update_epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates in a pass
    kl_coef: float = 0.1  # weight of the KL term, beta; 0 loads no reference
    # the method
    stage: str = "all"  # sft: the supervised start, rl: from --model as it is, all: both [ours]
    latent: bool = True  # think in mixtures; off: written chains and plain GRPO [sec. 5]
    latent_top_k: int = 2  # embeddings in a mixture, K [eq. 1; code: 10]
    latent_top_p: float = 0.95  # noise may bring in ids of this nucleus [code]
    latent_tau: float = 1.0  # temperature of the weights, tau [eq. 2, code]
    renormalise: bool = False  # SofT-GRPO: log-probs among the K likeliest, then noise [code]
    noise_scale: float = 0.5  # factor of the Gumbel noise, lambda [code: 1]
    latent_end: str = "either"  # a thought ends if the clean, perturbed or either best is [code]
    one_sided: bool = True  # shift the noise above 0 [eq. 12]
    ste: str = "paper"  # slope past the score: paper, released or none; with --one_sided [eq. 16]
    mask_invalid: bool = True  # leave cut-off completions out of the advantages [eq. 9-11]
    first_token_selection: bool = True  # one right completion trains the first step [eq. 18-21]
    # a decoding mode, not a method to train: eval.py --mode floor
    floor: bool = False  # the marker is given at once: what is known without a thought [ours]
    # the supervised stage
    sft_steps: int = 800  # updates [ours]
    sft_batch: int = 64  # demonstrations in an update, over all ranks [code: 512 and 256]
    sft_lr: float = 2e-3  # learning rate [code: 3e-4 and 2e-5]; cosine after 5 % warm-up [code]
    sft_noise: float = 1.0  # factor of the Gumbel noise of labels, which are the inputs too [code]
    chunk: int = 2  # ids of the chain in a latent step; two of digits never share one [ours]
    alone: str = ""  # symbols that share a latent step with no other id, as "+ - * / =" [ours]
    labels: str = "chunk"  # of thoughts: chunk, encoder (it learns them), or their folder [code]
    encoder_steps: int = 200  # updates in each of the encoder's three rounds [ours]
    encoder_lr: float = 1e-3  # learning rate there; cosine after 5 % warm-up [code]
    cot_steps: int = 0  # first updates, which learn the written chain, id by id, no noise [ours]
    sft_save_every: int = 200  # updates between checkpoints [ours]
    # optimizer and memory
    adam_beta2: float = 0.99  # AdamW beta2; beta1 is 0.9
    weight_decay: float = 0.0  # of matrices, decoupled
    warmup_steps: int = -1  # linear warm-up of all rates, then a cosine to 0; -1 = a tenth of steps
    schedule: str = "cosine"  # rates of RL after the warm-up: cosine, or constant as published
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
        counts = ("update_epochs", "minibatches", "latent_top_k", "sft_steps", "sft_save_every",
                  "chunk", "encoder_steps")
        resolve_config(self, METHOD, counts, self.minibatches)  # fills in "auto", checks the rest
        choices = {"stage": ("sft", "rl", "all"), "ste": ("paper", "released", "none"),
                   "latent_end": ("clean", "perturbed", "either"),
                   "schedule": ("cosine", "constant")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                fail(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}")
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self.sft_batch < world_size:
            fail(f"--sft_batch {self.sft_batch}: must be at least {world_size}, one for each rank")
        if not self.latent_tau > 0:
            fail(f"--latent_tau {self.latent_tau}: must be above 0")
        if not 0 < self.latent_top_p <= 1:
            fail(f"--latent_top_p {self.latent_top_p}: must be in (0, 1]")
        if self.latent_end == "clean" and self.latent_top_k == 1:
            fail("--latent_end clean: needs --latent_top_k 2 or more")
        if self.deterministic and self.latent and self.device.startswith("cuda"):
            fail("--deterministic: CUDA has no deterministic cumsum, which latent steps need")


REAL = dict(  # what all real models share [code]; supervised stage, evaluation, memory [ours]
    train="gsm8k", lr=1e-6, schedule="constant", warmup_steps=0, adam_beta2=0.999,
    weight_decay=0.01, noise_scale=1.0, alone="+ - * / =", sft_steps=2000, sft_batch=256,
    sft_lr=2e-5, encoder_steps=300, encoder_lr=2e-5, cot_steps=200, sft_save_every=500,
    micro_batch=8, share_prompts=True,
    eval_every=100, eval_limit=512, eval_batch=64, save_every=200)
AS_PUBLISHED = dict(  # prompt [code]
    instruction="Please reason step by step, and put your final answer within \\boxed{}.",
    prompt_suffix="<think>")
TWO_SIDED = dict(one_sided=False, mask_invalid=False, first_token_selection=False)
PRESETS = {
    "tiny": {},
    "paper": REAL | dict(  # low difficulty, for any real model [code]; prompt length [ours]
        steps=10000, num_prompts=64, max_extra_rollouts=50, max_prompt_length=384,
        max_completion_length=128, minibatches=4, kl_coef=0.0),
    "soft_grpo": TWO_SIDED | dict(lr=3e-4),  # the rate that suits it [ours]
    "soft_grpo_own": REAL | TWO_SIDED | dict(  # SofT-GRPO from any reasoning model [its code]
        stage="rl", steps=625, num_prompts=64, max_prompt_length=1024, max_completion_length=8192,
        top_k=5, top_p=0.95, minibatches=2, kl_coef=0.001, latent_top_k=5, latent_tau=0.1,
        renormalise=True, latent_end="perturbed", micro_batch=2, greedy=False),
}
PRESETS["soft_grpo_paper"] = PRESETS["paper"] | TWO_SIDED
# The named ones train the start with adapters and then all weights, so they are two runs.
PRESETS["llama-3.2-1b"] = PRESETS["paper"] | AS_PUBLISHED | dict(
    stage="rl", max_prompt_length=192, encoder_steps=150, encoder_lr=1e-4)  # 10 epochs of gsm8k
PRESETS["llama-3.2-1b-sft"] = PRESETS["llama-3.2-1b"] | dict(
    model="meta-llama/Llama-3.2-1B-Instruct", stage="sft", lora_rank=64, sft_steps=1000,
    sft_batch=512, sft_lr=3e-4)
# Computed for 8 GPUs (tests/estimate.py) with --zero: 109 GiB each; with --kl_coef 0 as well: 81.
PRESETS["qwen2.5-math-7b"] = REAL | AS_PUBLISHED | dict(  # K: 10 in the release, of learned labels
    stage="rl", steps=500, max_extra_rollouts=50, max_prompt_length=1024,
    max_completion_length=4096, kl_coef=0.001, latent_top_k=16, chunk=16, latent_end="perturbed",
    micro_batch=1, gradient_checkpointing=True, encoder_lr=1e-5)
PRESETS["qwen2.5-math-7b-sft"] = PRESETS["qwen2.5-math-7b"] | dict(
    model="Qwen/Qwen2.5-Math-7B", stage="sft", lora_rank=64)


def parse_config(argv=None):
    """The settings of a run, from the command line."""
    return parse_flags(Config, PRESETS, __doc__, argv)


def check_trainable(cfg):
    """`fail` on settings that only eval.py can use."""
    if cfg.floor or (cfg.latent and cfg.noise_scale == 0):
        fail("--floor, --noise_scale 0: are ways of decoding, for eval.py; they are not trained")
    if cfg.stage == "rl":
        start = checkpoint_settings(cfg.model)  # {} if it is none of ours
        size = "chunk" if start.get("labels") == "chunk" else "latent_top_k"
        check_support(start.get(size, cfg.latent_top_k), cfg)


def check_support(size, cfg):
    """Warn if a thought keeps more embeddings than the labels of its start have ids, `size`."""
    if cfg.latent and cfg.latent_top_k > size:
        warn(f"--latent_top_k {cfg.latent_top_k}: the labels of the start have at most {size} ids; "
             f"RL trains all it keeps, and the rest is filler: want --latent_top_k {size}")


# === 2. the method ================================================================================

METHOD_METRICS = ("margin", "crossed_frac", "top_weight")
PLAIN_GRPO = {"latent": False}  # the settings that switch the method off
LOW, HIGH = 1.5, 3.0  # Gumbel noise is clipped to [-LOW, HIGH] [eq. 12]


def one_sided_noise(gumbel):
    """Clipped and shifted above 0 [eq. 12]: clip(g, -LOW, HIGH) + LOW, same shape.

    Softmax and top-k do not see the shift: what is fed stays the same. But every score starts above
    its log-prob, so a positive advantage pulls all K log-probs up, a negative one pushes all down.
    """
    # paper: + epsilon, not given; released code: epsilon 0. A clipped draw (1.1 %) starts at 0.
    return gumbel.clamp(-LOW, HIGH) + LOW


def draw_noise(ids, cfg, rng):
    """Noise of the candidates `ids` [b, C]: clipped, shifted (--one_sided), then scaled [code]."""
    gumbel = gumbel_like(ids.float(), rng)
    if cfg.one_sided:
        noise = one_sided_noise(gumbel)
    else:
        noise = gumbel.clamp(-LOW, HIGH)
    return cfg.noise_scale * noise


def nucleus(logprobs, top_k, top_p):
    """The ids that noise may choose from: those of the top_p nucleus and the top_k likeliest.

    logprobs [b, V] -> logprobs [b, C], ids [b, C], likeliest first; -inf outside.
    """
    num_ids = logprobs.shape[-1]
    # Sort only the 1024 likeliest, if they hold the nucleus; it is rarely larger.
    best, ids = logprobs.topk(min(num_ids, max(1024, top_k)), -1)
    if (best.exp().sum(-1) < top_p).any():
        best, ids = logprobs.topk(num_ids, -1)
    probs = best.exp()
    likelier = probs.cumsum(-1) - probs  # the mass of all likelier ids
    outside = likelier >= top_p
    outside[:, :top_k] = False
    return best.masked_fill(outside, -math.inf), ids


def latent_step(logits, draw, top_k, top_p, renormalise=False):
    """The mixture of a latent step: logits [b, V] -> ids, scores [b, K], best first.

    Scores are log-probs at temperature 1, over the full vocabulary, plus noise [eq. 13]; the K best
    of the nucleus are kept. draw: ids of the candidates [b, C] -> their noise [b, C]; without noise
    (None) the K likeliest are kept [eq. 1, which has no tau; ours divides by it always].
    renormalise: the K likeliest are kept, and their log-probs are those among them (SofT-GRPO).
    """
    logprobs = torch.log_softmax(logits, -1)
    if draw is None:
        scores, ids = logprobs.topk(top_k, -1)
        return ids, scores
    if renormalise:
        kept, candidate_ids = logprobs.topk(top_k, -1)
        candidates = kept.log_softmax(-1)
    else:
        candidates, candidate_ids = nucleus(logprobs, top_k, top_p)  # [b, C]
    perturbed = candidates + draw(candidate_ids)
    scores, places = perturbed.topk(top_k, -1)
    return candidate_ids.gather(-1, places), scores


def mixture_weights(scores, tau):
    """Weights of the mixture = softmax(scores / tau) [eq. 2]: [..., K] -> [..., K], sums to 1."""
    return (scores / tau).softmax(-1)


def latent_logprob(scores, logprobs, ste):
    """log pi of a latent step, up to a constant: mean over K of -d - exp(-d) [eq. 3, eq. 17].

    scores (constants), logprobs of the same K ids (with gradient): [..., K] -> [...]. The margin
    d = scores - logprobs is the noise that explains the score; -d - exp(-d) is the log-density of
    Gumbel noise, largest at d = 0. Its slope towards logprobs is 1 - exp(-d), positive while d > 0.
    Once updates push a log-prob past its score, d < 0, the value stays, and the slope becomes
      none      1 - exp(-d) < 0: turns back to the score, whatever the advantage [eq. 27]
      paper     exp(-d) - 1 > 0: goes on, in the direction of the advantage [eq. 16, eq. 31]
      released  exp(d) - 1 in (-1, 0): turns back, gently
    """
    # paper: sum over K; released code: mean, which keeps the ratio's size independent of K.
    d = scores - logprobs
    value = -d - torch.exp(-d)
    crossed = value  # what counts where d < 0: the same value, another slope
    if ste == "paper":
        crossed = 2 * value.detach() - value  # the opposite slope
    elif ste == "released":
        gentle = d - torch.exp(d.clamp(max=0))  # the clamp: no overflow where it does not count
        crossed = value.detach() + (gentle - gentle.detach())
    return torch.where(d < 0, crossed, value).mean(-1)


class Policy(nn.Module):
    """The language model. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.table = lm.get_input_embeddings()
        self.cfg = cfg
        self.top_k = min(cfg.latent_top_k, lm.num_tokens)  # K
        # The first id of the marker ends a thought; the others are ordinary text.
        self.marker_ids = tokenizer(cfg.answer_marker, add_special_tokens=False)["input_ids"]
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        for module in (self.table, lm.get_output_embeddings()):  # the space of the mixtures
            module.weight.requires_grad_(cfg.train_embeddings)

    def completion_embeds(self, batch):
        """What is fed at each completion position, in rollout and update -> [B, T, H].

        The stored scores are constants, and so are the weights: the only way to the parameters is
        from the log-probs, not back through the thought. --train_embeddings opens the table, too.
        """
        tokens = self.table(batch["completion_ids"])
        weights = mixture_weights(batch["topk_scores"], self.cfg.latent_tau)  # [B, T, K]
        mixed = top_k_mixture(batch["topk_ids"], weights, self.table)
        return torch.where(batch["latent_mask"][..., None], mixed, tokens)

    def hidden(self, batch, lm=None):
        """The hidden states [B, T, H] of lm that decide each completion position."""
        return completion_hidden(lm or self.lm, batch, self.completion_embeds(batch))

    def score(self, batch, lm):
        """-> kept [B, T, K], token_logprobs [B, T], entropy [B, T] (nats).

        kept: log-probs of topk_ids at latent steps, at temperature 1 as in latent_step, else 0.
        token_logprobs: those of completion_ids at all other positions of loss_mask, at the
        temperature that they were sampled at, else 0. The entropy is that of either.
        """
        hidden = self.hidden(batch, lm)
        is_latent = batch["latent_mask"] & batch["loss_mask"]
        is_token = batch["loss_mask"] & ~is_latent
        # paper: one temperature; released code: answers sampled at 1 (a stale flag), scored at 0.6.
        token_logprobs, token_entropy = completion_logprobs(
            lm, hidden, batch["completion_ids"], is_token, self.cfg.temperature)
        kept, latent_entropy = completion_logprobs(lm, hidden, batch["topk_ids"], is_latent)
        return kept, token_logprobs, token_entropy + latent_entropy

    def before_noise(self, kept):
        """Log-probs of the kept ids -> what noise was added to, to give their scores: [..., K]."""
        if self.cfg.renormalise:
            return kept.log_softmax(-1)
        return kept

    def surrogate(self, kept, token_logprobs, batch, ste):
        """latent_logprob of kept [..., K] at latent steps, token_logprobs elsewhere -> [...].

        The density is that of the noise before its scaling (--noise_scale): latent_logprob gets d /
        lambda, so the slope towards a log-prob is (1 - exp(-d / lambda)) / (lambda K).
        """
        scale = self.cfg.noise_scale or 1.0  # 0 is for decoding; any scale will do
        scores = batch["topk_scores"] / scale
        latents = latent_logprob(scores, self.before_noise(kept) / scale, ste)
        return torch.where(batch["latent_mask"] & batch["loss_mask"], latents, token_logprobs)

    def forward(self, batch, labels=False):
        """-> {"logprobs" [B, T], "entropy" [B, T] (nats), "kept" [B, T, K]}.

        logprobs: the surrogate with the slopes of --ste. kept: log-probs of topk_ids at latent
        steps. All are 0 outside loss_mask. labels: the losses of the supervised stage, sums over
        rows and tokens, as {"kl", "ce"}.
        """
        with autocast(self.lm):
            kept, token_logprobs, entropy = self.score(batch, self.lm)
        if labels:
            weights = mixture_weights(batch["topk_scores"], self.cfg.latent_tau)
            kl = soft_label_loss(kept, weights, batch["latent_mask"])
            is_token = batch["loss_mask"] & ~batch["latent_mask"]
            return {"kl": kl.sum(), "ce": -token_logprobs[is_token].sum()}
        ste = self.cfg.ste if self.cfg.one_sided else "none"
        logprobs = self.surrogate(kept, token_logprobs, batch, ste)
        if ste == "released" and "advantages" in batch:  # only where they are not positive
            plain = self.surrogate(kept, token_logprobs, batch, "none")
            logprobs = torch.where(batch["advantages"] > 0, plain, logprobs)
        return {"logprobs": logprobs, "entropy": entropy, "kept": kept}


def start_state(num_rows, policy, cfg):
    """What each row remembers between steps: does it still think? Nothing without latent steps."""
    if not cfg.latent or cfg.floor:
        return {}
    return {"thinks": torch.ones(num_rows, dtype=torch.bool, device=policy.lm.device)}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    A row thinks from its first step until it emits the first id of the marker, which is fed and
    scored as a token, like all that follows. EOS ends a row anywhere. `hidden` is unused here.
    """
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, C]; C = V without top-k
    choice = probs.argmax(-1) if greedy else sample(probs, rng)
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    is_given = cfg.floor and t < len(policy.marker_ids)  # an empty thought: no choice, no score
    if is_given:
        ids = torch.full_like(ids, policy.marker_ids[t])
    if state:  # there are latent steps
        ids, record, state = think(policy, logits, ids, t, state, cfg, rng, greedy)
    else:
        no_mixture = torch.zeros(len(ids), policy.top_k, device=ids.device)  # [b, K]
        record = {
            "loss_mask": torch.full_like(ids, not is_given, dtype=torch.bool),
            "latent_mask": torch.zeros_like(ids, dtype=torch.bool),
            "topk_ids": no_mixture.long(),
            "topk_scores": no_mixture}
    embeds = policy.completion_embeds({"completion_ids": ids, **record})
    logprobs = torch.log_softmax(logits / cfg.temperature, -1).gather(1, ids[:, None])[:, 0]
    kept = torch.log_softmax(logits, -1).gather(1, record["topk_ids"])  # [b, K]
    record["rollout_logprobs"] = policy.surrogate(kept, logprobs, record, "none")
    return ids, embeds, record, state


def think(policy, logits, sampled, t, state, cfg, rng, greedy):
    """Choose the mixture of the rows that think, or end their thought -> ids [b], record, state.

    sampled [b]: the ids of the other rows. Greedy: no noise.
    """
    draw = None if greedy else functools.partial(draw_noise, cfg=cfg, rng=rng)
    topk_ids, scores = latent_step(  # [b, K] each
        logits, draw, policy.top_k, cfg.latent_top_p, cfg.renormalise)
    shown, ends = end_of_thought(logits, topk_ids, policy.marker_ids[0], cfg.latent_end)
    ids = torch.where(state["thinks"], shown, sampled)
    thinks = state["thinks"] & ~ends
    # Three cases: text, scored; a mixture that is fed; a mixture at the limit, which nothing reads.
    is_mixed = thinks & ~torch.isin(ids, policy.eos_ids)
    is_read = t + 1 < cfg.max_completion_length
    record = {
        "loss_mask": ~is_mixed | is_read,
        "latent_mask": is_mixed & is_read,
        "topk_ids": topk_ids * is_mixed[:, None],
        "topk_scores": scores * is_mixed[:, None]}
    return ids, record, {"thinks": thinks}


def end_of_thought(logits, topk_ids, marker_id, rule):
    """Which thoughts end here: logits [b, V], topk_ids [b, K] -> ids shown [b], ends [b] bool.

    rule: the marker has the best log-prob (clean), the best score (perturbed), or either. It is
    shown where a thought ends; a thought that goes on shows the best score of another id.
    """
    is_clean = logits.argmax(-1) == marker_id
    is_perturbed = topk_ids[:, 0] == marker_id
    # paper: not said; released code: either for Llama, perturbed for Qwen (a literal id).
    ends = {"clean": is_clean, "perturbed": is_perturbed, "either": is_clean | is_perturbed}[rule]
    second = topk_ids[:, min(1, topk_ids.shape[1] - 1)]  # K = 1 has none: such a thought ends
    shown = torch.where(is_perturbed, second, topk_ids[:, 0])
    return torch.where(ends, marker_id, shown), ends


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T, K + 1] under the reference: of the K kept ids and, last, of the token.

    The reference is a frozen copy, or (None) the model without adapters. It reads the same
    mixtures. A position has either kept ids or a token; the others of its K + 1 are 0.
    """
    lm = policy.lm if reference is None else reference
    with lora_disabled(policy.lm), autocast(lm):  # a copy keeps the adapters that it was made with
        kept, token_logprobs, _ = policy.score(batch, lm)
    return torch.cat([kept, token_logprobs[..., None]], -1)


def kept_kl(logprobs, reference):
    """KL of policy and reference over K ids and "any other", log-probs [..., K] each -> [...].

    Exact if the other ids have no mass or keep their proportions; otherwise it is less.
    """
    probs = logprobs.exp()
    rest = (1 - probs.sum(-1)).clamp(min=1e-6)  # rounding may leave less than nothing
    reference_rest = (1 - reference.exp().sum(-1)).clamp(min=1e-6)
    kl = (probs * (logprobs - reference)).sum(-1)
    return kl + rest * (rest.log() - reference_rest.log())


def kl_estimate(outputs, batch):
    """KL(policy || reference) [B, T]: kept_kl at latent steps, at tokens the k3 estimate.

    k3 = exp(d) - d - 1 >= 0, d = reference - now. Each is 0 where the other counts.
    """
    # paper: KL of the distributions; released code: k3 of the surrogate, through its STE, clamped
    # to 10. A sample of scores cannot serve: the K best of the noise have a positive mean slope.
    reference = batch["ref_logprobs"]  # [B, T, K + 1]
    token_logprobs = outputs["logprobs"].masked_fill(batch["latent_mask"], 0.0)
    difference = reference[..., -1] - token_logprobs
    k3 = torch.exp(difference) - difference - 1
    return k3 + kept_kl(outputs["kept"], reference[..., :-1])


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position [eq. 8, eq. 22], not yet reduced: PPO's clip, and the KL.

    The ratio exp(logprobs - old_logprobs) is at latent steps that of the surrogate [eq. 23]; with
    one update per rollout it is 1 and clips nothing. A negative advantage also stops pushing at a
    ratio of 3 (dual clip) [code].
    """
    logprobs = outputs["logprobs"]
    advantages = batch["advantages"]
    ratio = torch.exp(logprobs - batch.get("old_logprobs", logprobs.detach()))
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(loss, -3 * advantages)
    loss = torch.where(advantages < 0, bounded, loss)
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices and vectors of the language model; the method adds nothing."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() == 1]
    groups = [(matrices, cfg.lr, cfg.weight_decay), (vectors, cfg.lr, 0.0)]
    return [{"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups if params]


@torch.no_grad()
def measure(policy, outputs, batch, cfg):
    """Metrics of a micro-batch -> {name: (values [B, T], mask [B, T] of those that count)}.

    margin: mean d = score - log-prob over the K kept ids. crossed_frac: share of them that updates
    pushed past their score, d < -0.001: with one-sided noise and one update 0, but for bfloat16.
    top_weight: largest weight of the mixture; near 1, thoughts are single tokens.
    """
    found = {"entropy": (outputs["entropy"], batch["loss_mask"])}
    if cfg.kl_coef > 0:
        found["kl"] = (kl_estimate(outputs, batch), batch["loss_mask"])
    mask = batch["latent_mask"]
    margins = batch["topk_scores"] - policy.before_noise(outputs["kept"])  # [B, T, K]
    crossed = (margins < -1e-3).float()
    weights = mixture_weights(batch["topk_scores"], cfg.latent_tau)
    found["margin"] = (margins.mean(-1), mask)
    found["crossed_frac"] = (crossed.mean(-1), mask)
    found["top_weight"] = (weights.amax(-1), mask)
    return found


def describe(policy, outputs, batch, cfg):
    """What latent steps were fed, for eval.py show -> ids, weights [B, T, K] of the mixtures."""
    return batch["topk_ids"], mixture_weights(batch["topk_scores"], cfg.latent_tau)


# === 2b. supervised stage =========================================================================
# Latent-SFT. A label is the weights of some ids: those of a chunk of the written chain, or what an
# encoder has learned (2c). A demonstration is laid out as a rollout is: mixtures, then the marker,
# the answer and EOS. topk_scores / tau are the log-weights of a label, and the label is what is
# fed, too: never the model's own mixture.


def start_config(cfg):
    """The settings of the supervised stage; with --stage all it has a folder of its own."""
    start = supervised_config(cfg, "sft", cfg.sft_steps, cfg.sft_lr)
    if cfg.stage == "sft":
        start.out_dir, start.stop_after = cfg.out_dir, cfg.stop_after
    return start


def supervised_config(cfg, folder, steps, lr):
    """The settings of a supervised run with a folder, a length and a rate of its own."""
    return dataclasses.replace(
        cfg, stage="sft", out_dir=f"{cfg.out_dir}/{folder}", stop_after=0, steps=steps, lr=lr,
        save_every=cfg.sft_save_every, warmup_steps=round(0.05 * steps), eval_every=steps,
        schedule="cosine")


def chunk_labels(ids, size, is_digits, is_alone):
    """Chain of ids -> chunks of at most `size`, with at most one id of digits in each [ours].

    The ids of a chunk share one latent step, which forgets their order: 18 would equal 81. An id of
    is_alone shares its step with no other: a model computes the result at the position of `=`.
    """
    # paper: labels of a learned encoder, top-10; fixed size 2 (GSM8K). CoLaR feeds chunk sums.
    chunks = [[]]
    for i in ids:
        last = chunks[-1]
        is_full = len(last) == size
        both_digits = is_digits[i] and any(is_digits[j] for j in last)
        meets_alone = any(is_alone[i] or is_alone[j] for j in last)
        if is_full or both_digits or meets_alone:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def read_demonstrations(problems, tokenizer, policy, cfg):
    """-> those problems that have a chain, with chain_ids, chunks (of them), label, answer_ids.

    Chain and answer are tokenised apart, so that nothing merges across the border. The answer is
    marker, answer and EOS only: the thought has to do the work. The built-in task's teacher errs,
    and is imitated.
    """
    pieces = tokenizer.batch_decode([[i] for i in range(policy.lm.num_tokens)])
    is_digits = [piece.strip().isdigit() for piece in pieces]
    symbols = cfg.alone.split()
    is_alone = [piece.strip() in symbols for piece in pieces]
    end = tokenizer.eos_token_id  # what a chat template ends a turn with
    if end not in policy.lm.eos_ids:
        end = policy.lm.eos_ids[0]
    kept = []
    for problem in problems:
        space = "" if "teacher_answer" in problem else " "
        chain = space.join(problem["steps"] or []) or problem["solution"] or ""
        answer = taught_answer(problem)
        chain_ids, answer_ids = tokenizer([chain, answer], add_special_tokens=False)["input_ids"]
        answer_ids = [*policy.marker_ids, *answer_ids, end]
        fits = len(chain_ids) + len(answer_ids) < cfg.max_completion_length  # also id by id
        if chain_ids and fits and policy.marker_ids[0] not in chain_ids:  # it would end the thought
            chunks = chunk_labels(chain_ids, cfg.chunk, is_digits, is_alone)
            label = problem.get("label") or even_label(chunks, cfg.chunk)
            kept.append({**problem, "chain_ids": chain_ids, "chunks": chunks, "label": label,
                         "answer_ids": answer_ids})
    if not kept:
        fail(f"--stage {cfg.stage}: no problem of --train {cfg.train} has steps or a solution that "
             f"fits into --max_completion_length {cfg.max_completion_length}; or use --stage rl")
    num_lost = len(problems) - len(kept)
    if num_lost:
        warn(f"{num_lost} of {len(problems)} problems demonstrate nothing: no chain, or over "
             "--max_completion_length")
    sizes = [len(chunk) for problem in kept for chunk in problem["chunks"]]
    if cfg.labels == "chunk":
        check_support(max(sizes), cfg)
    return kept


def even_label(chunks, size):
    """Chunks of ids -> their label: weights, ids [N, size]. Ids of a chunk have equal weights."""
    ids = torch.tensor([chunk + [-1] * (size - len(chunk)) for chunk in chunks])
    in_chunk = ids >= 0
    return in_chunk / in_chunk.sum(-1, keepdim=True), ids.clamp(min=0)


def demonstrate(chosen, policy, cfg, is_written, rng):
    """Demonstrations -> batch with the keys of a rollout; K = --chunk, or that of the labels.

    is_written: the chain id by id and without noise, K = 1: supervised chains of thought.
    """
    device = policy.lm.device
    noise_scale = 0.0 if is_written else cfg.sft_noise
    rows = []
    latents = []  # latent steps of each row
    for problem in chosen:
        thought = problem["label"]
        if is_written:
            thought = even_label([[i] for i in problem["chain_ids"]], 1)
        num_latents, size = thought[1].shape
        latents.append(num_latents)
        answer = even_label([[i] for i in problem["answer_ids"]], size)
        rows.append([torch.cat(parts) for parts in zip(thought, answer)])
    columns = []
    for column in zip(*rows):
        columns.append(nn.utils.rnn.pad_sequence(column, True).to(device))
    weights, ids = columns  # [B, T, K]; weight 0: an empty place
    exists = weights.sum(-1) > 0
    positions = torch.arange(ids.shape[1], device=device)
    latent_mask = positions < torch.tensor(latents, device=device)[:, None]
    # released code: draws the noise again while the marker is the best of a thought
    ends = latent_mask[..., None] & (ids == policy.marker_ids[0])
    noise = noise_scale * gumbel_like(weights, rng)
    scores = (weights.masked_fill(ends, 0) + 1e-10).log()  # empty places: about -23
    scores = scores + noise.clamp(-LOW, HIGH)
    prompts = [problem["prompt_ids"] for problem in chosen]
    prompt_ids, prompt_mask = left_pad(prompts, policy.lm.pad_id, device)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[..., 0],
        "completion_mask": exists,
        "lengths": exists.sum(1),
        "loss_mask": exists,
        "latent_mask": latent_mask,
        "topk_ids": ids,
        "topk_scores": scores}


def soft_label_loss(logprobs, weights, latent_mask):
    """KL(label || policy) of the latent steps, mean over those of a row: [B, T, K] -> [B].

    weights: the noisy label, the same draw as the input, a constant; logprobs: full vocabulary. A
    one-hot label (chunks of 1, no noise) makes it the cross entropy of the written chain.
    """
    kl = (torch.xlogy(weights, weights) - weights * logprobs).sum(-1)  # [B, T]
    return (kl * latent_mask).sum(1) / latent_mask.sum(1).clamp(min=1)


def sft_step(policy, ddp_policy, optimizer, problems, cfg, step):
    """One supervised update -> (metrics row, no records).

    Loss: soft_label_loss, mean over all demonstrations, plus the cross entropy of marker, answer
    and EOS, mean over all these tokens. The first --cot_steps updates read written chains, and with
    --no-latent all of them do. A round of the encoder has the cross entropy alone, of chunks too.
    """
    started = time.time()
    world_size = dist.get_world_size()
    chosen = next_problems(problems, cfg.sft_batch, (cfg.seed, "sft"), step)
    if cfg.stage == "encoder":
        batch = encoder_batch(chosen, policy.lm.device)
    else:
        rng = make_rng(policy.lm.device, cfg.seed, "sft", step, dist.get_rank())
        is_written = not cfg.latent or step < cfg.cot_steps
        batch = demonstrate(chosen, policy, cfg, is_written, rng)
    is_token = batch["loss_mask"] & ~batch["latent_mask"]
    num_tokens = all_reduce(int(is_token.sum()))  # of all ranks

    policy.train()
    sums = [0.0, 0.0]  # kl, ce
    pieces = micro_batches(batch, range(len(chosen)), cfg.micro_batch, cfg.max_tokens)
    for piece in pieces:
        micro = select_rows(batch, piece)
        ddp_policy.require_backward_grad_sync = piece is pieces[-1]
        losses = ddp_policy(micro, labels=True)
        kl = losses["kl"] / cfg.sft_batch
        ce = losses["ce"] / num_tokens
        ((kl + ce) * world_size).backward()  # DDP averages, but the losses count all ranks
        sums[0] += kl.item()
        sums[1] += ce.item()
    kl, ce = all_reduce(sums)
    loss = kl + ce

    grad_norm = optimizer_step(optimizer, cfg, step)
    if grad_norm is None:
        loss = kl = ce = None  # they may be NaN, which JSON does not have
    row = {
        "kind": "train", "step": step + 1,
        "loss": loss,
        "kl": kl,
        "ce": ce,
        "grad_norm": grad_norm,
        "skipped": int(grad_norm is None),
        "lr": cfg.lr * lr_factor(step, cfg),
        "seconds": time.time() - started}
    return row, []


# === 2c. learned labels ===========================================================================
# --labels encoder: the stage before 2b, as in Latent-SFT. An encoder reads the written chain, and a
# code after each chunk. Its state at a code chooses K ids and their weights: the label. A decoder
# that sees only prompt and labels has to write from each label the chunk that comes next, and after
# the last one the answer. So a label has to hold what the chain has come to, and what follows.

CODE = -1  # stands for a code among ids


def read_order(problem):
    """A problem with N chunks -> what is read of it: encoder_ids, decoder_ids, their positions.

    Encoder: prompt, then each chunk and its code. Decoder: prompt, code 1, chunk 2, code 2, ...,
    chunk N, code N, answer; nobody asks for chunk 1. The positions of the decoder count as if there
    were no chunks between the codes, as there are none later.
    """
    # released code: a closing </think> behind the encoder's last code, which nothing sees
    prompt = problem["prompt_ids"]
    encoder_ids = list(prompt)
    for chunk in problem["chunks"]:
        encoder_ids += [*chunk, CODE]
    decoder_ids = list(prompt)
    positions = list(range(len(prompt)))
    for number, asked in enumerate([*problem["chunks"][1:], problem["answer_ids"]]):
        decoder_ids += [CODE, *asked]
        place = len(prompt) + number  # of the code
        positions += range(place, place + 1 + len(asked))
    return encoder_ids, decoder_ids, positions


def encoder_batch(problems, device):
    """What is read of some problems -> tensors [B, S] with the keys that select_rows needs.

    latent_mask: codes of the decoder; loss_mask: what follows its prompt. 0 fills up the rows on
    the right; the masks below are causal, so nothing of a row sees it.
    """
    rows = [read_order(problem) for problem in problems]
    columns = []
    for lists in zip(*rows):
        tensors = [torch.tensor(row, device=device) for row in lists]
        columns.append(nn.utils.rnn.pad_sequence(tensors, True))
    encoder_ids, decoder_ids, positions = columns
    is_code = decoder_ids == CODE
    return {
        "encoder_ids": encoder_ids,
        "decoder_ids": decoder_ids,
        "positions": positions,
        "latent_mask": is_code,
        "loss_mask": (is_code.cumsum(1) > 0) & (positions > 0),
        "lengths": torch.tensor([max(map(len, row)) for row in rows], device=device),
        "prompt_mask": is_code[:, :0]}  # select_rows shortens no prompt


def induction_mask(is_code):
    """What the encoder sees: is_code [B, S] -> [B, query, key]; a code is seen by itself alone."""
    itself = torch.eye(is_code.shape[1], dtype=torch.bool, device=is_code.device)
    return (~is_code[:, None] | itself).tril()


def supervision_mask(is_code):
    """What the decoder sees: is_code [B, S] -> [B, query, key].

    A chunk sees the code before it and itself; all others see prompt, codes and answer, no chunk.
    """
    number = is_code.cumsum(1)  # 0 in the prompt, then that of the last code
    last = number.amax(1, keepdim=True)  # behind it stands the answer
    in_chunk = (number > 0) & (number < last) & ~is_code
    together = number[:, :, None] == number[:, None]
    return torch.where(in_chunk[..., None], together, ~in_chunk[:, None]).tril()


def hidden_states(body, table, ids, codes, seen, positions=None):
    """Hidden states [B, S, H] of a model without its head.

    ids [B, S]; codes [n, H]: what is fed where ids are CODE; seen [B, query, key] bool; positions
    [B, S] are 0, 1, ... if not given.
    """
    embeds = table(ids.clamp(min=0))
    is_code = (ids == CODE)[..., None]
    embeds = embeds.masked_scatter(is_code, codes.to(embeds.dtype))
    mask = torch.zeros_like(seen, dtype=embeds.dtype)  # added: eager attention misreads booleans
    mask.masked_fill_(~seen, torch.finfo(embeds.dtype).min)
    outputs = body(inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions,
                   use_cache=False)
    return outputs.last_hidden_state


class EncoderPolicy(Policy):
    """The language model as the decoder, and a copy of it as the encoder."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__(lm, tokenizer, cfg)
        self.encoder = copy.deepcopy(lm.base_model)
        self.encoder.set_input_embeddings(self.table)  # there is one space of embeddings
        # released code: a new token, which starts as the mean row, too
        self.code = nn.Parameter(self.table.weight.detach().float().mean(0))  # fed at codes [H]
        self.trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def start_round(self, number):
        """Round 1 trains the encoder, 2 the decoder, which has been as at first, 3 both."""
        for name, p in self.trained:
            half = 2 if name.startswith("lm.") else 1
            p.requires_grad_(number in (half, 3))

    def encode(self, ids):
        """encoder_ids [B, S] -> labels of all codes, row after row: weights, ids [n, K].

        The only gradient is that of the weights: the choice of the ids has none.
        """
        is_code = ids == CODE
        codes = self.code.expand(int(is_code.sum()), -1)
        hidden = hidden_states(self.encoder, self.table, ids, codes, induction_mask(is_code))
        # released code: scores by the input embeddings, the same where they are tied
        best, label_ids = lm_logits(self.lm, hidden[is_code]).topk(self.top_k, -1)
        return best.softmax(-1), label_ids

    def forward(self, batch, labels=True):
        """The loss of a batch of encoder_batch: cross entropy of chunks 2 to N, marker, answer and
        EOS given the labels, a sum. -> as Policy.forward; there is no KL."""
        ids = batch["decoder_ids"]
        is_code = batch["latent_mask"]
        is_asked = batch["loss_mask"] & ~is_code
        with autocast(self.lm):
            weights, label_ids = self.encode(batch["encoder_ids"])
            codes = top_k_mixture(label_ids, weights, self.table)  # [n, H]
            hidden = hidden_states(self.lm.base_model, self.table, ids, codes,
                                   supervision_mask(is_code), batch["positions"])
            logprobs, _ = completion_logprobs(
                self.lm, hidden[:, :-1], ids[:, 1:], is_asked[:, 1:])
        return {"kl": torch.zeros(()), "ce": -logprobs.sum()}

    @torch.no_grad()
    def make_labels(self, problems, size):
        """Labels of all problems, `size` in a pass: [(weights [N, K], ids [N, K])] on the CPU."""
        self.eval()
        labels = []
        for start in range(0, len(problems), size):
            batch = encoder_batch(problems[start : start + size], self.lm.device)
            with autocast(self.lm):
                weights, ids = self.encode(batch["encoder_ids"])
            counts = batch["latent_mask"].sum(1).tolist()
            labels += zip(weights.cpu().split(counts), ids.cpu().split(counts))
        return labels


def learn_labels(policy, problems, eval_problems, settings, cfg):
    """Train encoder and decoder in three rounds, each a run of its own -> problems with labels.

    The language model of the policy becomes the decoder. The labels are made once, after round 3,
    and saved beside the rounds.
    """
    pair = EncoderPolicy(policy.lm, policy.tokenizer, cfg)
    for number in (1, 2, 3):
        once = supervised_config(cfg, f"encoder{number}", cfg.encoder_steps, cfg.encoder_lr)
        once.stage = "encoder"
        pair.start_round(number)
        if dist.get_rank() == 0:
            print(f"learned labels, round {number} of 3")
        trained = latest_checkpoint(Path(once.out_dir))
        train(pair, None, problems, eval_problems, settings, once, trained)
    folder = Path(cfg.out_dir, "labels")
    if dist.get_rank() == 0 and not folder.exists():
        partial = folder.with_suffix(".partial")  # the folder is there completely or not at all
        partial.mkdir(exist_ok=True)
        torch.save(pair.make_labels(problems, cfg.micro_batch), partial / "batch_0.pt")
        partial.rename(folder)
    dist.barrier()
    return with_labels(problems, folder, policy, cfg)


def with_labels(problems, folder, policy, cfg):
    """Problems with the labels of a folder, one each, in their order: weights, ids [N, K].

    Files are those of Latent-SFT: batch_START_END.pt, lists of such pairs [code].
    """
    labels = []
    for file in sorted(Path(folder).glob("batch_*.pt"), key=lambda file: (len(file.name), file)):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            labels += [(weights.float(), ids.long()) for weights, ids in found]
        except Exception as error:  # damaged files raise a dozen kinds
            fail(f"{file}: is no list of labels, pairs of weights and ids ({first_line(error)})")
    if len(labels) != len(problems):
        fail(f"--labels {folder}: must be chunk, encoder, or a folder whose batch_*.pt hold a "
             f"label for each of {len(problems)} problems; it holds {len(labels)}")
    size = labels[0][1].shape[-1]  # K
    for number, (weights, ids) in enumerate(labels):
        same_shape = weights.shape == ids.shape == (len(ids), size)
        is_known = (ids >= 0) & (ids < policy.lm.num_tokens)
        sums = weights.sum(-1)  # about 1: they may be bfloat16
        if not same_shape or not is_known.all() or not sums.allclose(torch.ones(()), atol=0.05):
            fail(f"--labels {folder}: label {number} must be ids of this tokenizer and weights "
                 f"that sum to 1, [latent steps, {size}] each")
    check_support(size, cfg)
    return [{**problem, "label": label} for problem, label in zip(problems, labels)]


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
    """1 if the answer is right and the marker occurs exactly once, else 0."""
    # paper: exact match; released code: also finds an answer in the ids shown at latent steps.
    return float(record["correct"] and record["format_ok"])


def join_batches(batches):
    """Stack batches of different widths: prompts padded on the left, completions on the right."""
    joined = {}
    for name, value in batches[0].items():
        rows = [row for batch in batches for row in batch[name]]
        if value.dim() == 1:
            joined[name] = torch.stack(rows)
        else:
            side = "left" if name.startswith("prompt") else "right"
            joined[name] = nn.utils.rnn.pad_sequence(rows, True, padding_side=side)
    return joined


def dead_groups(batch, cfg):
    """Which groups have equal rewards, and so no advantages -> [N] bool."""
    groups = batch["rewards"].view(-1, cfg.group_size)
    return groups.amin(1) == groups.amax(1)


def replace_dead_groups(policy, problems, batch, records, cfg, step):
    """Replace groups of equal rewards by further draws -> (batch, records of all that was drawn).

    A draw is as large as this rank's share of a step, at random with replacement (released code:
    the next batches of the data). Each rank draws until all its groups are
    live, at most --max_extra_rollouts times, with no collective in here. The size of the batch
    stays: where live groups are too few, the first dead ones fill it.
    """
    device = batch["rewards"].device
    rank = dist.get_rank()
    num_groups = len(dead_groups(batch, cfg))
    draw = 0
    while dead_groups(batch, cfg).any() and draw < cfg.max_extra_rollouts and not stop_requested():
        draw += 1
        rng = make_rng("cpu", cfg.seed, "extra problems", step, rank, draw)
        indices = torch.randint(len(problems), (num_groups,), generator=rng).tolist()
        chosen = [problems[i] for i in indices]
        prompts = [problem["prompt_ids"] for problem in chosen]
        rng = make_rng(device, cfg.seed, "rollout", step, rank, draw)
        extra = rollout(policy, prompts, cfg, rng, cfg.group_size)
        extra_records = grade(extra, chosen, policy.tokenizer, cfg.answer_marker)
        for record in extra_records:
            record["reward"] = reward(record)
        extra["rewards"] = torch.tensor([r["reward"] for r in extra_records], device=device)
        records = records + extra_records

        batch = join_batches([batch, extra])
        live_first = dead_groups(batch, cfg).int().argsort(stable=True)
        best = live_first[:num_groups].sort().values  # in the order in which they were drawn
        rows = torch.arange(len(batch["rewards"]), device=device).view(-1, cfg.group_size)
        batch = select_rows(batch, rows[best].view(-1))
    return batch, records


def group_advantages(rewards, group_size, eps=1e-4):
    """(r - group mean) / (group std + eps), std with ddof = 1.  rewards [B] -> [B]"""
    groups = rewards.view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    # In a group of equal rewards rounding leaves a difference to the mean: exactly 0 instead.
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + eps)
    return torch.where(differ, advantages, 0).view(-1)


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

    Without the method's devices it is one number per completion. The score of a path is its mean
    log-prob in the rollout [eq. 18].
    """
    rewards = batch["rewards"]
    mask = batch["loss_mask"]
    advantages = group_advantages(rewards, cfg.group_size)  # [B]
    if not cfg.latent or cfg.dry_run:  # in a dry run all are cut off
        return advantages[:, None] * mask
    valid = batch["lengths"] < cfg.max_completion_length  # [B] [eq. 9]
    groups = torch.arange(len(rewards), device=rewards.device).view(-1, cfg.group_size)  # rows
    if cfg.mask_invalid:
        for group in groups:
            advantages[group] = valid_advantages(rewards[group], valid[group])
    advantages = advantages[:, None] * mask  # [B, T]
    if cfg.first_token_selection:
        path_scores = (batch["rollout_logprobs"] * mask).sum(1) / mask.sum(1).clamp(min=1)
        for group in groups:
            winner = first_token_winner(path_scores[group], rewards[group] > 0, valid[group])
            if winner is not None:  # eq. 20 silences wrong completions too, as the released code
                others = group[group != group[winner]]
                advantages[others, 0] = 0  # of the first step
    return advantages


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
    if cfg.schedule == "constant":
        return 1.0
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def train_step(policy, ddp_policy, reference, optimizer, problems, cfg, step):
    """One rollout and its update -> (metrics row, records), or (None, None) when told to stop."""
    if cfg.stage in ("encoder", "sft"):
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
    if cfg.max_extra_rollouts > 0:
        batch, records = replace_dead_groups(policy, problems, batch, records, cfg, step)
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
    optimizer.zero_grad(set_to_none=dist.get_world_size() == 1)  # as in `train`
    return None if is_bad else grad_norm


def dry_run(policy, ddp_policy, reference, optimizer, problems, cfg):
    """Two steps with every prompt and completion at its limit -> metrics row: does it fit?

    The optimizer makes its moments at the end of the first step.
    """
    prompt = policy.tokenizer.decode(problems[0]["prompt_ids"])
    policy.eos_ids = policy.eos_ids[:0]  # no completion ends before the limit
    cfg = dataclasses.replace(cfg, stage="rl", max_extra_rollouts=0)
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
            unpunished = cfg.latent and cfg.mask_invalid and row.get("truncated_frac", 0) > 0.5
            progress.complain("over half are cut off, --mask_invalid punishes none", unpunished)
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
    check_trainable(cfg)
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
    if cfg.labels not in ("chunk", "encoder") and cfg.stage != "rl":
        problems = with_labels(problems, cfg.labels, policy, cfg)
    problems = encode_prompts(tokenizer, problems, cfg)
    eval_problems = encode_prompts(tokenizer, eval_problems, cfg)
    settings.update(model_sha=weights_fingerprint(lm), data_sha=data_fingerprint(problems))
    if rank == 0:
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        print(f"{cfg.num_prompts} prompts x {cfg.group_size} completions a step on {world_size} x "
              f"{device}, {len(problems)} training and {len(eval_problems)} evaluation problems")
    if rank == 0 and not cfg.dry_run:
        lock = lock or lock_run(out_dir)  # held until the process ends
    if cfg.stage != "rl" and not cfg.dry_run:
        start = start_config(cfg)
        trained = latest_checkpoint(Path(start.out_dir))
        if resumed and trained and cfg.stage == "all":  # complete; the reference is a copy of it
            load_checkpoint(trained, policy, None, settings, CAN_CHANGE)
        else:
            examples = read_demonstrations(problems, tokenizer, policy, cfg)
            if cfg.labels == "encoder" and cfg.latent:
                examples = learn_labels(policy, examples, eval_problems, settings, cfg)
            result = train(policy, None, examples, eval_problems, settings, start, trained)
            if cfg.stage == "sft":
                return result
        settings["start_sha"] = weights_fingerprint(lm)
    reference = frozen_copy(lm) if cfg.kl_coef > 0 and cfg.lora_rank == 0 else None
    if cfg.kl_coef > 0 and cfg.stage == "all" and cfg.lora_rank > 0:
        reference = frozen_copy(lm)  # without its adapters it would be the model before the start
    return train(policy, reference, problems, eval_problems, settings, cfg, resumed)


if __name__ == "__main__":
    run_program(main)
