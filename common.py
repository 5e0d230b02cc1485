"""What the four scripts share and no method depends on.

1. models                   load_model (hub id, folder, tiny), LoRA, the tiny model
2. problems and prompts     load_problems (files, named sets, arithmetic), encode_prompts, Marker
3. answer checking          extract_answer, answers_equal, is_correct, grade
4. embeddings and batches   hidden states, log-probs, mixtures of embeddings, batches of rows
5. runs                     flags, stop signals, ranks, sums of metrics, checkpoints, run folder

Shape letters as in the scripts: B sequences, N prompts, P prompt length, T completion length,
V vocabulary, H hidden size, K candidates. Bad input ends in `fail`: one line and exit code 2.
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import fcntl
import functools
import gc
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zlib
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CACHE = Path(os.environ.get("LATENT_RL_CACHE", Path.home() / ".cache" / "latent_rl"))


def warn(message, kind="warning"):
    """One line on stderr, from rank 0; an error from the first rank of each machine."""
    if os.environ.get("LOCAL_RANK" if kind == "error" else "RANK", "0") == "0":
        print(f"{kind}: {message}", file=sys.stderr, flush=True)


def fail(message):
    """Bad input from the user: one clear line and exit code 2."""
    warn(message, "error")
    raise SystemExit(2)


# === 1. models ====================================================================================


def load_model(name, dtype=torch.float32, device="cpu", lora_rank=0):
    """Load a causal language model and its tokenizer -> (lm, tokenizer).

    name       hub id, transformers folder, a run folder or checkpoint of ours, or `tiny:SPEC`:
               a 0.5M-parameter Llama taught the task SPEC (train_tiny); `tiny` = `tiny:arithmetic`
    dtype      bfloat16 computes under autocast over float32 weights; with LoRA the frozen weights
               themselves are stored in it. float32 computes in float32.
    lora_rank  > 0 freezes the model and adds trainable low-rank adapters

    Sets on lm: compute_dtype; num_tokens, the tokenizer's ids, logits beyond which are cut off;
    eos_ids, all of them; pad_id, any valid id, since masks come from lengths; head_scale, softcap:
    see lm_logits. Dropout is 0. `fail`s when a weight is missing, of another shape or not finite,
    without an EOS id, with too few embedding rows, and on the models that find_fault names.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    lm, tokenizer = read_model(name, dtype if lora_rank else torch.float32)
    lm.compute_dtype = dtype
    lm.share_prompts = False
    lm.num_tokens = len(tokenizer)
    ends = set()
    for owner in (tokenizer, lm.generation_config, lm.config):
        ids = getattr(owner, "eos_token_id", None)
        ends.update(ids if isinstance(ids, list) else [ids])
    lm.eos_ids = sorted(i for i in ends - {None} if i < lm.num_tokens)
    lm.to(device)
    try:
        fault = find_fault(lm)
    except Exception as error:  # models without such a cache stumble in many ways
        fault = f"{RECURRENT} ({first_line(error)})"
    logging.set_verbosity(verbosity)
    if fault:
        fail(f"--model {name}: {fault}; docs/models.md lists what works")
    pad_id = tokenizer.pad_token_id
    lm.pad_id = lm.eos_ids[0] if pad_id is None else pad_id
    if lora_rank:
        add_lora(lm, lora_rank)
    return lm, tokenizer


def read_model(name, dtype):
    """Files -> (lm, tokenizer) on the CPU; `fail`s unless every weight is there, in its shape."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = tiny_folder(name) if name.split(":")[0] == "tiny" else model_folder(name)
    if not path.is_dir() and name.startswith(("runs/", "/", "./", "../")):
        fail(f"--model {name}: no such folder")  # rather than ask the hub for it
    source = str(path)
    code = {"trust_remote_code": False}  # else it asks whether to run a folder's own code
    try:
        config = AutoConfig.from_pretrained(source, **code)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised; use the model that it was made from")
        for key in config.to_dict():
            if re.search("dropout|_pdrop", key):
                setattr(config, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(source, **code)
        logging.set_verbosity_error()  # else it prints a table of what is said below in one line
        lm, info = AutoModelForCausalLM.from_pretrained(  # a pickle is never opened
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **code)
    except Exception as error:  # damaged files raise a dozen kinds
        fail(f"--model {name}: not a model folder or hub id that loads ({first_line(error)})")
    lost = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    if lost:  # they would be random
        fail(f"--model {name}: {len(lost)} of its weights are missing or have another shape, such "
             f"as {sorted(lost)[:3]}; unknown ones: {sorted(info['unexpected_keys'])[:2]}")
    return lm, tokenizer


RECURRENT = ("it cannot decode padded rows on a cache of keys and values; recurrent, hybrid and "
             "linear-attention models are not supported")


@torch.no_grad()
def find_fault(lm):
    """Why the scripts cannot train lm, or None. Sets lm.head_scale and lm.softcap on the way.

    Two rows of made-up ids, the second padded on the left, are decoded as a rollout does it: on a
    cache, in pieces, the first row dropped on the way. The second row alone, in one pass and
    without a cache, has to give the same.
    """
    table = lm.get_input_embeddings()
    if not lm.eos_ids:
        return "no end-of-sequence id in its tokenizer, config or generation config"
    if lm.num_tokens > table.num_embeddings:
        return f"{lm.num_tokens} tokenizer ids but fewer embedding rows; resize it"
    for key, weight in lm.named_parameters():
        if not weight.isfinite().all():
            return f"NaN or infinite values in {key}"
    config = lm.config.get_text_config()
    for key, value in config.to_dict().items():
        if "jitter" in key and value:
            return f"the choice of its experts is random in training ({key}): not supported"
    rope = getattr(config, "rope_parameters", None) or {}
    if "'dynamic'" in str(rope):
        return "its positions (dynamic RoPE) depend on the longest row of a batch: not supported"
    if rope.get("rope_type") == "longrope":  # what is cached before is not what is scored then
        warn(f"{lm.name_or_path}: LongRoPE changes all positions in rows that are longer than "
             f"{rope['original_max_position_embeddings']}: keep prompt and completion below")

    padding = 16
    ids = torch.arange(76, device=lm.device).view(2, 38) % lm.num_tokens
    embeds = table(ids)  # [2, S, H]
    exists = torch.ones_like(ids, dtype=torch.bool)
    row = embeds[1:, padding:]
    alone = lm_hidden(lm, row, exists[1:, padding:])  # [1, S - padding, H]
    half = lm_hidden(lm, row[:, :11], exists[1:, :11])
    if differ(lm, half, alone[:, :11]):
        return "a token sees what comes after it: an encoder, no causal language model"
    if differ(lm, table.weight[ids] * embed_scale(table), embeds):
        return "its embeddings are no rows of a table: not supported"

    logits = lm(input_ids=ids[1:, padding:], use_cache=False).logits[..., : lm.num_tokens]
    lm.softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None) or 1.0
    for lm.head_scale in (scale, 1 / scale, 1.0):  # some multiply, some divide
        if not differ(lm, lm_logits(lm, alone), logits):
            break
    else:
        return "it makes its logits of more than its last hidden states: not supported"

    exists[1, :padding] = False
    cache = RoomyCache()
    pieces = []
    for start, end in ((0, 28), (28, 36), (36, 37), (37, 38)):
        hidden = lm_hidden(lm, embeds[:, start:end], exists[:, :end], cache=cache)
        pieces.append(hidden[-1:])
        if end == 36:
            cache.batch_select_indices(torch.tensor([1], device=lm.device))
            embeds, exists = embeds[1:], exists[1:]
    decoded = torch.cat(pieces, 1)[:, padding:]
    if differ(lm, decoded, alone):  # also where the model has ignored our cache
        return RECURRENT


def differ(lm, a, b):
    """Are a and b further apart than rounding in the precision of lm brings them?"""
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.1  # measured: 5e-7 and 1e-2
    distance = (a.float() - b.float()).norm()
    return not distance <= tolerance * b.float().norm()


def model_folder(name):
    """Path of the transformers folder in a run folder (newest checkpoint) or checkpoint of ours."""
    path = Path(name)
    if step_folders(path):
        path = latest_checkpoint(path) or fail(f"--model {name}: holds no valid checkpoint")
    return path / "hf" if (path / "hf").is_dir() else path


def checkpoint_settings(name):
    """What a checkpoint of ours was trained with; {} for any other model."""
    file = model_folder(name) / "latent" / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def load_method(policy, name, method):
    """Restore what a checkpoint of ours holds besides the language model, say HRPO's gate."""
    saved = checkpoint_settings(name)
    if saved and saved["method"] != method:
        warn(f"{name} was trained by {saved['method']}: only its language model is used")
    elif saved:
        file = model_folder(name) / "latent" / "method.safetensors"
        try:
            missing, wrong = policy.load_state_dict(load_file(file), strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: another shape
            fail(f"{file}: {' '.join(str(error).split())}")
        wrong += [key for key in missing if not key.startswith(("lm.", "table."))]
        if wrong:
            fail(f"{file}: not the tensors of {method}; these differ: {wrong[:3]}")


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.split("\n")[0][:160]


def weights_fingerprint(module):
    """Short hash over the names, shapes and some values of all weights: tells two models apart."""
    samples = []
    for key, tensor in module.state_dict().items():
        step = tensor.numel() // 256 + 1
        some = tensor.flatten()[::step].float().tolist()
        samples.append((key, tuple(tensor.shape), some))
    return fingerprint(samples)


def fingerprint(value):
    """Short hash of what a value prints as."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def frozen_copy(lm):
    """A reference model that never changes."""
    return copy.deepcopy(lm).requires_grad_(False).eval()


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, alpha = 2 r; W frozen, A random, B zero (arXiv 2106.09685).

    A [r, in] and B [out, r] are stored in float32 whatever W is.
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.enabled = True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        low = F.linear(x.float(), self.lora_A)  # [..., r]
        return (y + 2 * F.linear(low, self.lora_B)).to(y.dtype)


def add_lora(lm, rank):
    """Freeze lm and wrap every linear layer of its blocks (q, k, v, o, gate, up, down) in place."""
    lm.requires_grad_(False)
    body = lm.base_model
    linears = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        fail(f"--lora_rank {rank}: {type(lm).__name__} has no nn.Linear layers; use --lora_rank 0")
    for name in linears:
        body.set_submodule(name, LoRALinear(body.get_submodule(name), rank))


@contextlib.contextmanager
def lora_disabled(lm):
    """Inside, lm computes with its frozen weights alone: the reference policy at no memory cost."""
    adapters = [m for m in lm.modules() if isinstance(m, LoRALinear)]
    for module in adapters:
        module.enabled = False
    try:
        yield lm
    finally:
        for module in adapters:
            module.enabled = True


@torch.no_grad()
def merged_state_dict(lm):
    """Weights under their ordinary transformers names, adapters merged in (in float32)."""
    state = {key.replace(".base.", "."): value for key, value in lm.state_dict().items()
             if ".lora_" not in key}
    for name, module in lm.named_modules():
        if isinstance(module, LoRALinear):
            change = 2 * module.lora_B @ module.lora_A
            state[f"{name}.weight"] = module.base.weight.float() + change  # [out, in]
    return state


def tiny_folder(name):
    """Folder of the trained model `tiny:SPEC`. Rank 0 trains it the first time, the others wait."""
    spec = name.partition(":")[2] or "arithmetic"
    recipe = inspect.getsource(train_tiny) + inspect.getsource(arithmetic_problems)
    key = fingerprint([spec, torch.__version__, recipe])
    folder = CACHE / f"tiny-{spec.replace(':', '-')}-{key}"
    if os.environ.get("RANK", "0") == "0" and not folder.exists():
        check_writable(f"--model {name}, in LATENT_RL_CACHE", CACHE)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        print(f"training the built-in model for {spec}, once: about 20 s", flush=True)
        with torch.random.fork_rng():
            train_tiny(spec, partial)
        with contextlib.suppress(OSError):  # another run may have finished first, with the same
            partial.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
    while not folder.exists():
        time.sleep(0.2)
    return folder


def train_tiny(spec, folder):
    """Teach a 2-layer Llama the sloppy teacher's chains (arithmetic_problems) and save it there.

    Supervised, 15 to 30 s on two CPU cores: batch 64, until greedy accuracy on 256 training
    problems is >= 0.35 three times running. More of it would not help: accuracy stays near 0.5,
    for the teacher is wrong on some facts. Imitation cannot repair that, verified reward can.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        DataCollatorForSeq2Seq,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<bos>", "<eos>", *"0123456789+-*="]
    char = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    char.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    char.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=char, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    marks = ["<think>", "</think>", "<start-latent>", "<end-latent>", "<latent>"]
    tokenizer.add_tokens(marks)  # not special: graded
    turns = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = "{{ bos_token }}" + turns + "<think>"

    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    problems = arithmetic_problems(spec)
    prompts = tokenizer([f"<bos>{p['question']}<think>" for p in problems])["input_ids"]
    chains = tokenizer(["".join(p["steps"]) + f"</think>{p['teacher_answer']}<eos>"
                        for p in problems])["input_ids"]
    examples = [{"input_ids": prompt + chain, "labels": [-100] * len(prompt) + chain}
                for prompt, chain in zip(prompts, chains)]  # labels of -100 do not count
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads
    held = [i for i in range(256) if len(prompts[i]) == len(prompts[0])]  # needs no padding
    optimizer = torch.optim.AdamW(lm.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.01)
    passed = 0
    order = random.Random(0)
    for step in tqdm(range(2000), "training tiny, once", disable=None):
        batch = collate([examples[order.randrange(256, len(examples))] for _ in range(64)])
        lm(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            ids = torch.tensor([prompts[i] for i in held])
            ids = lm.generate(ids, max_new_tokens=64)
            texts = zip(held, tokenizer.batch_decode(ids))
            right = sum(f"</think>{problems[i]['answer']}<eos>" in text for i, text in texts)
            passed = passed + 1 if right >= 0.35 * len(held) else 0
            if passed == 3:
                break
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# === 2. problems and prompts ======================================================================

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math"
         "/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data")
SVAMP = ("https://raw.githubusercontent.com/arkilpatel/SVAMP"
         "/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json")
MATH = ("https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve"
        "/6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be/test.jsonl")
AIME = ("https://huggingface.co/datasets/math-ai/aime25/resolve"
        "/563bb8404243c5f09de6ec262f2db674fe5bce9b/test.jsonl")
QWEN = ("https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math"
        "/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data")
NAMED_SETS = {  # {name: {split: (address, how the file's sha256 starts, or "")}}
    "gsm8k": {
        "train": (f"{GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c5"),
        "test": (f"{GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066"),
    },
    "svamp": {"test": (SVAMP, "5be77703a6d891ae476d7c082787ad36")},
    "math500": {"test": (MATH, "35dc41080a3680858b27fa7e0533d2d5")},
    "aime25": {"test": (AIME, "b4e273c02d3e7fe1b74b59eae768fc82")},
    **{n: {"test": (f"{QWEN}/{n}/test.jsonl", "")} for n in ("aime24", "amc23", "minerva_math")},
}
ANNOTATION = r"<<[^<>\n]*=[^<>\n]*>>"  # a calculator step in GSM8K's prose: <<48/2=24>>
ENDING = re.compile(r"\.(jsonl|json|csv|parquet)(?:\.gz)?$")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = {  # what a column may be called; a dot reaches into it; the first one with a value counts
    "question": "question problem query extra_info.question prompt input messages",
    "answer": """answer.aliases answers.text answer answers final_answer final_ans expected_answer
        golden_answers ground_truth target answerkey reward_model.ground_truth.target
        reward_model.ground_truth""",
    "prose": "cot_answer solution response completion messages",  # ends in the answer
    "chain": "cot solution response completion messages extra_info.answer",
    "steps": "steps",
    "choices": "choices options",
}


def load_problems(spec, split="train", limit=0):
    """Problems of one or several data sets, each {"question", "answer", "set", "source", ...}.

    spec      `arithmetic...`, a named set, hub:owner/repo/file or the path of a file. A comma
              separates sets, so that no path can hold one; limit (0: none) counts in each of them
    answer    a text, or a list of texts of which any counts; set: its name in spec
    source    "file:line"; row: all columns of a file's row, for a user's own reward
    steps, solution    what a supervised stage can imitate, or None

    Rows whose answer the checker cannot read are dropped and counted; a row without a question or
    an answer stops the load.
    """
    problems = []
    for name in re.split(r"\s*,\s*", spec):
        problems += [{**row, "set": name} for row in load_set(name, split, limit)]
    return problems


def load_set(name, split, limit):
    """Problems of one data set."""
    if name.startswith("arithmetic") and not ENDING.search(name):
        return arithmetic_problems(name, split, limit)
    path = find_file(name, split)
    problems, lost = [], []
    for line, row in read_rows(path):
        source = f"{path}:{line}"
        try:
            problem = {**read_problem(row), "source": source}
        except ValueError as error:
            fail(f"{source}: {error}")
        answer = problem["answer"]
        if is_readable(answer) and answer not in ("proof", "notfound"):  # NuminaMath has those
            problems.append(problem)
        else:
            lost.append(f"{source}: {answer!r:.50}")
    if lost:
        warn(f"{len(lost)} rows dropped, their answer is not readable or not marked by #### or "
             f"\\boxed: {'; '.join(lost[:5])}")
    if not problems:
        fail(f"{path} holds no problems with a readable answer")
    return problems[: limit or None]


def taught_answer(problem):
    """The answer that a demonstration ends with: the teacher's, or the first accepted one."""
    answer = problem.get("teacher_answer", problem["answer"])
    return answer[0] if isinstance(answer, list) else answer


def data_fingerprint(problems):
    """Short hash that tells data apart, wherever its files lie."""
    keys = ("question", "answer", "steps", "solution")
    return fingerprint([[problem.get(key) for key in keys] for problem in problems])


# ---- files ---------------------------------------------------------------------------------------


def find_file(name, split):
    """Path of the file that holds a data set; the hub's and named sets are downloaded once."""
    ending = ENDING.search(name)
    if ending and not name.startswith("hub:"):
        return os.path.expanduser(name)
    local = find_local(name, split)
    if local:
        return local
    hub = re.fullmatch(r"hub:([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", name)
    splits = NAMED_SETS.get(name, {})
    try:
        if hub and ending:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(hub[1], hub[3], repo_type="dataset", revision=hub[2])
        if split in splits:
            return download(*splits[split])
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: not the pinned sha256
        fail(f"{name}: {first_line(error)}; offline, a path or LATENT_RL_DATA=folder of named sets")
    fail(f"{name} ({split}): want arithmetic, a path or hub:owner/repo/file ending in .jsonl, "
         f".json, .csv (.gz) or .parquet, or one of {', '.join(NAMED_SETS)} (only gsm8k has the "
         "split train)")


def find_local(name, split):
    """Path of NAME_SPLIT.jsonl(.gz) in $LATENT_RL_DATA, or of NAME.jsonl(.gz), or None."""
    folder = os.environ.get("LATENT_RL_DATA", os.devnull)
    stems = [f"{name}_{split}"]
    if list(NAMED_SETS.get(name, [split])) == [split]:  # a set that has no other split
        stems.append(name)
    for stem in stems:
        for ending in (".jsonl.gz", ".jsonl"):
            path = Path(folder, stem + ending)
            if path.is_file():
                return str(path)


def download(address, digest):
    """Path of a pinned file in the cache."""
    path = CACHE / "data" / re.sub(r"^\w+:/+", "", address)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), digest, progress=False)
    return str(path)


