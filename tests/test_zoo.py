"""Kinds of models: windows, ALiBi, scaled embeddings and logits work; other kinds are refused."""

import json

import pytest
import torch
from conftest import METHODS, ODD, make_lm, save_folder
from safetensors.torch import load_file, save_file
from test_hyrea import draw_often, slow_hidden
from test_replay import build, draw, score
from transformers import AutoConfig, AutoModelForCausalLM

import common
import hrpo

RECURRENT = {  # model type: what makes it small
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, expand=2),
    "rwkv": dict(attention_hidden_size=32),
    "lfm2": dict(layer_types=["conv", "full_attention"], num_key_value_heads=2)}


def tiny(kind, **changes):
    """A random model of a kind that is refused, or not by its kind."""
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=256, initializer_range=0.3,
                pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**size, **changes}))


def refusal(folder, capsys):
    """What load_model says, in one line, before it ends with exit code 2."""
    capsys.readouterr()  # what making the model printed
    with pytest.raises(SystemExit) as stop:
        common.load_model(str(folder))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: --model {folder}: ")
    return line


@pytest.mark.parametrize("kind", ODD)
def test_logits_are_those_of_the_model_itself_in_padded_batches_too(kind):
    lm = make_lm(kind)
    ids = torch.randint(29, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = lm(input_ids=ids, use_cache=False).logits[..., :29]
        mask = torch.ones_like(ids).bool()
        found = common.lm_logits(lm, common.lm_hidden(lm, lm.get_input_embeddings()(ids), mask))
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        mask[1, :9] = False
        found = common.lm_logits(lm, common.lm_hidden(lm, lm.get_input_embeddings()(ids), mask))
        own = lm(input_ids=ids[1:, 9:], use_cache=False).logits[..., :29]
        torch.testing.assert_close(found[1:, 9:], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_scores_what_the_rollout_did(method, kind):
    module, policy, cfg = build(method, kind)
    policy.lm.share_prompts = True
    batch = draw(module, policy, cfg, group_size=4)
    assert batch["latent_mask"].any() or method == "hyrea"  # there is a test below
    assert len(set(batch["lengths"].tolist())) > 3
    gap = (score(policy, batch) - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert gap.abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ODD)
def test_rounds_of_latents_equal_a_slow_loop_in_states_and_gradients(kind):
    _, policy, cfg = build("hyrea", kind, latents_per_step=2, max_completion_length=12)
    batch = draw_often(policy, cfg, 2)
    assert len(set(batch["latent_mask"].sum(1).tolist())) > 2  # gaps: rows differ in their rounds
    exists = batch["completion_mask"][..., None]
    noise = torch.randn(exists.shape[0], exists.shape[1], 32)
    hidden = policy.hidden(batch)
    slow = torch.zeros_like(hidden)
    for row, length in enumerate(batch["lengths"].tolist()):
        slow[row, :length] = slow_hidden(policy, batch, row)
    torch.testing.assert_close(hidden * exists, slow, rtol=0, atol=1e-3)
    trained = [p for p in policy.lm.parameters() if p.requires_grad]
    results = [torch.autograd.grad((states * exists * noise).sum(), trained, allow_unused=True)
               for states in (hidden, slow)]
    for ours, theirs in zip(*results):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_a_mixture_is_scaled_as_the_embedding_of_a_token_is(kind):
    table = make_lm(kind).get_input_embeddings()
    ids = torch.tensor([[3, 7], [9, 5]])
    tokens = table(ids)  # [2, 2, H]
    size = 32**0.5 if kind == "gemma2" else 1.0
    torch.testing.assert_close(tokens, table.weight[ids] * size)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = (tokens * weights[..., None]).sum(1)
    torch.testing.assert_close(common.top_k_mixture(ids, weights, table), expected)
    norms = weights.norm(dim=1, keepdim=True)
    torch.testing.assert_close(hrpo.soft_embedding(weights, table, ids), expected / norms)
    whole = torch.zeros(2, 40).scatter(1, ids, weights)
    torch.testing.assert_close(hrpo.soft_embedding(whole, table), expected / norms)


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_and_hybrid_models_are_refused_in_one_line(kind, tmp_path, capsys):
    folder = save_folder(tmp_path / "model", tiny(kind, **RECURRENT[kind]))
    assert "recurrent, hybrid and linear-attention" in refusal(folder, capsys)


def test_an_encoder_is_refused_as_one(tmp_path, capsys):
    folder = save_folder(tmp_path / "model", tiny("bert"))
    assert "an encoder, no causal" in refusal(folder, capsys)


def test_a_model_with_noise_of_its_own_in_training_is_refused(tmp_path, capsys):
    lm = tiny("mixtral", num_local_experts=4, num_key_value_heads=2, router_jitter_noise=0.5)
    folder = save_folder(tmp_path / "model", lm)
    assert "random in training (router_jitter_noise)" in refusal(folder, capsys)


def test_positions_that_depend_on_the_batch_are_refused_or_come_with_a_warning(tmp_path, capsys):
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    folder = save_folder(tmp_path / "dynamic", make_lm(rope_parameters=rope))
    assert "dynamic RoPE" in refusal(folder, capsys)
    rope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4,
                long_factor=[2.0] * 4, original_max_position_embeddings=64)
    lm = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    common.load_model(save_folder(tmp_path / "longrope", lm))
    assert "longer than 64" in capsys.readouterr().err


def test_a_quantised_folder_is_refused_before_its_weights_are_read(tmp_path, capsys):
    folder = save_folder(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(folder, capsys)


NORM, HEAD = "model.layers.1.input_layernorm.weight", "lm_head.weight"


@pytest.mark.parametrize("change, words", [
    (lambda w: {"_orig_mod." + key: value for key, value in w.items()}, ["_orig_mod.", "missing"]),
    (lambda w: {"module." + key: value for key, value in w.items()}, ["module.", "missing"]),
    (lambda w: {key: value for key, value in w.items() if key != HEAD}, [HEAD, "1 of its"]),
    (lambda w: {**w, NORM: torch.ones(5)}, [NORM, "another shape"]),
    (lambda w: {**w, NORM: w[NORM] * torch.nan}, [NORM, "NaN"]),
    (lambda w: {}, ["missing"])])
def test_weights_that_are_not_all_there_are_refused_by_name(change, words, tmp_path, capsys):
    folder = save_folder(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    line = refusal(folder, capsys)
    assert all(word in line for word in words), line


def test_a_tied_head_may_be_missing(tmp_path):
    folder = save_folder(tmp_path / "model", make_lm(tie_word_embeddings=True))
    assert HEAD not in load_file(tmp_path / "model" / "model.safetensors")
    common.load_model(folder)


@pytest.mark.parametrize("change", [
    lambda w: {}, lambda w: {"gate.Lambda": w["gate.Lambda"]},
    lambda w: {**w, "gate.Lambda": torch.ones(3)}, lambda w: {**w, "gate.other": torch.ones(3)}])
def test_a_method_without_its_tensors_is_refused(change, tmp_path, capsys):
    module, policy, cfg = build("hrpo")
    file = tmp_path / "latent" / "method.safetensors"
    file.parent.mkdir()
    (tmp_path / "latent" / "config.json").write_text('{"method": "hrpo"}')
    own = {name: value for name, value in policy.state_dict().items() if name.startswith("gate.")}
    save_file(own, file)
    common.load_method(policy, str(tmp_path), "hrpo")
    save_file(change(own), file)
    with pytest.raises(SystemExit) as stop:
        common.load_method(policy, str(tmp_path), "hrpo")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(file) in line and "gate." in line


def test_a_cache_without_room_is_said_before_tiny_is_trained(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(common, "train_tiny", lambda spec, folder: pytest.fail("trained"))
    monkeypatch.setattr(common.inspect, "getsource", lambda function: "")
    with pytest.raises(SystemExit) as stop:
        common.load_model("tiny")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "LATENT_RL_CACHE" in line and "tiny" in line


def test_loading_draws_no_random_number(tmp_path):
    folder = save_folder(tmp_path / "model")
    before = torch.get_rng_state()
    common.load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_has_the_name_that_the_model_gives_it():
    class Old:
        def forward(self, inputs_embeds, past_key_values=None, **kwargs):
            pass

    class New:
        def forward(self, inputs_embeds, cache=None, **kwargs):
            pass

    assert common.cache_name(Old) == "past_key_values" and common.cache_name(New) == "cache"


def test_a_cache_that_the_model_ignores_is_noticed_at_the_start(tmp_path, monkeypatch, capsys):
    folder = save_folder(tmp_path / "model")
    monkeypatch.setattr(common, "cache_name", lambda model_class: "unknown")  # swallowed
    assert "cache" in refusal(folder, capsys)
