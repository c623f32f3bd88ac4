"""Other people's models through all stages and out again, as their own tools read them."""

import json
import sys

import pytest
import torch

import nanorlhf
import train_ppo
import train_rm
import train_sft
from nanorlhf import scoring
from nanorlhf.data.dialogue import closed, encode_pair, encode_prompt
from nanorlhf.data.files import write_records
from nanorlhf.data.values import turns
from nanorlhf.hf.folder import KINDS, model_config_of
from nanorlhf.hf.tokenizer import FILES
from nanorlhf.loading import load_gpt
from nanorlhf.model import RewardModel
from nanorlhf.sampling import sample_responses
from nanorlhf.tools import data, evaluate, export
from tests.helpers import refused
from tests.hf.folders import (
    CHATML,
    CHATML_SPECIAL,
    TEMPLATES,
    byte_level,
    chat_folder,
    transformers,
    write,
)
from tests.hf.test_template import dialogues, messages, read
from tests.tools.test_evaluate import make_gpt, save

each = pytest.mark.parametrize("name", TEMPLATES)
ASKED = [("user", "the red cat?"), ("assistant", " sees"), ("user", "a boat")]


def out(folder, to, **more):
    export.main(export.Config(str(folder), str(to), **more))
    return to


def loaded(folder, kind="CausalLM"):
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()


def words_of(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
@each
def test_in_and_out_is_the_identity_on_files_ids_logits_and_greedy_text(tmp_path, name):
    chat_folder(tmp_path / "in", name)
    gpt, saved = load_gpt(tmp_path / "in")
    ours, theirs, words = saved.tokenizer, loaded(tmp_path / "in"), words_of(tmp_path / "in")
    save(tmp_path / "sft", "sft", gpt, ours)
    out(tmp_path / "sft", tmp_path / "out")
    for file in FILES:
        a, b = tmp_path / "in" / file, tmp_path / "out" / file
        assert a.exists() == b.exists() and (not a.exists() or a.read_bytes() == b.read_bytes())
    again, back = load_gpt(tmp_path / "out")
    assert back.tokenizer == ours and back.tokenizer.chat
    other = loaded(tmp_path / "out")
    ids = encode_prompt(ours, ASKED)
    tokens, n = torch.tensor([ids, ids[::-1]]), theirs.config.vocab_size
    wanted = theirs(tokens).logits
    assert other.config.vocab_size == n
    for model in (gpt.eval(), again.eval(), lambda x: other(x).logits):
        assert (model(tokens)[..., :n] - wanted).abs().max() < 1e-4
    prompts = [ids, encode_prompt(ours, ASKED[:1])]
    responses = sample_responses(gpt, ours, prompts, 12, 1, temperature=0)
    for prompt, response in zip(prompts, responses):
        for model in (theirs, other):
            made = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=ours.pad_id
            )
            assert made[0, len(prompt) :].tolist() == response
        text = words.decode(response, skip_special_tokens=True)
        assert ours.decode(response) == text


def test_a_model_with_several_ends_stops_at_each(tmp_path):
    """transformers does: generation_config.json names them."""
    folder = tmp_path / "in"
    chat_folder(folder, "a default system text")
    gpt, saved = load_gpt(folder)
    prompt = encode_prompt(saved.tokenizer, ASKED)
    [free] = sample_responses(gpt, saved.tokenizer, [prompt], 9, 1, temperature=0)
    end = next(i for i in free if i not in saved.tokenizer.special.values())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    gpt, saved = load_gpt(folder)
    assert saved.tokenizer.ends == (2, end)
    [response] = sample_responses(gpt, saved.tokenizer, [prompt], 9, 1, temperature=0)
    made = loaded(folder).generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    assert made[0, len(prompt) :].tolist() == response and response[-1] == end
    # a reward model reads the response with the end that it has learned
    assert (
        closed(saved.tokenizer, response)
        == [*response[:-1], 2]
        == closed(saved.tokenizer, [*response[:-1]])
    )


@torch.no_grad()
@each
def test_an_exported_score_is_read_where_its_reader_reads_it(tmp_path, name):
    """On the text that apply_chat_template gives: the card's way, padded batches, a pipeline."""
    chat_folder(tmp_path / "in", name)
    gpt, saved = load_gpt(tmp_path / "in")
    ours, judge = saved.tokenizer, RewardModel(gpt).eval()
    torch.nn.init.normal_(judge.score_head.weight)
    judge.score_mean.fill_(0.7)
    judge.score_sd.fill_(1.9)
    ours.chat = True
    save(tmp_path / "rm", "rm", judge, ours)
    folder = out(tmp_path / "rm", tmp_path / "out")
    theirs, words = loaded(folder, "SequenceClassification"), words_of(folder)
    shift = json.loads((folder / "config.json").read_text())["nanorlhf_score_shift"]
    talks = [t for t in dialogues(12, False, ["a fox", " sees", "12", "\n"]) if len(t) % 2 == 0]
    wanted = scoring.score_responses(
        judge, ours, [[]] * len(talks), [encode_pair(ours, t[:-1], t[-1][1])[0] for t in talks]
    )
    texts = [words.apply_chat_template(messages(t), tokenize=False) for t in talks]
    tensors = {"return_tensors": "pt", "add_special_tokens": False}
    alone = torch.cat([theirs(**words(text, **tensors)).logits[:, 0] for text in texts])
    batch = theirs(**words(texts, padding=True, **tensors)).logits[:, 0]
    pipe = transformers.pipeline("text-classification", theirs, tokenizer=words, device="cpu")
    piped = [x["score"] for x in pipe(texts, batch_size=4, add_special_tokens=False)]
    for found in (alone, batch, torch.tensor(piped)):
        assert (found + shift - wanted).abs().max() < 1e-4


