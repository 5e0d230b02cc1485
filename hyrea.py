"""HyRea: a model that skips its predictable steps, thinking them in hidden states instead of text.

Paper    HyRea, Zhao et al., ICLR 2026, OpenReview lebJ6wz1vj. The text is public: [sec.], [eq.],
         [alg.], [tab.], [fig.] name its places, [ours] is what we settled. The address of the code
         is public (zhaoyiran924/HyRea); the code could not be read for this implementation.
Idea     A chain of thought has steps that the model can foresee (low entropy) and steps that it
         must work out. The former become <start-latent> c x <latent> <end-latent>: at a latent slot
         the input is the last hidden state, no token. When to switch is learned, by RL too.
GRPO +   1. the hidden state that decided a position is the next input          next_input
         2. updates recompute latents with gradient, round by round             Policy.hidden
         3. latents and a forced <end-latent> are not sampled: not in the loss  Policy.score
         4. reward = accuracy + format + use of latents                         reward_parts
Start    cold start, section 2b: the k least uncertain steps of written chains  replace_steps
         are replaced, k and the data grow by the round                         round_of
Differs  who ranks the steps on tiny, one latent a span, rewards: the table in docs/hyrea.md.
Run      python hyrea.py                            # both stages, tiny model, two CPU cores
         python hyrea.py --replace random           # the ablation: any steps, not foreseeable ones
         python hyrea.py --replace block --end_latent sampled     # Coconut: one span for the chain
         python hyrea.py --max_replaced_steps 0     # the explicit baseline: written chains, GRPO
"""

import dataclasses
import math
import os
import re
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from common import (
    INSTRUCTION, Progress, RoomyCache, add_up, all_reduce, autocast, candidate_scores, check_ranks,
    checkpoint_settings, combine, completion_hidden, completion_logprobs, data_fingerprint,
    embed_scale, encode_prompts, fail, find_resume, first_of_each, frozen_copy, gather, grade,
    largest, latest_checkpoint, left_pad, live_rows, lm_hidden, lm_logits, load_checkpoint,
    load_method, load_model, load_problems, lock_run, log_rows, lora_disabled, make_rng, maxima,
    means, micro_batches, next_problems, open_run, parse_flags, peak_memory, record_sums,
    resolve_config, run_program, sample, save_checkpoint, select_rows, setup_distributed,
    stop_agreed, stop_requested, summarise, taught_answer, warn, weights_fingerprint)

METHOD = Path(__file__).stem

# === 1. config ====================================================================================


@dataclasses.dataclass
class Config:
    """Every setting; each is a command-line flag of the same name. The values train `tiny`."""

    # model, data, length of the run
    model: str = "tiny"  # hub id, folder, checkpoint of ours, or tiny (0.5M, trained at first use)
    preset: str = "auto"  # where values start: tiny (as here), paper; auto chooses by the model
    train: str = "arithmetic-restated:3"  # problems: a named set (gsm8k), a file, hub:OWNER/REPO/F
    eval_data: str = ""  # evaluation problems; "" = the test split of --train
    answer_marker: str = "</think>"  # text that ends the thinking and opens the answer
    instruction: str = INSTRUCTION  # what a prompt asks for, "" = nothing; {marker} is filled in
    template_args: str = ""  # JSON object for the chat template, as {"enable_thinking": false}
    prompt_suffix: str = ""  # text after the rendered prompt, as <think>
    prompt_date: str = "2025-01-01"  # date that a chat template writes, so that no day changes it
    steps: int = 120  # rollouts, each followed by its updates
    seed: int = 0  # all randomness is a function of it, the step and the rank
    # rollout and update
    num_prompts: int = 16  # problems in a step, over all ranks
    group_size: int = 8  # completions per problem, G
    max_prompt_length: int = 128  # tokens; longer prompts are dropped and counted
    max_completion_length: int = 40  # tokens, latent steps included
    temperature: float = 1.0  # of sampling, > 0
    top_k: int = 0  # sample among the k likeliest ids; 0 = all
    top_p: float = 1.0  # then in this nucleus; 1 = off
    lr: float = 3e-4  # AdamW learning rate of the language model
    clip_eps: float = 0.2  # ratio clip; matters with several updates per rollout
    update_epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates in a pass
    kl_coef: float = 0.0  # weight of the KL term, beta; 0 loads no reference
    # the method
    stage: str = "all"  # sft: cold start, rl: from one (--model its folder), all: both [alg. 1]
    max_replaced_steps: int = 3  # steps a chain may lose, S [alg. 1; value ours]; 0 = no latents
    max_replaced_share: float = 1.0  # nor more than this share of its steps, rounded down [ours]
    latents_per_step: int = 1  # latents for each replaced step, c [sec. 3.1]; 8 fails [fig. 7]
    replace: str = "entropy"  # or random [tab. 2]; all: in order [ours]; block: one span [tab. 1]
    merge_spans: bool = False  # neighbours share one span of several latents [sec. 5.1]
    max_entropy: float = 0.0  # replace only steps below it, nats, if ranked; 0 = no bound [ours]
    end_latent: str = "forced"  # <end-latent>: forced after c slots, or sampled up to there [ours]
    latent_rms: bool = False  # scale a latent to the size of an embedding row [ours]
    replay_latents: bool = False  # stored latents, constants: gradient off by 7-49 % (tiny) [ours]
    reward_accuracy: float = 1.0  # weight of a right answer [sec. 3.2; value ours]
    reward_format: float = 0.2  # weight of exactly one marker and an end [sec. 3.2; value ours]
    reward_latent: float = 0.2  # weight of using latents [sec. 3.2; value ours]
    latent_reward: str = "any"  # 1 for any switch, or frac: share of S switches [ours]
    # the cold start
    sft_steps: int = 800  # updates, over all rounds [ours]
    sft_rounds: int = 10  # round n replaces n steps, at most S; 0 = S + 1 rounds [alg. 1]
    sft_growth: float = 0.0  # data a round adds, paper 0.1 [alg. 1]; 0 = the last round has all
    sft_batch: int = 64  # demonstrations in an update, over all ranks [sec. 4.1: 32]
    sft_lr: float = 2e-3  # learning rate [sec. 4.1: 4e-7], cosine after 5 % warm-up [ours]
    sft_save_every: int = 400  # updates between checkpoints of the cold start [ours]
    marker_weight: float = 4.0  # weight of both span markers in the loss [sec. 4.1]
    marker_init: str = ""  # tokens whose rows the span markers start as; "" = the mean row [ours]
    marker_lr: float = 1.0  # factor on the learning rate of the markers' rows [ours]
    label_ends: bool = False  # label <end-latent> even where it is forced [sec. 4.1; tiny: off]
    entropy_once: bool = True  # rank by the model after round 0 [ours]; off: in training [alg. 1]
    # optimizer and memory
    adam_beta2: float = 0.99  # AdamW beta2; beta1 is 0.9
    weight_decay: float = 0.0  # of matrices, decoupled
    warmup_steps: int = -1  # linear warm-up of all rates, then a cosine to 0; -1 = a tenth of steps
    max_grad_norm: float = 1.0  # the global gradient norm is clipped to it
    lora_rank: int = 0  # 0 = full fine-tuning; alpha = 2 x rank
    train_embeddings: bool = False  # train the embedding table and head too (not with LoRA)
    micro_batch: int = 128  # sequences in one forward pass on one rank
    max_tokens: int = 0  # padded tokens in one forward pass on one rank; 0 = no bound
    zero: bool = False  # spread AdamW's moments over the ranks: 8 bytes a parameter / ranks on each
    gradient_checkpointing: bool = False  # recompute layers in backward: less memory, more time
    share_prompts: bool = False  # in updates, encode each prompt once for its whole group
    # evaluation
    eval_every: int = 20  # steps; also before the first and after the last
    eval_limit: int = 512  # problems; 0 = all
    eval_batch: int = 512  # problems decoded together on one rank
    num_samples: int = 1  # completions per evaluation problem
    greedy: bool = True  # evaluate with argmax instead of sampling
    # the run
    out_dir: str = ""  # run folder; "" = runs/<script>-<model>-s<seed>
    save_every: int = 60  # steps between checkpoints; one is also written at the end
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
        counts = ("update_epochs", "minibatches", "sft_steps", "sft_batch", "sft_save_every")
        resolve_config(self, METHOD, counts, self.minibatches)  # fills in "auto", checks the rest
        choices = {"stage": "sft rl all", "replace": "entropy random all block",
                   "end_latent": "forced sampled", "latent_reward": "any frac"}
        for name, values in choices.items():
            value = getattr(self, name)
            if value not in values.split():
                fail(f"--{name} {value}: must be one of {values}")
        if self.sft_rounds == 0:
            self.sft_rounds = self.max_replaced_steps + 1  # k = 0 .. S
        if len(self.marker_init.split()) not in (0, 2):
            fail(f"--marker_init {self.marker_init!r}: want two texts, one for each end of a span, "
                 "as '<< >>'")
        if self.replace == "block":
            self.merge_spans = True
        if self.merge_spans and self.end_latent == "forced":  # after c slots, so no span is longer
            fail("--merge_spans, --replace block: need --end_latent sampled")


