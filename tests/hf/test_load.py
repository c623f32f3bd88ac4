"""GPT-2 in and out, held against transformers itself: logits, tokens, scores, refusals."""

import csv
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import scoring
from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.data import dialogue
from nanorlhf.data.values import turns
from nanorlhf.hf.load import load_gpt, load_gpt2
from nanorlhf.hf.tokenizer import byte_symbols, read_tokenizer, tokenizer_files
from nanorlhf.machine import durable
from nanorlhf.model import GPT, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.sampling import KVCache
from nanorlhf.tokenizer import (
    GPT2_PATTERN,
    PATTERN,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)
from nanorlhf.tools import export

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
ROOT = Path(__file__).parents[2]
CACHE = Path(__file__).parents[3] / "shared/data/tiktoken"
needs_gpt2 = pytest.mark.skipif(not CACHE.exists(), reason="needs shared/data/tiktoken")
STORY = "The cat's hat isn't 1234 é🦊.\n\n  Then   it rained. " * 3
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hi\n"},
    {"role": "assistant", "content": "yo "},
    {"role": "user", "content": "bye?"},
]


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
    small_gpt2(len(tokenizer.ranks) + 1).save_pretrained(path)
    files = tokenizer_files(tokenizer, 48, chat=False)
    files["tokenizer.json"]["added_tokens"] = files["tokenizer.json"]["added_tokens"][:1]
    (path / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    return path


def refused(capsys, call, *args):
    with pytest.raises(SystemExit) as stop:
        call(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- in ----------------------------------------------------------------------------------------


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
    gpt = load_gpt2(folder).eval()
    same_logits(gpt, theirs, len(tokenizer.ranks) + 1)


def test_rows_for_our_tokens_are_added_behind_and_no_other_is_touched(folder, tokenizer):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    old = theirs.transformer.wte.weight.detach()
    gpt, found = load_gpt(folder)
    assert found.tokenizer == tokenizer and found.stage == "gpt"
    assert gpt.wte.weight.shape[0] == tokenizer.vocab_size == len(old) + 3
    assert torch.equal(gpt.wte.weight[: len(old)], old)
    assert torch.allclose(gpt.wte.weight[len(old) :], old.mean(0).expand(3, -1))


@pytest.mark.parametrize("kind", ["bin", "sharded", "half", "no prefix"])
def test_every_way_to_store_the_weights_gives_the_same_model(folder, kind, tmp_path):
    wanted = load_gpt2(folder).state_dict()
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
    for name, w in load_gpt2(folder).state_dict().items():
        assert w.dtype == torch.float32 and (w - wanted[name]).abs().max() <= near, name


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "values, named",
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
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
    error = refused(capsys, load_gpt2, edited(folder, **values))
    assert named in error or (values == {"n_embd": None} and "number" in error), error


def test_an_untied_head_is_refused(folder, capsys):
    weights = safetensors.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    safetensors.save_file(weights, folder / "model.safetensors")
    assert "lm_head.weight" in refused(capsys, load_gpt2, folder)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_that_wants_to_run_code_is_refused(folder, capsys):
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"wte.weight": Evil()}, file, protocol=2)
    error = refused(capsys, load_gpt2, folder)
    assert "refused" in error and "code was run" not in error


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_a_half_downloaded_file_is_named(folder, capsys, name, keep):
    if name == "pytorch_model.bin":
        torch.save(safetensors.load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert str(folder) in refused(capsys, load_gpt2, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(folder, capsys, name):
    (folder / name).unlink()
    assert str(folder) in refused(capsys, load_gpt2, folder)


def test_a_missing_package_says_how_to_install_it(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -e '.[hub]'" in refused(capsys, load_gpt2, folder)
    assert "pip install -e '.[hub]'" in refused(capsys, load_gpt2, "gpt2")


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
    wanted = load_gpt2(folder).state_dict()
    snapshot_download = sys.modules["huggingface_hub"].snapshot_download
    fetch = lambda name, allow_patterns: snapshot_download(
        name, allow_patterns=allow_patterns, cache_dir=cache
    )
    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fetch)
    found = load_gpt2("gpt2").state_dict()
    assert all(torch.equal(found[name], w) for name, w in wanted.items())
    assert "gpt2-medium: could not be downloaded" in refused(capsys, load_gpt2, "gpt2-medium")


def test_a_folder_of_ones_own_wins_over_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    shutil.copytree(folder, tmp_path / "gpt2")
    assert torch.equal(load_gpt2("gpt2").wte.weight, load_gpt2(folder).wte.weight)


def test_a_folder_that_holds_nothing_says_which_script_makes_one(tmp_path, capsys):
    assert "train_sft.py" in refused(capsys, load_gpt, tmp_path)


# ---- tokens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_pair(tmp_path_factory):
    """(ours, tiktoken's, transformers') GPT-2 tokenizer, the last from the original files."""
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        ours, reference = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary, merges = sorted(
        (p for p in CACHE.iterdir() if p.read_bytes()[:1] in (b"{", b"#")),
        key=lambda p: p.read_bytes(),
    )[::-1]
    shutil.copy(vocabulary, folder / "vocab.json")
    shutil.copy(merges, folder / "merges.txt")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return ours, reference, transformers.AutoTokenizer.from_pretrained(folder), folder


@needs_gpt2
def test_gpt2s_tokens_are_tiktokens_and_transformers(gpt2_pair):
    ours, reference, theirs, folder = gpt2_pair
    from_files = read_tokenizer(folder, 50257)
    assert from_files == ours and ours.eos_id == theirs.eos_token_id == 50256

    @given(st.text() | st.text("a 'sdtremlv\n1é🦊\u0300\u2028", max_size=40))
    @settings(max_examples=400)
    def check(text):
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == reference.encode_ordinary(text) == theirs(text)["input_ids"]

    check()
    letters = "".join(
        map(chr, [*range(32, 0x2FFF), *range(0x1F000, 0x1FAFF), *range(0xA000, 0xABFF)])
    )
    for words in (letters, " ".join(letters), "a".join(letters)):
        assert ours.encode(words) == reference.encode_ordinary(words) == theirs(words)["input_ids"]


def hugging_face(tokenizer):
    from tokenizers import Tokenizer as Theirs

    return Theirs.from_str(json.dumps(tokenizer_files(tokenizer, 64, True)["tokenizer.json"]))


@given(
    st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=20),
    st.integers(260, 330),
    st.lists(st.text("ab ", max_size=60), min_size=5, max_size=20),
)
def test_any_bpe_that_is_trained_here_is_exported_exactly(documents, size, texts):
    """Few letters make many tokens that are put together in several ways: the hard case."""
    ours = train_bpe(documents, size)
    theirs = hugging_face(ours)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


def test_the_exported_tokens_of_any_unicode_text_are_ours(tokenizer):
    theirs = hugging_face(tokenizer)

    @given(st.text() | st.text(STORY, max_size=60))
    @settings(max_examples=300)
    def check(text):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    check()


def test_a_tokenizer_that_ours_cannot_be_is_refused(folder, capsys):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    token = whole["added_tokens"][0]
    moved = [{**token, "content": "[PAD]"}, {**token, "id": token["id"] + 1}]
    vocab = whole["model"]["vocab"]
    gap = vocab | {max(vocab, key=vocab.get): max(vocab.values()) + 5}
    for change, named in (
        ({"model": whole["model"] | {"vocab": gap}}, "gaps"),
        ({"added_tokens": moved}, "<|endoftext|> has id"),
        ({"normalizer": {"type": "NFC"}}, "changes the text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": whole["model"] | {"merges": whole["model"]["merges"][::-1]}}, "order"),
        ({"model": {"type": "WordPiece"}}, "merges"),
    ):
        path.write_text(json.dumps(whole | change))
        assert named in refused(capsys, load_gpt2, folder)


