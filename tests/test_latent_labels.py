"""Latent-GRPO's learned labels: what encoder and decoder read, loss, rounds, files of labels."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, make_lm
from runs import differences, flags, launch, rows, train
from test_latent_grpo_stages import (  # noqa: F401
    PROBLEM,
    SHORT,
    built,
    demonstrations,
    few_problems,
    stopping,
)
from torch.nn import functional as F

import common
import latent_grpo as script
from common import make_rng, select_rows

torch.set_num_threads(1)
LEARNED = f"{SHORT} --labels encoder --encoder_steps 2 --encoder_lr 0.01 --latent_top_k 3"


def pair(**changes):
    """-> an encoder and decoder, cfg and demonstrations of several lengths."""
    policy, cfg, tokenizer = built(labels="encoder", latent_top_k=3, **changes)
    found = script.EncoderPolicy(policy.lm, tokenizer, cfg)
    with torch.no_grad():  # encoder and decoder start equal, and the code near 0
        rng = torch.Generator().manual_seed(0)
        for name, p in found.named_parameters():
            if name.startswith(("encoder.layers", "code")):
                p += 0.2 * torch.randn(p.shape, generator=rng)
    return found, cfg, demonstrations(policy, cfg, tokenizer)


def naive(problem):
    """The specification, position by position: kind, number of code or chunk, id, position."""
    encoder, decoder = [], []
    for i in problem["prompt_ids"]:
        encoder.append(("prompt", 0, i))
        decoder.append(("prompt", 0, i, len(decoder)))
    base = len(decoder) - 1  # position of the last id of the prompt
    chunks = problem["chunks"]
    for n, chunk in enumerate(chunks, 1):
        for i in chunk:
            encoder.append(("chunk", n, i))
        encoder.append(("code", n, None))
        decoder.append(("code", n, None, base + n))
        if n < len(chunks):
            for offset, i in enumerate(chunks[n], 1):
                decoder.append(("chunk", n + 1, i, base + n + offset))
    for offset, i in enumerate(problem["answer_ids"], 1):
        decoder.append(("answer", 0, i, base + len(chunks) + offset))
    return encoder, decoder


def encoder_sees(query, key, encoder):
    return key <= query and (encoder[key][0] != "code" or key == query)


def decoder_sees(query, key, decoder):
    if key > query:
        return False
    (asks, n, *_), (told, m, *_) = decoder[query], decoder[key]
    if asks == "chunk":  # of S(n), which code n - 1 stands for
        return (told, m) in (("chunk", n), ("code", n - 1))
    return told != "chunk"


def table(rule, line):
    return torch.tensor([[rule(q, k, line) for k in range(len(line))] for q in range(len(line))])


def test_ids_positions_and_both_masks_are_those_of_the_specification():
    _, _, problems = pair()
    batch = script.encoder_batch(problems, "cpu")
    seen = [script.induction_mask(batch["encoder_ids"] == script.CODE),
            script.supervision_mask(batch["latent_mask"])]
    lengths = set()
    for row, problem in enumerate(problems):
        lines = naive(problem)
        lengths.add(len(lines[1]))
        for number, (line, name) in enumerate(zip(lines, ("encoder_ids", "decoder_ids"))):
            size = len(line)
            ids = [script.CODE if place[2] is None else place[2] for place in line]
            assert batch[name][row, :size].tolist() == ids
            assert (batch[name][row, size:] == 0).all()
            rule = (encoder_sees, decoder_sees)[number]
            assert torch.equal(seen[number][row, :size, :size], table(rule, line))
            assert not seen[number][row, :size, size:].any()
        kinds = [place[0] for place in lines[1]]
        size = len(kinds)
        assert batch["positions"][row, :size].tolist() == [place[3] for place in lines[1]]
        asked = batch["loss_mask"][row] & ~batch["latent_mask"][row]
        assert asked[:size].tolist() == [kind in ("chunk", "answer") for kind in kinds]
        assert not batch["loss_mask"][row, size:].any()
        assert batch["lengths"][row] == max(size, len(lines[0]))
    assert len(lengths) > 1  # some rows are padded


def naive_loss(policy, problem):
    """One problem: masks by loops, logits of every position, cross entropy of each token."""
    encoder, decoder = naive(problem)
    lm, rows = policy.lm, policy.table.weight

    def states(body, line, codes, rule, positions):
        codes = iter(codes)
        embeds = torch.stack([next(codes) if place[2] is None else rows[place[2]]
                              for place in line])
        mask = torch.where(table(rule, line), 0.0, torch.finfo(torch.float32).min)
        return body(inputs_embeds=embeds[None], attention_mask=mask[None, None],
                    position_ids=torch.tensor([positions]), use_cache=False).last_hidden_state[0]

    codes = [policy.code for place in encoder if place[2] is None]
    hidden = states(policy.encoder, encoder, codes, encoder_sees, list(range(len(encoder))))
    labels = []
    for place, state in zip(encoder, hidden):
        if place[2] is None:
            scores = (lm.lm_head.weight @ state)[: lm.num_tokens]
            best = scores.topk(policy.top_k)
            labels.append((best.values.softmax(0), best.indices))
    codes = [(weights[:, None] * rows[ids]).sum(0) for weights, ids in labels]
    hidden = states(lm.model, decoder, codes, decoder_sees, [place[3] for place in decoder])
    logits = (hidden @ lm.lm_head.weight.T)[:, : lm.num_tokens]
    losses = [F.cross_entropy(logits[n - 1], torch.tensor(place[2]))
              for n, place in enumerate(decoder) if place[0] in ("chunk", "answer")]
    return sum(losses), labels


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_a_naive_reading_row_by_row_and_so_is_its_gradient():
    policy, _, problems = pair()
    found = policy(script.encoder_batch(problems, "cpu"))
    naive_losses = [naive_loss(policy, problem)[0] for problem in problems]
    assert found["kl"] == 0
    torch.testing.assert_close(found["ce"], sum(naive_losses), rtol=1e-5, atol=1e-4)
    ours = gradients(policy, found["ce"])
    theirs = gradients(policy, sum(naive_losses))
    assert ours.keys() == theirs.keys() and {"code"} < ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-3)


def test_padding_changes_neither_loss_nor_labels():
    policy, _, problems = pair()
    batch = script.encoder_batch(problems, "cpu")
    whole = policy(batch)["ce"]
    alone = [policy(select_rows(batch, [row]))["ce"] for row in range(len(problems))]
    torch.testing.assert_close(whole, sum(alone), rtol=1e-5, atol=1e-4)
    together, single = (policy.make_labels(problems, n) for n in (4, 1))
    for (weights, ids), (others, other_ids) in zip(together, single):
        assert torch.equal(ids, other_ids)
        torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neo", "mpt", "granite", "cohere"])
def test_a_mask_of_every_position_is_the_model_s_own_and_a_masked_key_is_not_seen(kind):
    """Also with ALiBi and with scaled embeddings; windows do not count under such a mask."""
    lm, ids = make_lm(kind), torch.arange(24).view(2, 12)
    table, none = lm.get_input_embeddings(), torch.zeros(0, 32)
    seen = torch.ones(2, 12, 12, dtype=torch.bool).tril()
    own = common.lm_hidden(lm, table(ids), torch.ones_like(ids).bool())
    found = script.hidden_states(lm.base_model, table, ids, none, seen)
    torch.testing.assert_close(found, own)
    seen[:, 5:, 3] = False
    masked = script.hidden_states(lm.base_model, table, ids, none, seen)
    assert torch.equal(masked[:, :5], found[:, :5])
    assert (masked[:, 5:] - found[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("number, trained", [
    (1, {"encoder", "code"}), (2, {"lm"}), (3, {"encoder", "code", "lm"})])
@pytest.mark.parametrize("lora", [0, 2])
def test_a_round_trains_its_half_and_never_the_table(number, trained, lora):
    policy, cfg, tokenizer = built(labels="encoder")
    problems = demonstrations(policy, cfg, tokenizer)
    if lora:
        common.add_lora(policy.lm, lora)
    found = script.EncoderPolicy(policy.lm, tokenizer, cfg)
    found.start_round(number)
    got = gradients(found, found(script.encoder_batch(problems, "cpu"))["ce"])
    assert {name.split(".")[0] for name in got} == trained
    assert not any("embed" in name or "lm_head" in name for name in got)
    assert all("lora_" in name for name in got if name != "code") == bool(lora)
    groups = script.param_groups(found, cfg)
    assert sum(len(group["params"]) for group in groups) == len(got)


def test_labels_have_k_ids_and_weights_that_sum_to_1():
    policy, cfg, problems = pair()
    labels = policy.make_labels(problems, 2)
    for problem, (weights, ids) in zip(problems, labels):
        expected = naive_loss(policy, problem)[1]
        assert weights.shape == ids.shape == (len(problem["chunks"]), 3)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(ids)))
        assert torch.equal(ids, torch.stack([label[1] for label in expected]))
        torch.testing.assert_close(weights, torch.stack([label[0] for label in expected]),
                                   rtol=1e-4, atol=1e-5)
        assert all(len(set(row)) == 3 for row in ids.tolist())


def test_a_demonstration_feeds_the_learned_label_without_the_marker():
    policy, cfg, problems = pair()
    marker = policy.marker_ids[0]
    weights = torch.tensor([[0.6, 0.3, 0.1]])
    problems = [{**problem, "label": (weights.repeat(n, 1), torch.tensor([[marker, 4, 5]] * n))}
                for n, problem in enumerate(problems, 2)]
    still = dataclasses.replace(cfg, sft_noise=0.0)
    batch = script.demonstrate(problems, policy, still, False, make_rng("cpu", 0))
    assert batch["latent_mask"].sum(1).tolist() == list(range(2, 2 + len(problems)))
    fed = batch["topk_scores"].softmax(-1)[batch["latent_mask"]]
    torch.testing.assert_close(fed, torch.tensor([0, 0.75, 0.25]).expand_as(fed))
    written = script.demonstrate(problems, policy, still, True, make_rng("cpu", 0))
    chains = [len(problem["chain_ids"]) for problem in problems]
    assert written["latent_mask"].sum(1).tolist() == chains  # --cot_steps knows no labels


def test_the_language_model_ends_as_the_decoder_and_labels_are_made_once(model, tmp_path):
    run = tmp_path / "run"
    train("latent_grpo", flags(model, run, f"--stage sft {LEARNED}"))
    first, states = common.load_model(model)[0].state_dict(), []
    for number in (1, 2, 3):
        lm, _ = common.load_model(str(run / f"encoder{number}" / "step_000002" / "hf"))
        states.append(lm.state_dict())
    layers = [name for name in first if "proj" in name]
    assert all(torch.equal(first[name], states[0][name]) for name in layers)
    assert not any(torch.equal(first[name], states[1][name]) for name in layers)
    assert not any(torch.equal(states[1][name], states[2][name]) for name in layers)
    file, = (run / "labels").iterdir()
    labels = torch.load(file, weights_only=True)
    assert file.name == "batch_0.pt" and labels[0][1].shape[1] == 3
    found = rows(run / "encoder3", "train")
    assert len(found) == 2 and found[0]["ce"] > 0 and found[0]["kl"] == 0
    before = file.stat().st_mtime_ns
    train("latent_grpo", flags(model, run, f"--stage sft {LEARNED} --resume auto"))
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("call, more", [  # in rounds 1, 2, 3 and Latent-SFT
    (1, "--stage sft"), (3, "--stage all --lora_rank 2"), (6, "--stage sft"), (8, "--stage sft")])
def test_learning_labels_resumes_in_every_round(model, tmp_path, monkeypatch, capsys, call, more):
    argv = f"{more} {LEARNED}"
    result = train("latent_grpo", flags(model, tmp_path / "whole", argv))
    with monkeypatch.context() as patch:
        stopping(patch, call)
        assert train("latent_grpo", flags(model, tmp_path / "parts", argv)) == 143
    capsys.readouterr()
    assert train("latent_grpo", flags(model, tmp_path / "parts", f"{argv} --resume auto")) == result
    assert "at the beginning" not in capsys.readouterr().err
    sft = "sft/step_000004" if "all" in more else "step_000004"
    for folder in ("encoder1/step_000002", "encoder2/step_000002", "encoder3/step_000002", sft):
        assert differences(tmp_path / "whole" / folder, tmp_path / "parts" / folder) == []
    for name in ("encoder1", "encoder2", "encoder3", sft.split("/")[0] if "all" in more else "."):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "parts" / name)


def cut_back(run):
    """A run folder as after the first step of round 2."""
    for folder in [*run.glob("step_*"), run / "encoder3", run / "labels"]:
        shutil.rmtree(folder)
    shutil.rmtree(run / "encoder2" / "step_000002")


def test_two_ranks_learn_labels_as_one_does_and_resume(model, tmp_path):
    lines = [json.dumps({"question": f"{n}+4=", "answer": str(n + 4), "solution": f"+4={n + 4}"})
             for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    argv = (f"--stage sft {LEARNED} --sft_save_every 1 --sft_noise 0 --eval_limit 4 "
            f"--train {data} --eval_data {data} --encoder_lr 0.001")
    train("latent_grpo", flags(model, tmp_path / "one", argv))
    run, log = tmp_path / "two", tmp_path / "log"
    for more in ("", " --resume auto"):
        job = launch(ROOT / "latent_grpo.py", flags(model, run, argv + more), log, 2)
        assert job.wait(300) == 0, log.read_text()
        if not more:
            shutil.copytree(run, tmp_path / "whole")
            cut_back(run)
    for name in ("encoder2/step_000002", "encoder3/step_000002", "step_000004"):
        assert differences(tmp_path / "whole" / name, run / name) == []
    one, two = (torch.load(tmp_path / name / "encoder3/step_000002/trainer.pt", weights_only=True)
                for name in ("one", "two"))
    for name, value in one["policy"].items():
        torch.testing.assert_close(value, two["policy"][name], rtol=0, atol=1e-4)


def write(folder, *batches):
    """Files of labels as the authors write them, 3 problems each, and other files."""
    folder.mkdir()
    for number, batch in enumerate(batches):
        torch.save(batch, folder / f"batch_{9 * number}_{9 * number + 9}.pt")
    (folder / "readme.txt").write_text("no labels")


def label(steps, first=0, dtype=torch.bfloat16):
    weights = torch.tensor([[0.7, 0.2, 0.1]], dtype=dtype).expand(steps, -1)
    ids = torch.arange(3 * steps).view(steps, 3) % 20 + first
    return weights, ids


def test_labels_of_the_authors_files_are_read_in_the_order_of_their_numbers(tmp_path):
    batches = [[label(n + 1), label(2, n)] for n in range(12)]  # starts of one to three digits
    write(tmp_path / "labels", *batches)
    policy, cfg, _ = built()
    problems = [dict(PROBLEM) for _ in range(24)]
    found = [problem["label"] for problem in script.with_labels(
        problems, tmp_path / "labels", policy, cfg)]
    for n, pair in enumerate(batches):
        for (weights, ids), (others, other_ids) in zip(pair, found[2 * n : 2 * n + 2]):
            assert torch.equal(ids, other_ids) and torch.equal(weights.float(), others)
            assert others.dtype == torch.float32


def test_a_run_learns_from_labels_of_a_folder(model, tmp_path, capsys):
    write(tmp_path / "labels", [label(n % 3 + 1) for n in range(9)],
          [label(2) for _ in range(15)])
    more = f"--stage sft --labels {tmp_path / 'labels'} {SHORT} --latent_top_k 4 --sft_noise 0"
    result = train("latent_grpo", flags(model, tmp_path / "run", more))
    assert result["n"] == 8 and not (tmp_path / "run" / "encoder1").exists()
    assert "have at most 3 ids" in capsys.readouterr().err
    steps = rows(tmp_path / "run", "train")
    assert len(steps) == 4 and steps[-1]["kl"] < steps[0]["kl"]


class Code:
    """What a pickle could bring along."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("batches, words", [
    ([], "chunk, encoder"), ([[label(1)] * 23], "24 problems holds 23"),
    ([[label(1)] * 24, [Code()]], "batch_9_18.pt is no list"),
    ([[label(1)] * 23 + [torch.ones(2, 29)]], "label 23 [latent steps, 3]"),
    ([[label(1)] * 23 + [label(1, first=28)]], "label 23 ids of this tokenizer"),
    ([[label(1)] * 23 + [label(1, first=-1)]], "label 23 ids of this tokenizer"),
    ([[label(2)] * 23 + [(label(1)[0], label(2)[1])]], "label 23 [latent steps, 3]"),
    ([[label(2)] * 23 + [(label(1)[0][:, :2], label(1)[1][:, :2])]], "label 23 [latent steps, 3]"),
    ([[label(2)] * 23 + [(label(1)[0] * float("nan"), label(1)[1])]], "label 23 sum to 1")])
def test_a_folder_without_such_labels_is_one_line(model, tmp_path, capsys, batches, words):
    write(tmp_path / "labels", *batches)
    more = f"--stage sft --labels {tmp_path / 'labels'} {SHORT}"
    assert train("latent_grpo", flags(model, tmp_path / "run", more)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words.split())


def test_a_damaged_file_of_labels_is_named(tmp_path, capsys):
    write(tmp_path / "labels", [label(1)] * 24)
    file = tmp_path / "labels" / "batch_0_9.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit):
        script.with_labels([{}] * 24, tmp_path / "labels", None, None)
    assert "batch_0_9.pt: is no list of labels" in capsys.readouterr().err


def test_rl_warns_where_it_keeps_more_than_learned_labels_have(tmp_path, capsys):
    (tmp_path / "latent").mkdir()
    config = '{"chunk": 2, "labels": "encoder", "latent_top_k": 10}'
    (tmp_path / "latent/config.json").write_text(config)
    for top_k, is_said in ((10, False), (11, True)):
        argv = ["--stage", "rl", "--model", str(tmp_path), "--latent_top_k", str(top_k)]
        script.check_trainable(script.parse_config(argv))
        assert ("at most 10 ids" in capsys.readouterr().err) == is_said