PRESETS = {
    "tiny": {},
    "paper": dict(  # Qwen2.5-7B-Instruct. Rates, batches, group, temperature, rounds [sec. 4.1,
        # alg. 1]; GSM8K, lengths, the number of updates (RL: one pass), S, the markers' rows [ours]
        # Computed for 8 GPUs (tests/estimate.py) with --zero: 152 GiB each; with
        # --gradient_checkpointing, --micro_batch 2 and --num_prompts 64 as well: 89.
        train="gsm8k", answer_marker="####", steps=58, num_prompts=128, max_prompt_length=512,
        max_completion_length=1024, lr=1e-6, micro_batch=8, share_prompts=True, eval_every=10,
        eval_limit=200, eval_batch=64, save_every=20, max_replaced_steps=5, sft_steps=1000,
        sft_rounds=0, sft_growth=0.1, sft_batch=32, sft_lr=4e-7, sft_save_every=250,
        label_ends=True, entropy_once=False, marker_init="<< >>", marker_lr=10.0),
}


def parse_config(argv=None):
    """The settings of a run, from the command line."""
    return parse_flags(Config, PRESETS, __doc__, argv)


# === 2. the method ================================================================================

METHOD_METRICS = ("latent_size", "switch_entropy")
PLAIN_GRPO = {"max_replaced_steps": 0}  # the settings that switch the method off
MARKERS = ("<start-latent>", "<end-latent>", "<latent>")


def pick(states, columns):
    """states [B, S, H], columns [B, T] -> [B, T, H], in each row the states at its columns."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def embedding_size(table, num_tokens):
    """Root mean square of what an embedding module makes of the tokenizer's ids; constant."""
    weight = table.weight.detach()[:num_tokens]
    return weight.float().square().mean().sqrt() * embed_scale(table)


def close_gaps(cache, seen):
    """Move what each row has cached to the right, over its gaps: mask [B, S] -> mask [B, <= S].

    A gap is a column that was fed for other rows only. Windows and ALiBi count columns, so inside a
    row there must be none. Columns that are gaps in all rows go.
    """
    longest = int(seen.sum(1).max())
    order = seen.int().argsort(dim=1, stable=True)[:, -longest:]  # gaps first
    for layer in cache.layers:  # keys, values [B, heads, S, size]
        layer.keys = layer.keys.take_along_dim(order[:, None, :, None], 2)
        layer.values = layer.values.take_along_dim(order[:, None, :, None], 2)
    return seen.gather(1, order)