def read_rows(path):
    """Pairs (line, row) of a file; in a JSON list or parquet the line is the number of the row."""
    kind = ENDING.search(path)[1]
    line = 0

    def lines():  # decoded one by one, so that an error knows its line
        nonlocal line
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for part in file:
                line += 1
                yield part.decode("utf-8-sig")

    try:
        if kind == "parquet":
            import pyarrow.parquet

            text = json.dumps(pyarrow.parquet.read_table(path).to_pylist(), default=str)
            yield from enumerate(json.loads(text), 1)  # dates and the like are text now
        elif kind == "json":
            text = "".join(lines())
            line = 0  # the error of a JSON file names the line
            yield from enumerate(json_rows(text), 1)
        elif kind == "csv":
            for row in csv.DictReader(lines(), strict=True):
                if any(row.values()):
                    yield line, row
        else:
            for text in lines():
                if text.strip():
                    yield line, json.loads(text)
    except Exception as error:  # pyarrow alone has ten kinds
        hints = {"parquet": "; pip install pyarrow, or convert the file to JSONL",
                 "json": "; a file with one object a line must end in .jsonl"}
        place = f"{path}:{line}" if line else path
        fail(f"cannot read {place}: {first_line(error)}{hints.get(kind, '')}")


def json_rows(text):
    """The list of rows in a JSON file, alone or under the key "data"."""
    content = json.loads(text)
    if isinstance(content, dict):
        content = content.get("data", f"the keys {', '.join(content)}")
    if not isinstance(content, list):
        raise ValueError(f'want a list of rows or {{"data": [rows]}}, found {content}')
    return content


# ---- rows ----------------------------------------------------------------------------------------


def read_problem(row):
    """A row of a file -> problem; its columns may have any of the names in COLUMNS.

    ValueError says what is wrong with it.
    """
    if not isinstance(row, dict) or None in row:
        raise ValueError("want a JSON object, or as many CSV cells as the header has")
    columns = {key.strip().lower(): value for key, value in row.items()}
    found = {kind: find_column(columns, kind) for kind in COLUMNS}
    prose = found["answer"] is None
    if prose:
        found["answer"] = found["prose"]
    for kind in ("question", "answer"):
        if found[kind] is None:
            raise ValueError(f"no {kind} or an empty one in the columns {', '.join(row)}; "
                             f"rename the right one to {kind}")
    question = read_text(found["question"], "question")
    if isinstance(columns.get("body"), str):  # SVAMP tells its story there
        question = f"{columns['body'].rstrip('. ')}. {question}"
    value = found["answer"]
    answer = read_gold(value, prose)
    if found["choices"]:
        question, answer = add_choices(
            question, answer, isinstance(value, str), found["choices"])
    chain = value if "####" in str(value) else found["chain"]
    steps, solution = read_chain(chain, found["steps"])
    return {"question": question, "answer": answer, "steps": steps, "solution": solution,
            "row": row}


def find_column(columns, kind):
    """Value of the first column of a kind that has one, or None.

    In a conversation only the last turn counts, of the user or else of the assistant: the system
    turn of a row gives way to --instruction.
    """
    role = "user" if kind == "question" else "assistant"
    for name in COLUMNS[kind].split():
        value = columns
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        for turn in value if isinstance(value, list) else []:
            if isinstance(turn, dict) and turn.get("role") == role:
                value = turn.get("content")
        if value is not None:
            return value