def test_a_base_model_that_learned_our_template_is_exported_with_its_tokens(tmp_path):
    write(tmp_path / "in", byte_level("gpt2", ["<|endoftext|>"]), eos_token="<|endoftext|>")
    gpt, saved = load_gpt(tmp_path / "in")
    n = json.loads((tmp_path / "in/config.json").read_text())["vocab_size"]
    assert gpt.config.vocab_size == n + 3 and not saved.tokenizer.chat
    save(tmp_path / "gpt", "gpt", gpt, saved.tokenizer, chat=False)
    base = out(tmp_path / "gpt", tmp_path / "base")  # what it has not learned stays behind
    assert json.loads((base / "config.json").read_text())["vocab_size"] == n
    assert (base / "tokenizer.json").read_bytes() == (tmp_path / "in/tokenizer.json").read_bytes()
    saved.tokenizer.chat = True
    save(tmp_path / "sft", "sft", gpt, saved.tokenizer)
    chat = out(tmp_path / "sft", tmp_path / "chat")
    words, model = words_of(chat), loaded(chat)
    assert model.config.vocab_size == n + 3 == len(words)
    ids = words.apply_chat_template(messages(ASKED), add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(saved.tokenizer, ASKED)
    model.generate(torch.tensor([ids]), max_new_tokens=3)  # no id is beyond its vocabulary
    back = load_gpt(chat)[1].tokenizer
    assert back.dialogue(ASKED) == saved.tokenizer.dialogue(ASKED) and back.added == []


def test_half_the_bytes_and_what_is_no_whole_model(tmp_path, capsys):
    chat_folder(tmp_path / "in", "a default system text")
    gpt, saved = load_gpt(tmp_path / "in")
    sft = save(tmp_path / "sft", "sft", gpt, saved.tokenizer)
    sizes = [
        out(sft, tmp_path / d, dtype=d).joinpath("model.safetensors").stat().st_size
        for d in ("float32", "bfloat16")
    ]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    assert loaded(tmp_path / "bfloat16").dtype == torch.bfloat16
    path = sft / "step_1/weights.pt"
    weights = torch.load(path)
    torch.save(weights | {"h.0.attn.c_attn.A": torch.zeros(2, 4)}, path)  # LoRA's adapters
    said = refused(capsys, out, sft, tmp_path / "lora")
    assert "h.0.attn.c_attn.A" in said and not (tmp_path / "lora").exists()


# ---- the stages and the commands ---------------------------------------------------------------


def records(tmp_path):
    pairs = [{"prompt": f"w {i}", "chosen": "aaa", "rejected": "b\n"} for i in range(40)]
    demos = [
        {"prompt": p["prompt"], "completion": "a" + "b" * (i % 3)} for i, p in enumerate(pairs)
    ]
    return [[write_records(tmp_path / f"{n}.jsonl", r)] for n, r in (("d", demos), ("p", pairs))]


@pytest.mark.parametrize("name", [n for n in TEMPLATES if "default" in n or "plain" in n])
def test_the_stages_go_by_the_template_of_the_model_that_they_start_from(tmp_path, name, capsys):
    chat_folder(tmp_path / "start", name)
    demos, pairs = records(tmp_path)
    at = lambda folder: str(tmp_path / folder)
    flags = {"device": "cpu", "dtype": "float32", "max_steps": 2, "batch_size": 4}
    flags |= {"max_new_tokens": 5}
    train_sft.main(train_sft.Config(at("sft"), init=at("start"), data=demos, **flags))
    gpt, found = load_gpt(at("sft"))
    start = read(tmp_path / "start")
    assert found.tokenizer.chat and found.tokenizer == start
    report = train_rm.main(train_rm.Config(at("rm"), init=at("sft"), data=pairs, **flags))
    assert report["score_unit"].endswith(("responses of " + str(found.path), "by itself"))
    flags |= {"minibatch_size": 2, "eval_prompts": 2}
    train_ppo.main(
        train_ppo.Config(at("ppo"), init=at("sft"), reward=at("rm"), data=pairs, **flags)
    )
    flags |= {"max_steps": 3, "resume": True}  # exactly on, with the tokenizer that was saved
    train_ppo.main(
        train_ppo.Config(at("ppo"), init=at("sft"), reward=at("rm"), data=pairs, **flags)
    )
    model, tokenizer = nanorlhf.load(at("ppo"), "cpu", "float32")
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "w 1"}]
    assert len(nanorlhf.generate(model, tokenizer, [talk, "w 2"], 4)) == 2
    judge, _ = nanorlhf.load(at("rm"), "cpu", "float32")
    assert len(nanorlhf.score(judge, tokenizer, [talk, "w 2"], ["a", ""])) == 2
    words = words_of(out(at("ppo"), tmp_path / "out"))
    ids = words.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(tokenizer, turns(talk))
    assert "check failed" not in capsys.readouterr().err


