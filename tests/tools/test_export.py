"""What is exported, held against what transformers makes of it: logits, tokens, scores. What comes
in goes out again, and the other way round."""

import json
import sys

import pytest
import torch

import nanorlhf
from nanorlhf import scoring
from nanorlhf.data import dialogue
from nanorlhf.data.values import turns
from nanorlhf.loading import ancestors, load_gpt
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tools import export
from tests.helpers import refused
from tests.hf import test_load
from tests.hf.test_load import STORY, edited, same_logits
from tests.tools.test_evaluate import make_gpt, save

transformers = pytest.importorskip("transformers")
folder, tokenizer = test_load.folder, test_load.tokenizer  # fixtures

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hi\n"},
    {"role": "assistant", "content": "yo "},
    {"role": "user", "content": "bye?"},
]


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
    save(tmp_path / "sft", "sft", model.gpt, tokenizer)
    save(tmp_path / "rm", "rm", model, tokenizer)
    return tmp_path, model


def write(folder, to):
    export.main(export.Config(str(folder), str(to)))


def exported(path, stage, auto_model):
    """(model, tokenizer) that transformers loads from an export of a stage, with its defaults."""
    export.main(export.Config(str(path / stage), str(path / "hf")))
    model = getattr(transformers, auto_model).from_pretrained(path / "hf").eval()
    return model, transformers.AutoTokenizer.from_pretrained(path / "hf")


