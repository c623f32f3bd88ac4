"""GPT-2 comes in as transformers has it: the same logits, or a refusal in one line."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf.bpe import train_bpe
from nanorlhf.config import from_cli
from nanorlhf.hf.export import tiktokens
from nanorlhf.loading import load_gpt
from nanorlhf.sampling import KVCache
from nanorlhf.tools import export
from tests.helpers import refused

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
ROOT = Path(__file__).parents[2]
STORY = "The cat's hat isn't 1234 é🦊.\n\n  Then   it rained. " * 3


def small_gpt2(vocab_size, **more):
    """transformers' own GPT-2 with random weights, biases and norms too."""
    sizes = {"vocab_size": vocab_size, "n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4}
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | more)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([STORY, Path(__file__).read_text()], 400)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A GPT-2 in Hugging Face layout that was written by transformers; its vocabulary has one
    special token, as GPT-2's."""
    path = tmp_path / "gpt2-like"
    n = len(tokenizer.ranks)
    small_gpt2(n + 1, bos_token_id=n, eos_token_id=n).save_pretrained(path)
    content = json.loads(tiktokens(tokenizer))
    content["added_tokens"] = content["added_tokens"][:1]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@torch.no_grad()
def same_logits(gpt, theirs, n):
    """On random tokens, without padding and with padding on the left; n: the shared ids."""
    tokens = torch.randint(0, n, (4, 40))  # left padding is what a cache takes
    mask = torch.arange(40) >= torch.tensor([[0], [1], [17], [39]])
    assert (gpt(tokens)[..., :n] - theirs(tokens).logits[..., :n]).abs().max() < 1e-4
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    cache = KVCache(gpt.config, (~mask).sum(1), 40, torch.float32)
    assert (gpt(tokens, cache)[..., :n] - wanted[..., :n])[mask].abs().max() < 1e-4


def test_logits_are_those_of_transformers_gpt2(folder, tokenizer):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    gpt = load_gpt(folder)[0].eval()
    same_logits(gpt, theirs, len(tokenizer.ranks) + 1)


def test_rows_for_our_tokens_are_added_behind_and_no_other_is_touched(folder, tokenizer):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    old = theirs.transformer.wte.weight.detach()
    gpt, found = load_gpt(folder)
    assert found.tokenizer.special == tokenizer.special and found.stage == "gpt"
    assert gpt.wte.weight.shape[0] == tokenizer.vocab_size == len(old) + 3
    assert torch.equal(gpt.wte.weight[: len(old)], old)
    assert torch.allclose(gpt.wte.weight[len(old) :], old.mean(0).expand(3, -1))


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "values, named",
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 64}, "n_inner"),
        ({"n_layer": 4}, "tensor h.3.ln_1.weight is missing"),
        ({"n_layer": 2}, "tensor h.2."),
        ({"n_positions": 50}, "tensor wpe.weight has shape (48, 32), expected (50, 32)"),
        ({"n_embd": None}, "n_embd"),
    ],
)
def test_another_architecture_is_refused_by_what_differs(folder, capsys, values, named):
    error = refused(capsys, load_gpt, edited(folder, **values))
    assert named in error or (values == {"n_embd": None} and "number" in error), error


def test_an_untied_head_is_refused(folder, capsys):
    weights = safetensors.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    safetensors.save_file(weights, folder / "model.safetensors")
    assert "lm_head.weight" in refused(capsys, load_gpt, folder)


def test_a_folder_that_holds_nothing_says_which_script_makes_one(tmp_path, capsys):
    assert "train_{gpt,sft,ppo}.py" in refused(capsys, load_gpt, tmp_path)


# ---- all four stages ---------------------------------------------------------------------------


def test_a_gpt2_folder_goes_through_all_stages_on_published_data_and_out_again(
    folder, tmp_path, monkeypatch
):
    """Text, SFT, reward model and PPO from --init FOLDER, then an export."""
    monkeypatch.chdir(tmp_path)
    data = [ROOT / "tests/fixtures/ultrafeedback_binarized.jsonl"]
    common = ["--data", *data, "--val_data", *data, "--max_steps", 2, "--device", "cpu"]
    short = ["--batch_size", 2, "--max_new_tokens", 8]
    stages = {
        train_gpt: ["--init", folder, "--block_size", 16, "--batch_size", 2, "--sample_tokens", 4],
        train_sft: ["--init", folder, *short],
        train_rm: ["--init", "out/sft", *short],
        train_ppo: ["--init", "out/sft", *short, "--minibatch_size", 2, "--eval_prompts", 2],
    }
    for stage, flags in stages.items():
        stage.main(from_cli(stage.Config, [str(word) for word in (*common, *flags)]))
    first = next(csv.DictReader((tmp_path / "out/ppo/metrics.csv").open()))
    assert abs(float(first["kl"])) < 0.05
    export.main(export.Config("out/ppo", "hf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = load_gpt(tmp_path / "out/ppo")[0].eval()
    same_logits(ours, loaded, ours.config.vocab_size)
    card = (tmp_path / "hf/README.md").read_text()
    assert [row.split(" | ")[0] for row in card.splitlines() if row.startswith("| sft |")]
    assert card.index("| sft |") < card.index("| ppo |")  # in the order they were made
