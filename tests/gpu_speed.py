"""Parts `decode` and `update` of gpu_run.py: speed and memory on models with random weights.

decode  a rollout of each method and `generate`, without an end before the limit. The bound is the
        time that reading all weights and, on average, half of the final cache takes at the measured
        bandwidth of a copy.
update  forward, backward, clipping and the optimizer's step on one batch. The peak is that of a
        large product of bfloat16 matrices. Recomputed layers and logits do not count as work.
"""

import copy
import dataclasses
import gc
import time
import warnings
from importlib import import_module

import torch
import torch.distributed as dist
from conftest import make_lm, make_tokenizer

from common import add_lora, make_rng, peak_memory

SHAPES = {
    "135M": ("llama", dict(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                           num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)),
    "1.5B": ("qwen2", dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                           num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)),
}
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)  # --small
VARIANTS = {  # name: (script, flags, what the weights are)
    "explicit": ("hrpo", "--no-hybrid", "bfloat16"),
    "generate": ("", "", "bfloat16"),
    "HRPO": ("hrpo", "", "bfloat16"),
    "LEPO": ("lepo", "--latent_steps 9999 --top_k 30 --top_p 0.95", "bfloat16"),
    "Latent-GRPO": ("latent_grpo", "", "bfloat16"),
    "HyRea": ("hyrea", "--latents_per_step 9999", "bfloat16"),
    "explicit, LoRA 32": ("hrpo", "--no-hybrid", "LoRA"),
    "explicit, float32 weights": ("hrpo", "--no-hybrid", "float32"),
    "generate, static cache": ("", "", "bfloat16"),
}
METHODS = [*VARIANTS][:6]
DECODE = [  # shape, batch, variant
    *[(shape, 64, name) for shape in SHAPES for name in METHODS],
    ("1.5B", 64, "explicit, LoRA 32"), ("135M", 64, "explicit, float32 weights"),
    *[(shape, 256, name) for shape in SHAPES for name in METHODS[:2]],
    *[(shape, 64, "generate, static cache") for shape in SHAPES],  # minutes to compile
    *[(shape, 256, name) for shape in SHAPES for name in METHODS[2:]]]
UPDATE = [  # shape, variant, rows, completion, recompute layers (--gradient_checkpointing)
    ("135M", "explicit, float32 weights", 4, 1024, False),
    ("1.5B", "explicit, LoRA 32", 4, 1024, False),
    ("1.5B", "explicit, LoRA 32", 4, 4096, False), ("1.5B", "explicit, LoRA 32", 4, 4096, True),
    ("1.5B", "explicit, float32 weights", 1, 4096, True), ("135M", "HRPO", 4, 1024, False),
    ("135M", "LEPO", 4, 1024, False), ("135M", "Latent-GRPO", 4, 1024, False)]


def seconds(device, function):
    """Time that a call takes, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_peaks(facts, device, small):
    """-> bytes a second of a copy (read and written), operations a second of a product."""
    size, width = (1 << 22, 256) if small else (1 << 31, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, matrix = source.clone(), torch.randn(width, width, device=device).bfloat16()
    copy_time = min(seconds(device, lambda: target.copy_(source)) for _ in range(10))
    product_time = min(seconds(device, lambda: matrix @ matrix) for _ in range(10))
    bandwidth, peak = 2 * size / copy_time, 2 * width**3 / product_time
    facts.tell("peaks", copy_gb_per_s=bandwidth / 1e9, bfloat16_tflops=peak / 1e12)
    return bandwidth, peak


def random_model(shape, weights, device, small):
    """-> a model of the shape with random weights, whose completions never end; its tokenizer."""
    kind, size = SHAPES[shape]
    size = {**size, **TINY, "num_attention_heads": 4, "num_key_value_heads": 2} if small else size
    with torch.device(device):
        lm = make_lm(kind, max_position_embeddings=8192, initializer_range=0.02,
                     tie_word_embeddings=True, **size)
    lm.num_tokens, lm.eos_ids, lm.compute_dtype = size["vocab_size"], [], torch.bfloat16
    lm.generation_config.eos_token_id = None
    lm = lm if weights == "float32" else lm.bfloat16()
    if weights == "LoRA":
        add_lora(lm, 32)
    return lm, make_tokenizer()


def make_policy(name, lm, tokenizer, device, new, more=""):
    """-> script, policy, cfg; what ends a latent phase is too rare for random models to meet."""
    script = import_module(VARIANTS[name][0])
    cfg = script.parse_config([
        "--preset", "tiny", "--answer_marker", "####", "--max_completion_length", str(new),
        "--device", device, *VARIANTS[name][1].split(), *more.split()])
    if name == "HyRea":
        lm, tokenizer = copy.deepcopy((lm, tokenizer))  # it adds three tokens
        script.start_state = lambda rows, *_: {"left": torch.full((rows,), 9999, device=device)}
    return script, script.Policy(lm, tokenizer, cfg), cfg


def decoder(name, lm, tokenizer, device, batch, length, new):
    """-> function that decodes a given number of tokens for the whole batch."""
    prompts = torch.randint(3, 256, (batch // 8, length), generator=make_rng("cpu", 0))
    if name.startswith("generate"):
        ids, more = prompts.repeat_interleave(8, 0).to(device), {}
        if "static" in name:
            more["cache_implementation"] = "static"
        return lambda count: lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, temperature=1.0,
            max_new_tokens=count, pad_token_id=0, **more)
    script, policy, cfg = make_policy(name, lm, tokenizer, device, new)

    def decode(count):
        short = dataclasses.replace(cfg, max_completion_length=count)
        script.rollout(policy, prompts.tolist(), short, make_rng(device, 0), 8)

    return decode


def count_syncs(decode):
    """How often the CPU waits for the GPU in a step of decoding."""
    counts = []
    for length in (4, 20):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            decode(length)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in said))
    return (counts[1] - counts[0]) / 16


def time_decoding(facts, device, lm, tokenizer, shape, batch, name, bandwidth, small):
    """Decode 256 tokens a row, after a short run that loads kernels (and, static, compiles)."""
    length, new = (8, 16) if small else (64, 256)
    batch = 16 if small else batch
    decode = decoder(name, lm, tokenizer, device, batch, length, new)
    with torch.no_grad():
        decode(new if "static" in name else 8)
        taken = seconds(device, lambda: decode(new))
        syncs = count_syncs(decode) if device == "cuda" and "static" not in name else None
    config = lm.config
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * (
        config.hidden_size // config.num_attention_heads) * batch * (length + new / 2)
    weights = 2 * sum(p.numel() for p in lm.parameters())
    bound = (weights + cache) / bandwidth
    facts.tell("decode", shape=shape, batch=batch, variant=name, tokens_per_s=batch * new / taken,
               ms_a_step=1e3 * taken / new, share_of_bound=bound * new / taken,
               syncs_a_step=syncs, peak_gib=peak_memory(torch.device(device)))


def decode(facts, device, place, deadline, args):
    """Every case until the time is up; the order is that of their worth."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    bandwidth, _ = measure_peaks(facts, device, args.small)
    lm, built = None, None
    for shape, batch, name in DECODE:
        if time.time() > deadline:
            return facts.failed(f"{shape}, {batch}, {name}", "no time left; nor for what follows")
        if built != (shape, VARIANTS[name][2]):
            lm = None  # before the next one is there
            built = shape, VARIANTS[name][2]
            lm, tokenizer = random_model(*built, device, args.small)
        free(device)
        facts.attempt(f"{shape}, {batch}, {name}", time_decoding, facts, device, lm, tokenizer,
                      shape, batch, name, bandwidth, args.small)