def read_text(value, column):
    """A cell as text; 18.0 is 18. ValueError where it is empty, no number (NaN) or no text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if isinstance(value, list | dict | None) else str(value).strip()
    if re.search(r"(?i)^(?:nan|-?inf)?$|[\ud800-\udfff]", text):
        raise ValueError(f"{column} is empty or not text: {value!r:.50}")
    return text


def read_gold(value, prose):
    """Gold answer of a cell: a text, or a list of accepted texts; "" where prose marks none."""
    cells = value if isinstance(value, list) and value else [value]
    golds = [read_text(cell, "answer") for cell in cells]
    if prose or "####" in golds[0]:
        golds = [marked_answer(gold) for gold in golds]
    return golds if len(golds) > 1 else golds[0]


def marked_answer(text):
    r"""Answer after the last ####, in the last \boxed{}, after "The answer is:" at the end.

    A text without a mark is an answer itself when it has at most five words; else "".
    """
    answer = extract_answer(text)
    if answer is not None:
        return answer
    stated = re.search(r"(?i)\banswer(?: is:?|:) *(.+)$", text)  # as MetaMathQA ends
    if stated:
        return stated[1].rstrip(" .")
    return text if len(text.split()) <= 5 else ""


def add_choices(question, answer, is_text, choices):
    """(Question with its choices as A., B., ..., letter of the answer).

    choices  a list, {"text": [...], "label": [...]} or a text with | between
    answer   a label or letter, an index from 0, or the text of a choice; a number in the file is no
             text, even where the choices are numbers
    """
    labels = LETTERS
    if isinstance(choices, dict):
        labels = choices.get("label") or LETTERS
        choices = choices.get("text")
    if isinstance(choices, str):
        choices = choices.split("|")
    if not isinstance(choices, list) or not isinstance(labels, list | str) or len(choices) > 26:
        raise ValueError(f"choices must be a list of at most 26 texts: {choices!r:.50}")
    texts = [read_text(text, "choices") for text in choices]
    names = [str(label) for label in labels]
    if answer not in names:
        names = list(map(str, range(26)))
    found = [letter for letter, name, text in zip(LETTERS, names, texts)
             if answer == name or is_text and answer == text]
    if len(found) != 1:
        raise ValueError(f"answer {answer!r} names none or two of the {len(texts)} choices; want "
                         "a label, a letter or a text, or an index from 0 as a number")
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts)]
    return "\n".join([question, *lines]), found[0]


def read_chain(prose, steps):
    """(Steps, solution) that lead to the answer, each None where there is none."""
    text = prose.rsplit("####", 1)[0] if isinstance(prose, str) else ""
    if not isinstance(steps, list):
        steps = re.findall(ANNOTATION, str(steps or text))
    steps = [read_text(step, "steps") for step in steps]
    solution = re.sub(rf"{ANNOTATION}|</?think>|[\ud800-\udfff]", "", text).strip()
    return steps or None, solution or None


# ---- the built-in task ---------------------------------------------------------------------------


def arithmetic_problems(spec, split="train", limit=0):
    """The built-in task: chains of digit operations modulo 10, with a teacher that errs.

    spec    `arithmetic[-verbose|-restated][:N or :LO-HI]`, N operations per chain, 5 by default
    split   train (16384 problems) or test (1024): told apart by a hash, so disjoint by construction
    -> {"question": "3+8-5*7=", "answer": "2", "steps": ["+1", "-6", "*2"], "teacher_answer": "2"}

    A step is the operator and the running value; verbose restates the operand, "+8=1"; restated has
    two steps an operation, one that only copies, "+8=3+8", and one that computes, "=1". `answer` is
    the truth. `steps` and `teacher_answer` come from a sloppy teacher: on a fixed fifth of the
    facts (a, op, b) it writes one fixed wrong value 60 % of the time and goes on from there. * has
    only the operands 3, 7, 9: those permute the digits, so that a wrong value stays wrong.
    """
    parts = re.fullmatch(r"arithmetic(-verbose|-restated)?(?::(\d{1,2})(?:-(\d{1,2}))?)?", spec)
    low = int(parts[2] or 5) if parts else 0
    high = int(parts[3] or low) if parts else 0
    if not 1 <= low <= high <= 40 or split not in ("train", "test"):
        fail(f"{spec} ({split}): want arithmetic, arithmetic-verbose, arithmetic-restated, "
             "arithmetic:N or arithmetic:LO-HI, lengths of 1 to 40, split train or test")
    teacher = random.Random("sloppy")
    shifts = {}  # {fact: by how much the teacher errs}
    for fact in itertools.product(range(10), "+-*", range(10)):
        is_sloppy = teacher.random() < 0.17
        shift = teacher.randint(1, 9)
        shifts[fact] = shift * is_sloppy
    rng = random.Random(f"{spec} {split}")
    wanted = limit or (16384 if split == "train" else 1024)
    rows = []
    while len(rows) < wanted:
        value = truth = rng.randint(0, 9)
        question = str(value)
        steps = []
        for _ in range(rng.randint(low, high)):
            op = rng.choice("+-*")
            b = rng.choice((3, 7, 9)) if op == "*" else rng.randint(0, 9)
            shift = shifts[value, op, b]
            if shift and rng.random() >= 0.6:
                shift = 0
            before = value
            value = (apply_operation(value, op, b) + shift) % 10
            truth = apply_operation(truth, op, b)
            question += f"{op}{b}"
            styles = {None: [f"{op}{value}"], "-verbose": [f"{op}{b}={value}"],
                      "-restated": [f"{op}{b}={before}{op}{b}", f"={value}"]}
            steps += styles[parts[1]]
        if (zlib.crc32(question.encode()) % 16 == 0) == (split == "test"):
            rows.append({"question": f"{question}=", "answer": str(truth), "steps": steps,
                         "solution": None, "teacher_answer": str(value),
                         "source": f"{spec}:{len(rows) + 1}"})
    return rows


def apply_operation(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


# ---- prompts -------------------------------------------------------------------------------------

INSTRUCTION = ("Think through the problem step by step. Then end your thinking with the marker "
               "{marker} , written exactly once, and give only the final answer after it, like "
               "this: reasoning {marker} answer")


def encode_prompts(tokenizer, problems, cfg, max_length=0):
    """Problems with "prompt_ids" added; those over max_prompt_length are dropped and counted.

    cfg: answer_marker, max_prompt_length, and what render_prompt reads; or the marker alone, with
    max_length, for prompts as they are by default. The prompt is tokenised without special tokens
    where a chat template wrote them, so that a BOS is never doubled, and else with them.
    """
    if isinstance(cfg, str):
        cfg = SimpleNamespace(
            answer_marker=cfg, max_prompt_length=max_length, instruction=INSTRUCTION,
            template_args="", prompt_suffix="", prompt_date="2025-01-01")
    marker = cfg.answer_marker
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    if marker not in tokenizer.decode(ids, skip_special_tokens=True):
        fail(f"--answer_marker {marker}: is a special token here, or cannot be written with this "
             "tokenizer; no graded text would contain it")
    texts = [render_prompt(tokenizer, problem["question"], cfg) for problem in problems]
    encoded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    pad = tokenizer.pad_token  # what tiny reads for a character that it does not know
    pad_id = tokenizer.pad_token_id  # it can be the BOS, too, which stands in front
    unknown = sum(pad_id in ids[1:] and pad not in text for ids, text in zip(encoded, texts))
    if unknown:
        (warn if unknown < len(texts) else fail)(
            f"{unknown} of {len(texts)} prompts hold characters that this model's tokenizer does "
            "not know; tiny knows digits, + - * and = only: name a --model")
    kept = [{**problem, "prompt_ids": ids} for problem, ids in zip(problems, encoded)
            if len(ids) <= cfg.max_prompt_length]
    if len(kept) < len(problems):
        (warn if kept else fail)(
            f"dropped {len(problems) - len(kept)} of all {len(problems)} prompts: longer than "
            f"--max_prompt_length {cfg.max_prompt_length}; the shortest has "
            f"{min(map(len, encoded))} tokens")
    return kept


def render_prompt(tokenizer, question, cfg):
    """The text that a model goes on from: the chat template's, or a plain one without a template.

    cfg.instruction    {marker} in it is filled in; "" for none. It is the system turn, or stands in
                       the user turn where the template knows or takes no system turn
    cfg.template_args  JSON object for the chat template, as {"enable_thinking": false}
    cfg.prompt_suffix  text after it, as <think>
    cfg.prompt_date    YYYY-MM-DD that the template writes instead of today's
    """
    task = cfg.instruction.replace("{marker}", cfg.answer_marker)
    if not tokenizer.chat_template:
        framed = f"{task}\n\nQuestion: {question}\nAnswer:"
        return (framed if task else question) + cfg.prompt_suffix
    attempts = [[{"role": "user", "content": f"{task}\n\n{question}".strip()}]]
    if task and "system" in str(tokenizer.chat_template):
        attempts.insert(0, [{"role": "system", "content": task},
                            {"role": "user", "content": question}])
    for turns in attempts:
        try:
            return render_turns(tokenizer, turns, cfg) + cfg.prompt_suffix
        except Exception as error:  # whatever a template raises, say against a system turn
            reason = first_line(error)
    fail(f"the chat template of --model {tokenizer.name_or_path} fails with --template_args "
         f"{cfg.template_args!r:.99}: {reason}")


def render_turns(tokenizer, turns, cfg):
    """Turns through the chat template -> text; an error where it takes none."""
    template = tokenizer.get_chat_template()
    day = time.strptime(cfg.prompt_date, "%Y-%m-%d")  # Llama-3.2 writes strftime_now("%d %b %Y")
    call = r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)"""
    template = re.sub(call, lambda found: repr(time.strftime(found[2], day)), template)
    args = {"add_generation_prompt": True, **json.loads(cfg.template_args or "{}")}
    return tokenizer.apply_chat_template(turns, chat_template=template, **args, tokenize=False)


class Marker:
    """Watches completions for a text (say `####`) that may be split over several tokens.

    Only an id whose own text holds the marker's last character (or a part of it, decoded as U+FFFD)
    can complete it: just the rows that sampled such an id are decoded, and only their last ids.
    """

    def __init__(self, tokenizer, text, num_tokens, device="cpu"):
        self.tokenizer, self.text, self.width = tokenizer, text, len(text.encode())
        pieces = tokenizer.batch_decode([[i] for i in range(num_tokens)])
        hits = [text[-1] in piece or "\ufffd" in piece for piece in pieces]
        self.may_complete = torch.tensor(hits, device=device)  # [V]

    def completed(self, tail_ids):
        """tail_ids [b, width], newest last, -1 where a completion is shorter -> bool [b]."""
        hit = self.may_complete[tail_ids[:, -1]]  # [b], a copy
        for row in hit.nonzero()[:, 0].tolist():
            ids = [i for i in tail_ids[row].tolist() if i >= 0]
            hit[row] = self.text in self.tokenizer.decode(ids)
        return hit


# === 3. answer checking ===========================================================================
# An answer is read in three steps; two answers are equal if their trees are, node by node.
#   spelling    respell: one spelling for each symbol        \dfrac12\mbox{ cm} -> \frac{1}{2}
#   structure   read_tree: lists, brackets, equations ...    x=1, y=2 -> a list of two named values
#   value       read_atom: words, or one exact number        \frac{1}{2} -> 1/2
# No text is ever run by Python. What no rule reads is "unreadable" and only equals itself.

MAX_TEXT = 30_000  # characters of a completion that are read, counted from its end
MAX_PROSE = 5_000  # the same, where the letter of an option is looked for
MAX_ANSWER = 400  # characters of an answer; a longer one only equals itself
MAX_DEPTH = 30  # brackets inside each other
MAX_DIGITS = 2_500  # of a number

