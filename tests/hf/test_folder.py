"""A folder in Hugging Face layout: where it is found, and what is read in it."""

import json
import pickle
import shutil
import sys
from fnmatch import fnmatch

import pytest
import torch

from nanorlhf.loading import load_gpt
from tests.helpers import refused
from tests.hf import test_load
from tests.hf.folders import chat_folder

safetensors = pytest.importorskip("safetensors.torch")
folder, tokenizer = test_load.folder, test_load.tokenizer  # fixtures


@pytest.mark.parametrize("kind", ["bin", "sharded", "half", "no prefix"])
def test_every_way_to_store_the_weights_gives_the_same_model(folder, kind, tmp_path):
    wanted = load_gpt(folder)[0].state_dict()
    weights = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    near = 1e-3 if kind == "half" else 0
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "sharded":
        names = sorted(weights)
        where = {
            name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)
        }
        for file in set(where.values()):
            safetensors.save_file({n: weights[n] for n in names if where[n] == file}, folder / file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        if kind == "half":
            weights = {name: w.half() for name, w in weights.items()}
        else:  # and with the buffers and the second copy of the head that old files have
            weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
            weights["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
            weights["lm_head.weight"] = weights["wte.weight"].clone()
        safetensors.save_file(weights, folder / "model.safetensors")
    for name, w in load_gpt(folder)[0].state_dict().items():
        assert w.dtype == torch.float32 and (w - wanted[name]).abs().max() <= near, name


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_that_wants_to_run_code_is_refused(folder, capsys):
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"wte.weight": Evil()}, file, protocol=2)
    error = refused(capsys, load_gpt, folder)
    assert "refused" in error and "code was run" not in error


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_a_half_downloaded_file_is_named(folder, capsys, name, keep):
    if name == "pytorch_model.bin":
        torch.save(safetensors.load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert str(folder) in refused(capsys, load_gpt, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(folder, capsys, name):
    (folder / name).unlink()
    assert str(folder) in refused(capsys, load_gpt, folder)


def test_a_missing_package_says_how_to_install_it(folder, monkeypatch, capsys, tmp_path):
    for name in ("safetensors", "safetensors.torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install -e '.[hub]'" in refused(capsys, load_gpt, folder)
    assert "pip install -e '.[hub]'" in refused(capsys, load_gpt, "gpt2")


def test_a_name_is_looked_up_through_huggingface_hub(folder, monkeypatch, capsys, tmp_path):
    """Its own cache on disk, as a download leaves it, and no network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "cache"
    snapshot = cache / "models--gpt2/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (cache / "models--gpt2/refs").mkdir()
    (cache / "models--gpt2/refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    wanted = load_gpt(folder)[0].state_dict()
    snapshot_download = sys.modules["huggingface_hub"].snapshot_download
    wishes = []

    def fetch(name, allow_patterns):
        wishes.extend(allow_patterns)
        return snapshot_download(name, allow_patterns=allow_patterns, cache_dir=cache)

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fetch)
    found = load_gpt("gpt2")[0].state_dict()
    assert all(torch.equal(found[name], w) for name, w in wanted.items())
    for file in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert any(fnmatch(file, wish) for wish in wishes)  # what a chat model's template is in
    assert "gpt2-medium: could not be downloaded" in refused(capsys, load_gpt, "gpt2-medium")


def test_a_folder_of_ones_own_wins_over_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    shutil.copytree(folder, tmp_path / "gpt2")
    assert torch.equal(load_gpt("gpt2")[0].wte.weight, load_gpt(folder)[0].wte.weight)


def test_each_tensor_that_ours_holds_side_by_side_has_its_own_shape(tmp_path, capsys):
    chat_folder(tmp_path, "a default system text")
    path = tmp_path / "model.safetensors"
    weights = safetensors.load_file(path)
    q, k, v = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    rows = torch.cat([weights[k], weights[v]])
    n = len(weights[k]) + 2
    for wrong in ({k: rows[:n].clone(), v: rows[n:].clone()}, {q: torch.tensor(1.0)}):
        safetensors.save_file(weights | wrong, path)
        said = refused(capsys, load_gpt, tmp_path)
        assert "h.0.attn.c_attn.weight has shape" in said and next(iter(wrong)) in said


def test_a_stored_head_that_config_json_ties_must_be_the_embedding(tmp_path, capsys):
    """transformers gives the model this head, and does not tie it."""
    chat_folder(tmp_path, "a default system text")
    path = tmp_path / "model.safetensors"
    weights = safetensors.load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    safetensors.save_file(weights | {"lm_head.weight": head}, path)
    load_gpt(tmp_path)
    safetensors.save_file(weights | {"lm_head.weight": head + 1}, path)
    assert "lm_head.weight differs" in refused(capsys, load_gpt, tmp_path)
