"""What the update computes about a rollout is what the rollout did, however rows are batched."""

import importlib

import pytest
import torch
from conftest import METHODS, make_lm, make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import lm_logits, make_rng, select_rows

torch.set_num_threads(1)  # models this small lose a factor of ten to thread switching
CHANGES = {  # strong mixing, so that an error in it is visible
    "hrpo": dict(r_min=0.2, r_max=0.9), "lepo": dict(latent_steps=5, latent_tau=0.7),
    "latent_grpo": dict(latent_top_k=4, latent_tau=2.0),
    "hyrea": dict(latents_per_step=1, latent_rms=False)}
BY_MARKER = ["hrpo"]  # methods whose thinking ends at the marker in the decoded text
EOS = (2, 5, 8, 11)  # ids that end a completion; a random model hits one of them soon
HASHES = ["#", "##", "###", "a#", "#b", "##c", "d", "e", " "]
PROMPTS = [[1, 4, 6], [1, 6, 7, 12, 9, 10, 13, 3], [4], [1, 17, 17, 17, 17, 12]]


def hash_tokenizer():
    """Many ids hold a `#`: `####` takes two to four tokens and appears in most completions."""
    words = ["<pad>", "<bos>", "<eos>", *HASHES, *(f"{w}{w}" for w in HASHES[3:])]
    words += [f"{a}{b}" for a, b in zip("fghijklmnop", "#" * 11)]  # 29 ids, as conftest's
    text = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    text.pre_tokenizer, text.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def build(method, kind="llama", tokenizer=None, eos=EOS, pad=0, seed=0, **changes):
    """-> module, policy, cfg; every parameter the method adds is made large."""
    module, lm = importlib.import_module(method), make_lm(kind, seed)
    lm.eos_ids, lm.pad_id = list(eos), pad
    own = {"answer_marker": "7", "max_completion_length": 14, **CHANGES[method], **changes}
    cfg = module.Config(**{**module.PRESETS["tiny"], **own})
    policy = module.Policy(lm, tokenizer or make_tokenizer(), cfg)
    for name, p in policy.named_parameters():
        if not name.startswith(("lm.", "table.")) and p.dim() > 1:
            p.data.mul_(20)
    if method == "hyrea" and cfg.max_replaced_steps:
        # an id that random models sample often, as the real one is not
        policy.start_id = policy.markers[0] = 14
    return module, policy, cfg


def draw(module, policy, cfg, prompts=PROMPTS, group_size=3, greedy=False, seed=0):
    return module.rollout(policy, prompts, cfg, make_rng("cpu", seed), group_size, greedy)


def score(policy, batch):
    with torch.no_grad():
        return policy(batch)["logprobs"]


def gradients(module, policy, cfg, batch, micro_batch=8, max_tokens=0):
    """The gradient of one update with plus and minus 1 as advantages, by SGD at rate 1."""
    cfg.micro_batch, cfg.max_tokens, cfg.kl_coef = micro_batch, max_tokens, 0.0
    cfg.max_grad_norm, cfg.warmup_steps = 1e9, 0
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD([{"params": list(trained.values()), "initial_lr": 1.0}], 1.0)
    sign = 1.0 - 2.0 * (torch.arange(len(batch["lengths"])) % 2)
    batch = {**batch, "advantages": sign[:, None] * batch["loss_mask"]}
    sums, _ = module.update(policy, policy, None, optimizer, batch, cfg, 0)
    found = {n: before[n] - p.detach() for n, p in trained.items()}
    for n, p in trained.items():
        p.data.copy_(before[n])
    return found, sums


def survivors(logits, cfg):
    """Ids, likeliest first, that top-k and top-p leave, and the log-probs that they share out."""
    order = logits.argsort(descending=True)[: cfg.top_k or len(logits)].tolist()
    p = (logits.double() / cfg.temperature)[order].softmax(0)
    kept = sum(float(p[:k].sum()) < cfg.top_p for k in range(len(p)))  # mass of the likelier ones
    return order[:kept], (p[:kept] / p[:kept].sum()).log()


