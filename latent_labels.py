"""Learned labels for the supervised stage of latent_grpo.py: the encoder of Latent-SFT.

Paper    Latent-SFT, arXiv 2510.15522, its first stage. [code] marks the authors' release, [ours]
         our own choices. latent_grpo.py trains it with --labels encoder, in three rounds.
Idea     An encoder reads the written chain, and a code after each chunk. Its state at a code
         chooses K ids and their weights: the label. A decoder that sees only prompt and labels has
         to write from each label the chunk that comes next, and after the last one the answer. So
         a label has to hold what the chain has come to, and what follows from it.
Read     lay_out, induction_mask, supervision_mask: who reads what. Encoder: codes, labels, loss.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from common import autocast, completion_logprobs, fail, first_line, lm_logits, top_k_mixture

CODE = -1  # stands for a code among ids


def lay_out(problem):
    """A problem with N chunks -> what is read of it: encoder_ids, decoder_ids, their positions.

    Encoder: prompt, then each chunk and its code. Decoder: prompt, code 1, chunk 2, code 2, ...,
    chunk N, code N, answer; nobody asks for chunk 1. The positions of the decoder count as if there
    were no chunks between the codes, as there are none later.
    """
    # released code: a closing </think> behind the encoder's last code, which nothing sees
    prompt = problem["prompt_ids"]
    encoder_ids = list(prompt)
    for chunk in problem["chunks"]:
        encoder_ids += [*chunk, CODE]
    decoder_ids = list(prompt)
    positions = list(range(len(prompt)))
    for number, asked in enumerate([*problem["chunks"][1:], problem["answer_ids"]]):
        decoder_ids += [CODE, *asked]
        place = len(prompt) + number  # of the code
        positions += range(place, place + 1 + len(asked))
    return encoder_ids, decoder_ids, positions


def encoder_batch(problems, device):
    """What is read of some problems -> tensors [B, S] with the keys that select_rows needs.

    latent_mask: codes of the decoder; loss_mask: what follows its prompt. 0 fills up the rows on
    the right; the masks below are causal, so nothing of a row sees it.
    """
    rows = [lay_out(problem) for problem in problems]
    columns = []
    for lists in zip(*rows):
        tensors = [torch.tensor(row, device=device) for row in lists]
        columns.append(nn.utils.rnn.pad_sequence(tensors, True))
    encoder_ids, decoder_ids, positions = columns
    is_code = decoder_ids == CODE
    return {
        "encoder_ids": encoder_ids,
        "decoder_ids": decoder_ids,
        "positions": positions,
        "latent_mask": is_code,
        "loss_mask": (is_code.cumsum(1) > 0) & (positions > 0),
        "lengths": torch.tensor([max(map(len, row)) for row in rows], device=device),
        "prompt_mask": is_code[:, :0]}  # select_rows shortens no prompt


def induction_mask(is_code):
    """What the encoder sees: is_code [B, S] -> [B, query, key]; a code is seen by itself alone."""
    itself = torch.eye(is_code.shape[1], dtype=torch.bool, device=is_code.device)
    return (~is_code[:, None] | itself).tril()


def supervision_mask(is_code):
    """What the decoder sees: is_code [B, S] -> [B, query, key].

    A chunk sees the code before it and itself; all others see prompt, codes and answer, no chunk.
    """
    number = is_code.cumsum(1)  # 0 in the prompt, then that of the last code
    last = number.amax(1, keepdim=True)  # behind it stands the answer
    in_chunk = (number > 0) & (number < last) & ~is_code
    together = number[:, :, None] == number[:, None]
    return torch.where(in_chunk[..., None], together, ~in_chunk[:, None]).tril()


def hidden_states(body, table, ids, codes, seen, positions=None):
    """Hidden states [B, S, H] of a model without its head.

    ids [B, S]; codes [n, H]: what is fed where ids are CODE; seen [B, query, key] bool; positions
    [B, S] are 0, 1, ... if not given.
    """
    embeds = table(ids.clamp(min=0))
    is_code = (ids == CODE)[..., None]
    embeds = embeds.masked_scatter(is_code, codes.to(embeds.dtype))
    mask = torch.zeros_like(seen, dtype=embeds.dtype)  # added: eager attention misreads booleans
    mask.masked_fill_(~seen, torch.finfo(embeds.dtype).min)
    outputs = body(inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions,
                   use_cache=False)
    return outputs.last_hidden_state


class Encoder(nn.Module):
    """A copy of the language model `lm`, which is the decoder and is handed to each method."""

    def __init__(self, lm, top_k):
        super().__init__()
        self.top_k = top_k  # K
        self.body = copy.deepcopy(lm.base_model)
        table = lm.get_input_embeddings()
        self.body.set_input_embeddings(table)  # there is one space of embeddings
        # released code: a new token, which starts as the mean row, too
        self.code = nn.Parameter(table.weight.detach().float().mean(0))  # fed at codes [H]

    def encode(self, lm, ids):
        """encoder_ids [B, S] -> labels of all codes, row after row: weights, ids [n, K].

        The only gradient is that of the weights: the choice of the ids has none.
        """
        is_code = ids == CODE
        codes = self.code.expand(int(is_code.sum()), -1)
        table = lm.get_input_embeddings()
        hidden = hidden_states(self.body, table, ids, codes, induction_mask(is_code))
        # released code: scores by the input embeddings, the same where they are tied
        best, label_ids = lm_logits(lm, hidden[is_code]).topk(self.top_k, -1)
        return best.softmax(-1), label_ids

    def loss(self, lm, batch):
        """Cross entropy of chunks 2 to N, marker, answer and EOS, given the labels: their sum."""
        ids = batch["decoder_ids"]
        is_code = batch["latent_mask"]
        is_asked = batch["loss_mask"] & ~is_code
        table = lm.get_input_embeddings()
        weights, label_ids = self.encode(lm, batch["encoder_ids"])
        codes = top_k_mixture(label_ids, weights, table)  # [n, H]
        hidden = hidden_states(
            lm.base_model, table, ids, codes, supervision_mask(is_code), batch["positions"])
        logprobs, _ = completion_logprobs(lm, hidden[:, :-1], ids[:, 1:], is_asked[:, 1:])
        return -logprobs.sum()

    @torch.no_grad()
    def make_labels(self, lm, problems, size):
        """Labels of all problems, `size` in a pass: [(weights [N, K], ids [N, K])] on the CPU."""
        self.eval()
        labels = []
        for start in range(0, len(problems), size):
            batch = encoder_batch(problems[start : start + size], lm.device)
            with autocast(lm):
                weights, ids = self.encode(lm, batch["encoder_ids"])
            counts = batch["latent_mask"].sum(1).tolist()
            labels += zip(weights.cpu().split(counts), ids.cpu().split(counts))
        return labels


def save_labels(folder, labels):
    """Write the labels of all problems as one file that read_labels reads, completely or not."""
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    torch.save(labels, partial / f"batch_0_{len(labels)}.pt")
    partial.rename(folder)


def read_labels(folder, problems, num_tokens):
    """Labels of problems, in their order, from a folder: [(weights [N, K], ids [N, K])].

    Files are those of Latent-SFT: batch_START_END.pt, lists of such pairs [code].
    """
    labels = []
    for file in sorted(Path(folder).glob("batch_*.pt"), key=lambda file: (len(file.name), file)):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            labels += [(weights.float(), ids.long()) for weights, ids in found]
        except Exception as error:  # damaged files raise a dozen kinds
            fail(f"{file}: is no list of labels, pairs of weights and ids ({first_line(error)})")
    if len(labels) != len(problems):
        fail(f"--labels {folder}: must be chunk, encoder, or a folder whose batch_*.pt hold one "
             f"label for each of the {len(problems)} problems of --train; it holds {len(labels)}")
    size = labels[0][1].shape[-1]  # K
    for number, (weights, ids) in enumerate(labels):
        is_known = (ids >= 0) & (ids < num_tokens)
        sums_to_1 = (weights.sum(-1, keepdim=True) - 1).abs() < 0.05  # they may be bfloat16
        same_shape = weights.shape == ids.shape == (len(ids), size)
        if not same_shape or not (is_known & sums_to_1).all():
            fail(f"--labels {folder}: label {number} must be weights that sum to 1 and ids below "
                 f"{num_tokens}, both [latent steps, {size}]")
    return labels
