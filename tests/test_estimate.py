"""tests/estimate.py: memory computed from a config.json."""

import json
import re

import estimate as tool
import pytest
import torch
from conftest import make_lm

import common
import hrpo
import lepo


def config_folder(folder, **changes):
    """A folder with a config.json and nothing else."""
    folder.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
              "vocab_size": 152064, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def estimate(module, argv):
    cfg = module.parse_config(argv)
    return cfg, *tool.estimate(cfg, 1)


SMALL = ["--preset", "tiny", "--device", "cpu", "--train", "arithmetic:2"]


def test_a_7b_model_is_estimated_from_its_config_alone(tmp_path, capsys):
    """Against shapes by hand: 6.53e9 parameters in the blocks, 1.09e9 in the two tables."""
    model = config_folder(tmp_path / "model")
    argv = ["--model", model, "--preset", "paper", "--device", "cuda", "--zero"]
    tool.main(["lepo", "--ranks", "8", *argv])
    lines = re.findall(r"^ +([0-9.]+)  (.+)$", capsys.readouterr().out, re.M)
    found = {name: float(size) for size, name in lines}
    assert len(found) == 12
    blocks = 28 * (3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 3584 + 1024 + 2 * 3584) + 3584
    tables = 2 * 152064 * 3584
    gib = 2**30
    assert found["weights"] == pytest.approx(4 * (blocks + tables) / gib, abs=0.01)
    assert found["gradients"] == pytest.approx(4 * blocks / gib, abs=0.01)
    assert found["optimizer"] == pytest.approx(8 * blocks / 8 / gib, abs=0.01)
    cfg = lepo.parse_config(argv)
    columns = cfg.max_prompt_length + cfg.max_completion_length
    positions = cfg.num_prompts / 8 * cfg.group_size * (columns + columns // 16 + 4)
    cache = positions * 28 * 2 * 4 * 128 * 2
    assert found["cache of the rollout"] == pytest.approx(cache / gib, abs=0.01)


def test_lora_and_bfloat16_halve_the_frozen_weights_and_shrink_the_rest(tmp_path):
    model = config_folder(tmp_path / "model", hidden_size=256, intermediate_size=512,
                          num_hidden_layers=4, num_attention_heads=4, vocab_size=1000)
    argv = [*SMALL, "--model", model]
    _, full, *_ = estimate(hrpo, argv)
    _, lora, *_ = estimate(hrpo, [*argv, "--lora_rank", "4", "--dtype", "bfloat16"])
    adapters = lora["gradients"]
    assert lora["weights"] == full["weights"] / 2 + adapters and adapters < full["gradients"] / 10
    assert lora["optimizer"] == 2 * adapters and lora["reference"] == 0 < full["reference"]
    assert lora["cache of the rollout"] == full["cache of the rollout"] / 2


def test_checkpointing_shared_prompts_and_micro_batches_lower_the_activations(tmp_path):
    model = config_folder(tmp_path / "model", hidden_size=256, intermediate_size=512,
                          num_hidden_layers=8, num_attention_heads=4, vocab_size=1000)
    argv = [*SMALL, "--model", model]
    found = [estimate(hrpo, [*argv, *more])[1]["activations of a micro-batch"] for more in (
        [], ["--micro_batch", "32"], ["--share_prompts"], ["--gradient_checkpointing"],
        ["--max_tokens", str(32 * 160)])]
    assert found[1] == pytest.approx(found[0] / 2, rel=0.01) and found[4] == found[1]
    assert found[2] < found[0] / 2 and found[3] < found[0] / 4


def test_activations_are_those_that_autograd_keeps(tmp_path):
    """The same count with real tensors, of an update's forward pass."""
    lm, held = make_lm(), {}
    lm.save_pretrained(tmp_path / "model")
    _, parts, *_ = estimate(hrpo, [*SMALL, "--model", str(tmp_path / "model"),
                                   "--num_prompts", "2", "--group_size", "2"])
    weights = {p.data_ptr() for p in lm.parameters()}
    for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        table.requires_grad_(False)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = torch.ones(4, 160).bool()
        mask[0, :3] = False  # without padding transformers keeps no mask
        common.lm_hidden(lm.train(), torch.randn(4, 160, 32), mask)
    real = sum(number for number, _ in held.values())
    assert parts["activations of a micro-batch"] == pytest.approx(real, rel=0.02)