def hrpo_input(policy, cfg, logits, ids, step, last, noise):
    """The specification's next input, in float64 and one row; `step` is what was recorded."""
    gate, E = policy.gate, policy.table.weight.detach().double()
    kept, log_p = survivors(logits, cfg)
    e, p = E[ids[-1]], log_p.exp()
    s = sum(x * E[v] for x, v in zip(p, kept)) / (p * p).sum().sqrt()
    W_r, b_r, W_i, b_i, Lambda = (
        x.detach().double() for x in (gate.gate_r.weight, gate.gate_r.bias, gate.gate_i.weight,
                                      gate.gate_i.bias, gate.Lambda))
    r, i = 1 / (1 + (-(W_r @ e + b_r)).exp()), 1 / (1 + (-(W_i @ e + b_i)).exp())
    a = (-8 * (1 + (-Lambda).exp()).log() * r).exp()
    thinking = cfg.answer_marker not in policy.marker.tokenizer.decode(ids)
    assert bool(step["latent_mask"]) == (thinking and not last)  # nothing reads the last input
    torch.testing.assert_close(step["soft_embeds"], s.float(), rtol=1e-5, atol=1e-5)
    return a * e + (1 - a * a + 1e-8).sqrt() * i * s if thinking else e


def lepo_input(policy, cfg, logits, ids, step, last, noise):
    """z @ E with z = softmax((log pi + g) / tau); the candidates are also those recorded."""
    E, stored = policy.table.weight.detach().double(), step["topk_scores"]
    assert bool(step["latent_mask"]) == (len(ids) <= cfg.latent_steps)  # it decides the score too
    if len(ids) > cfg.latent_steps:
        assert stored.tolist() == [0.0] + [-torch.inf] * (len(stored) - 1)
        assert step["topk_ids"][0] == ids[-1] and noise is None
        return E[ids[-1]]
    kept, log_pi = survivors(logits, cfg)
    assert ids[-1] == kept[0]  # shown: the likeliest, without noise
    place = {v: k for k, v in enumerate(step["topk_ids"].tolist()) if stored[k] > -torch.inf}
    assert set(place) == set(kept) and len(stored) == cfg.top_k
    u = torch.stack([x + noise[place[v]] for v, x in zip(kept, log_pi)])
    torch.testing.assert_close(
        stored[[place[v] for v in kept]], u.float(), rtol=1e-5, atol=1e-5)
    weights = (stored.double() / cfg.latent_tau).exp()
    return sum(z * E[v] for z, v in zip(weights / weights.sum(), step["topk_ids"]))


def latent_grpo_input(policy, cfg, logits, ids, step, last, noise):
    """The mixture from the recorded scores, which are checked against the logits."""
    latent = policy.marker_ids[0] not in ids and ids[-1] not in EOS
    assert bool(step["latent_mask"]) == (latent and not last)
    E, logits = policy.table.weight.detach().double(), logits.double()
    if not latent or len(ids) == cfg.max_completion_length:
        assert not step["topk_scores"].any() or latent
        return E[ids[-1]]
    kept, scores = step["topk_ids"].tolist(), step["topk_scores"].double()
    margins = scores - (logits - logits.exp().sum().log())[kept]
    assert len(set(kept)) == 4 and -1e-5 <= margins.min() <= margins.max() <= 4.5 + 1e-5
    w = (scores / cfg.latent_tau).exp()
    return sum(x * E[i] for x, i in zip(w / w.sum(), kept))


def hyrea_input(policy, cfg, logits, ids, step, last, noise):
    """The last hidden state in the c slots after <start-latent>, else the token."""
    latent = policy.start_id in ids[-1 - cfg.latents_per_step : -1]
    assert latent == (ids[-1] == policy.latent_id)
    assert bool(step["latent_mask"]) == (latent and not last)
    return step["hidden"] if latent else policy.table.weight.detach()[ids[-1]]


