"""A GPT-2 in Hugging Face layout: fetched by name, read, and turned into this project's names.

The architecture is that of model.py. Their names differ from ours by a prefix, and their matrices
are stored transposed (Conv1D).
"""

import json
import pickle
import zipfile
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.model import GPT, GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# keys of their config.json for which model.py knows one value only; an absent key has this value
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
PLAIN = (torch.strided, "cpu")  # layout and device of an ordinary tensor: neither sparse nor meta
GELU = {"gelu_new": "tanh", "gelu": "none"}  # their activation_function -> GPTConfig.gelu


def download(name):
    """The folder into which huggingface_hub has fetched what we read of a model."""
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
    if not isinstance(found, dict):
        die(f"{path}: not an object")
    return found


def read_weights(folder):
    """{name: tensor in float32} of a folder: from safetensors or, where there are none, from .bin.
    Either is one file, or several that an index lists."""
    for name, read_file in (
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", read_bin),
    ):
        index = folder / f"{name}.index.json"
        if index.exists():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict) or not all(
                isinstance(file, str) for file in file_of.values()
            ):
                die(f"{index}: 'weight_map' does not name a file for each tensor")
            files = sorted(set(file_of.values()))
        elif (folder / name).exists():
            files = [name]
        else:
            continue
        weights = {}
        for file in files:
            weights |= {k: w.float() for k, w in read_file(folder / file).items()}
        return weights
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
    found = read_pickle(path)
    if not isinstance(found, dict) or not all(map(is_plain, found.values())):
        die(f"{path}: not a file of tensors by name")
    return {str(name): w for name, w in found.items()}


def is_plain(w):
    return isinstance(w, torch.Tensor) and (w.layout, w.device.type) == PLAIN


def read_pickle(path):
    """What torch.save wrote. A pickle can hold code: such a file is refused, and nothing is run."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            # torch.load does not compare checksums
            die(f"{path}: damaged, its contents are not what was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        die(f"{path}: damaged, or it holds more than tensors and could run code: refused")
    except Exception as error:  # torch raises many kinds of error over a damaged file
        die(f"{path}: not a whole file ({reason(error)})")


def checked(model_config):
    """The same GPTConfig, if a GPT can be made of it. ValueError where it cannot: a damaged file
    may hold anything."""
    c = model_config
    sizes = (c.vocab_size, c.block_size, c.n_layer, c.n_head, c.d_model)
    if (
        not all(type(n) is int and 0 < n < 2**24 for n in sizes)
        or c.n_layer > 1000
        or c.d_model % c.n_head
        or type(c.dropout) not in (int, float)
        or not 0 <= c.dropout <= 1
        or c.gelu not in list(GELU.values())
    ):
        raise ValueError(f"no sizes of a GPT: {c}")
    return c


def model_config_of(config, folder):
    """config.json -> GPTConfig. What model.py's GPT-2 does not do is named, with exit status 2."""
    if config.get("model_type") != "gpt2" or "ForSequence" in str(config.get("architectures")):
        about = config.get("architectures") or config.get("model_type")
        die(f"{folder}: architecture {about}; only language models of type gpt2 can be read")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            die(f"{folder}: {key} is {config[key]!r}, not {value!r}: not GPT-2's architecture")
    gelu = str(config.get("activation_function", "gelu_new"))
    if gelu not in GELU:
        die(f"{folder}: activation_function is {gelu!r}, not {' or '.join(GELU)}")
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    try:
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


def convert(theirs, model_config, folder):
    """Their weights under our names and in our layout. The first tensor that is missing or has
    another shape than `model_config` wants is named, with exit status 2."""
    masks = (".attn.bias", ".attn.masked_bias")  # stored beside the weights, and no weights
    theirs = {name.removeprefix("transformer."): w for name, w in theirs.items()}
    theirs = {name: w for name, w in theirs.items() if not name.endswith(masks)}
    head = theirs.pop("lm_head.weight", theirs.get("wte.weight"))
    ours = {}
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in GPT(model_config).state_dict().items()}
    for name, shape in shapes.items():
        stored = shape[::-1] if name.endswith(TRANSPOSED) else shape
        w = theirs.pop(name, None)
        if w is None:
            die(f"{folder}: tensor {name} is missing")
        if tuple(w.shape) != stored:
            die(f"{folder}: tensor {name} has shape {tuple(w.shape)}, expected {stored}")
        ours[name] = w.T.contiguous() if name.endswith(TRANSPOSED) else w
    if theirs:
        die(f"{folder}: tensor {next(iter(theirs))} has no place in GPT-2")
    if not torch.equal(head, ours["wte.weight"]):
        die(f"{folder}: tensor lm_head.weight differs from wte.weight; GPT-2's are tied")
    return ours