def test_the_template_flag_is_for_a_model_that_comes_in(tmp_path, capsys):
    """And it is offered by everything that loads one; elsewhere it is refused, and not ignored."""
    folder = tmp_path / "a"
    write(
        folder, byte_level("qwen2", CHATML_SPECIAL), TEMPLATES["a default system text"][0], **CHATML
    )
    gpt, saved = load_gpt(folder, template="chatml")
    found = [saved.tokenizer, nanorlhf.load(folder, "cpu", template="chatml")[1]]
    found.append(data.vocabulary(data.Config(init=str(folder), template="chatml"))[0])
    ladder = evaluate.Config(out="nowhere", models=[f"a={folder}"], template="chatml", device="cpu")
    found.append(evaluate.load_models(ladder)[0]["a"][1].tokenizer)
    assert all("Be kind" not in tokenizer.source for tokenizer in found)
    sft = save(tmp_path / "sft", "sft", gpt, saved.tokenizer)
    load_gpt(sft, template="chatml")  # what it has
    assert "keeps the template" in refused(capsys, load_gpt, sft, template="nanorlhf")
    own = save(tmp_path / "own", "sft", make_gpt(2))
    load_gpt(own, template="nanorlhf")
    assert "keeps the template" in refused(capsys, load_gpt, own, template="chatml")
    with pytest.raises(ValueError, match="choose from nanorlhf, chatml"):
        nanorlhf.load(folder, template="alpaca")


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    chat_folder(tmp_path, "a default system text")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install -e '.[hub]'" in refused(capsys, load_gpt, tmp_path)


# ---- by name -----------------------------------------------------------------------------------


def a_hub(monkeypatch, tmp_path, folders):
    """Stands in for the hub: hands over of {name: folder} what the caller's patterns allow."""
    from huggingface_hub import snapshot_download  # noqa: F401, it must be there
    from huggingface_hub.utils import filter_repo_objects

    def fetch(name, allow_patterns=None, **_):
        copy = tmp_path / "hub" / name.replace("/", "--")
        copy.mkdir(parents=True, exist_ok=True)
        names = [p.name for p in folders[name].iterdir()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            if not (copy / file).exists():
                (copy / file).symlink_to(folders[name] / file)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)


@each
def test_a_name_of_the_hub_gives_the_same_model_as_the_folder(tmp_path, monkeypatch, name):
    chat_folder(tmp_path / "in", name)
    a_hub(monkeypatch, tmp_path, {"owner/name": tmp_path / "in"})
    (a, of_folder), (b, of_hub) = load_gpt(tmp_path / "in"), load_gpt("hf:owner/name")
    assert (
        of_hub.tokenizer == of_folder.tokenizer
        and of_hub.tokenizer.ends == of_folder.tokenizer.ends
    )
    assert of_hub.tokenizer.files == of_folder.tokenizer.files and of_hub.tokenizer.chat
    assert all(torch.equal(w, b.state_dict()[key]) for key, w in a.state_dict().items())


KEYS = """rope_theta rope_parameters rope_scaling tie_word_embeddings head_dim sliding_window
max_position_embeddings rms_norm_eps num_key_value_heads hidden_act no_rope_layers
no_rope_layer_interval attention_bias use_sliding_window intermediate_size n_positions n_inner
activation_function layer_norm_epsilon scale_attn_weights n_head""".split()


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_key_is_what_transformers_takes_it_for_or_refused(kind, tmp_path, capsys):
    """A key that a folder leaves out has a default in transformers, of each family its own."""
    sizes = {"vocab_size": 99, "hidden_size": 256, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 64} if kind != "gpt2" else {"n_head": 4, "n_embd": 32}
    whole = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
    for gone in [[], *([key] for key in KEYS), ["rope_theta", "rope_parameters"], KEYS]:
        config = {key: x for key, x in whole.items() if key not in gone and x is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        try:
            ours = model_config_of(config, tmp_path)
        except SystemExit:
            assert "config.json: ValueError" in capsys.readouterr().err, gone
        else:
            assert ours == model_config_of(theirs, tmp_path), gone