class HeadWithout:
    """The head of a language model by which some ids have no probability.

    It takes the model's place in completion_logprobs, which asks a model only for what is below.
    """

    head_scale, softcap = 1.0, None  # lm_logits has applied the model's own

    def __init__(self, lm, ids):
        self.lm = lm
        self.num_tokens = lm.num_tokens
        self.ids = ids  # [n]

    def get_output_embeddings(self):
        return self.logits

    def logits(self, hidden):
        """hidden [..., H] -> logits [..., V]"""
        # exp(-1e4) is 0 as well, and -inf would make the entropy 0 x inf = NaN.
        return lm_logits(self.lm, hidden).index_fill(-1, self.ids, -1e4)


class RoundCache(DynamicCache):
    """Keys and values of the rounds before, and in `grown` with those of one round as well.

    Nothing is changed in place. Checkpointed layers repeat a round in backward, and they must find
    the cache as it was before that round.
    """

    def __init__(self, past=None):
        super().__init__(past)
        self.grown = {}  # {layer: (keys, values)}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """The layer's new keys and values [B, heads, s, d] -> all that it may read."""
        if layer_idx < len(self.layers):
            past = self.layers[layer_idx]
            keys = torch.cat([past.keys, keys], -2)
            values = torch.cat([past.values, values], -2)
        self.grown.setdefault(layer_idx, (keys, values))  # of the first run, not of one in backward
        return keys, values


class Policy(nn.Module):
    """Language model with three more tokens. forward re-scores a rollout; DDP wraps this module."""

    def __init__(self, lm, tokenizer, cfg):
        super().__init__()
        self.cfg = cfg
        if cfg.max_replaced_steps:  # no special tokens: those would be missing in the graded text
            tokenizer.add_tokens([AddedToken(m, normalized=False) for m in MARKERS])
            lm.num_tokens = len(tokenizer)
            if lm.num_tokens > lm.get_input_embeddings().num_embeddings:  # no spare rows
                lm.resize_token_embeddings(lm.num_tokens, mean_resizing=False)
        self.lm = lm
        self.tokenizer = tokenizer
        self.table = lm.get_input_embeddings()
        self.eos_ids = torch.tensor(lm.eos_ids, device=lm.device)
        vocabulary = tokenizer.get_vocab()
        marker_ids = [vocabulary.get(marker, -1) for marker in MARKERS]  # -1: not in it
        self.start_id, self.end_id, self.latent_id = marker_ids
        self.markers = torch.tensor(marker_ids, device=lm.device)

        # Ids that are never a choice: in the text <latent> and <end-latent>, in a span all others.
        banned = [self.latent_id, self.end_id]
        banned_in_span = [i for i in range(lm.num_tokens) if i not in banned]
        if not cfg.max_replaced_steps:
            banned.append(self.start_id)  # explicit, but the vocabulary may have the markers
        banned = [i for i in banned if i >= 0]
        self.banned = torch.tensor(banned, dtype=torch.long, device=lm.device)
        self.banned_in_span = torch.tensor(banned_in_span, device=lm.device)

        start = checkpoint_settings(cfg.model)  # {} unless ours, or a fork's
        self.knows_markers = start.get("max_replaced_steps", 0) > 0
        for module in (self.table, lm.get_output_embeddings()):
            module.weight.requires_grad_(cfg.train_embeddings)
            if cfg.max_replaced_steps:
                self.train_markers(module)
        # [] or [the model after round 0], see sft_step. A list hides it from DDP and checkpoints.
        self.ranker = []
        if cfg.gradient_checkpointing and cfg.max_replaced_steps:
            for module in lm.modules():  # transformers would take the cache away from its layers
                module._can_checkpoint_with_cache = True
            lm.base_model.gradient_checkpointing = False  # the layers keep their own switch

    def train_markers(self, module):
        """Train the rows of the markers in the embedding table or head, and no other row of it.

        They learn what no other token means, <latent> only as an output. At first they are the mean
        of all other rows: neither likely nor unlikely. A pretrained model learns the span markers
        sooner if they start as tokens that it expects in their place (--marker_init).
        """
        module.float()  # as all that learns, also in a bfloat16 model with adapters
        weight = module.weight.requires_grad_()
        if not self.knows_markers:
            weight.data[self.markers] = weight.data[: int(self.markers.min())].mean(0)
            for marker, text in zip(self.markers, self.cfg.marker_init.split()):
                first, *_ = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                weight.data[marker] = weight.data[first]
        if not self.cfg.train_embeddings:
            weight.register_hook(self.only_markers)

    def only_markers(self, grad):
        """Gradient of the embedding table or head [rows, H], 0 but for the rows of the markers."""
        return torch.zeros_like(grad).index_put((self.markers,), grad[self.markers])

    def latent_input(self, hidden, lm=None):
        """Hidden state -> the input of a latent slot, [.., H]: itself, or scaled (--latent_rms)."""
        if not self.cfg.latent_rms:
            return hidden
        table = (lm or self.lm).get_input_embeddings()
        wanted = embedding_size(table, self.lm.num_tokens)
        size = hidden.float().square().mean(-1, keepdim=True).sqrt()
        return hidden * (wanted / size)

    def hidden(self, batch, lm=None):
        """The hidden states [B, T, H] that decide each completion position; gradients on.

        A latent slot reads the hidden state of the slot before it, so the slots of a row are fed in
        rounds: round n feeds the n-th latent slot and the tokens up to the next one, in all rows at
        once, on one growing cache. Gradients run back through the chain of latents. Two rows,
        S E markers, L latents, a-e tokens:   a S L E b S L E c  is fed as  a S | L E b S | L E c
                                              d e S L E                     d e S | L E | (gap)
        Windows and ALiBi count columns, so the gaps of a round go before the next. A Llama has
        neither: it is spared the copies, and the published numbers stay as they are.
        """
        lm = lm or self.lm
        table = lm.get_input_embeddings()
        latent = batch["latent_mask"] & batch["completion_mask"]
        if "latent_embeds" in batch:  # --replay_latents: constants, one pass
            tokens = table(batch["completion_ids"])
            embeds = torch.where(latent[..., None], batch["latent_embeds"].to(tokens.dtype), tokens)
            return completion_hidden(lm, batch, embeds)
        width = batch["prompt_ids"].shape[1]
        # the last position of a completion decides nothing: not fed. S = P + T - 1 slots
        inputs = table(torch.cat([batch["prompt_ids"], batch["completion_ids"][:, :-1]], 1))
        exists = torch.cat([batch["prompt_mask"], batch["completion_mask"][:, :-1]], 1)  # [B, S]
        positions = (exists.long().cumsum(1) - 1).clamp(min=0)
        round_of_slot = F.pad(latent[:, :-1], (width, 0)).cumsum(1)  # [B, S]
        columns = torch.arange(exists.shape[1], device=exists.device)
        cache = RoundCache() if round_of_slot.any() else None  # a single round needs none
        num_fed = 0  # columns fed in the rounds before
        seen = exists[:, :0]  # which of these are slots, in each row
        column_of_slot = torch.zeros_like(positions)  # among all that is fed
        pieces = []  # hidden states of the rounds
        if lm.share_prompts:  # each prompt once, for all its rows; the rounds are what follows it
            if cache is None:
                return completion_hidden(lm, batch, table(batch["completion_ids"]))
            rows, prompt_of = first_of_each(batch["prompt_ids"], batch["prompt_mask"])
            hidden = lm_hidden(lm, inputs[rows, :width], exists[rows, :width], cache=cache)
            pieces = [hidden[prompt_of, -1:]]  # it decides the first position
            num_fed = 1
            grown = cache.grown.values()
            cache = RoundCache([(keys[prompt_of], values[prompt_of]) for keys, values in grown])
            seen = exists[:, :width]
            exists = exists & (columns >= width)
        for number in range(int(round_of_slot.max()) + 1):
            # In each row one run of slots, or none.
            is_fed = exists & (round_of_slot == number)  # [B, S]
            first = is_fed.int().argmax(1, keepdim=True)  # [B, 1]
            count = is_fed.sum(1, keepdim=True)
            offsets = columns[: int(count.max())]
            slots = (first + offsets).clamp(max=len(columns) - 1)  # [B, s]
            embeds = pick(inputs, slots)  # [B, s, H]
            if number > 0 and lm.config.model_type != "llama":
                seen = close_gaps(cache, seen)
            if number > 0:  # the first slot is latent: its input ends the row's round before
                embeds = torch.cat([self.latent_input(last, lm), embeds[:, 1:]], 1)
            column_of_slot = torch.where(is_fed, num_fed + columns - first, column_of_slot)
            num_fed += len(offsets)
            seen = torch.cat([seen, offsets < count], 1)
            pieces.append(lm_hidden(lm, embeds, seen, positions.gather(1, slots), cache))
            last = pick(pieces[-1], (count - 1).clamp(min=0))  # [B, 1, H]
            if cache is not None:
                cache = RoundCache(cache.grown.values())
        return pick(torch.cat(pieces, 1), column_of_slot[:, width - 1 :])

    def opened(self, ids):
        """ids [B, T] -> [B, T], the column of the last <start-latent> up to each; 0 if none."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(ids == self.start_id, columns, 0).cummax(1).values

    def is_slot(self, ids):
        """ids [B, T] -> [B, T], may <latent> stand here? Only so far behind <start-latent>."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        return columns - self.opened(ids) <= span_limit(self.cfg)

    def score(self, hidden, batch, lm, labels=False):
        """-> log-probs [B, T] of completion_ids, entropy [B, T] of the choices; 0 elsewhere.

        Scored as sampled, at --temperature: a choice in the text is never <end-latent> or <latent>,
        one in a span (--end_latent sampled) is one of these two. labels: those of the cold start,
        at temperature 1. There a forced <end-latent> competes with all text.
        """
        ids = batch["completion_ids"]
        temperature = self.cfg.temperature
        banned_in_text = self.banned
        if labels:
            temperature = 1.0
            banned_in_text = self.banned[:1]  # <latent>
        in_span = self.is_slot(ids) & torch.isin(ids, self.banned)
        text_mask = batch["loss_mask"] & ~in_span
        span_mask = batch["loss_mask"] & in_span
        text_head = HeadWithout(lm, banned_in_text)
        span_head = HeadWithout(lm, self.banned_in_span)
        text_logprobs, text_entropy = completion_logprobs(
            text_head, hidden, ids, text_mask, temperature)
        span_logprobs, span_entropy = completion_logprobs(
            span_head, hidden, ids, span_mask, temperature)
        return text_logprobs + span_logprobs, text_entropy + span_entropy

    def forward(self, batch, labels=False):
        """-> {"logprobs" [B, T], "entropy" [B, T] (nats), "size" [B, T]}.

        size: root mean square of the hidden state that a latent slot reads; constant.
        """
        with autocast(self.lm):
            hidden = self.hidden(batch)
            logprobs, entropy = self.score(hidden, batch, self.lm, labels)
        size = hidden.detach().float().square().mean(-1).sqrt()
        return {"logprobs": logprobs, "entropy": entropy, "size": size}


