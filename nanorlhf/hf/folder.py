"""A GPT-2 in Hugging Face layout: fetched by name, read, and turned into this project's names.

Their matrices are stored transposed (Conv1D) and their names have a prefix; the architecture is
the one of model.py.
"""

import json
import pickle
import zipfile
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.model import GPT, GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what GPT is and cannot be told to be otherwise; absent keys have these values
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
PLAIN = (torch.strided, "cpu")  # layout and place of a tensor that is nothing but numbers
GELU = {"gelu_new": "tanh", "gelu": "none"}  # their activation_function -> GPTConfig.gelu


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
    except (OSError, ValueError, RecursionError) as error:
        die(f"{path}: cannot be read ({reason(error)})")
    return found if isinstance(found, dict) else die(f"{path}: not an object")


def read_weights(folder):
    """All tensors of a folder, float32; safetensors rather than .bin, one file or shards."""
    for name, read_file in (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", read_bin),
    ):
        index = folder / f"{name}.index.json"
        if index.exists():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
                die(f"{index}: 'weight_map' does not name a file for each tensor")
            files = sorted(set(named.values()))
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
    """Tensors by name."""
    found = read_pickle(path)
    plain = lambda w: isinstance(w, torch.Tensor) and (w.layout, w.device.type) == PLAIN
    if not isinstance(found, dict) or not all(map(plain, found.values())):
        die(f"{path}: not a file of tensors by name")
    return {str(name): w for name, w in found.items()}


def read_pickle(path):
    """What torch.save wrote. No code in it is run: what would need that is refused."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            die(f"{path}: damaged, its contents are not what was written")  # torch does not look
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        die(f"{path}: damaged, or it holds more than tensors and could run code: refused")
    except Exception as error:  # of a damaged file torch raises whatever it stumbles over
        die(f"{path}: not a whole file ({reason(error)})")


def checked(sizes):
    """A GPTConfig of which a GPT can be made; a damaged file may hold anything. ValueError."""
    numbers = (sizes.vocab_size, sizes.block_size, sizes.n_layer, sizes.n_head, sizes.d_model)
    if (
        not all(type(n) is int and 0 < n < 2**24 for n in numbers)
        or sizes.n_layer > 1000
        or sizes.d_model % sizes.n_head
        or type(sizes.dropout) not in (int, float)
        or not 0 <= sizes.dropout <= 1
        or sizes.gelu not in list(GELU.values())
    ):
        raise ValueError(f"no sizes of a GPT: {sizes}")
    return sizes


def sizes(config, folder):
    """config.json -> GPTConfig; whatever our GPT-2 does not do exits 2."""
    if config.get("model_type") != "gpt2" or "ForSequence" in str(config.get("architectures")):
        about = config.get("architectures") or config.get("model_type")
        die(f"{folder}: architecture {about}; only language models of type gpt2 can be read")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}, not {value!r}: not GPT-2's architecture")
    gelu = str(config.get("activation_function", "gelu_new"))
    if gelu not in GELU:
        die(f"{folder}: activation_function is {gelu!r}, not {' or '.join(GELU)}")
    try:
        names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        for name in names:
            if type(config[name]) is not int:
                die(f"{folder}/config.json: {name} is {config[name]!r}, no number")
        found = checked(GPTConfig(*(config[name] for name in names), gelu=GELU[gelu]))
    except KeyError as error:
        die(f"{folder}/config.json: {error} is missing")
    except ValueError as error:
        die(f"{folder}/config.json: {error}")
    if config.get("n_inner") not in (None, 4 * found.d_model):
        die(f"{folder}: n_inner is {config['n_inner']}, not 4 times n_embd")
    return found


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
