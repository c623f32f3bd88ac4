"""A model folder in Hugging Face layout: fetched by name, its json and tensors read; or exit 2."""

import json
import pickle
from pathlib import Path

import torch

from nanorlhf.config import die, reason


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