def span_limit(cfg):
    """The most latents in a span: c; of merged ones, c for each step that a chain may lose."""
    if not cfg.merge_spans:
        return cfg.latents_per_step
    *_, most_replaced = round_of(cfg.sft_steps, cfg)
    return cfg.latents_per_step * max(1, most_replaced)


def start_state(num_rows, policy, cfg):
    """What each row remembers: latent slots left in its span; 0: <end-latent> is due; -1: none."""
    return {"left": torch.full((num_rows,), -1, device=policy.lm.device)}


def next_input(policy, logits, hidden, t, state, cfg, rng, greedy):
    """One step of the b live rows: logits [b, V] -> ids [b], next input [b, H], record, new state.

    <start-latent> is sampled like any token. It opens a span: slots <latent>, whose input is the
    hidden state [b, H] that decided them, then <end-latent>. These ids are given, not sampled, so
    they are not scored; with --end_latent sampled each slot is a choice: <latent> or <end-latent>.
    """
    left = state["left"]  # [b]
    is_text = torch.ones_like(logits, dtype=torch.bool).index_fill(1, policy.banned, False)
    in_text = left < 0
    allowed = torch.where(in_text[:, None], is_text, ~is_text)  # [b, V]
    logits = logits.masked_fill(~allowed, -math.inf)
    scores, candidates = candidate_scores(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    probs = scores.softmax(-1)  # [b, K]; K = V without top-k
    choice = probs.argmax(-1) if greedy else sample(probs, rng)
    ids = choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / cfg.temperature, -1)  # [b, V]
    logprobs = logprobs.gather(1, ids[:, None])[:, 0]  # [b]

    # In a span the state decides what comes, not the sample.
    is_sampled = in_text
    if cfg.end_latent == "sampled":
        is_sampled = left != 0
    due = torch.where(left == 0, policy.end_id, policy.latent_id)
    ids = torch.where(is_sampled, ids, due)
    left = (left - 1).clamp(min=-1)
    left = torch.where(ids == policy.end_id, -1, left)
    left = torch.where(ids == policy.start_id, span_limit(cfg), left)

    is_latent = ids == policy.latent_id
    latent_embeds = policy.latent_input(hidden).to(policy.table.weight.dtype)
    embeds = torch.where(is_latent[:, None], latent_embeds, policy.table(ids))
    is_read = t + 1 < cfg.max_completion_length  # nothing follows the last id: it is not latent
    record = {
        "loss_mask": is_sampled,
        "latent_mask": is_latent & is_read,
        "rollout_logprobs": logprobs.masked_fill(~is_sampled, 0),
    }
    if cfg.replay_latents:
        record["latent_embeds"] = latent_embeds * is_latent[:, None]
    return ids, embeds, record, {"left": left}


