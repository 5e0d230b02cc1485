"""LEPO: reinforcement learning in which the first thinking steps are soft mixtures of tokens.

Paper    LEPO, arXiv 2604.17892 (Findings of ACL 2026). [fig.] refers to the objective in its method
         figure, [code] to the authors' code; [ours] marks our own choices.
Idea     The first L_g steps sample no token. Gumbel noise on the log-probs of the K likeliest
         tokens and a softmax give weights z, and the mean embedding under z is the next input. The
         noise makes completions so that rewards can rank them. Then tokens follow as usual.
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
    check_ranks, combine, completion_hidden, completion_logprobs, data_fingerprint, encode_prompts,
    fail, find_resume, frozen_copy, gather, grade, gumbel_like, largest, left_pad, live_rows,
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
    preset: str = "auto"  # where values start: tiny (as here) or another of PRESETS; auto: by model
    train: str = "arithmetic"  # problems: arithmetic, a named set (gsm8k), a file, hub:OWNER/REPO/F
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
    max_prompt_length: int = 128  # tokens; longer prompts are dropped and counted
    max_completion_length: int = 32  # tokens, latent steps included
    temperature: float = 1.0  # of sampling, > 0
    top_k: int = 0  # sample among the k likeliest ids; 0 = all
    top_p: float = 1.0  # then in this nucleus; 1 = off
    lr: float = 3e-4  # AdamW learning rate of the language model
    clip_eps: float = 0.2  # ratio clip; matters with several updates per rollout
    update_epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates in a pass
    kl_coef: float = 0.0  # weight of the KL term, beta; 0 loads no reference
    # the method
    latent_steps: int = 8  # latent positions at the start of a completion, L_g; 0: GRPO [code]
    latent_tau: float = 0.5  # Gumbel-Softmax temperature tau; near 0 one token is fed [code]
    noise_scale: float = 1.0  # factor of the Gumbel noise; at 0, and when greedy, z = pi [ours]
    latent_grad: str = "soft"  # latent score: soft [fig.]; or token, concrete, gumbel, none [ours]
    clip_latents: bool = False  # ratio and clip on latent positions too [ours]
    # Soft Thinking: a decoding mode of eval.py (--mode soft_thinking), not a method to train
    until_marker: bool = False  # latent until the answer marker [ours]
    cold_stop_entropy: float = 0.0  # with it: nats; a step below is calm; 0 = off [ours]
    cold_stop_length: int = 256  # so many calm steps in a row force the marker [ours]
    # optimizer and memory
    adam_beta2: float = 0.99  # AdamW beta2; beta1 is 0.9
    weight_decay: float = 0.0  # of matrices, decoupled
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
        counts = ("update_epochs", "minibatches", "cold_stop_length")
        resolve_config(self, METHOD, counts, self.minibatches)  # fills in "auto", checks the rest
        if not 1e-4 <= self.latent_tau:
            fail(f"--latent_tau {self.latent_tau}: want 0.0001 or more; 0.3 and 0.5 are published")
        if self.latent_grad not in LATENT_GRADS:
            fail(f"--latent_grad {self.latent_grad}: must be one of {', '.join(LATENT_GRADS)}")


PRESETS = {
    "tiny": {},
    "paper": dict(  # the release, for other models [code]; data, marker, evaluation, sizes [ours]
        train="gsm8k", answer_marker="####", steps=99, num_prompts=128, top_k=30, top_p=0.95,
        max_prompt_length=1024, max_completion_length=2048, lr=1e-6, latent_steps=32,
        weight_decay=0.1, warmup_steps=3, micro_batch=8, share_prompts=True, eval_every=5,
        eval_limit=200, eval_batch=64, save_every=25),
}
PRESETS["qwen2.5-3b"] = PRESETS["paper"] | dict(  # the published triples [code]
    model="Qwen/Qwen2.5-3B", latent_steps=64, latent_tau=0.3)
# Computed for 8 GPUs (tests/estimate.py) with --zero: 202 GiB each; with --gradient_checkpointing,
# --micro_batch 2 and --num_prompts 64 as well: 83.
PRESETS["qwen2.5-7b"] = PRESETS["paper"] | dict(model="Qwen/Qwen2.5-7B", latent_steps=64)
PRESETS["llama-3.2-3b"] = PRESETS["paper"] | dict(model="meta-llama/Llama-3.2-3B-Instruct")


def parse_config(argv=None):
    """The settings of a run, from the command line."""
    return parse_flags(Config, PRESETS, __doc__, argv)


def check_trainable(cfg):
    """`fail` on settings that only eval.py can use."""
    if cfg.until_marker:
        fail("--until_marker: Soft Thinking is not trained; see eval.py --mode soft_thinking")
    noiseless = (cfg.noise_scale, cfg.latent_grad, cfg.kl_coef) == (0, "soft", 0)
    if cfg.noise_scale != 1 and not noiseless:
        fail(f"--noise_scale {cfg.noise_scale}: is for eval.py --no-greedy; training wants 1, or 0 "
             "with --latent_grad soft and --kl_coef 0")


# === 2. the method ================================================================================

METHOD_METRICS = ("mixture_size", "survivors", "top_is_shown")
PLAIN_GRPO = {"latent_steps": 0, "until_marker": False}  # the settings that switch the method off
LATENT_GRADS = ("soft", "token", "concrete", "gumbel", "none")  # see latent_logprob


def gumbel_softmax_scores(
        logits, tau, top_k=0, top_p=1.0, temperature=1.0, generator=None, noise_scale=1.0):
    """Perturbed log-probs of the candidates that survive temperature, top-k and top-p [code].

    logits [..., V] -> ids [..., K], u [..., K] float32, constants. u = log pi_S + g on the
    survivors S, over which pi_S sums to 1, and -inf elsewhere; g is iid standard Gumbel noise.
    K = top_k, or V without it. argmax u is an exact sample of pi_S. Without noise (noise_scale 0)
    u = tau log pi_S: mixture_weights divides by tau, so it gives pi_S itself, as in Soft Thinking.
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

    u is constant; logprobs = log pi of the same ids over the *full* vocabulary V, with gradient. S
    are the n candidates with a finite u, g = u - log pi_S the noise that they drew. LEPO is `soft`;
    the others are ablations [ours]. Each kind with its gradient for the logits:
    soft      sum_k z_k log pi_k; z - pi. The mixture is the label of a cross-entropy [fig.].
              Little noise; its mean is too small, for z shares the credit among all that is mixed.
    token     log pi_i, i = argmax u; e_i - pi. REINFORCE as if token i alone had been fed, the
              limit of soft for tau -> 0. Blind to the rest of the mixture.
    concrete  (log density of z) / n; (1 - n q) / n on S, with q = softmax over S of log pi - u.
              1/n of the exact score. Undivided, its noise grows like n.
    gumbel    (log density of u) / n; (v - pi_S sum v) / n, v = 1 - exp(-g): as SofT-GRPO's code.
              Also 1/n of an exact score; concrete is its mean given z, so this has more noise.
    none      0. Latent steps are not trained, only tokens learn, from what the noise brought.
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
    inside = torch.logsumexp(logprobs.masked_fill(~kept, -math.inf), -1, keepdim=True)  # pi(S)
    # g = u - log pi_S
    g = (u - logprobs + inside).masked_fill(~kept, math.inf)  # exp(-inf) = 0: nothing outside S
    return -(g.masked_fill(~kept, 0) + torch.exp(-g)).sum(-1) / n


