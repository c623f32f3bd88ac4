"""Weights that the field uses, in and out: GPT-2 in Hugging Face layout.

Their matrices are stored transposed (Conv1D) and their names have a prefix; the architecture is
the one of model.py. The vocabulary gets rows for our special tokens behind GPT-2's own.
"""

import json
import pickle
from pathlib import Path

import torch

from nanorlhf import checkpoint
from nanorlhf.config import die, reason
from nanorlhf.formats.hf_tokenizer import read_tokenizer, tokenizer_files
from nanorlhf.model import GPT, GPTConfig

KNOWN = {  # blocks, heads, width
    "distilgpt2": (6, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what GPT is and cannot be told to be otherwise; absent keys have these values
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}  # fmt: skip


def load_gpt(init, stages=("gpt", "sft", "ppo"), dropout=0.0):
    """--init: (GPT in float32, Checkpoint) of a checkpoint of ours, a folder in Hugging Face
    layout, one of KNOWN, or hf:owner/name."""
    if checkpoint.find(init) or not (is_name(init) or Path(init, "config.json").exists()):
        return checkpoint.load_gpt(init, stages, dropout)
    found = read(init)
    if found.stage not in stages:
        die(f"{init}: a model of stage {found.stage}; this needs {' or '.join(stages)}")
    found.model_config.dropout = dropout
    gpt = GPT(found.model_config)
    gpt.load_state_dict(found.weights)
    found.weights = {}  # they are in the model; a second copy would stay for the whole run
    return gpt, found


def is_name(init):
    return str(init) in KNOWN or str(init).startswith("hf:")


def load_gpt2(name_or_folder):
    """GPT in float32 with the weights of GPT-2: by name (huggingface_hub downloads it), or from a
    folder with config.json, model.safetensors or pytorch_model.bin, sharded or not."""
    return load_gpt(name_or_folder)[0]


# ---- in ----------------------------------------------------------------------------------------


def read(init):
    """A Checkpoint made of a model in Hugging Face layout."""
    is_folder = Path(init, "config.json").exists()
    folder = Path(init) if is_folder else download(str(init).removeprefix("hf:"))
    config = read_json(folder / "config.json")
    model_config = sizes(config, folder)
    tokenizer = read_tokenizer(folder, config["vocab_size"])
    weights = convert(read_weights(folder), model_config, folder)
    wte = weights["wte.weight"]
    missing = tokenizer.vocab_size - len(wte)
    # a new token starts at the mean of all: it gets the probability of an average one
    weights["wte.weight"] = torch.cat([wte, wte.mean(0, keepdim=True).expand(max(missing, 0), -1)])
    weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size].clone()
    model_config.vocab_size = tokenizer.vocab_size
    stage = config.get("nanorlhf_stage", "gpt")
    return checkpoint.Checkpoint(Path(init), stage, 0, weights, tokenizer, model_config, {})


def download(name):
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        die(f"{name} is fetched by huggingface_hub: pip install -e '.[hub]'; or give a folder")
    files = ["config.json", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*files, "model*.safetensors*"]))
        if not list(folder.glob("model*.safetensors*")):
            folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*.bin*"]))
    except Exception as error:  # whatever the network raises: there is one thing to say
        die(f"{name}: could not be downloaded ({type(error).__name__}: {reason(error)})")
    return folder


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        die(f"{path}: cannot be read ({reason(error)})")
    return found if isinstance(found, dict) else die(f"{path}: not an object")


def sizes(config, folder):
    """config.json -> GPTConfig; whatever our GPT-2 does not do exits 2."""
    if config.get("model_type") != "gpt2" or "ForSequence" in str(config.get("architectures")):
        about = config.get("architectures") or config.get("model_type")
        die(f"{folder}: architecture {about}; only language models of type gpt2 can be read")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}, not {value!r}: not GPT-2's architecture")
    try:
        names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        found = GPTConfig(*(int(config[name]) for name in names))
    except (KeyError, TypeError, ValueError) as error:
        die(f"{folder}/config.json: {error} is missing or no number")
    if config.get("n_inner") not in (None, 4 * found.d_model):
        die(f"{folder}: n_inner is {config['n_inner']}, not 4 times n_embd")
    return found


