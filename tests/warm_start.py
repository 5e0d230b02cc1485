"""Dev only: a short supervised start for a model that solves nothing, so that RL has a reward.

python tests/warm_start.py MODEL OUT_DIR --data FILE --updates 150

Trains on the `steps` of the problems, as `a; b #### answer` after the prompt that RL will use.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import hrpo
from common import encode_prompts, fail, load_model, load_problems


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out_dir")
    parser.add_argument("--data", required=True)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max_length", type=int, default=200, help="of a prompt, in tokens")
    args = parser.parse_args()
    if Path(args.out_dir).exists():
        fail(f"{args.out_dir} exists; name another folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load_model(args.model, device=device)
    problems = [p for p in load_problems(args.data) if p["steps"]]
    length = ["--max_prompt_length", str(args.max_length)]
    problems = encode_prompts(
        tokenizer, problems, hrpo.parse_config(["--preset", "paper", *length]))
    optimizer = torch.optim.AdamW(lm.parameters(), args.lr, (0.9, 0.95), weight_decay=0.01)
    rng = random.Random(0)
    lm.train()
    for update in range(args.updates):
        chosen = rng.sample(problems, args.batch)
        ids, labels = [], []
        for p in chosen:
            steps = "; ".join(s.strip("<>") for s in p["steps"])
            target = tokenizer(f"{steps} #### {p['answer']}")["input_ids"] + [lm.eos_ids[0]]
            ids.append(torch.tensor(p["prompt_ids"] + target))
            labels.append(torch.tensor([-100] * len(p["prompt_ids"]) + target))
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = torch.ones_like(ids)  # padding is on the right of what is scored: causal
        hidden = lm.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        scored = labels[:, 1:] != -100
        logits = lm.get_output_embeddings()(hidden[scored.to(device)]).float()
        loss = F.cross_entropy(logits, labels[:, 1:][scored].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (update + 1) / 10)
        optimizer.step()
        optimizer.zero_grad()
        if update % 10 == 0:
            print(f"update {update}  loss {loss.item():.3f}", flush=True)
    lm.save_pretrained(args.out_dir)
    tokenizer.save_pretrained(args.out_dir)


if __name__ == "__main__":
    main()