# The rules of spelling, in the order in which they are applied. At least two spaces stand between
# an example, a pattern, and what it becomes (␣ is a space; where nothing stands, it goes away).
# A deeply indented line goes on with the pattern of the line before.
SPELLING = r"""
# Characters are what they look like; NFKC is Unicode's own table of such characters.
2½               (?<![0-9])([0-9]*)\s?([¼-¾⅐-⅞])  (\1+\2)
10³              ([⁰¹²³⁴-ⁿ]+)  ^{\1}
x₁               ([₀-₉]+)  _{\1}
1 250            (?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))
18º              [º˚]  °
１％             NFKC
−5               [−–‐]  -
3⋅4              [⋅·∙∗]  *
1÷2              [÷⁄]  /
2¹⁄₂             (?<![0-9])([0-9]*)\s?\^\{([0-9]+)\}/_\{([0-9]+)\}  (\1+\2/\3)
1∶2              ∶  :
α                α  \\alpha␣
β                β  \\beta␣
θ                θ  \\theta␣
λ                λ  \\lambda␣
φ                φ  \\phi␣
ω                ω  \\omega␣
f′(x)            [’′]  '
**27**           ^[\s*]+|[\s*]+$
1,\n2            \s+  ␣

# LaTeX commands with a plain spelling.
1 \\ 2           \\\\(?=.*\\end\{)  ¶
\\frac           \\\\  \\
\cdot2           (\\[A-Za-z]+)(?=[0-9_])  \1␣
\left(           \\(?:left|right|[bB]ig+[lr]?|displaystyle|boxed|fbox)\b
{1:2}            ^\s?\{([^{},;]+)\}$  \1
1 \quad 2        \\q?quad\b  ␣
\dfrac           \\[dtc]frac\b  \\frac
\mbox{cm}        \\(?:mbox|textnormal|text(?:bf|it|rm)|mathrm)\b  \\text
3 \cdot 4        \\cdot\b  *
3 \times 4       \\times\b  ×
3 \div 4         \\div\b  /
x \le 5          \\(?:leq?|leqslant)\b|<=  ≤
x \ge 5          \\(?:geq?|geqslant)\b|>=  ≥
x != 5           \\neq?\b|!=|=?/=  ≠
x := 5           :=|==  =
x \lt 5          \\lt\b  <
x \gt 5          \\gt\b  >
x \in A          \\in\b  ∈
x \approx 5      \\approx\b  ≈
A \cup B         \\cup\b  ∪
\emptyset        \\(?:emptyset|varnothing)\b  ∅
\{\}             \\\{\s?\\\}|^\{\s?\}$|(?:\\text\s?\{)?\b(?:the )?empty set\b\}?  ∅
\{\emptyset\}    \\\{\s?∅\s?\\\}  [∅]
1 \pm 2          \\pm\b  ±
\infty           \\infty\b  ∞
2pi              (?:\\|(?<![A-Za-z]))pi\b  π
sqrt(2)          (?:\\|(?<![A-Za-z]))sqrt\b  √
30^\circ         ([\^{0-9]\s?)\\circ\b  \1°
\lfloor x        \\lfloor\b|⌊  §floor(
\lceil x         \\lceil\b|⌈  §ceil(
x \rceil         \\(?:rfloor|rceil)\b|[⌋⌉]  )
\{1\}, \$5       \\([{}$%])  \1
[\begin{array}   [(\[]?\s?\\begin\{array\}(?:\{[lcr|]*\})?(.*?)\\end\{array\}\s?[)\]]?  ⟦\1⟧
\begin{matrix}   \\begin\{[pb]?(?:small)?matrix\}(.*?)\\end\{\w+\}  ⟦\1⟧
\\ \end{matrix}  ¶\s?⟧  ⟧

# Text: one with a number or a list; a conjunction; a letter that is no unit; any other.
\text{14 pens}   \\text\s?\{([^{}]*[0-9,][^{}]*)\}  ␣\1␣
1 \text{or} 2    \\text\s?\{\s?(?:and|or)\s?\}|\b(?:and|or)\b  ,
\mathrm{e}^x     \\text\s?\{([A-Za-z](?=\}[}^])|[^\W\d_ghlmsAJKLNVW])\}  \1
\text{cm}        \s?\\text\s?\{\s?([^{}]*?)\s?\}\s?  ␣"\1"␣
Answer: 27       (?i)^[\s*_#"]*(?:the\s)?(?:final\s)?answer\b(?:\sis\b)?[\s*_:"]*(?!\s?-\s)

# Names of several characters: those of functions begin with §, others with @.
sin(x)           (?:\\|(?<![A-Za-z\\])(?=[a-z]+(?:\s?[(\[{0-9\\^_√π]|\s[a-z]\b)))
                 ((?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp)(?![A-Za-z])  §\1
\sin^{-1} x      §(sin|cos|tan)\s?\^\s?(?:\{\s?-1\s?\}|-1)  §arc\1
\sin^2 x         §([a-z]+)\s?\^\s?(?:\{\s?([0-9]+)\s?\}|([0-9]+))  §\1_p\2\3␣
\theta           \\((?:var)?(?i:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda
                 |mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega)|ell|hbar)\b  @\1␣
\vec{v}          \\(vec|hat|bar|overline|overrightarrow|angle|triangle)
                 \s?(?:\{\s?([A-Za-z]+)\s?\}|([A-Za-z]+))  @\1\2\3␣
\mathbb{R}       \\(?:math(?:bf|it|sf|bb|cal)|boldsymbol)\s?
                 (?:\{\s?([0-9A-Za-z]+)\s?\}|([0-9A-Za-z]))  \1\2
x_{\max}         _\s?\{["\\\s]*([0-9A-Za-z]+)["\s]*\}  _\1␣
y^{\prime}       \^\s?(?:\{\s?\\prime\s?\}|\\prime\b)  '

# What changes nothing: separators, spaces, degrees, currencies.
70{,}000         (?<=[0-9])(?:\{,\}|,\\!|\\[,;:\s])\s?(?=[0-9]{3}(?![0-9]))
5\,\%            \\[,;:!&#()\[\]\s]|[~%]  ␣
18^\circ C       (?:\^\s?(?:°|\{\s?°\s?\})|°)(?:\s?[CF]\b)?  ␣
US$640           (?<![\w}$])(?:US|CA?|AU?|NZ|HK|NT|SG?|MX|R)\s?\$(?=\s?[0-9.])
€640             [$¢£¥€\u20a0-\u20cf]  ␣
USD 640          (?:(?<=[0-9])|(?<![A-Za-z0-9]))
                 (?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|CHF|KRW|MXN|BRL|Rs\.?)(?![A-Za-z])  ␣
$5$ m            \s+  ␣
1 + 2            \s*([-+*/^_=<>≤≥≠≈∈∪×±:;&¶⟦({\[])\s*|\s+([)}\]⟧])  \1\2
1,080            (?<=[0-9]),(?=[0-9]{3}(?![0-9])[^()\[\]{}]*$)
x \in [1,2]      (?<![\w)}\]])[A-Za-z]∈
x \approx 5      (?<![^,;])([A-Za-z](?:_\w+)?(?:\([a-z]\))?)≈  \1=

# Products and powers; a × b with two letters stays, since it may be a cross product.
3×4              (?<![A-Za-z])×|×(?![A-Za-z@])  *
2**3             \*\*  ^

# Numbers: fractions, mixed numbers, repeating decimals, times of day.
\dot{1}          \\dot\s?\{([0-9])\}  \\dot\1
\frac12          \\frac\s?([0-9])([0-9])  \\frac{\1}{\2}
1\frac{4}{5}     (?<![0-9.])([0-9]+)\s?\\frac\{([0-9]+)\}\{([0-9]+)\}  (\1+\2/\3)
1 4/5            (?<![0-9.])([0-9]+)\s([0-9]+)/([0-9]+)  (\1+\2/\3)
0.1\overline{6}  (\.[0-9]*)\\(?:overline|bar)\s?(?:\{([0-9]+)\}|([0-9]))  \1(\2\3)
0.\dot1\dot6     (\.[0-9]*)\\dot\s?([0-9])(?:([0-9]*)\\dot\s?([0-9]))?  \1(\2\3\4)
0.333...         (\.[0-9]{0,9}?)([0-9]{1,6}?)\2\2+(?:\.\.\.|\\[lc]?dots\b)  \1(\2)
0.1(6)           (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9])\)  (0\1+(0\1\2-0\1)*10/9)
0.1(63)          (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9]{2})\)  (0\1+(0\1\2-0\1)*100/99)
0.(370)          (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9]{3})\)  (0\1+(0\1\2-0\1)*1000/999)
0.(1428)         (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9]{4})\)  (0\1+(0\1\2-0\1)*10000/9999)
0.(12345)        (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9]{5})\)  (0\1+(0\1\2-0\1)*100000/99999)
0.(142857)       (?<![0-9.])([0-9]*\.[0-9]*)\(([0-9]{6})\)  (0\1+(0\1\2-0\1)*1000000/999999)
9:00             (?<![\w:.])0?([0-9]{1,2}):00(?![\w:])  \1
6:15             (?<![\w:.])0?([0-9]{1,2}):([0-5][0-9])(?![0-9:]|\.[0-9])  "\1h\2"
6:15:30 am       (?<![\w:.])0?([0-9]{1,2}):([0-5][0-9]):([0-5][0-9])
                 (?=[\s"]*[AaPp]\.?[Mm])  "\1h\2m\3"
9 a.m.           (?i)("[^"]*"|\b[0-9]{1,2}(?=[\s"]))[\s"]*a(?:m|\.\s?m\.?)(?![a-z])"?  @am=\1
9 p.m.           (?i)("[^"]*"|\b[0-9]{1,2}(?=[\s"]))[\s"]*p(?:m|\.\s?m\.?)(?![a-z])"?  @pm=\1

# Words that change the number before them get a mark, so that they are not dropped as a unit.
5 thousands      (?i)(?<![a-z@\\])(?:tens|hundreds?|thousands?|[a-z]*illions?|mil|[bt]n|grand
                 |lakhs?|crores?|dozens?|score|gross)(?![a-z])  ¿\g<0>
5 fifths         (?i)(?<![a-z@\\])(?:hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin
                 |ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|[a-z]*illion)ths?)
                 (?![a-z])  ¿\g<0>
5 plus three     (?i)(?<![a-z@\\])(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven
                 |twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)(?![a-z])  ¿\g<0>
5 squared        (?i)(?<![a-z@\\])(?:(?<![a-z]{2}\s)(?:squared|cubed)
                 |(?:square|cube)(?=\W*$)|factorial|plus
                 |minus|over|times(?=\s)|divided|multiplied|power|root|choose|mod(?:ulo)?|doubled?
                 |tripled?|halved|twice|inverse|reciprocal)(?![a-z])  ¿\g<0>
5 below          (?i)(?<![a-z@\\])(?:negative|below|under|above|less|more|fewer|than|least|most
                 |short|not|never|without|except|but|nor)(?![a-z])  ¿\g<0>
5 base           (?<![A-Za-z@\\])(?:am|pm|AM|PM|base|binary|octal|hex(?:adecimal)?
                 |recurring|repeating
                 |remainder)(?![a-z])  ¿\g<0>

# Units: each becomes a text, and a text after a number is dropped.
5 hr             (?<=[0-9)}π])\s(?:[cdkmnμ]?m|[kmμ]?g|[cdm]?[lL]|[mnμ]?s|m?A|[kM]?[JNVW]|K|hr?
                 |[kMGT]?(?:Hz|Pa|Wh|eV)|[kMGT]B|mi|yd|yr|wk|mo|qt|pt|pc|ha|US|fl
                 |(?:sq|cu)(?:\sm)?)\b
                 (?!\s?[-+*}@§\\(√π]|\s[A-Za-z]\b)  "\g<0>"
5cm              (?<=[0-9)}π])\s?(?:[cdkmn]m|[km]g|m[lL]|ft|in|lbs?|oz|mph|hrs|mins?)\b
                 (?!\s?[*}@§\\(√π]|\s[A-Za-z]\b)  "\g<0>"
5 apples         (?<=[0-9)}π])\s[^\W\d_](?:[^\W\d_]|'){2,}  "\g<0>"
5 cups of tea    ("[^"¿,]*")(?:\^(?:-?[0-9]|\{-?[0-9]\})|/(?:[^\W\d_]+|"[^"¿,]*")|\.?\s?"[^"¿,]*"
                 |\.?\s(?:(?:a|per\s[a-z])\b|[^\W\d_]{2,}))+\.?  \1
5 \text{cm}      (?<=[0-9)}π])\s?"[^"¿,]*"[\s.]*(?=[-+*/,;=≈<>≤≥∪)\]}&¶⟧:]|$)
# Ratios in lowest terms, and what may stand around an answer.
a:b = 1:2        ^[A-Za-z](?::[A-Za-z])+=
1:2              (?<![^=])([^:=,;"]+):([^:=,;"]+)$  (\1)/(\2)
1:2:3            (?<![^=])([^:=,;"]+):([^:=,;"]+):([^:=,;"]+)$  ⟦(\1)/(\3)¶(\2)/(\3)⟧
= 27 .           ^[\s=≈,;*]+|[\s*.,;/\\]+$
AB C             (?<=[A-Z])\s(?=[A-Z]\b)
"""
RULES = re.findall(  # (pattern, what it becomes) of each row
    r"(?m)^[^#\s].*? {2,}(\S.*?)(?: {2,}(.*))?$", re.sub(r"\n {9,}", "", SPELLING)
)

# What the parts of a respelled answer look like.
ITEM = r"(?:@?[A-Za-z]+(?:_\w+)?(?:(?:'*|\^\{-1\})\([^()]*\))?|\"[^\"]*\")"
NAME = (  # x, x_1, AB, f(x), (x,y), "Area of" ABC, \frac{a}{b}; but not -x, 2x, x^2, xy
    rf"(?![a-z] ?[a-z]\b|abc\b|xyz\b)\(?{ITEM}(?:(?:[ ,:]+|(?=[@\"])){ITEM})*\)?"
    r"|\\frac\{[A-Za-z ]+\}\{[A-Za-z ]+\}"
)
WORDS = r"\".*|(?=.*[^\W\d_]{3}|[Nn]o$|[A-Z]{2,}$)(?!-)(?:[^\W\d_]|[ ¿\"'.()-])*"
PROSE = r"(?s)(?=.*[^\W\d_]{3})[^\\=<>^_{}|+*~\[\]]*"  # July 4, 1776
CAPITAL = r"[A-Z](?:_\w+ ?)?(?:\^(?:\{[^{}]*\}|\w))?"
SYMBOL = (
    r"(?:[A-Z]+[0-9][0-9A-Z]*|[0-9]+)_[0-9A-Za-z]+"  # 52_8
    rf"|{CAPITAL}(?:{CAPITAL})+"  # AB^{-1} is one symbol, since matrices do not commute
    # x_1, f'(x), I(0), P(X=2); but x(x+1) is a product
    r"|(?:@[A-Za-z]+ ?|[A-Za-z])(?:_\w+ ?)?'*"
    r"(?:\((?:[^()A-Za-z\\]*|[A-Za-z]|[^()]*[=<>≤≥,][^()]*)\))?"
    "|[π∞∅]"
)
NUMBER = r"(?:[0-9]+\.(?=[-+*/)}]|$)|[0-9]*\.?[0-9]+)(?:[eE][+-]?[0-9]{1,2}\b)?"
TOKEN = rf"§[a-z]+(?:_\w+)?|\\frac|{SYMBOL}|{NUMBER}|\S"
BRACKETS = {"(": ")", "[": "]", "{": "}", "⟦": "⟧"}
STRENGTH = {"+": 1, "*": 2, "/": 2, "^": 4}

