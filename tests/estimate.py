"""How much memory would a run take? Computed from the config.json of a model, on any machine.

python tests/estimate.py lepo --ranks 8 --preset qwen2.5-7b --device cuda --zero

The first word is a script, and all flags but --ranks are its own. docs/speed.md compares some
estimates with what was measured.
"""

import argparse
import math
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import (
    RoomyCache,
    RoomyLayer,
    add_lora,
    autocast,
    fail,
    first_line,
    lm_hidden,
    model_folder,
    peak_memory,
    tiny_folder,
)

LOGITS = 1 << 24  # that completion_logprobs makes at a time


def print_estimate(cfg, ranks):
    """One line for each part, in GiB, and the sum in a rollout and in an update."""
    parts, always, rollout, update = estimate(cfg, ranks)
    print(f"memory estimated for each of {ranks} ranks, in GiB ({cfg.dtype}):")
    for name, size in parts.items():
        print(f"{size / 2**30:9.2f}  {name}")
    print(f"{(always + rollout) / 2**30:9.2f}  in a rollout")
    print(f"{(always + update) / 2**30:9.2f}  in an update", flush=True)


def estimate(cfg, ranks):
    """-> {part: bytes}, and the bytes that are there always, in a rollout too, in an update too.

    The model is made of tensors that have a shape and a type but no data. So a laptop answers for
    any size, and transformers still runs it: what autograd keeps is counted, not guessed. Left out:
    the few parameters of a method, the evaluation, and what CUDA and NCCL take (some 2 GiB).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    started = peak_memory(torch.device("cpu")) * 2**30  # the libraries: no model is loaded yet
    is_tiny = cfg.model.split(":")[0] == "tiny"
    folder = tiny_folder(cfg.model) if is_tiny else model_folder(cfg.model)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {cfg.model}: no config.json that loads ({first_line(error)})")
    dtype = getattr(torch, cfg.dtype)
    is_rounded = dtype == torch.bfloat16
    rows = math.ceil(cfg.num_prompts / ranks) * cfg.group_size
    replaces = getattr(cfg, "max_replaced_steps", 0) > 0  # its markers are rows of the tables
    with FakeTensorMode():
        # Weights already rounded: autocast's copies of them are a part of their own.
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        lm.compute_dtype = dtype
        head = lm.get_output_embeddings().weight
        total = sum(p.numel() for p in lm.parameters())
        for table in (lm.get_input_embeddings().weight, head):
            table.requires_grad_(cfg.train_embeddings or replaces)
        if cfg.lora_rank:
            add_lora(lm, cfg.lora_rank)
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        columns = cfg.max_prompt_length + cfg.max_completion_length
        free = columns // 16 + RoomyLayer.spare // 2  # on average
        cached = cache_bytes(lm) * rows * (columns + free)
        kept, count = activation_bytes(lm, rows, cfg)

    held = 2 if is_rounded and cfg.lora_rank else 4  # bytes of a frozen weight
    parts = {"program and libraries": started if cfg.device == "cpu" else 0}
    parts["weights"] = held * total + 4 * trained * (cfg.lora_rank > 0)
    is_other = not cfg.lora_rank or replaces or getattr(cfg, "stage", "rl") == "all"
    parts["reference"] = held * total if cfg.kl_coef > 0 and is_other else 0
    parts["gradients"] = 4 * trained
    parts["optimizer"] = 8 * trained / (ranks if cfg.zero else 1)
    rounded = 0 if cfg.lora_rank else trained
    parts["weights as autocast rounds them"] = 2 * (rounded + head.numel()) * is_rounded
    records = record_bytes(cfg, *head.shape[::-1]) * rows * cfg.max_completion_length
    parts["cache of the rollout"] = cached
    parts["record of the rollout"] = records
    parts["activations of a micro-batch"] = kept
    logits = min(LOGITS, rows * cfg.max_completion_length * head.shape[0])
    parts["logits"] = 5 * 4 * logits
    if head.requires_grad:  # its gradient, the table's, and only_markers' two
        parts["logits"] += 4 * 4 * head.numel()

    always = sum(parts[name] for name in (
        "program and libraries", "weights", "reference", "optimizer", "record of the rollout",
        "weights as autocast rounds them"))
    update = kept + parts["logits"] + parts["gradients"]
    if ranks == 1 and count == 1:  # gradients come as the activations go
        update = max(kept + parts["logits"], parts["gradients"])
    rollout = cached + parts["gradients"] * (ranks > 1)  # DDP's buckets stay
    return parts, always, rollout, update


def cache_bytes(lm):
    """Bytes of keys and values at one position of one row."""
    cache = RoomyCache()
    embeds = torch.empty(1, 1, lm.get_input_embeddings().embedding_dim)
    with torch.no_grad(), autocast(lm):
        lm_hidden(lm, embeds, torch.ones(1, 1, dtype=torch.bool), cache=cache)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)


def record_bytes(cfg, hidden_size, num_ids):
    """Bytes that a rollout stores at one position: ids, log-prob, masks, and what the method feeds.

    HRPO a soft token; LEPO and Latent-GRPO K ids and scores.
    """
    kept = getattr(cfg, "latent_top_k", 0)
    if getattr(cfg, "latent_grad", ""):
        kept = cfg.top_k or num_ids
    return 18 + 4 * hidden_size * getattr(cfg, "hybrid", False) + 12 * kept


def activation_bytes(lm, rows, cfg):
    """Bytes that autograd keeps of the largest micro-batch, and the number of micro-batches.

    As update does it: --micro_batch, --max_tokens, --share_prompts, --gradient_checkpointing.
    """
    prompt, completion = cfg.max_prompt_length, cfg.max_completion_length
    size = min(rows, cfg.micro_batch)
    if cfg.max_tokens:
        size = max(1, min(size, cfg.max_tokens // (prompt + completion)))
    shares = cfg.share_prompts and not cfg.gradient_checkpointing
    prompts = math.ceil(size / cfg.group_size) if shares else size
    hidden_size = lm.get_input_embeddings().embedding_dim
    weights = {weight.untyped_storage()._cdata for weight in lm.parameters()}
    found = {}  # of each storage: its bytes, and itself, so that it lives

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes(), storage
        return tensor

    def run(width, past, number, cache=None):
        embeds = torch.empty(number, width, hidden_size)
        lm_hidden(lm, embeds, torch.ones(number, past + width, dtype=torch.bool), cache=cache)

    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(lm):
        if shares:
            cache = DynamicCache()
            run(prompt, 0, prompts, cache)
            cache.batch_repeat_interleave(math.ceil(size / prompts))
            size = prompts * math.ceil(size / prompts)
            run(completion, prompt, size, cache)
        else:
            run(prompt + completion, 0, size)
    total = sum(number for number, _ in found.values())
    if cfg.gradient_checkpointing:  # the input of each layer, and one layer computed again
        layers = lm.config.get_text_config().num_hidden_layers
        total = total / layers + layers * size * (prompt + completion) * hidden_size * 4
    return total, math.ceil(rows / size)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="estimate.py SCRIPT [--ranks N] [--flag ...]",
                                     description=__doc__, allow_abbrev=False)
    parser.add_argument("script", choices=["hrpo", "lepo", "latent_grpo", "hyrea"])
    parser.add_argument("--ranks", type=int, default=1)
    args, flags = parser.parse_known_args(argv)
    print_estimate(import_module(args.script).parse_config(flags), args.ranks)


if __name__ == "__main__":
    main()