def test_transformers_loads_what_is_exported_and_says_the_same(trained, tokenizer):
    path, model = trained
    theirs, words = exported(path, "sft", "AutoModelForCausalLM")
    same_logits(model.gpt, theirs, tokenizer.vocab_size)
    assert words(STORY)["input_ids"] == tokenizer.encode(STORY)
    assert words.decode(tokenizer.encode(STORY)) == STORY
    assert (words.eos_token_id, words.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    ids = words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids == dialogue.encode_prompt(tokenizer, turns(CHAT))


@torch.no_grad()
def test_a_score_is_the_same_through_every_default_of_transformers(trained, tokenizer):
    """One text and many, short and too long for the context, and by a pipeline."""
    path, model = trained
    theirs, words = exported(path, "rm", "AutoModelForSequenceClassification")
    asked = [[{"role": "user", "content": text}] for text in ("", "why is it? " * 9, "hi")] + [CHAT]
    replies = ["yes", "no", "a longer answer", ""]
    prompts = [dialogue.encode_prompt(tokenizer, turns(talk)) for talk in asked]
    ids = [[*tokenizer.encode(reply), tokenizer.eos_id] for reply in replies]
    wanted = scoring.score_responses(model, tokenizer, prompts, ids)
    assert len(prompts[1]) > model.gpt.config.block_size
    talks = [[*talk, {"role": "assistant", "content": r}] for talk, r in zip(asked, replies)]
    texts = [words.apply_chat_template(talk, tokenize=False) for talk in talks]
    as_tensors = {"truncation": True, "return_tensors": "pt"}
    alone = torch.cat([theirs(**words(text, **as_tensors)).logits[:, 0] for text in texts])
    batch = theirs(**words(texts, padding=True, **as_tensors)).logits[:, 0]
    pipe = transformers.pipeline("text-classification", str(path / "hf"), device="cpu")
    piped = [pipe(text, truncation=True)[0]["score"] for text in texts]
    batched = [x["score"] for x in pipe(texts, truncation=True, batch_size=4)]
    for found in (alone, batch, piped, batched):
        assert (torch.as_tensor(found) - wanted).abs().max() < 1e-4


def test_a_pipeline_answers_as_the_model_does(trained, tokenizer):
    """Greedily, one prompt and several at once."""
    path, model = trained
    export.main(export.Config(str(path / "sft"), str(path / "hf")))
    pipe = transformers.pipeline("text-generation", str(path / "hf"), device="cpu")
    greedy = {"do_sample": False, "max_new_tokens": 9, "return_full_text": False}
    asked = ["hi", "what is the time?", "x"]
    loaded = nanorlhf.load(path / "sft", "cpu", "float32")
    wanted = nanorlhf.generate(*loaded, asked, 9, temperature=0)
    talks = [[{"role": "user", "content": text}] for text in asked]
    alone = [pipe(talk, **greedy)[0]["generated_text"] for talk in talks]
    batch = [x[0]["generated_text"] for x in pipe(talks, batch_size=3, **greedy)]
    assert alone == batch == wanted


FOREIGN = ["chat_template.jinja", "generation_config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", [*FOREIGN, "config.json", "step_1"])
def test_an_export_leaves_the_files_of_another_model_alone(trained, capsys, name):
    path, _ = trained
    (path / "hf").mkdir()
    (path / "hf" / name).write_text("{}")
    said = refused(capsys, write, path / "sft", path / "hf")
    assert name in said and [p.name for p in (path / "hf").iterdir()] == [name]
    (path / "hf" / name).unlink()
    (path / "hf" / ".gitattributes").write_text("")
    for stage in ("rm", "sft"):  # an earlier export is written anew
        export.main(export.Config(str(path / stage), str(path / "hf")))
    (path / "hf" / name).write_text("{}")
    if name != "config.json":
        assert name in refused(capsys, write, path / "sft", path / "hf")


def test_what_goes_out_comes_in_again_bit_for_bit(trained, tokenizer):
    path, model = trained
    write(path / "sft", path / "hf")
    gpt, found = load_gpt(path / "hf")
    assert (found.stage, found.kind, found.tokenizer.chat) == ("sft", "lm", True)
    assert found.tokenizer.special == tokenizer.special
    assert found.tokenizer.dialogue(turns(CHAT)) == tokenizer.dialogue(turns(CHAT))
    for name, w in model.gpt.state_dict().items():
        assert torch.equal(gpt.state_dict()[name], w), name
    assert gpt.config == model.gpt.config


def test_an_export_says_what_it_is(trained, capsys):
    path, _ = trained
    is_chat = lambda **words: load_gpt(edited(path / "hf", **words))[1].tokenizer.chat
    write(path / "sft", path / "hf")
    assert not is_chat(nanorlhf_chat=False)
    assert load_gpt(edited(path / "hf", nanorlhf_stage="rloo"))[1].stage == "rloo"
    write(path / "rm", path / "hf")
    assert "a reward model; this needs a language model" in refused(capsys, load_gpt, path / "hf")


def test_the_model_card_states_stage_data_metrics_and_commit(trained):
    path, _ = trained
    edited(path / "sft/step_1", flags={"data": ["some.jsonl"], "seed": 7})
    (path / "sft/metrics.csv").write_text("step,val_loss\n0,9\n1,1.25\n")
    export.main(export.Config(str(path / "sft"), str(path / "hf")))
    card = (path / "hf/README.md").read_text()
    commit = checkpoint.load(path / "sft").config["commit"]
    run = f"| sft | some.jsonl | – | 1 | 7 | {commit or 'unknown'} |"
    for fact in ("Stage `sft`", run, "| val_loss | 1.25 |"):
        assert fact in card, card


@pytest.mark.parametrize("judge", ["out/rm", "my.py:reward"])
def test_the_card_names_the_judge_a_model_or_a_function(trained, judge):
    path, _ = trained
    edited(path / "sft/step_1", flags={"reward": judge, "seed": 7})
    export.main(export.Config(str(path / "sft"), str(path / "hf")))
    card = (path / "hf/README.md").read_text()
    assert "| judged by |" in card and f"| sft | the embedded world | {judge} | 1 | 7 |" in card


def test_an_export_without_safetensors_or_checkpoint_is_refused(trained, monkeypatch, capsys):
    path, _ = trained
    assert "no checkpoint" in refused(capsys, write, path / "nothing", path / "hf")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install" in refused(capsys, write, path / "sft", path / "hf")


# ---- a fork's checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, model, is_chat, loader, sentence",
    [
        ("rloo", ActorCritic, True, "CausalLM", "a language model that answers in a chat"),
        ("pretrained", None, False, "CausalLM", "a base model"),
        ("judge", RewardModel, True, "SequenceClassification", "a reward model"),
    ],
)
def test_a_fork_is_exported_as_what_it_is(tmp_path, stage, model, is_chat, loader, sentence):
    pytest.importorskip("safetensors")
    gpt = make_gpt(5)
    folder = save(tmp_path / stage, stage, model(gpt) if model else gpt, chat=is_chat)
    to = tmp_path / "hf"
    export.main(export.Config(str(folder), str(to)))
    config = json.loads((to / "config.json").read_text())
    assert (config["nanorlhf_stage"], config["nanorlhf_chat"]) == (stage, is_chat)
    assert config["nanorlhf_kind"] == ("reward" if model is RewardModel else "lm")
    card = (to / "README.md").read_text()
    assert f"Stage `{stage}` of nanorlhf: {sentence}" in card and f"AutoModelFor{loader}" in card
    words = json.loads((to / "tokenizer_config.json").read_text())
    assert ("chat_template" in words) == is_chat


def test_the_card_names_each_run_once_though_one_started_from_its_own_folder(tmp_path):
    sft = save(tmp_path / "sft", "sft", make_gpt(2))
    ppo = save(tmp_path / "ppo", "ppo", make_gpt(4))
    for folder, init in ((sft, ppo), (ppo, sft)):
        edited(folder / "step_1", flags={"init": str(init)})
    found = list(ancestors(checkpoint.load(ppo)))
    assert [config["stage"] for config in found] == ["ppo", "sft"]