@torch.no_grad()
def reference_logprobs(policy, reference, batch, cfg):
    """Log-probs [B, T] under the reference: a frozen copy, or (None) the model without adapters.

    It reads its own latents, for they are a function of its weights and of the tokens before.
    """
    lm = policy.lm if reference is None else reference
    adapters = lora_disabled(lm) if reference is None else nullcontext()  # a copy keeps its own
    batch = {name: value for name, value in batch.items() if name != "latent_embeds"}
    with adapters, autocast(lm):
        hidden = policy.hidden(batch, lm)
        logprobs, _ = policy.score(hidden, batch, lm)
    return logprobs


def kl_estimate(outputs, batch):
    """k3 estimate [B, T] of KL(policy || reference): exp(d) - d - 1 >= 0, d = reference - now."""
    difference = batch["ref_logprobs"] - outputs["logprobs"]
    return torch.exp(difference) - difference - 1


def policy_loss(outputs, batch, cfg):
    """Loss [B, T] of each position, not yet reduced: the clipped ratio times the advantage.

    ratio = exp(logprobs - old_logprobs); with one update per rollout the old ones are today's. The
    likelihood of a completion is the product over its sampled tokens, given latents that follow
    from the weights. So leaving latents out is exact, if they are recomputed with gradient and the
    samples are not cut by top-k or top-p. paper [eq. 6]: no division by the length; here a mean.
    """
    # paper: the ratio in eq. 6 is that of whole outputs, with no KL term; here each token has its
    # own, and --kl_coef is 0 unless asked for.
    logprobs, advantages = outputs["logprobs"], batch["advantages"]
    ratio = torch.exp(logprobs - batch.get("old_logprobs", logprobs.detach()))
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if cfg.kl_coef > 0:
        loss = loss + cfg.kl_coef * kl_estimate(outputs, batch)
    return loss