# The letter of an option in prose.
CHOICE = re.compile(  # the phrase, filler, the letter; a small letter only where the phrase ends
    r"(?i:\b(?:answer|option|choice)(?:\** ?[:-]| (?:is|(?:must|would) be)\b)|\bit(?:'s| is)\b)"
    r"(?i:[\s:*$({\[]|\\(?:text|boxed)\b|option\b|choice\b|for sure\b|definitely\b){0,12}"
    r"([A-Z](?![\w'])|[a-j](?=[\s)}*$]{0,6}(?:[.,;\n]|$)))"
)
LABEL = re.compile(  # the letter alone, or before a bracket, dot or colon
    r"(?m)^[ \t*$({\[]{0,6}(?:\\(?:text|math)\w*\{)?(?:[Oo]ption )?\(?"
    r"([A-Z](?=[.:)}*$\]]|[ \t]*$)|[a-z](?=[).\s]{0,3}\Z))"
)
RIVAL = re.compile(r"[\s)}*$.\]]{0,6}(?:or\b|(?:and|,|/|&)[\s*$({\[]{0,6}[A-HJ-Z](?![\w']))")
LETTER = re.compile(r"\s{0,9}(?:\\text\{)?\(?([A-Z])\)?\}?\s{0,9}")


def extract_answer(text: str, marker: str = "####", flexible: bool = False) -> str | None:
    """Last closed box after the last marker, else the line after it; no marker: the last box."""
    text = text.rstrip()[-MAX_TEXT:]
    _, found, marked = text.rpartition(marker)
    opened = []  # for each open bracket, where its box begins; 0 for other brackets
    box = None
    for match in re.finditer(r"(\\{1,2}(?:boxed|fbox)\s*|)\{|\\.|(\})", marked):
        if match[1] is not None:
            opened.append(match.end() if match[1] else 0)
        elif match[2] and opened:
            start = opened.pop()
            box = marked[start : match.start()] if start else box
    if box is not None:
        return box
    # "Final Answer" may be a heading. A special token such as <|endoftext|> ends the line, too.
    marked = re.sub(r"(?i)^\W*(?:the )?(?:final )?answer\W*\n\s*", "", marked.strip())
    line = re.split(r"\n|<\|", marked)[0].strip()
    if not flexible:
        return line if found else None
    if found and read_answer(line)[0] not in ("text", "unreadable"):
        return line
    # For evaluation only, since a policy under training would learn to exploit these guesses.
    text = re.split(r"(?i)\banswer(?:\s+is\b|\s*:)", marked or text)[-1]
    guesses = re.findall(r"\$([^$]+)\$|(-?[0-9][0-9,.]*)", text)
    return "".join(guesses[-1]) if guesses else text


def is_correct(completion: str, gold: str | list[str], marker: str = "####") -> bool:
    """Is the marked or boxed answer a gold one? A gold letter may also be stated in prose."""
    return answers_equal(extract_answer(completion, marker), gold, completion)


def is_readable(gold: str | list[str]) -> bool:
    """Can the checker interpret this gold answer, or one of a list? Then other spellings count."""
    if not isinstance(gold, str):
        return any(map(is_readable, gold))
    return read_answer(gold)[0] != "unreadable"


def answers_equal(predicted: str | None, gold: str | list[str], prose: str = "") -> bool:
    """Is an extracted answer the same value, structure, option or text as a gold one?

    Where nothing was extracted (None), the letter of an option is looked for in the prose.
    """
    if not isinstance(gold, str):
        return any(answers_equal(predicted, each, prose) for each in gold)
    letter = LETTER.fullmatch(gold)
    if letter:
        text = prose if predicted is None else predicted
        return stated_letter(text[-MAX_PROSE:]) == letter[1]
    predicted = (predicted or "").strip()
    if predicted == gold.strip():
        return predicted != ""
    right = read_answer(gold)
    if right[0] == "number":  # where m+n is asked for, "m+n = 204" is 204
        predicted = re.sub(r"^[\s$\\(\[]*[a-w](?:\s*\+\s*[a-w])+\s*=", "", predicted)
    left = read_answer(predicted)
    if same(left, right):
        return True
    leaves = right[1] if right[0] == "" else [right]
    if "\\" in gold or any(leaf[0] != "text" for leaf in leaves):
        return False
    text = left[1] if left[0] == "text" else predicted
    return plain_words(text, "a an the") == plain_words(gold, "a an the")


def plain_words(text, dropped=""):
    """Words without capitals and punctuation (except in numbers); SQuAD also drops articles."""
    words = re.sub(r"[^\w\s](?![0-9])", "", text.casefold()).split()
    return " ".join(word for word in words if word not in dropped.split())


def stated_letter(text):
    """The option that a text states last, or the only one that labels a line; None if unclear."""
    stated = list(CHOICE.finditer(text))
    labels = list(LABEL.finditer(text))
    if not stated and len({match[1] for match in labels}) != 1:
        return None
    last = (stated or labels)[-1]
    return None if RIVAL.match(text, last.end(1)) else last[1].upper()


def read_answer(text):
    """Tree of an answer: (form, content)."""
    text = respell(text)
    try:
        if len(text) <= MAX_ANSWER:
            return read_tree(text)
    except (ValueError, ArithmeticError, RecursionError):  # syntax; 1/0, overflow; nesting
        if re.fullmatch(PROSE, text):
            return "text", plain_words(text)
    return "unreadable", text.replace(" ", "")


def respell(text):
    """One spelling for each symbol; units, signs of currency, percent and degrees are dropped."""
    for pattern, plain in RULES:
        if len(text) > MAX_ANSWER:
            break
        if pattern == "NFKC":
            text = unicodedata.normalize("NFKC", text)
        else:
            text = re.sub(pattern, plain.replace("␣", " "), text)
    return text


def split_top(text, separators):
    """Parts of the text between separators outside all brackets, and those separators."""
    parts = [""]
    found = ""
    depth = 0
    for char in text:
        depth += (char in "([{⟦") - (char in ")]}⟧")
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if depth == 0 and char in separators:
            parts.append("")
            found += char
        else:
            parts[-1] += char
    return [part.strip() for part in parts], found


def read_tree(text):
    """Tree of a respelled answer: a list, rounded value, relation, ratio, bracket or atom."""
    for separator in "∪;,":
        parts, found = split_top(text, separator)
        if found:
            form = separator.strip(";,")
            return form, [read_tree(part) for part in parts if part]
    exact, found, rounded = text.rpartition("≈")
    if found:  # 100/3 ≈ 33.33 is both, if it is rounded rightly
        value = exact.rpartition("=")[2].replace("π", "(3.141592653589793)")
        decimals = len(rounded.partition(".")[2])
        error = abs(evaluate(value) - evaluate(rounded)) * 10**decimals
        options = [read_tree(exact), read_tree(rounded)]
        return "≈", options if error <= 0.5 else options[:1]
    parts, signs = split_top(text, "=∈<>≤≥≠")
    if signs:
        return read_relation(parts, signs)
    if "±" in text:
        return "", [read_tree(text.replace("±", sign)) for sign in "+-"]
    if text[:1] in BRACKETS and split_top(text, ")]}⟧")[0] == [text[:-1].strip(), ""]:
        parts, found = split_top(text[1:-1], ",;&¶")
        form = text[0] + found.strip(",;") + text[-1]  # of a matrix also its shape, as ⟦&¶&⟧
        if len(parts) == 1 and form in ("()", "{}"):
            return read_tree(parts[0])
        return form, [read_tree(part) for part in parts]
    return read_atom(text)


def read_relation(parts, signs):
    """A named value (x = 5), a calculation (9*3 = 27) or a relation (x > 5, 2x+3y = 1)."""
    if not signs.strip(">≥"):  # 5 > x is x < 5
        parts, signs = parts[::-1], signs[::-1].translate(str.maketrans(">≥", "<≤"))
    if signs.strip("="):
        return signs, [read_tree(part) for part in parts]
    if not re.fullmatch(NAME, parts[0]):  # 5 = x is x = 5
        parts = parts[::-1]
    if re.fullmatch(NAME, parts[0]):
        name = re.sub("_[0-9]+", "", parts[0])
        return "named", [read_tree(name), read_tree(parts[-1])]
    sides = [read_tree(part) for part in parts]
    return sides[0] if all(same(side, sides[0]) for side in sides) else ("=", sides)


def read_atom(text):
    """Words, what is only compared as written, or a number with the count of its decimals."""
    if re.fullmatch(WORDS, text):
        return "text", plain_words(text)
    if re.search(r"×|\\(?!frac)[A-Za-z]", text):
        return "written", text.replace(" ", "")
    decimals = re.fullmatch(r"[+-]?[0-9]*\.([0-9]+)|.*", text)[1]
    return "number", (evaluate(text), len(decimals or ""))


def evaluate(text):
    """Value of an expression: Fraction while rational, else float."""
    tokens = ["", *reversed(re.findall(TOKEN, text))]  # taken from the end; "" ends the text
    value = read_expression(tokens)
    if tokens != [""] or not abs(value) < 1e300:  # beyond, floats overflow or are inf or nan
        raise ValueError("text after the expression, or too large")
    return value


def read_expression(tokens, strength=0):
    """Value of the operators that bind more than strength."""
    value = read_operand(tokens)
    while True:
        # 2x has no operator, and a sign is left to its term; "1 8" is neither 18 nor 8
        operator = re.sub(r"^[A-Za-z@§\\(\[{√π∞∅].*", "*", tokens[-1]).replace("-", "+")
        if STRENGTH.get(operator, 0) <= strength:
            return value
        if operator == tokens[-1] != "+":
            tokens.pop()
        right = read_expression(tokens, min(STRENGTH[operator], 3))
        if operator == "^":
            if len(str(value)) * abs(right) > MAX_DIGITS:
                raise ValueError("power out of bounds")
            value = value**right
        elif operator == "/":
            value = value / right
        else:
            value = value + right if operator == "+" else value * right
        if len(str(value)) > MAX_DIGITS:
            raise ValueError("number out of bounds")


def read_operand(tokens):
    """A number, bracket, root, fraction, function or symbol."""
    token = tokens.pop()
    if token in ("+", "-"):
        return Fraction(token + "1") * read_expression(tokens, 2)  # -x^2 is -(x^2)
    if token in BRACKETS:
        value = read_expression(tokens)
        if tokens.pop() != BRACKETS[token]:
            raise ValueError("wrong bracket")
        return value
    if token == r"\frac":
        return read_operand(tokens) / read_operand(tokens)
    if token == "√":
        degree = abs(read_operand(tokens)) if tokens[-1] == "[" else 2
        return read_operand(tokens) ** (1 / float(degree))
    if re.fullmatch(NUMBER, token):
        return Fraction(token)
    if token.startswith("§"):
        token += str(read_operand(tokens))  # equal arguments give equal values
    elif not re.fullmatch(SYMBOL, token):
        raise ValueError("unknown character")
    # Expressions that agree at this point are the same polynomial, but for a chance near 2^-31.
    number = int.from_bytes(token.encode(), "big") + 2**30
    return 1 + Fraction(pow(number, 65537, 2**31 - 1), 2**31)


def same(left, right):
    """Do two trees hold equal values? Bare lists, sets and unions may be in another order."""
    if left[0] != right[0]:  # x = 5 is 5, but not y = 5
        left, right = (tree[1][1] if tree[0] == "named" else tree for tree in (left, right))
    (form, items), (other, others) = left, right
    if form == "≈":
        return any(same(item, right) for item in items)
    if other == "≈":
        return any(same(left, item) for item in others)
    forms = {form, other}
    if forms == {"number"}:
        return same_number(*items, *others)
    if len(forms) == 1 and isinstance(items, str):
        return items == others != ""
    if len(items) != len(others) or len(forms) > 1 and forms not in ({"", "()"}, {"", "{}"}):
        return False
    named = {item[0] == "named" for item in [*items, *others]}
    if len(named) > 1 or len(items) > 40 or not forms <= {"", "{}", "∪", "=", "≠", "named"}:
        return all(map(same, items, others))
    rest = list(others)
    for item in items:
        partner = next((each for each in rest if same(item, each)), None)
        if partner is None:
            return False
        rest.remove(partner)
    return True