def candidate_ids(batch):
    """Ids of the candidates, [B, T, K]; where no id is cut off none is stored: k is id k."""
    scores = batch["topk_scores"]
    all_ids = torch.arange(scores.shape[-1], device=scores.device)
    return batch.get("topk_ids", all_ids.expand(scores.shape))


def heaviest_ids(batch):
    """argmax u -> ids [B, T]: the token, or what a mixture holds most of, a sample of pi_S."""
    places = batch["topk_scores"].argmax(-1, keepdim=True)
    return candidate_ids(batch).gather(-1, places)[..., 0]


class Policy(nn.Module):
    """The language model. forward re-scores a rollout with gradient; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.table = lm.get_input_embeddings()
        self.temperature = cfg.temperature
        self.tau = cfg.latent_tau
        self.kind = cfg.latent_grad
        self.num_candidates = min(cfg.top_k or lm.num_tokens, lm.num_tokens)  # K
        if cfg.latent_steps == 0 and not cfg.until_marker:
            self.num_candidates = 1  # the sampled token is the only candidate
        # Where every id is a candidate, candidate k is id k.
        some_are_cut = self.num_candidates < lm.num_tokens or cfg.top_p < 1
        self.stores_ids = some_are_cut or cfg.until_marker
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
        return top_k_mixture(candidate_ids(batch), weights, table or self.table)

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
                self.lm, self.hidden(batch), candidate_ids(batch), batch["loss_mask"],
                self.temperature)  # [B, T, K], [B, T]
        tokens = latent_logprob(u, candidates, self.tau, "token")
        latents = latent_logprob(u, candidates, self.tau, self.kind)
        logprobs = torch.where(batch["latent_mask"], latents, tokens)
        return {"logprobs": logprobs, "token_logprobs": tokens, "entropy": entropy}


def start_state(num_rows, policy, cfg):
    """Nothing: the position alone decides which steps are latent. Soft Thinking needs more:

    has the marker appeared; the last ids; steps in a row of low entropy; ids of the marker that
    were forced so far.
    """
    if not cfg.until_marker:
        return {}
    last_ids = torch.full((num_rows, policy.marker.width), -1, device=policy.lm.device)
    zeros = torch.zeros_like(last_ids[:, 0])
    return {"marker_seen": zeros.bool(), "last_ids": last_ids, "calm": zeros, "forced": zeros}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    `hidden` [b, H], which made the logits, is unused here.
    """
    if cfg.until_marker:
        return soft_thinking_input(policy, logits, state, cfg, rng, greedy)
    step = latent_input if t < cfg.latent_steps else token_input
    ids, embeds, record = step(policy, logits, cfg, rng, greedy)
    return ids, embeds, record, state