NAIVE_INPUT = {"hrpo": hrpo_input, "lepo": lepo_input, "latent_grpo": latent_grpo_input,
               "hyrea": hyrea_input}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_update_recomputes_the_logits_and_logprobs_of_the_rollout(method, kind, monkeypatch):
    module, policy, cfg = build(method, kind, temperature=1.3, top_k=20)
    step = module.next_input

    def keep_logits(policy, logits, *args):
        ids, embeds, record, state = step(policy, logits, *args)
        return ids, embeds, {**record, "logits": logits}, state

    monkeypatch.setattr(module, "next_input", keep_logits)
    batch = draw(module, policy, cfg, group_size=4)
    mask, lengths = batch["loss_mask"], batch["lengths"].tolist()
    assert len(set(lengths)) > 4 and batch["latent_mask"].any()  # rows left at different times
    with torch.no_grad():
        logits = lm_logits(policy.lm, policy.hidden(batch))
    gap = (logits - batch["logits"])[mask].abs().max()
    assert gap <= 1e-5 * batch["logits"].abs().max().clamp(min=1)
    gap = (score(policy, batch) - batch["rollout_logprobs"])[mask]
    assert gap.abs().max() <= 1e-5 and (gap.exp() - 1).abs().max() <= 1e-5  # the ratio is 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_equal_a_naive_loop_over_single_unpadded_rows(method, kind, monkeypatch):
    module, policy, cfg = build(
        method, kind, temperature=0.7, top_k=9, top_p=0.9, max_completion_length=9)
    noise, original = [], getattr(module, "gumbel_like", None)  # one call a latent step
    monkeypatch.setattr(module, "gumbel_like", lambda x, rng: noise.append(original(x, rng))
                        or noise[-1], raising=False)
    batch = draw(module, policy, cfg, group_size=2)
    with torch.no_grad():
        hidden = policy.hidden(batch)
        for row, length in enumerate(batch["lengths"].tolist()):
            prompt, ids = PROMPTS[row // 2], batch["completion_ids"][row].tolist()
            inputs = [policy.table.weight[i] for i in prompt]
            for t in range(length):
                states = policy.lm.base_model(inputs_embeds=torch.stack(inputs)[None])[0][0, -1]
                torch.testing.assert_close(hidden[row, t], states, rtol=1e-5, atol=1e-5)
                logits = (policy.lm.get_output_embeddings().weight @ states)[: policy.lm.num_tokens]
                step = {n: v[row, t] for n, v in batch.items() if v.dim() > 1 and "prompt" not in n}
                step["hidden"] = states
                place = int((batch["lengths"][:row] > t).sum())  # among the rows alive at t
                g = noise[t][place].double() if t < len(noise) else None
                inputs.append(NAIVE_INPUT[method](
                    policy, cfg, logits, ids[: t + 1], step, t + 1 == length, g).float())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_equals_the_same_row_under_any_padding(method, kind):
    module, policy, cfg = build(method, kind)
    batch = draw(module, policy, cfg)
    whole = score(policy, batch)
    wide = {n: torch.cat([v[:, :1].expand(-1, 5) * (n == "prompt_ids"), v], 1)
            if n.startswith("prompt") else v for n, v in batch.items()}
    assert not wide["prompt_mask"][:, :5].any()
    torch.testing.assert_close(score(policy, wide), whole, rtol=0, atol=1e-5)
    for row, length in enumerate(batch["lengths"].tolist()):
        alone = score(policy, select_rows(batch, [row]))
        assert alone.shape == (1, length)
        torch.testing.assert_close(alone[0], whole[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_after_eos_changes_logprobs_loss_or_gradients(method):
    module, policy, cfg = build(method)
    batch, rng = draw(module, policy, cfg), torch.Generator().manual_seed(1)
    dead = ~batch["completion_mask"]
    assert dead.sum() > 20
    other = {n: v.clone() for n, v in batch.items()}
    other["completion_ids"][dead] = torch.randint(29, (int(dead.sum()),), generator=rng)
    other["latent_mask"][dead] = True
    for name, value in {"soft_embeds": 9.0, "topk_ids": 3, "topk_scores": 0.5}.items():
        if name in batch:
            other[name][dead] = value
    torch.testing.assert_close(score(policy, other), score(policy, batch), rtol=0, atol=1e-7)
    one, _ = gradients(module, policy, cfg, batch)
    two, _ = gradients(module, policy, cfg, other)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("marker", ["##", "####", "#"])
@pytest.mark.parametrize("method", BY_MARKER)
def test_latent_positions_are_those_before_the_marker_in_the_decoded_text(method, marker):
    tokenizer = hash_tokenizer()
    module, policy, cfg = build(method, tokenizer=tokenizer, answer_marker=marker, eos=(2, 8, 11),
                                temperature=4.0, max_completion_length=20)
    batch = draw(module, policy, cfg, group_size=16)
    switches, dropped_before, split = 0, 0, 0
    for row, length in enumerate(batch["lengths"].tolist()):
        ids = batch["completion_ids"][row].tolist()
        texts = [tokenizer.decode(ids[: t + 1]) for t in range(length)]
        expected = [marker not in text for text in texts]
        expected[-1] = False  # nothing reads the last input
        assert batch["latent_mask"][row].tolist() == expected + [False] * (len(ids) - length)
        if False in expected:
            t = expected.index(False)
            switches += 1
            split += marker not in tokenizer.decode(ids[t : t + 1])
            dropped_before += bool((batch["lengths"] <= t).any())
    assert switches > 5 and dropped_before > 5 and (split > 5 or marker == "#")


@pytest.mark.parametrize("method", BY_MARKER)
def test_a_marker_in_the_prompt_does_not_end_the_thinking(method):
    module, policy, cfg = build(method, answer_marker="####", eos=(2,))
    batch = draw(module, policy, cfg, [[1, 17, 17, 17, 17], [17, 17, 17]], greedy=True)
    assert batch["latent_mask"][:, 0].all()