def same_number(left, decimals, right, other_decimals):
    """Equal, or a long decimal against the endless value it rounds: 0.333333 = 1/3, not 0.33."""
    error = abs(left - right)
    slack = 1e-13 * abs(right)
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    if error <= (0 if exact else slack):
        return True
    value = right if decimals else left
    ends = exact and pow(10, 4096, value.denominator) == 0  # 17.9999999 is not 18
    digits = decimals or other_decimals
    return not ends and digits >= (6 if exact else 10) and error <= 10.0**-digits + slack


def grade(batch, problems, tokenizer, marker):
    """Decode and check a rollout -> one record per completion; rows of a problem are neighbours.

    The ids are cut at the first EOS by length, so pad = EOS does no harm. latent_spans: the runs
    [start, end) of latent positions, switches in number. format_ok: the marker occurs exactly once.
    row: all columns of the problem's row in its file, for a reward of your own.
    """
    lengths = batch["lengths"].tolist()
    finished = batch["finished"].tolist()
    masks = batch["latent_mask"].tolist()
    ids = [row[:n] for row, n in zip(batch["completion_ids"].tolist(), lengths)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    records = []
    for row, text in enumerate(texts):
        problem = problems[row * len(problems) // len(texts)]
        latent = masks[row][: lengths[row]]
        spans = [list(run.span()) for run in re.finditer(rb"\x01+", bytes(latent))]
        answer = extract_answer(text, marker)
        records.append({
            "question": problem["question"], "completion": text,
            "extracted": answer, "gold": problem["answer"], "unanswered": answer is None,
            "correct": is_correct(text, problem["answer"], marker),
            "format_ok": text.count(marker) == 1, "truncated": not finished[row],
            "length": lengths[row], "latent_steps": sum(latent),
            "switches": len(spans), "latent_spans": spans, "set": problem.get("set", ""),
            "row": problem.get("row", {})})
    return records


# === 4. embeddings and batches ====================================================================


@contextlib.contextmanager
def autocast(lm):
    """bfloat16 autocast when the model was loaded with that dtype; otherwise it does nothing.

    Autocast converts a trained weight once, but a frozen one at each use. So in a rollout, which
    makes no gradients, the frozen head passes for trained.
    """
    enabled = lm.compute_dtype == torch.bfloat16
    weight = lm.get_output_embeddings().weight
    is_trained = weight.requires_grad
    weight.requires_grad_(is_trained or not torch.is_grad_enabled())
    try:
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=enabled):
            yield
    finally:
        weight.requires_grad_(is_trained)


class RoomyLayer(DynamicLayer):
    """Keys and values [b, heads, S, size] of one layer: views of buffers that are larger.

    DynamicLayer copies all of them at each step. Here a step writes its own column; when no column
    is free, the buffers grow by an eighth and `spare`: in wider ones short rows would lie far apart
    in memory. For decoding only: backward needs what a write would change.
    """

    spare = 8
    room = 0  # columns of the buffers

    def update(self, key_states, value_states, *args, **kwargs):
        """The new keys and values [b, heads, s, size] -> all that are cached now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Under autocast rotary embeddings leave keys in float32; attention rounds them anyway.
            self.keys = key_states[:, :, :0].to(value_states.dtype)
            self.values = value_states[:, :, :0]
        number, _, start, _ = self.keys.shape
        end = start + key_states.shape[2]
        if end > self.room:
            self.room = end + end // 8 + self.spare
            free = (0, 0, 0, self.room - start)
            self.buffers = [F.pad(self.keys, free), F.pad(self.values, free)]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:number, :, start:end] = new
        self.keys, self.values = (buffer[:number, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats):
        """Each row `repeats` times; the next step makes buffers of that size."""
        super().batch_repeat_interleave(repeats)
        self.room = 0


class RoomyCache(DynamicCache):
    """The cache of a rollout, made of RoomyLayers."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer

    def batch_select_indices(self, indices):
        """Keep the rows `indices`. A row that keeps its place is not copied: see live_rows."""
        number = len(indices)
        is_moved = indices != torch.arange(number, device=indices.device)
        places = is_moved.nonzero()[:, 0]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[places] = layer.keys[indices[places]]
                layer.values[places] = layer.values[indices[places]]
                layer.keys = layer.keys[:number]
                layer.values = layer.values[:number]


def live_rows(ended, width):
    """ended [b] -> numbers of the other rows, for a cache of `width` columns.

    In a wide cache the last rows take the places of those that ended, so that no other row moves.
    Rows draw noise in their order: below 512 columns it stays, and tiny's published numbers too.
    """
    live = (~ended).nonzero()[:, 0]
    if width < 512:
        return live
    number = len(live)
    order = torch.arange(number, device=ended.device)
    order[ended[:number]] = live[live >= number]
    return order


@functools.cache
def cache_name(model_class):
    """What the forward of a class calls its cache: past_key_values; cache from transformers 5.24"""
    names = inspect.signature(model_class.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def lm_hidden(lm, embeds, mask, positions=None, cache=None):
    """Last hidden states, after the final norm: embeds [B, S, H] -> [B, S, H].

    mask [B, past + S] bool: the positions, cached ones included, that exist. positions [B, S] are
    counted from it when not given, so that left padding shifts nothing. Windows and ALiBi count
    columns instead: between two positions of a row there must be none that does not exist. cache:
    a transformers DynamicCache, extended in place; None computes without one.
    """
    if positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        positions = positions[:, -embeds.shape[1] :]
    body = lm.base_model
    caching = {"use_cache": cache is not None, cache_name(type(body)): cache}
    outputs = body(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, **caching)
    return outputs.last_hidden_state


def lm_logits(lm, hidden):
    """hidden [..., H] -> logits [..., V] float32; V = the tokenizer's ids, without padded rows.

    What the model itself makes of them: some scale logits (Cohere, Granite, MiniCPM), some bend
    them so that they stay below a cap (Gemma 2). Scaling the input of the head costs less.
    """
    logits = lm.get_output_embeddings()(hidden * lm.head_scale)[..., : lm.num_tokens].float()
    if lm.softcap:
        logits = lm.softcap * torch.tanh(logits / lm.softcap)
    return logits


def embed_scale(table):
    """The factor by which an embedding module multiplies its rows (Gemma, MiniCPM); mostly 1.

    Other models multiply later, and then all that is fed (Granite): nothing is to be done here.
    """
    return getattr(table, "embed_scale", 1.0)


def completion_hidden(lm, batch, embeds):
    """Hidden states [B, T, H] that decide each completion position: the only place with an offset.

    embeds [B, T, H]: the input at each completion position. The hidden state at absolute position
    P + t - 1 decides completion position t, whose embedding is the input at P + t; so the last one
    decides nothing and is not fed. With lm.share_prompts, rows with the same prompt share its pass:
    their completions attend to the same keys and values, through which its gradients add up.
    """
    ids = batch["prompt_ids"]
    prompt_mask = batch["prompt_mask"]
    table = lm.get_input_embeddings()
    fed = embeds[:, :-1]
    exists = torch.cat([prompt_mask, batch["completion_mask"][:, :-1]], 1)
    first, same = first_of_each(ids, prompt_mask) if lm.share_prompts else (ids, None)
    if len(first) == len(ids):
        inputs = torch.cat([table(ids), fed], 1)
        return lm_hidden(lm, inputs, exists)[:, ids.shape[1] - 1 :]
    cache = DynamicCache()
    hidden = lm_hidden(lm, table(ids[first]), prompt_mask[first], cache=cache)
    last = hidden[same, -1:]  # [B, 1, H]
    if fed.shape[1] == 0:
        return last
    cache.batch_select_indices(same)
    rest = lm_hidden(lm, fed, exists, cache=cache)
    return torch.cat([last, rest], 1)


def first_of_each(prompt_ids, prompt_mask):
    """Prompts [B, P] -> first row of each distinct one [b], and which of them each row has [B]."""
    seen, rows = {}, []  # rows: for each row, the first one with the same prompt
    for row, (ids, mask) in enumerate(zip(prompt_ids.cpu(), prompt_mask.cpu())):
        prompt = tuple(ids[mask].tolist())
        rows.append(seen.setdefault(prompt, row))
    return torch.tensor(rows, device=prompt_ids.device).unique(return_inverse=True)


def completion_logprobs(lm, hidden, ids, mask, temperature=1.0, chunk=1 << 24):
    """Log-probs of ids under softmax(logits / temperature), full vocabulary, and its entropy.

    hidden [B, T, H]; ids [B, T] or [B, T, K]; mask [B, T]: positions outside give 0, cost nothing
    -> logprobs shaped like ids, entropy [B, T] (nats, detached), float32. The head runs on slices
    of about `chunk` logits, so that [B, T, V] never exists. Backward recomputes them, but not where
    frozen_logprobs can be used.
    """
    states = hidden[mask]  # [n, H]
    wanted = ids[mask]  # [n] or [n, K]
    size = max(1, chunk // lm.num_tokens)
    recompute = torch.is_grad_enabled() and len(states) > size
    head = lm.get_output_embeddings()
    is_frozen = isinstance(head, nn.Module) and not any(p.requires_grad for p in head.parameters())
    score = gather_logprobs
    if recompute and is_frozen and ids.dim() == 2:
        score = frozen_logprobs
    elif recompute:
        score = functools.partial(checkpoint, gather_logprobs, use_reentrant=False)
    found, entropies = [], []
    for start in range(0, max(1, len(states)), size):
        rows = slice(start, start + size)
        part = score(lm, states[rows], wanted[rows], temperature)
        found.append(part[0])
        entropies.append(part[1])
    logprobs = torch.zeros(ids.shape, device=ids.device)
    entropy = torch.zeros(mask.shape, device=ids.device)
    logprobs[mask] = torch.cat(found)
    entropy[mask] = torch.cat(entropies)
    return logprobs, entropy


def gather_logprobs(lm, states, ids, temperature):
    """states [n, H], ids [n] or [n, K] -> log-probs shaped like ids, entropies [n]."""
    logits = lm_logits(lm, states) / temperature
    logprobs = torch.log_softmax(logits, -1)  # [n, V]
    columns = ids if ids.dim() > 1 else ids[:, None]
    found = logprobs.gather(-1, columns)
    with torch.no_grad():  # last: backward recomputes only up to what it needs
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return found.view(ids.shape), entropies


def frozen_logprobs(lm, states, ids, temperature):
    """gather_logprobs of ids [n] for a head that is not trained; backward costs nothing.

    The log-prob of a row depends on the state of that row only. So its slope [n, H] can be made at
    once, while the logits are there, whatever the loss will be.
    """
    inputs = states.detach().requires_grad_()
    found, entropies = gather_logprobs(lm, inputs, ids, temperature)
    slopes, = torch.autograd.grad(found.sum(), inputs)
    change = (states - inputs.detach()) * slopes  # 0, with the gradient that found has
    return found.detach() + change.sum(-1), entropies


def candidate_scores(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What ids are sampled from: temperature, then top-k, then top-p.

    logits [B, V] -> scores [B, K], ids [B, K] or None. softmax(scores) are the probabilities of the
    K candidates, 0 where top-p cut. With top_k 0 and top_p 1, K = V and ids is None: k is id k.
    """
    scores = logits / temperature
    ids = None
    if 0 < top_k < logits.shape[-1]:
        scores, ids = scores.topk(top_k, -1)
    elif top_p < 1:
        scores, ids = scores.sort(-1, descending=True)
    if top_p < 1:
        probs = scores.softmax(-1)
        likelier = probs.cumsum(-1) - probs  # mass of the ids before each
        scores = scores.masked_fill(likelier >= top_p, -math.inf)
    return scores, ids


def sample(probs, rng, width=256):
    """probs [b, K] -> places [b], each drawn with its share of the sum of its row.

    multinomial draws noise for each of the K places. So from 1024 places on it draws a block of
    `width` places first, and then a place in it.
    """
    if probs.shape[1] < 1024:
        return torch.multinomial(probs, 1, generator=rng)[:, 0]
    padded = F.pad(probs, (0, -probs.shape[1] % width))
    blocks = padded.unflatten(1, (-1, width))  # [b, n, width]
    block = sample(blocks.sum(-1), rng)  # [b]
    inside = blocks.take_along_dim(block[:, None, None], 1)  # [b, 1, width]
    return block * width + sample(inside[:, 0], rng)


def make_rng(device, *key):
    """Generator seeded by what the noise is for: seed, purpose, step. A resume needs no state."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:7], "little")
    return torch.Generator(device).manual_seed(seed)


def gumbel_like(x, rng):
    """Independent standard Gumbel noise shaped like x, float32; rng is a torch.Generator."""
    draws = torch.empty(x.shape, device=x.device)
    draws.exponential_(generator=rng)
    return -draws.clamp(min=1e-30).log()


def top_k_mixture(ids, weights, table):
    """Weighted sum of K embeddings: ids, weights [..., K] -> [..., H], dtype of the table."""
    rows = table.weight
    bags = ids.flatten(0, -2)  # [n, K]
    factors = weights.flatten(0, -2).to(rows.dtype)
    mixed = F.embedding_bag(bags, rows, mode="sum", per_sample_weights=factors)  # [n, H]
    mixed = mixed.view(*ids.shape[:-1], -1)
    return mixed * embed_scale(table)


# ---- batches: dicts of tensors with B rows; their keys: `rollout` in a script --------------------


def left_pad(prompts, pad_id, device):
    """Lists of ids -> ids [N, P] padded on the left, mask [N, P] made from the lengths."""
    width = max(map(len, prompts))
    rows, gaps = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        rows.append([pad_id] * gap + prompt)
        gaps.append([gap])
    ids = torch.tensor(rows, device=device)
    columns = torch.arange(width, device=device)
    mask = columns >= torch.tensor(gaps, device=device)
    return ids, mask


def select_rows(batch, rows):
    """The given rows of every tensor, without the columns that are padding in all of them."""
    picked = {name: value[rows] for name, value in batch.items()}
    longest = int(picked["lengths"].max())
    prompt_mask = picked["prompt_mask"]
    first = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
    for name, value in picked.items():
        if name.startswith("prompt"):
            picked[name] = value[:, first:]
        elif value.dim() > 1:
            picked[name] = value[:, :longest]
    return picked


def micro_batches(batch, rows, micro_batch, max_tokens=0, share_prompts=False):
    """Row numbers, longest row first, in lists of at most micro_batch rows, max_tokens tokens.

    share_prompts: rows with the same prompt stay together, in the place of the longest of them.
    """
    lengths = batch["lengths"].tolist()
    prompts = batch["prompt_mask"].sum(1).tolist()
    same = range(len(lengths))
    if share_prompts:
        same = first_of_each(batch["prompt_ids"], batch["prompt_mask"])[1].tolist()
    longest = {}
    for row in rows:
        total = lengths[row] + prompts[row]
        longest[same[row]] = max(total, longest.get(same[row], 0))
    pieces = [[]]
    prompt, length = 0, 0  # the widest of the piece
    for row in sorted(rows, key=lambda row: (-longest[same[row]], same[row])):
        prompt = max(prompt, prompts[row])
        length = max(length, lengths[row])
        size = len(pieces[-1]) + 1
        if size > 1 and (size > micro_batch or 0 < max_tokens < size * (prompt + length)):
            pieces.append([])
            prompt = prompts[row]
            length = lengths[row]
        pieces[-1].append(row)
    return pieces


# === 5. runs ======================================================================================


def run_program(main):
    """Run `main`; errors that a user can mend end in one line, from the rank that met them."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 ends no run
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {first_line(error)}; lower --micro_batch, --max_tokens, --num_prompts, "
                 "--eval_batch or --max_completion_length; see --dry_run")
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not re.search("[Tt]imed out|[Tt]imeout", str(error)):
            raise
        sys.exit(f"error: rank {os.environ.get('RANK')} waited for another one in vain; if none "
                 f"hangs, raise --dist_timeout ({first_line(error)})")
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # without it gloo's threads can abort the interpreter's exit


# ---- the command line ----------------------------------------------------------------------------


def parse_flags(config, presets, doc, argv=None):
    """The command line -> an instance of the dataclass `config`: every field is a flag.

    A value is that of the command line, else that of the preset, else the field's own. The preset
    is --preset; by default the one that a checkpoint of ours was trained with, tiny for the tiny
    model, and paper for all others. An unknown flag or preset ends with exit code 2.
    """
    for word in sys.argv if argv is None else argv:
        if re.search("[\ud800-\udfff]", word):
            fail(f"{word!r}: is no UTF-8 text")
    source = inspect.getsource(config)
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", source, re.M))
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]", description=doc,
        formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False, add_help=False)
    for field in dataclasses.fields(config):
        note = notes[field.name].replace("%", "%%") + " (%(default)s)"
        kind = {"type": field.type, "metavar": field.type.__name__}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{field.name}", default=field.default, help=note, **kind)
    first, _ = parser.parse_known_args(argv)  # only to find the preset
    preset = first.preset
    if preset == "auto":
        by_model = "tiny" if first.model.split(":")[0] == "tiny" else "paper"
        saved = checkpoint_settings(first.model).get("preset")
        preset = saved if saved in presets else by_model
    if preset not in presets:
        fail(f"--preset {preset}: must be auto or one of {', '.join(presets)}")
    parser.set_defaults(**presets[preset])
    parser.add_argument("-h", "--help", action="help", help="show this text and exit")
    return config(**{**vars(parser.parse_args(argv)), "preset": preset})


AT_LEAST_1 = """steps num_prompts max_prompt_length max_completion_length micro_batch eval_every
    eval_batch num_samples save_every keep_checkpoints dist_timeout""".split()


def resolve_config(cfg, method, counts=(), minibatches=1):
    """Fill in the settings that follow from others, in place; `fail` on values that cannot work.

    counts: the method's own fields that must be at least 1; minibatches share out a rollout.
    """
    if cfg.model == "tiny" and cfg.train.startswith("arithmetic"):
        cfg.model = f"tiny:{cfg.train}"  # each arithmetic task has its own base model
    if cfg.warmup_steps < 0:
        cfg.warmup_steps = round(0.1 * cfg.steps)
    if cfg.device == "auto":
        cfg.device = "cpu"
        if torch.backends.mps.is_available():
            cfg.device = "mps"
        if torch.cuda.is_available():
            cfg.device = "cuda"
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device.startswith("cuda") else "float32"
    if not cfg.out_dir:
        name = re.sub(r"[^\w.-]+", "-", Path(cfg.model).name)
        cfg.out_dir = f"runs/{method}-{name}-s{cfg.seed}"

    for flag, value in vars(cfg).items():
        least = int(flag in (*AT_LEAST_1, *counts))
        if isinstance(value, int | float) and not least <= value < math.inf:
            fail(f"--{flag} {value}: must be at least {least} and finite")
    shares = int(os.environ.get("WORLD_SIZE", 1)) * minibatches
    has_file = any(map(ENDING.search, re.split(r"\s*,\s*", cfg.train)))
    rules = [  # flag, is its value fine, what would be
        ("num_prompts", cfg.num_prompts % shares == 0, f"what divides by ranks x minibatches = "
         f"{shares}, since a group of completions stays together"),
        ("group_size", cfg.group_size >= 2, "2 or more completions a problem, to compare them"),
        ("temperature", cfg.temperature > 0, "above 0; --greedy evaluates with argmax"),
        ("top_p", 0 < cfg.top_p <= 1, "in (0, 1]"),
        ("adam_beta2", cfg.adam_beta2 < 1, "in [0, 1)"),
        ("train_embeddings", not (cfg.train_embeddings and cfg.lora_rank),
         "off, since embeddings stay frozen with LoRA; or --lora_rank 0"),
        ("answer_marker", cfg.answer_marker, "some text"),
        ("dtype", cfg.dtype in ("float32", "bfloat16"), "auto, float32 or bfloat16"),
        ("track", cfg.track in ("", "tensorboard", "wandb"), "tensorboard or wandb"),
        ("device", cfg.device.split(":")[0] in ("cuda", "mps", "cpu"), "auto, cuda, mps or cpu"),
        ("train", cfg.eval_data or not has_file,
         "with a named --eval_data, since a file has no test split"),
    ]
    for flag, is_fine, right in rules:
        if not is_fine:
            fail(f"--{flag} {getattr(cfg, flag)}: must be {right}")


# ---- ranks and stop signals ----------------------------------------------------------------------


def setup_distributed(cfg):
    """Join torchrun's process group, or make a group of one -> rank, world_size, device.

    So no later line has to ask whether there is a group. From here on a stop signal is noted.
    """
    device = torch.device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            fail(f"--device {cfg.device}: more ranks on this machine than GPUs")
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
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # what replaces it needs torch 2.13
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
    """Was this process told to stop? Or was its launcher killed, which would leave it an orphan?"""
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


def gather(values):
    """The lists of all ranks, one after the other; the same list on all ranks."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return sum(parts, [])


def check_ranks(settings, resumed):
    """`fail` on all ranks where they disagree on flags, weights, data or the step to go on from."""
    mine = {"resumed step": checkpoint_step(resumed) if resumed else 0, **settings}
    everyone = gather([mine])
    for name in mine:
        values = [other[name] for other in everyone]
        if values != values[:1] * len(values):
            fail(f"{name} differs between ranks: {', '.join(map(str, values))}; all need the same "
                 "flags, model and data, and one run folder that all machines can read")


# ---- one step: its problems, its numbers ---------------------------------------------------------


def next_problems(problems, number, seed, step):
    """This rank's share of the `number` problems of a step. Each pass over the data is shuffled."""
    epoch, start = divmod(step * number, len(problems))
    order = []  # of the passes from this one on
    while len(order) < start + number:
        rng = make_rng("cpu", seed, "order", epoch)
        order += torch.randperm(len(problems), generator=rng).tolist()
        epoch += 1
    rank, world_size = dist.get_rank(), dist.get_world_size()
    end = start + (rank + 1) * number // world_size
    start += rank * number // world_size
    return [problems[i] for i in order[start:end]]


def add_up(sums, found):
    """Add a micro-batch to sums, {metric: [sum, count]}, in place.

    found: {metric: (values [B, T], mask [B, T] of those that count)}. A NaN is left out.
    """
    for name, (values, mask) in found.items():
        total = values[mask].sum().item()
        if math.isfinite(total):
            sums[name][0] += total
            sums[name][1] += int(mask.sum())


def largest(values, mask):
    """Largest of values [B, T] >= 0 where mask [B, T] is True; at most 1e9, which JSON can hold."""
    return values.masked_fill(~mask, 0).max().clamp(max=1e9).item()


def combine(updates):
    """Metrics of several updates, a list of (sums, peaks) -> (sums, peaks), as of one update."""
    sums, peaks = updates[0]
    for name in sums:
        totals, counts = zip(*(found[name] for found, _ in updates))
        sums[name] = [sum(totals), sum(counts)]
    for name in peaks:
        peaks[name] = max(found[name] for _, found in updates)
    return sums, peaks


def means(sums):
    """{metric: [sum, count]} of each rank -> {metric: mean over all ranks, None if none counts}."""
    totals = all_reduce(list(sums.values()))  # [number of metrics, 2]
    return {name: total / count if count else None for name, (total, count) in zip(sums, totals)}


def maxima(peaks):
    """{metric: largest value of this rank, or -inf} -> {metric: largest of all ranks, or None}."""
    largest = all_reduce(list(peaks.values()), dist.ReduceOp.MAX)
    return {name: value if value > -math.inf else None for name, value in zip(peaks, largest)}


def record_sums(records, group_size):
    """Graded completions of a step -> {metric: [sum, count]}. Rows of a group are neighbours."""
    sums = {}
    for name in ("reward", "correct", "format_ok", "length", "latent_steps", "truncated_frac"):
        values = [record[name.removesuffix("_frac")] for record in records]
        sums[name] = [sum(values), len(values)]
    rewards = [record["reward"] for record in records]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    sums["zero_std_frac"] = [sum(min(g) == max(g) for g in groups), len(groups)]
    return sums


def summarise(records, num_samples):
    """Graded completions of an evaluation, in the order of the problems -> metrics.

    stderr is that of the accuracy over the problems, each the mean of its samples. Several data
    sets get an accuracy each.
    """
    correct = torch.tensor([float(record["correct"]) for record in records])
    scores = correct.view(-1, num_samples).mean(1)  # one per problem
    latent, length = mean(records, "latent_steps"), mean(records, "length")
    row = {
        "accuracy": scores.mean().item(), "n": len(scores),
        "stderr": scores.std(correction=0).item() / len(scores) ** 0.5,
        "latent_steps": latent, "visible_tokens": length - latent, "total_length": length,
        "truncated_frac": mean(records, "truncated"), "format_ok": mean(records, "format_ok"),
        "unanswered_frac": mean(records, "unanswered"), "switches": mean(records, "switches")}
    sets = dict.fromkeys(record["set"] for record in records)
    if len(sets) > 1:
        for name in sets:
            own = [record for record in records if record["set"] == name]
            row[f"accuracy/{name}"] = mean(own, "correct")
    return row


def mean(records, name):
    return sum(record[name] for record in records) / len(records)


def peak_memory(device):
    """Largest memory use so far in GiB: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


SHOWN = """reward accuracy loss kl length total_length latent_steps zero_std_frac truncated_frac
    seconds""".split()
SAMPLE = """  {question!r:.200} -> {completion!r}
  extracted {extracted!r}, gold {gold!r}, reward {reward}, latent steps {latent_steps}"""


class Progress:
    """What rank 0 shows of a run: a bar (plain lines without a terminal), samples, warnings."""

    def __init__(self, title, step, steps, dtype="float32"):
        hidden = dist.get_rank() > 0 or None  # None: hidden where there is no terminal
        self.bar = tqdm(total=steps, initial=step, desc=title, disable=hidden)
        self.gap_limit = 0.2 if dtype == "bfloat16" else 0.01
        self.bad_steps = collections.Counter()  # {problem: steps in a row}

    def show(self, row, records):
        """A row of metrics.jsonl; with a training row now and then two of its completions."""
        text = "  ".join(f"{n} {row[n]:.4g}" for n in SHOWN if row.get(n) is not None)
        line = f"{row['kind']:5} step {row['step']:4d}  {text}"
        if row["kind"] == "eval":
            tqdm.write(line)
            return
        self.bar.set_postfix_str(text)
        self.bar.update()
        if self.bar.disable and (row["step"] == 1 or row["step"] % 10 == 0):
            print(line, flush=True)
        if row["step"] % 50 == 1:
            for record in records[:2]:
                tqdm.write(SAMPLE.format(**{**record, "completion": record["completion"][-600:]}))
        gap = row.get("logprob_gap") or 0.0
        all_latent = row.get("latent_steps", 0) >= row.get("length", math.inf)
        self.complain("reward is 0", row.get("reward") == 0)
        self.complain("over 30 % are truncated", row.get("truncated_frac", 0) > 0.3)
        self.complain("no position is plain", all_latent)
        self.complain("logprob_gap is large, rollout and update disagree", gap > self.gap_limit)

    def complain(self, problem, is_there):
        """Warn once when a problem has been there for 10 steps running, or from the first on."""
        self.bad_steps[problem] = self.bad_steps[problem] + 1 if is_there else 0
        if self.bad_steps[problem] == 10:
            warn(f"{problem} for 10 steps: read samples.jsonl, check --answer_marker and lengths")


# ---- checkpoints and run folder ------------------------------------------------------------------
#   runs/NAME/config.json  metrics.jsonl  samples.jsonl  code/{SCRIPT,common.py}
#   runs/NAME/step_000200/{hf/...  trainer.pt  manifest.json}; hf/latent/ holds what is the method's


def save_checkpoint(out_dir, policy, tokenizer, optimizer, settings, state, keep):
    """Write step_NNNNNN, which exists completely or not at all -> True; False on an error, said.

    hf/ loads with plain AutoModelForCausalLM (adapters merged); what the method adds to the model
    lies in hf/latent/, where no other tool looks. trainer.pt has the trained parameters unmerged,
    the optimizer and `state`. All ranks call it, since each may hold a part of the optimizer; rank
    0 writes. Written beside its final name, fsynced, sha256 of every file in
    manifest.json, renamed; then checkpoints older than the newest `keep` are removed, but for the
    best one with --keep_best.
    """
    if hasattr(optimizer, "consolidate_state_dict"):  # --zero
        optimizer.consolidate_state_dict()
    if dist.get_rank() > 0:
        return True
    folder = out_dir / f"step_{state['step']:06d}"
    partial = folder.with_name(folder.name + ".partial")
    hf = partial / "hf"
    latent = hf / "latent"
    if folder.exists():
        if checkpoint_step(folder) == state["step"]:
            return True  # a stop signal just after the periodic save
        set_aside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    own = {k: v for k, v in policy.state_dict().items()
           if not k.startswith(("lm.", "table."))}
    trained = {k: v.detach() for k, v in policy.named_parameters() if v.requires_grad}
    try:
        latent.mkdir(parents=True)
        policy.lm.save_pretrained(hf, state_dict=merged_state_dict(policy.lm))
        tokenizer.save_pretrained(hf)
        save_file(own, latent / "method.safetensors")
        told = json.dumps({**settings, "step": state["step"]}, indent=1)
        (latent / "config.json").write_text(told, encoding="utf-8")
        torch.save({**state, "policy": trained, "optimizer": optimizer.state_dict()},
                   partial / "trainer.pt")
        manifest = {}
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # safetensors leaves mode 0600
                manifest[str(path.relative_to(partial))] = sha256(path)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        partial.rename(folder)
        fsync(out_dir)
    except Exception as error:  # a full disk raises four kinds, tokenizers' is a bare Exception
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(out_dir).free >> 20
        warn(f"{folder} NOT saved ({first_line(error)}; {free} MiB free); older checkpoints stay")
        return False
    best = state["best"][1] if settings.get("keep_best") else -1
    for old in step_folders(out_dir)[:-keep]:
        if checkpoint_step(old) != best:
            shutil.rmtree(old, ignore_errors=True)
    return True


def load_checkpoint(folder, policy, optimizer, settings, free):
    """Restore trained parameters and optimizer -> the saved `state`. Runs no pickled code.

    Without an optimizer (None) only the parameters. The policy was built from --model, as for a
    fresh run: a reference copied from it before this call is the original one, never the resumed
    policy.
    """
    refuse_differences(folder, settings, free)
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        fail(f"--resume {folder}: trainer.pt holds more than tensors ({first_line(error)})")
    policy.load_state_dict(state.pop("policy"), strict=False)  # the frozen ones are not in it
    moments = state.pop("optimizer")
    if optimizer is not None:
        optimizer.load_state_dict(moments)
    return state


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def step_folders(out_dir):
    """Checkpoint folders of a run, oldest first, valid or not."""
    found = [p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_[0-9]{6,}", p.name)]
    return sorted(found, key=lambda folder: (checkpoint_step(folder), folder.name))


def checkpoint_step(folder):
    """The step that a checkpoint holds; its name, which anybody can change, if it does not say."""
    try:
        return checkpoint_settings(folder)["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return int(folder.name.removeprefix("step_"))


def checkpoint_defect(folder):
    """Why a checkpoint cannot be trusted; "" when every file matches the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        needed = {"trainer.pt": "", "hf/latent/config.json": "", **manifest}
        wrong = [name for name, value in needed.items() if sha256(folder / name) != value]
    except (OSError, ValueError, TypeError) as error:
        return first_line(error)
    return f"{wrong[0]} differs from its sha256" if wrong else ""


def latest_checkpoint(out_dir, clean=False):
    """Newest checkpoint that matches its manifest, or None. Names, or sets aside, what it skips."""
    for folder in reversed(step_folders(out_dir)):
        defect = checkpoint_defect(folder)
        if not defect:
            return folder
        if clean:
            set_aside(folder)
        else:
            warn(f"skipping checkpoint {folder}: {defect}")


def set_aside(folder):
    """Rename a folder that must not be taken for a checkpoint."""
    folder.rename(folder.with_name(f"{folder.name}.{int(time.time())}.invalid"))


def find_resume(out_dir, resume, settings, free):
    """(Checkpoint that --resume asks for or None for a fresh run, lock or None); only reads.

    A folder is locked before its checkpoints are read: a live run deletes old ones.
    `fail`s on a used folder without --resume, on a bad path, and on settings (but those in `free`)
    that differ from the saved ones.
    """
    if out_dir.exists() and not out_dir.is_dir():
        fail(f"--out_dir {out_dir}: is a file")
    used = out_dir.is_dir() and any(p.name != ".lock" for p in out_dir.iterdir())
    if not resume:
        if used:
            fail(f"--out_dir {out_dir} is not empty: go on with --resume auto, or name another one")
        check_writable(f"--out_dir {out_dir}", out_dir)
        return None, None
    lock = lock_run(out_dir) if used and os.environ.get("RANK", "0") == "0" else None
    if resume == "auto":
        folder = latest_checkpoint(out_dir)
        if folder is None:  # a supervised stage goes on by itself
            if not any(out_dir.glob("*/step_*")):
                warn(f"--resume auto: no valid checkpoint in {out_dir}, starting at the beginning")
            return None, lock
    else:
        folder = Path(resume)
        known = [p.resolve() for p in step_folders(out_dir)]
        defect = checkpoint_defect(folder)
        if folder.resolve() not in known[-1:]:
            defect = (f"not a checkpoint (step_NNNNNN) in --out_dir {out_dir}, or one with newer "
                      "checkpoints beside it; move those away first")
        if defect:
            fail(f"--resume {resume}: {defect}")
    refuse_differences(folder, settings, free)
    return folder, lock


def refuse_differences(folder, settings, free):
    """`fail`, naming every setting that a resumed run would change."""
    saved = checkpoint_settings(folder)
    pairs = [f"{key}: saved {saved.get(key)!r}, now {value!r}" for key, value in settings.items()
             if key not in free and saved.get(key) != value]
    if pairs:
        fail(f"--resume {folder}: a resumed run must not change " + "; ".join(pairs))


def check_writable(flag, folder):
    """`fail` if a folder cannot be made or filled; makes nothing, so asked before all else."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        fail(f"{flag}: cannot be written (no permission in {place})")


def lock_run(out_dir):
    """Lock of a run folder, made if need be."""
    return lock_file(f"--out_dir {out_dir}", out_dir / ".lock")


def lock_file(flag, path):
    """Lock of a file, made if need be. It ends with the process, however that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{flag} is in use by another process; name another one")
    except OSError as error:
        fail(f"{flag}: cannot be written ({first_line(error)})")
    return lock


def open_run(out_dir, settings, script, resumed_step):
    """Rank 0: record settings and source, drop rows that will be written again."""
    record = json.dumps({**settings, "argv": sys.argv, "torch": torch.__version__}, indent=1)
    try:
        (out_dir / "code").mkdir(parents=True, exist_ok=True)
        latest_checkpoint(out_dir, clean=True)
        for partial in out_dir.glob("step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for source in (script, __file__):
            shutil.copy(source, out_dir / "code")
        (out_dir / "config.json").write_text(record, encoding="utf-8")
        for path in (out_dir / "metrics.jsonl", out_dir / "samples.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [f"{line}\n" for line in lines if keep_row(line, resumed_step)]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        fail(f"--out_dir {out_dir}: cannot be written ({first_line(error)})")
    TRACKERS.clear()
    if settings.get("track"):
        TRACKERS.append(open_tracker(settings["track"], out_dir, resumed_step))


TRACKERS = []  # with --track: the function that shows numbers there, of the run that is open


def open_tracker(kind, out_dir, step):
    """-> function of {name: value} and a step. A resumed run goes on in the same log."""
    try:
        if kind == "wandb":
            import wandb

            key = fingerprint(str(out_dir.resolve()))  # the same when the run is resumed
            return wandb.init(project="latent-rl", name=out_dir.name, dir=out_dir, id=key,
                              resume="allow").log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail(f"--track {kind}: is not installed: pip install {kind}")
    writer = SummaryWriter(out_dir / kind, purge_step=step + 1)

    def show(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return show


def keep_row(line, step):
    """Is this row one that a run resumed at `step` does not write again? (Half a line is not.)"""
    try:
        row = json.loads(line)
        return row["step"] < step or (row["step"] == step and row["kind"] == "train")
    except (ValueError, TypeError, KeyError):
        return False


def log_rows(out_dir, metrics, records):
    """Append one row to metrics.jsonl, and to --track, and completions to samples.jsonl."""
    numbers = {f"{metrics['kind']}/{name}": value for name, value in metrics.items()
               if isinstance(value, int | float)}
    for show in TRACKERS:
        show(numbers, metrics["step"])
    samples = []
    for record in records:
        sample = {"kind": metrics["kind"], "step": metrics["step"], **record}
        sample.pop("row", None)  # the user has it in a file
        samples.append(sample)
    for name, lines in {"metrics.jsonl": [metrics], "samples.jsonl": samples}.items():
        path = out_dir / name
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(text)
        except OSError as error:  # a full disk costs rows, not the run, and leaves no half row
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            warn(f"{path}: step {metrics['step']} not written ({first_line(error)})")