def token_input(policy, logits, cfg, rng, greedy):
    """A sampled token, or the likeliest, and its embedding -> ids [b], embeds [b, H], record."""
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, K]; K = V without top-k
    choice = probs.argmax(-1) if greedy else sample(probs, rng)
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / cfg.temperature, -1)  # [b, V]
    zero = torch.zeros_like(logprobs[:, :1])
    record = {
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),  # every step was sampled
        "latent_mask": torch.zeros_like(ids, dtype=torch.bool),
        "rollout_logprobs": logprobs.gather(1, ids[:, None])[:, 0],
    }
    if policy.stores_ids:
        padding = (0, policy.num_candidates - 1)  # one candidate, K - 1 without weight
        record["topk_ids"] = F.pad(ids[:, None], padding)  # [b, K]
        record["topk_scores"] = F.pad(zero, padding, value=-math.inf)
    else:
        nothing = torch.full_like(logprobs, -math.inf)
        record["topk_scores"] = nothing.scatter(1, ids[:, None], zero)  # [b, V]
    return ids, policy.table(ids), record


def latent_input(policy, logits, cfg, rng, greedy):
    """A mixture of embeddings (greedy: without noise) -> ids [b], embeds [b, H], record.

    The id shown is the likeliest before the noise: graded with the text, and the end of the row if
    it is EOS, but neither fed nor scored for itself [code].
    """
    noise_scale = 0.0 if greedy else cfg.noise_scale
    topk_ids, topk_scores = gumbel_softmax_scores(
        logits, policy.tau, cfg.top_k, cfg.top_p, cfg.temperature, rng, noise_scale)  # [b, K] each
    weights = mixture_weights(topk_scores, policy.tau)
    embeds = top_k_mixture(topk_ids, weights, policy.table)
    logprobs = torch.log_softmax(logits / cfg.temperature, -1)
    logprobs = logprobs.gather(1, topk_ids)  # [b, K]
    likeliest = logprobs.argmax(-1, keepdim=True)  # before the noise
    ids = topk_ids.gather(1, likeliest)[:, 0]
    score = latent_logprob(topk_scores, logprobs, policy.tau, policy.kind)  # [b]
    mask = torch.ones_like(ids, dtype=torch.bool)
    record = {
        "loss_mask": mask,
        "latent_mask": mask,
        "topk_scores": topk_scores,
        "rollout_logprobs": score,
    }
    if policy.stores_ids:
        record["topk_ids"] = topk_ids
    return ids, embeds, record