def free(device):
    """Give back what nothing uses, and start to measure the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# === updates ======================================================================================


def long_batch(script, policy, cfg, device, rows, completion):
    """A short rollout whose completions are repeated up to the length, with advantages of +-1."""
    prompts = torch.randint(3, 256, (rows, 128), generator=make_rng("cpu", 0)).tolist()
    batch = script.rollout(policy, prompts, cfg, make_rng(device, 0))
    for name, value in batch.items():
        if value.dim() > 1 and not name.startswith("prompt"):
            times = [1, completion // value.shape[1], *[1] * (value.dim() - 2)]
            batch[name] = value.repeat(times)
    batch["lengths"] = torch.full_like(batch["lengths"], completion)
    sign = 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)
    batch["advantages"] = sign[:, None] * batch["loss_mask"]
    return batch


def time_update(facts, device, shape, name, rows, completion, recompute, peak, small):
    """Median of three updates after a first one, which makes the optimizer's state."""
    if small:
        completion //= 32
    lm, tokenizer = random_model(shape, "LoRA" if "LoRA" in name else "float32", device, small)
    if recompute:  # the first name is that of transformers from 5.23
        enable = getattr(lm, "activation_checkpointing_enable", None)
        (enable or lm.gradient_checkpointing_enable)()
    script, policy, cfg = make_policy(name, lm, tokenizer, device, 8, "--kl_coef 0")
    batch = long_batch(script, policy, cfg, device, rows, completion)
    optimizer = torch.optim.AdamW(script.param_groups(policy, cfg))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    policy.train()

    def update():
        loss = script.policy_loss(policy(batch), batch, cfg)[batch["loss_mask"]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds(device, update) for _ in range(4)]
    taken, config = sorted(times[1:])[1], lm.config
    table = lm.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for n, p in lm.named_parameters() if "lora_" not in n) - table
    width, all_tokens = 128 + completion, rows * (128 + completion)
    work = all_tokens * layers * (4 if "LoRA" in name else 6) + 4 * table * rows * completion
    work += 6 * all_tokens * width * config.hidden_size * config.num_hidden_layers  # attention
    facts.tell("update", shape=shape, variant=name, batch=f"{rows} x {completion}",
               recomputed=recompute, seconds=taken, tokens_per_s=rows * completion / taken,
               share_of_peak=work / taken / peak, peak_gib=peak_memory(torch.device(device)))


def update(facts, device, place, deadline, args):
    """Every case until the time is up; one that is out of memory is a fact too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, peak = measure_peaks(facts, device, args.small)
    for case in UPDATE:
        where = ", ".join(map(str, case))
        if time.time() > deadline:
            return facts.failed(where, "no time left; nor for what follows")
        free(device)
        facts.attempt(where, time_update, facts, device, *case, peak, args.small)