def test_special_tokens_that_are_not_ours_are_left_out_with_a_word(folder, capsys):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    token = whole["added_tokens"][0]
    more = {**token, "id": token["id"] + 1, "content": "[PAD]"}
    path.write_text(json.dumps(whole | {"added_tokens": [token, more]}))
    _, found = load_gpt(folder)
    assert "[PAD]" in capsys.readouterr().err and found.tokenizer.vocab_size == token["id"] + 4


# ---- out ---------------------------------------------------------------------------------------


def saved(folder, stage, model, tokenizer, config, step=3):
    cfg = TrainConfig(out_dir=str(folder))
    folder.mkdir(exist_ok=True)
    about = {"first": True, "best": True, "chat": stage != "gpt"}
    checkpoint.save(cfg, stage, step, model.state_dict(), {}, tokenizer, config, **about)
    path = folder / f"step_{step}/config.json"  # as a stage's own flags would have it
    found = json.loads(path.read_text())
    found["flags"] |= {"data": ["some.jsonl"], "init": "nowhere"}
    path.write_text(json.dumps(found))
    durable.seal(path.parent)
    (folder / "metrics.csv").write_text(f"step,val_loss\n0,9\n{step},1.25\n")
    return folder


@pytest.fixture(params=["tanh", "none"])
def trained(tmp_path, tokenizer, request):
    """A checkpoint of ours with no weight at its initial value; with each of the two GELUs."""
    config = GPTConfig(tokenizer.vocab_size, 48, 2, 4, 32, gelu=request.param)
    torch.manual_seed(4)
    model = RewardModel(GPT(config)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.score_mean.fill_(0.7)
    model.score_sd.fill_(1.9)
    saved(tmp_path / "sft", "sft", model.gpt, tokenizer, config)
    saved(tmp_path / "rm", "rm", model, tokenizer, config)
    return tmp_path, model


def test_transformers_loads_what_is_exported_and_says_the_same(trained, tokenizer):
    path, model = trained
    export.main(export.Config(str(path / "sft"), str(path / "hf")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "hf").eval()
    same_logits(model.gpt, theirs, tokenizer.vocab_size)
    words = transformers.AutoTokenizer.from_pretrained(path / "hf")
    assert words(STORY)["input_ids"] == tokenizer.encode(STORY)
    assert words.decode(tokenizer.encode(STORY)) == STORY
    assert (words.eos_token_id, words.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    ids = words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids == dialogue.encode_prompt(tokenizer, turns(CHAT))


@torch.no_grad()
def test_an_exported_reward_model_gives_the_same_standardised_scores(trained, tokenizer):
    path, model = trained
    export.main(export.Config(str(path / "rm"), str(path / "hf")))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path / "hf").eval()
    words = transformers.AutoTokenizer.from_pretrained(path / "hf")
    prompt, reply = turns(CHAT), "the answer"
    messages = CHAT + [{"role": "assistant", "content": reply}]
    ids = words.apply_chat_template(messages, return_tensors="pt")
    said = [*tokenizer.encode(reply), tokenizer.eos_id]
    asked = dialogue.encode_prompt(tokenizer, prompt)
    wanted = scoring.score_responses(model, tokenizer, [asked], [said])
    assert (theirs(**ids).logits[:, 0] - wanted).abs().max() < 1e-4
    tokens = torch.randint(0, 256, (5, 30))
    real = torch.arange(30) < torch.tensor([[30], [29], [12], [1], [7]])
    tokens = tokens.masked_fill(~real, tokenizer.pad_id)
    found = theirs(tokens, attention_mask=real.long()).logits[:, 0]
    assert (found - model.score(tokens, real)).abs().max() < 1e-4


def test_what_goes_out_comes_in_again_bit_for_bit(trained, tokenizer):
    path, model = trained
    export.write_model(path / "sft", path / "hf")
    gpt, found = load_gpt(path / "hf")
    assert (found.stage, found.kind, found.chat) == ("sft", "lm", True)
    assert found.tokenizer == tokenizer
    for name, w in model.gpt.state_dict().items():
        assert torch.equal(gpt.state_dict()[name], w), name
    assert gpt.config == model.gpt.config


def test_an_export_says_what_it_is_and_an_older_one_is_what_its_stage_was(trained, capsys):
    path, _ = trained
    is_chat = lambda **words: load_gpt(edited(path / "hf", **words))[1].chat
    export.write_model(path / "sft", path / "hf")
    assert not is_chat(nanorlhf_chat=False)
    assert load_gpt(edited(path / "hf", nanorlhf_stage="rloo"))[1].stage == "rloo"
    config = json.loads((path / "hf/config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("nanorlhf_kind", "nanorlhf_chat")}
    (path / "hf/config.json").write_text(json.dumps(old))
    assert is_chat(nanorlhf_stage="sft") and not is_chat(nanorlhf_stage="gpt")
    assert "chat 'no'" in refused(capsys, load_gpt, edited(path / "hf", nanorlhf_chat="no"))
    export.write_model(path / "rm", path / "hf")
    assert "a reward model; this needs a language model" in refused(capsys, load_gpt, path / "hf")


def test_what_comes_in_goes_out_again(folder, tokenizer):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    gpt, found = load_gpt(folder)
    saved(folder.parent / "gpt", "gpt", gpt, found.tokenizer, found.model_config)
    export.write_model(folder.parent / "gpt", folder.parent / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "hf").eval()
    tokens = torch.randint(0, len(tokenizer.ranks), (2, 30))
    n = len(tokenizer.ranks) + 1
    assert (again(tokens).logits[..., :n] - theirs(tokens).logits).abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(folder.parent / "hf").chat_template is None


def test_the_model_card_states_stage_data_metrics_and_commit(trained):
    path, _ = trained
    export.main(export.Config(str(path / "sft"), str(path / "hf")))
    card = (path / "hf/README.md").read_text()
    commit = checkpoint.load(path / "sft").config["commit"]
    for fact in ("Stage `sft`", "some.jsonl", "| val_loss | 1.25 |", commit or "unknown"):
        assert fact in card, card


def test_an_export_without_safetensors_or_checkpoint_is_refused(trained, monkeypatch, capsys):
    path, _ = trained
    assert "no checkpoint" in refused(capsys, export.write_model, path / "nothing", path / "hf")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install" in refused(capsys, export.write_model, path / "sft", path / "hf")


def test_every_byte_has_a_symbol_of_its_own():
    symbols = byte_symbols()
    assert len(set(symbols.values())) == 256 and symbols[ord("a")] == "a" and symbols[32] == "Ġ"
    assert all(len(s) == 1 and s.isprintable() and not s.isspace() for s in symbols.values())


def test_bytes_and_gpt2_patterns_survive_the_round_trip(tmp_path):
    for pattern in (PATTERN, GPT2_PATTERN):
        tokenizer = Tokenizer(pattern, byte_tokenizer().ranks)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tokenizer_files(tokenizer, 9, True)["tokenizer.json"]))
        assert read_tokenizer(tmp_path, 260) == tokenizer


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
