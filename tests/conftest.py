"""Random models and a character tokenizer made in memory: no network, no cache."""

import gc
import os
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # the models are small: more threads only wait for each other

gc.freeze()  # what the imports made stays: collecting after each test takes 1 ms instead of 400

METHODS = ["hrpo", "lepo", "latent_grpo", "hyrea"]  # the scripts under test
# What sets a kind of model apart: windows shorter than the rows, ALiBi, scaled or capped logits,
# scaled embeddings. Factors are far from 1, so that leaving one out is seen.
ODD = {"mistral": dict(sliding_window=6, num_key_value_heads=2, head_dim=8),
       "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                       window_size=6),
       "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
       "gemma2": dict(sliding_window=6, num_key_value_heads=2, head_dim=8,
                      final_logit_softcapping=2.0),
       "granite": dict(embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5),
       "cohere": dict(logit_scale=0.25)}
WORDS = ["<pad>", "<bos>", "<eos>", *"0123456789+-*=# abcdefgh"]


def make_tokenizer(template=True):
    """One token per character; `</think>` is one added token, `####` takes four."""
    char = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    char.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    char.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=char, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.add_tokens([AddedToken(m, normalized=False) for m in ("<think>", "</think>")])
    if template:
        turns = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
        tokenizer.chat_template = "{{ bos_token }}" + turns + "<think>"
    return tokenizer


def make_lm(kind="llama", seed=0, **changes):
    """Random 2-layer model, hidden 32, with the attributes that load_model sets."""
    torch.manual_seed(seed)
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=256, initializer_range=0.3)
    if kind == "gpt2":
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4,
                                        n_positions=256, initializer_range=0.3, attn_pdrop=0,
                                        embd_pdrop=0, resid_pdrop=0, bos_token_id=1,
                                        eos_token_id=2))
    elif kind == "qwen2":
        lm = Qwen2ForCausalLM(Qwen2Config(**{**size, "num_key_value_heads": 2, **changes}))
    elif kind in ODD:
        ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config = AutoConfig.for_model(kind, **{**size, **ends, **ODD[kind], **changes})
        lm = AutoModelForCausalLM.from_config(config).eval()
    else:
        lm = LlamaForCausalLM(LlamaConfig(**{**size, **changes}))
    lm.num_tokens, lm.compute_dtype, lm.share_prompts = len(make_tokenizer()), torch.float32, False
    lm.eos_ids, lm.pad_id = [2], 0
    lm.head_scale, lm.softcap = 1.0, None
    if kind in ODD:
        assert common.find_fault(lm) is None  # sets both
    return lm


def prompt_cfg(answer_marker="</think>", max_prompt_length=99, **changes):
    """What encode_prompts and render_prompt read of a Config."""
    return SimpleNamespace(**{
        "answer_marker": answer_marker, "max_prompt_length": max_prompt_length,
        "instruction": common.INSTRUCTION, "template_args": "", "prompt_suffix": "",
        "prompt_date": "2025-01-01", **changes})


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def lm():
    return make_lm()


@pytest.fixture(autouse=True)
def process_group():
    """A group of one for code that reduces over ranks; gone afterwards, so main() can run again."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    common.SIGNALS.clear()  # a stop signal of one test must not stop a rollout of the next
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def save_folder(folder, lm=None, tokenizer=None):
    """A transformers folder of a random model, for --model."""
    (lm or make_lm()).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random model."""
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    """Name of a script, which loads no more than 64 problems."""
    script, load = import_module(request.param), common.load_problems
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: load(
        spec, split, limit or 64))
    return request.param