def soft_thinking_input(policy, logits, state, cfg, rng, greedy):
    """As next_input, but latent until the answer marker: Soft Thinking (arXiv 2505.15778).

    The id that completes the marker is fed plain, like all that follow. Cold stop: from the
    cold_stop_length-th step in a row whose entropy is below cold_stop_entropy, the marker's ids are
    fed one by one, whatever the model says. Only eval.py decodes so; the step lives here because it
    is this script's latent step, and any other file would need a rollout of its own.
    """
    shown, mixed, record = latent_input(policy, logits, cfg, rng, greedy)
    sampled, _, token_record = token_input(policy, logits, cfg, rng, greedy)
    seen = state["marker_seen"]
    forced = state["forced"]  # ids of the marker that were fed so far
    entropy = torch.distributions.Categorical(logits=logits / cfg.temperature).entropy()  # [b]
    calm = torch.where(entropy < cfg.cold_stop_entropy, state["calm"] + 1, 0)
    force = ~seen & ((forced > 0) | (calm >= cfg.cold_stop_length))
    marker_ids = policy.marker_ids[forced % len(policy.marker_ids)]
    free = torch.where(seen, sampled, shown)
    ids = torch.where(force, marker_ids, free)
    last_ids = torch.cat([state["last_ids"][:, 1:], ids[:, None]], 1)
    seen = seen | policy.marker.completed(last_ids)
    latent = ~seen & ~force
    embeds = torch.where(latent[:, None], mixed, policy.table(ids))
    forced = forced + force.long()
    state = {"marker_seen": seen, "last_ids": last_ids, "calm": calm, "forced": forced}
    token_record["topk_ids"][:, 0] = ids
    token_record["loss_mask"] = ~force
    for name, value in token_record.items():
        is_mixed = latent.view(-1, *[1] * (value.dim() - 1))
        record[name] = torch.where(is_mixed, record[name], value)
    return ids, embeds, record, state


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
    """Loss [B, T] of each position, not yet reduced.

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
    trained = [p for p in policy.lm.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() == 1]
    groups = [(matrices, cfg.lr, cfg.weight_decay), (vectors, cfg.lr, 0.0)]
    return [{"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups if params]


@torch.no_grad()
def measure(policy, outputs, batch, cfg):
    """Metrics of a micro-batch -> {name: (values [B, T], mask [B, T] of those that count)}.

    mixture_size: 1 / sum z^2, in tokens. survivors: n. top_is_shown: is argmax u the id shown?
    """
    found = {"entropy": (outputs["entropy"], batch["loss_mask"])}
    if cfg.kl_coef > 0:
        found["kl"] = (kl_estimate(outputs, batch), batch["loss_mask"])
    weights = mixture_weights(batch["topk_scores"], policy.tau)  # [B, T, K]
    is_shown = heaviest_ids(batch) == batch["completion_ids"]
    values = {"mixture_size": 1 / weights.square().sum(-1),
              "survivors": batch["topk_scores"].isfinite().sum(-1),
              "top_is_shown": is_shown.float()}
    for name, value in values.items():
        found[name] = (value, batch["latent_mask"])
    return found


def describe(policy, outputs, batch, cfg):
    """What latent steps were fed, for eval.py show -> ids, weights [B, T, K] of the mixtures."""
    return candidate_ids(batch), mixture_weights(batch["topk_scores"], policy.tau)


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
    """1 if the answer is right, else 0; the graded text holds the shown latent ids too [code]."""
    return float(record["correct"])


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