def read_weights(folder):
    """All tensors of a folder, float32; safetensors rather than .bin, one file or shards."""
    for name, read_file in (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", read_bin),
    ):
        index = folder / f"{name}.index.json"
        if index.exists():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif (folder / name).exists():
            files = [name]
        else:
            continue
        return {k: w.float() for file in files for k, w in read_file(folder / file).items()}
    die(f"{folder}: neither model.safetensors nor pytorch_model.bin in it")


def read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        die(f"{path} needs safetensors: pip install -e '.[hub]'")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        die(f"{path}: not a whole file ({reason(error)})")


def read_bin(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        die(f"{path}: damaged, or it holds more than tensors and could run code: refused")
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        die(f"{path}: not a whole file ({reason(error)})")


def convert(found, config, folder):
    """Their names and layout -> ours; the first tensor that is missing or wrong is named."""
    found = {name.removeprefix("transformer."): w for name, w in found.items()}
    buffers = [name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))]
    found = {name: w for name, w in found.items() if name not in buffers}
    head = found.pop("lm_head.weight", found.get("wte.weight"))
    weights = {}
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in GPT(config).state_dict().items()}
    for name, shape in shapes.items():
        stored = shape[::-1] if name.endswith(TRANSPOSED) else shape
        w = found.pop(name, None)
        if w is None or tuple(w.shape) != stored:
            what = "is missing" if w is None else f"has shape {tuple(w.shape)}, expected {stored}"
            die(f"{folder}: tensor {name} {what}")
        weights[name] = w.T.contiguous() if name.endswith(TRANSPOSED) else w
    if found:
        die(f"{folder}: tensor {next(iter(found))} has no place in GPT-2")
    if not torch.equal(head, weights["wte.weight"]):
        die(f"{folder}: tensor lm_head.weight differs from wte.weight; GPT-2's are tied")
    return weights


# ---- out ---------------------------------------------------------------------------------------


def export(folder, to):
    """Write a checkpoint of ours so that transformers loads it: AutoModelForCausalLM, or
    AutoModelForSequenceClassification for a reward model, and AutoTokenizer."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        die("export needs safetensors: pip install -e '.[hub]'")
    found = checkpoint.load(folder, ("gpt", "sft", "rm", "ppo"))
    is_rm, out = found.stage == "rm", {}
    for name, w in checkpoint.gpt_weights(found).items():
        out["transformer." + name] = w.T.contiguous() if name.endswith(TRANSPOSED) else w.clone()
    if is_rm:
        fold_scale(found.weights, out)
    config, tokenizer = found.model_config, found.tokenizer
    about = FIXED | {
        "model_type": "gpt2", "nanorlhf_stage": found.stage, "tie_word_embeddings": True,
        "architectures": ["GPT2ForSequenceClassification" if is_rm else "GPT2LMHeadModel"],
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.d_model,
        "bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id, "torch_dtype": "float32",
    } | ({"num_labels": 1} if is_rm else {})  # fmt: skip
    files = {"config.json": about} | tokenizer_files(
        tokenizer, config.block_size, found.stage != "gpt"
    )
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(to, name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        save_file(out, Path(to, "model.safetensors"), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        die(f"{to}: {reason(error)}")
    return found


def fold_scale(weights, out):
    """(w h + b - mean) / sd as w' h' without a bias, as their head has it: w' = w / sd, and the
    constant c = (b - mean) / sd goes into the final norm's bias as c w' / |w'|^2."""
    sd = weights["score_sd"]
    w = weights["score_head.weight"] / sd  # (1, D)
    c = (weights["score_head.bias"] - weights["score_mean"]) / sd  # (1,)
    out["score.weight"] = w
    out["transformer.ln_f.bias"] += c * w[0] / w.square().sum()
