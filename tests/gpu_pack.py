"""Pack a pretrained model and some data into a small folder, for a machine without a network.

python tests/gpu_pack.py PACK --model FOLDER --train a.jsonl.gz b.jsonl.gz --test c.jsonl.gz
python tests/gpu_pack.py PACK --model FOLDER --compare 60    # what it has lost, on 60 test problems

FOLDER is a transformers folder, as tests/convert_smollm2.py makes one. Its matrices are rounded to
few levels and coded: 135M parameters take 55 MiB, 3.4 bits each. The rounding is GPTQ's (arXiv
2210.17323): column by column, where the columns that follow make up for the error, as far as the
inputs are correlated. They are those that the problems give, so the model is good for them only.
"""

import argparse
import math
import random
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import hrpo
from common import encode_prompts, load_model, load_problems, taught_answer

STEPS = [  # distance of two levels as a share of a row's root mean square, by name
    (r"[qk]_proj", 0.36), (r"[vo]_proj", 0.6), (r"", 0.34)]
USED, RARE = 0.2, 1.0  # the same for embeddings: of tokens in the data, and of all others
TEXTS, GROUPS = 160, 4  # texts that give the inputs; the layers are rounded in so many groups


def encode_texts(source, tokenizer, problems):
    """Ids of the prompts with their solutions: what the model will read."""
    cfg = hrpo.parse_config(["--model", source, "--preset", "paper"])
    texts = []
    for problem in encode_prompts(tokenizer, problems, cfg):
        words = [problem["solution"] or "", *(problem["steps"] or []), taught_answer(problem)]
        texts.append(problem["prompt_ids"] + tokenizer(" ".join(words))["input_ids"])
    return texts


@torch.no_grad()
def input_products(lm, linears, texts):
    """X^T X [in, in] of the inputs X of each of the linear layers, over all positions."""
    products = dict.fromkeys(linears, 0)

    def add(linear, inputs):
        x = inputs[0].flatten(0, -2).float()
        products[linear] = products[linear] + x.T @ x

    handles = [linear.register_forward_pre_hook(add) for linear in linears]
    for ids in texts:
        lm.base_model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return products


def quantise(weight, step, product=None):
    """Weight [out, in] -> levels [out, in] int8, scale of each row [out] float16.

    product: X^T X of the inputs; without it each value is rounded by itself.
    """
    scale = (weight.square().mean(1).sqrt() * step).clamp(min=1e-6).half()  # [out]
    weight, unit = weight.clone(), scale.float()
    if product is None:
        return (weight / unit[:, None]).round().clamp(-127, 127).to(torch.int8), scale
    order = product.diagonal().argsort(descending=True)  # large inputs first: most can follow
    weight, product = weight[:, order], product[order][:, order]
    levels = torch.empty_like(weight, dtype=torch.int8)
    damped = product + 0.01 * product.diagonal().mean() * torch.eye(len(order))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)  # row i: how to make up for column i
    for i in range(len(order)):
        levels[:, i] = (weight[:, i] / unit).round().clamp(-127, 127)
        error = (weight[:, i] - levels[:, i] * unit) / upper[i, i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
    return levels[:, order.argsort()], scale


def pack_model(source, folder, problems):
    """Write model.npz and the small files of a transformers folder; the head must be tied."""
    lm, tokenizer = load_model(source)
    texts = encode_texts(source, tokenizer, problems)
    used = torch.tensor(sorted({i for ids in texts for i in ids}))
    chosen = random.Random(0).sample(texts, min(TEXTS, len(texts)))
    arrays = {name: value.numpy() for name, value in lm.state_dict().items() if value.dim() == 1}

    def replace(module, name, levels, scale):
        """Store a rounded weight, and let the model go on with it."""
        coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)  # close to the entropy
        data = coder.compress(levels.numpy().tobytes()) + coder.flush()
        arrays[name], arrays[f"{name}:scale"] = np.frombuffer(data, np.uint8), scale.numpy()
        module.weight.data.copy_(levels * scale[:, None])

    table = lm.get_input_embeddings()
    levels, scale = quantise(table.weight.data, RARE)
    levels[used], scale[used] = quantise(table.weight.data[used], USED)
    replace(table, "model.embed_tokens.weight", levels, scale)
    linears = [(n, m) for n, m in lm.base_model.named_modules() if isinstance(m, torch.nn.Linear)]
    size = math.ceil(len(linears) / GROUPS)
    for start in range(0, len(linears), size):  # in order: the inputs come from rounded layers
        part = dict(linears[start : start + size])
        products = input_products(lm, part.values(), chosen)
        for name, linear in part.items():
            step = next(step for pattern, step in STEPS if re.search(pattern, name))
            rounded = quantise(linear.weight.data, step, products[linear])
            replace(linear, f"model.{name}.weight", *rounded)
    np.savez(folder / "model.npz", **arrays)
    weights = shutil.ignore_patterns("*.safetensors*", "*.bin")
    shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)


def unpack(folder, out):
    """Write the transformers folder of a pack to `out` -> its path; a model as it is -> itself."""
    if not Path(folder, "model.npz").is_file():
        return folder
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.npz", "train", "test"))
    arrays = dict(np.load(Path(folder, "model.npz")))
    for name in [name for name in arrays if name.endswith(":scale")]:
        scale = arrays.pop(name).astype(np.float32)[:, None]
        name = name.removesuffix(":scale")
        levels = np.frombuffer(zlib.decompress(arrays[name].tobytes()), np.int8)
        arrays[name] = levels.reshape(len(scale), -1) * scale
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return str(out)


@torch.no_grad()
def compare(source, pack, problems):
    """Print, for the model and its pack, how well they predict the problems' written solutions."""
    for name in (source, pack):
        with tempfile.TemporaryDirectory() as place:
            lm, tokenizer = load_model(unpack(name, Path(place, "model")))
        cfg = hrpo.parse_config(["--model", source, "--preset", "paper"])
        loss, right, total = 0.0, 0, 0
        for problem in encode_prompts(tokenizer, problems, cfg):
            ids = torch.tensor(problem["prompt_ids"] + tokenizer(problem["solution"])["input_ids"])
            asked = len(problem["prompt_ids"])
            logits = lm(ids[None]).logits[0, asked - 1 : -1]  # [T, V]
            loss += torch.nn.functional.cross_entropy(logits, ids[asked:], reduction="sum").item()
            right += (logits.argmax(-1) == ids[asked:]).sum().item()
            total += len(logits)
        print(f"{name}: {loss / total:.3f} nats and {right / total:.3f} right per token of "
              f"{len(problems)} solutions")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", help="new folder")
    parser.add_argument("--model", required=True, help="transformers folder of a Llama or Qwen")
    parser.add_argument("--train", nargs="+", default=[], help="problem files with steps")
    parser.add_argument("--test", nargs="+", default=[], help="problem files")
    parser.add_argument("--compare", type=int, default=0, help="compare an old pack on N problems")
    args = parser.parse_args(argv)
    if args.compare:
        problems = load_problems(",".join(map(str, sorted(Path(args.pack, "test").iterdir()))))
        problems = [problem for problem in problems if problem["solution"]][: args.compare]
        return compare(args.model, args.pack, problems)
    if not args.train or not args.test:
        parser.error("name the files of --train and --test")
    for kind, files in (("train", args.train), ("test", args.test)):
        folder = Path(args.pack, kind)
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder)
    pack_model(args.model, Path(args.pack), load_problems(",".join(args.train + args.test)))


if __name__ == "__main__":
    main()