def param_groups(policy, cfg):
    """Optimizer groups: matrices, vectors, embeddings; no decay of rows that are not trained."""
    trained = [p for p in policy.lm.parameters() if p.requires_grad]
    tables = {policy.table.weight, policy.lm.get_output_embeddings().weight}
    embeddings = [p for p in trained if p in tables]
    matrices = [p for p in trained if p.dim() > 1 and p not in tables]
    vectors = [p for p in trained if p.dim() == 1]
    table_lr, table_decay = cfg.lr * cfg.marker_lr, 0.0
    if cfg.train_embeddings:
        table_lr, table_decay = cfg.lr, cfg.weight_decay
    groups = [(matrices, cfg.lr, cfg.weight_decay), (vectors, cfg.lr, 0.0),
              (embeddings, table_lr, table_decay)]
    return [{"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups if params]


@torch.no_grad()
def measure(policy, outputs, batch, cfg):
    """Metrics of a micro-batch -> {name: (values [B, T], mask [B, T] of those that count)}.

    latent_size: root mean square of a latent over that of the embedding table (1 with
    --latent_rms). switch_entropy: entropy of the position where the span was opened.
    """
    found = {"entropy": (outputs["entropy"], batch["loss_mask"])}
    if cfg.kl_coef > 0:
        found["kl"] = (kl_estimate(outputs, batch), batch["loss_mask"])
    if cfg.max_replaced_steps:
        size = outputs["size"] / embedding_size(policy.table, policy.lm.num_tokens)
        if cfg.latent_rms:
            size = torch.ones_like(size)
        opened = policy.opened(batch["completion_ids"])
        found["latent_size"] = (size, batch["latent_mask"])
        found["switch_entropy"] = (outputs["entropy"].gather(1, opened), batch["latent_mask"])
    return found


@torch.no_grad()
def describe(policy, outputs, batch, cfg):
    """What latent steps were fed, for eval.py show -> ids (None: k is id k), weights [B, T, V].

    They were fed a hidden state. The weights are what the head makes of it: the tokens near to it.
    """
    logits = lm_logits(policy.lm, policy.hidden(batch))
    return None, logits.softmax(-1)


# === 2b. supervised stage =========================================================================
# A demonstration is laid out as a rollout is: steps, some of them replaced by spans, then marker,
# answer and EOS. All have labels, both span markers too, but latent slots only if ends are sampled.


# What an equation is made of. Possessive (`++`): no run of terms is tried in several ways.
BRACES = r"\{(?:[^{}=]|\{[^{}=]*\})*\}"
ATOM = (r"(?:[$€£]?(?:\d+(?:[.,]\d+)*|\.\d+)[%!]?"  # 3, 1,000, .5, $2.50, 20%
        r"|\((?:[^()\n=]|\([^()\n=]*\))*\)|<<[^<>\n]*>>"  # (2 + 3), and GSM8K's <<2+3=5>>
        rf"|\\[A-Za-z]+|{BRACES}"  # \frac{1}{2}
        r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[A-Za-z]\w*(?=[ \t]*=))")  # x, and total in total = 5
UNIT = r"(?:[ ][A-Za-z]+(?=[ \t]*[-+*/=.,;\n]|$))?"  # apples in 3 apples + 4
OPERATOR = r"(?:[-+*/^_×÷·−]|\\(?:times|cdot|div|pm)|x(?=[ ]))"
# 3 apples + 4 apples
SIDE = rf"[-+−]?{ATOM}++{UNIT}(?:[ \t]*{OPERATOR}[ \t]*[-+−]?{ATOM}++{UNIT})*+"
MATHS = re.compile(  # a match without `=` is no equation: it keeps terms from being read again
    r"(?<![ \t])[ \t]*+(?:\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|\$\$.{0,2000}?\$\$"
    r"|\\begin\{(\w+\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\$(?=\S)[^$\n]*?=[^$\n]*(?<=\S)\$(?!\d)"  # a $ before a digit is money
    rf"|(?<![\w.])(?:{SIDE}(?:[ \t]*&?=[ \t]*{SIDE})++|{SIDE}))[.,;:!?)]*(?:\s*\n)?", re.S)
ROW = re.compile(r"(?<=\\\\)(?=(?:(?!\\\\).)*=)", re.S)  # before a row of align with `=`
SENTENCE = re.compile(  # up to a newline or full stop, but over those of "e.g." and "No. 3"
    r"(?:\b(?:e\.g|i\.e|Mr|Mrs|Ms|Dr|Prof|St|vs|cf|approx|(?:No|Nr|Fig|Eq|Sec)(?=\.\s*\d))\."
    r"|[^\S\n]++|.)*?(?:\.?\s*\n|\.(?=\s|$)|$)", re.S)


def split_steps(text):
    """A written chain -> its steps; joined they are the text again [sec. 4.1].

    Cut after a newline, and after a full stop before white space or the end, so never inside 3.14.
    An equation, with the punctuation behind it, is a step of its own: a run of terms around one `=`
    or a chain of them, LaTeX in dollars or brackets, a row of align. A numeral (`2.`) and pieces
    below 6 characters join the next piece, the last the one before.
    """
    pieces = []  # (text, is it an equation?)
    end = 0
    for match in MATHS.finditer(text):
        if "=" in match[0]:
            pieces += [(piece, False) for piece in SENTENCE.findall(text[end : match.start()])]
            pieces += [(row, True) for row in ROW.split(match[0])]
            end = match.end()
    pieces += [(piece, False) for piece in SENTENCE.findall(text[end:])]
    steps, held = [], ""  # held: what waits for the next piece
    for piece, is_equation in pieces:
        held += piece
        is_numeral = re.fullmatch(r"\W*\d+\W*", held)
        if is_equation or (len(held.strip()) >= 6 and not is_numeral):
            steps.append(held)
            held = ""
    if held and steps:
        steps[-1] += held
    elif held:
        steps = [held]
    return steps


def read_demonstrations(problems, tokenizer, policy, cfg):
    """Problems with steps_ids and answer_ids (marker, answer, EOS), shuffled.

    Each step is tokenised by itself, so that replacing it changes no other token. The built-in
    task's chains and answers are a teacher's, errors included. A warning counts the problems that
    have no chain, or none that fits; without any other one it `fail`s.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id not in policy.lm.eos_ids:
        eos_id = policy.lm.eos_ids[0]
    span_length = cfg.latents_per_step + 2
    *_, most_replaced = round_of(cfg.sft_steps, cfg)
    kept = []
    faults = {}  # {why a problem is left out: how many are}
    for problem in problems:
        steps = split_steps(problem["solution"] or "") or problem["steps"] or []
        space = "" if "teacher_answer" in problem else " "
        answer = cfg.answer_marker + space + taught_answer(problem)
        if problem["solution"] and not steps[-1].endswith("\n"):
            answer = "\n" + answer
        *steps_ids, answer_ids = tokenizer([*steps, answer], add_special_tokens=False)["input_ids"]
        answer_ids = [*answer_ids, eos_id]
        # It is longest when spans, none of them merged, replace its shortest steps.
        growth = sorted(max(0, span_length - len(ids)) for ids in steps_ids)[::-1]
        length = sum(map(len, steps_ids)) + len(answer_ids) + sum(growth[:most_replaced])
        fault = ""
        if not steps or not all(steps_ids):
            fault = "no solution or steps"
        elif cfg.answer_marker in "".join(steps):
            fault = f"{cfg.answer_marker} inside the chain"
        elif length > cfg.max_completion_length:
            fault = f"over --max_completion_length {cfg.max_completion_length}"
        if fault:
            faults[fault] = faults.get(fault, 0) + 1
        else:
            kept.append({**problem, "steps_ids": steps_ids, "answer_ids": answer_ids})
    if faults:
        reasons = ", ".join(f"{number} {fault}" for fault, number in faults.items())
        message = (f"{len(problems) - len(kept)} of {len(problems)} problems of --train "
                   f"{cfg.train} demonstrate nothing: {reasons}")
        if not kept:
            fail(message)
        warn(message)
    rng = make_rng("cpu", cfg.seed, "cold start")
    return [kept[i] for i in torch.randperm(len(kept), generator=rng).tolist()]


def lay_out(rows, prompts, lm, latent_id=-1):
    """Completions and prompts, lists of ids -> batch with the keys of a rollout.

    Its loss_mask leaves out latent slots: they have no label.
    """
    ids = [torch.tensor(row, device=lm.device) for row in rows]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=lm.pad_id)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=lm.device)
    exists = torch.arange(ids.shape[1], device=lm.device) < lengths[:, None]
    is_latent = exists & (ids == latent_id)
    prompt_ids, prompt_mask = left_pad(prompts, lm.pad_id, lm.device)  # [B, P]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": exists,
        "latent_mask": is_latent,
        "loss_mask": exists & ~is_latent,
        "lengths": lengths,
    }


@torch.no_grad()
def chain_entropies(model, problems, banned=None):
    """Of each step of each problem, the mean entropy (nats) of what predicts its tokens.

    banned: ids of the span markers, left out: whether to switch is no uncertainty about the step.
    """
    chains = [sum(problem["steps_ids"], []) for problem in problems]
    batch = lay_out(chains, [problem["prompt_ids"] for problem in problems], model)
    head = model if banned is None else HeadWithout(model, banned)
    with autocast(model):
        embeds = model.get_input_embeddings()(batch["completion_ids"])
        hidden = completion_hidden(model, batch, embeds)
        _, entropies = completion_logprobs(
            head, hidden, batch["completion_ids"], batch["completion_mask"])  # [B, T]
    found = []
    for row, problem in zip(entropies.cpu(), problems):
        sizes = [len(step) for step in problem["steps_ids"]]
        by_step = row[: sum(sizes)].split(sizes)
        found.append([values.mean().item() for values in by_step])
    return found


def step_entropies(model, prompt_ids, steps_ids):
    """Mean entropy (nats) of what predicts the tokens of each step of one chain -> floats."""
    return chain_entropies(model, [{"prompt_ids": prompt_ids, "steps_ids": steps_ids}])[0]


def replace_steps(steps, entropies, k, mode, rng=None):
    """The steps with k of them (or all there are) replaced by None.

    entropy: those of the lowest mean entropy, the first of equals; random: in an order drawn from
    rng; all, block: from the first on, whatever their entropy, as in Coconut.
    """
    order = list(range(len(steps)))
    if mode == "entropy":
        order.sort(key=lambda i: entropies[i])
    elif mode == "random":
        order = torch.randperm(len(steps), generator=rng).tolist()
    return [None if i in order[:k] else step for i, step in enumerate(steps)]


def sft_examples(chosen, policy, k, cfg):
    """Demonstrations -> batch, with up to k steps of each chain replaced by spans."""
    entropies = [[0.0] * len(problem["steps_ids"]) for problem in chosen]
    if k and cfg.replace == "entropy":
        # paper: the model in training ranks (Alg. 1, line 4); here policy.ranker, if there is one.
        ranker = policy.ranker[0] if policy.ranker else policy.lm
        entropies = chain_entropies(ranker, chosen, policy.markers)
    bound = cfg.max_entropy or math.inf
    latents = [policy.latent_id] * cfg.latents_per_step
    span = [policy.start_id, *latents, policy.end_id]
    rows = []
    for problem, values in zip(chosen, entropies):
        num_low = sum(value < bound for value in values)
        most = int(cfg.max_replaced_share * len(values))
        if cfg.replace in ("entropy", "random"):
            most = min(most, len(values) - 1)  # an empty chain would teach to answer at once
        rng = make_rng("cpu", cfg.seed, "replace", problem["question"])
        number = min(k, num_low, most)
        steps = replace_steps(problem["steps_ids"], values, number, cfg.replace, rng)
        row = []
        for step in steps:
            if step is None and cfg.merge_spans and row[-1:] == [policy.end_id]:
                row[-1:] = [*latents, policy.end_id]  # the span before grows
            else:
                row += span if step is None else step
        rows.append(row + problem["answer_ids"])
    prompts = [problem["prompt_ids"] for problem in chosen]
    batch = lay_out(rows, prompts, policy.lm, policy.latent_id)
    if cfg.end_latent == "sampled":  # going on is a choice, to be learned
        batch["loss_mask"] = batch["completion_mask"]
    if not cfg.label_ends:  # a state that must name the end is a poorer thought: docs/hyrea.md
        ids = batch["completion_ids"]
        is_forced = (ids == policy.end_id) & ~policy.is_slot(ids)
        batch["loss_mask"] = batch["loss_mask"] & ~is_forced
    return batch


def label_weights(batch, policy, marker_weight):
    """Weight of each label [B, T]: marker_weight at the span markers, 0 where there is none."""
    ids = batch["completion_ids"]
    is_marker = (ids == policy.start_id) | (ids == policy.end_id)
    return batch["loss_mask"] * torch.where(is_marker, marker_weight, 1.0)


def round_of(step, cfg):
    """Curriculum -> round of a step, first step of that round, share of the data, replaced steps.

    The replaced steps grow by one a round, up to S (--replace all and block: without end), the data
    by equal shares, or by --sft_growth [alg. 1, line 9].
    """
    number = min(step * cfg.sft_rounds // cfg.sft_steps, cfg.sft_rounds - 1)
    first = math.ceil(number * cfg.sft_steps / cfg.sft_rounds)
    share = (number + 1) / cfg.sft_rounds
    if cfg.sft_growth:
        share = min(1.0, (number + 1) * cfg.sft_growth)
    replaced = min(number, cfg.max_replaced_steps)
    if cfg.replace in ("all", "block") and cfg.max_replaced_steps:
        replaced = number
    return number, first, share, replaced


def start_config(cfg):
    """Settings of a run -> those of its cold start, in its own folder, for train().

    An evaluation starts each round, as far as rounds are equally long.
    """
    if cfg.sft_batch < dist.get_world_size():
        fail(f"--sft_batch {cfg.sft_batch}: must be at least the number of ranks, "
             f"{dist.get_world_size()}")
    if cfg.sft_rounds <= cfg.max_replaced_steps:
        warn(f"--sft_rounds {cfg.sft_rounds}: too few to reach --max_replaced_steps")
    if cfg.latents_per_step > 4:
        warn(f"--latents_per_step {cfg.latents_per_step}: the paper finds 8 far worse than 1")
    start = dataclasses.replace(
        cfg,
        stage="sft",
        steps=cfg.sft_steps,
        lr=cfg.sft_lr,
        warmup_steps=round(0.05 * cfg.sft_steps),
        eval_every=max(1, cfg.sft_steps // cfg.sft_rounds),
        save_every=cfg.sft_save_every,
    )
    if cfg.stage == "all":
        start.out_dir = str(Path(cfg.out_dir, "sft"))
        start.stop_after = 0  # it counts the steps of RL
    return start


def check_spans(cfg):
    """`fail` if RL would write other spans than those that its start has taught the model."""
    start = checkpoint_settings(cfg.model)
    names = ["latents_per_step", "max_replaced_steps", "latent_rms", "merge_spans"]
    if cfg.merge_spans:
        names += ["replace", "sft_rounds"]  # they bound a span
    for name in names:
        value = getattr(cfg, name)
        if start.get(name, value) != value:
            fail(f"--{name} {value}: {cfg.model} was trained with {start[name]}; use that")


def sft_step(policy, ddp_policy, optimizer, problems, cfg, step):
    """One update on demonstrations -> (metrics row, no records).

    Loss: sum of weights x cross entropies over the sum of weights, both over all ranks.
    """
    started = time.time()
    number, first, share, k = round_of(step, cfg)
    if k and cfg.replace == "entropy" and cfg.entropy_once and not policy.ranker:
        # A model forgets how to write what it no longer writes, so the steps already replaced come
        # to look uncertain. This copy has only seen whole chains.
        policy.ranker.append(frozen_copy(policy.lm))
    active = problems[: max(1, round(share * len(problems)))]
    chosen = next_problems(active, cfg.sft_batch, (cfg.seed, "sft", number), step - first)
    batch = sft_examples(chosen, policy, k, cfg)
    weights = label_weights(batch, policy, cfg.marker_weight)
    batch["weights"] = weights / all_reduce(weights.sum().item())

    policy.train()
    loss = 0.0
    pieces = micro_batches(batch, range(len(chosen)), cfg.micro_batch, cfg.max_tokens)
    for piece in pieces:
        micro = select_rows(batch, piece)
        ddp_policy.require_backward_grad_sync = piece is pieces[-1]  # as in update
        outputs = ddp_policy(micro, labels=True)
        piece_loss = -(outputs["logprobs"] * micro["weights"]).sum()
        (piece_loss * dist.get_world_size()).backward()
        loss += piece_loss.item()
    grad_norm = optimizer_step(optimizer, cfg, step)
    loss = all_reduce(loss)
    is_bad = grad_norm is None
    return {
        "kind": "train",
        "step": step + 1,
        "replaced": k,
        "loss": None if is_bad else loss,
        "grad_norm": grad_norm,
        "skipped": int(is_bad),
        "lr": cfg.lr * lr_factor(step, cfg),
        "seconds": time.time() - started,
    }, []


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


def latent_reward(record, cfg):
    """Spans of a completion with at least one latent, as a share of those wanted; at most 1."""
    wanted = max(1, cfg.max_replaced_steps) if cfg.latent_reward == "frac" else 1
    return min(1.0, record["switches"] / wanted)


def reward_parts(record, cfg):
    """What a completion earns by a right answer; one marker and an EOS; use of latents [sec. 3.2].

    By the default weights a right answer without latents beats a wrong one with them.
    """
    has_form = record["format_ok"] and not record["truncated"]
    return {
        "accuracy": cfg.reward_accuracy * record["correct"],
        "format": cfg.reward_format * has_form,
        "latent": cfg.reward_latent * latent_reward(record, cfg),
    }


def reward(record):
    """The sum of what reward_parts found."""
    return sum(record["reward_parts"].values())


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
            record["reward_parts"] = reward_parts(record, cfg)
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
        record["reward_parts"] = reward_parts(record, cfg)
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
    uses = [latent_reward(record, cfg) for record in records]
    sums["latent_reward"] = [sum(uses), len(uses)]
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
    cfg.stage = "rl"  # its steps are the larger ones
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
        if cfg.max_replaced_steps:
            print("no span was forced: each latent that a trained model takes adds a pass to it")
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
        for weights in state.pop("ranker", []):
            policy.ranker = [frozen_copy(policy.lm)]
            policy.ranker[0].load_state_dict(weights)
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
            if cfg.stage == "sft":
                *_, replaced = round_of(max(step - 1, 0), cfg)
                row["replaced"] = replaced  # in the last update before this evaluation
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
        state["ranker"] = [lm.state_dict() for lm in policy.ranker]  # one or none
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
    if cfg.stage == "rl":
        check_spans(cfg)
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
        if cfg.stage == "rl" and cfg.max_replaced_steps and not policy.knows_markers:
            print(f"{cfg.model} has had no cold start: nothing has taught it the markers")
    if rank == 0 and not cfg.dry_run:
        lock = lock or lock_run(out_dir)  # held until the process ends
    if cfg.stage != "rl" and not cfg.dry_run:
        start = start_config(cfg)
        trained = latest_checkpoint(Path(start.out_dir))
        if resumed and trained and cfg.stage == "all":  # complete; the reference is a copy of it
            load_checkpoint(trained, policy, None, settings, CAN_CHANGE)
        else:
            examples = read_demonstrations(problems, tokenizer, policy, cfg)
            if rank == 0:
                print(f"cold start: {start.steps} updates on {len(examples)} written chains")
            result = train(policy, None, examples, eval_problems, settings, start, trained)
            if cfg.stage == "sft":
                return result
        settings["start_sha"] = weights_fingerprint(lm)
        policy.ranker.clear()  # RL needs none
    reference = frozen_copy(lm) if cfg.kl_coef > 0 and cfg.lora_rank == 0 else None
    if reference is None and cfg.kl_coef > 0 and (cfg.stage == "all" or cfg.max_replaced_steps):
        reference = frozen_copy(lm)  # adapters alone are not what the start or the markers learned
    return train(policy, reference, problems, eval_problems, settings, cfg, resumed)


if __name__ == "__main__":
    run_program(main)
