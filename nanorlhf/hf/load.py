"""The way in: a model of the GPT-2 or Llama family in Hugging Face layout, as a GPT of ours.

What it lacks of the special tokens that training needs, a pad or the roles of our own template,
gets a row of the embedding. hf/export.py is the way out.
"""

from datetime import datetime
from pathlib import Path

import torch

from nanorlhf.config import die, note, warn
from nanorlhf.hf.folder import convert, download, model_config_of, read_json, read_weights
from nanorlhf.hf.template import jinja_of
from nanorlhf.hf.tokenizer import FILES, ForeignTokenizer, kept_files


def load_foreign(init, dropout=0.0, template=""):
    """(GPT in float32, its stage's name, its ForeignTokenizer) of --init and --template."""
    is_folder = Path(init, "config.json").exists()
    folder = Path(init) if is_folder else download(str(init).removeprefix("hf:"), FILES)
    config = read_json(folder / "config.json")
    if config.get("nanorlhf_kind", "lm") != "lm":
        die(f"{folder}: a {config['nanorlhf_kind']} model; this needs a language model")
    model_config = model_config_of(config, folder)
    tokenizer = read_tokenizer(folder, config, template)
    weights = convert(read_weights(folder), model_config, folder)
    for name in weights.keys() & {"wte.weight", "lm_head.weight"}:
        w = weights[name]  # (their vocabulary, width)
        # a new token starts at the mean of all tokens, and so about as likely as an average one
        mean = w.mean(0)
        weights[name] = torch.cat([w, mean.expand(tokenizer.vocab_size - len(w), -1)])
        weights[name][[tokenizer.special[token] for token in tokenizer.added]] = mean
    model_config.vocab_size, model_config.dropout = tokenizer.vocab_size, dropout
    gpt = model_config.build()
    gpt.load_state_dict(weights)
    return gpt, str(config.get("nanorlhf_stage", "gpt")), tokenizer


def read_tokenizer(folder, config, template=""):
    """The ForeignTokenizer of a folder, with its config.json. template: what --template says."""
    files = kept_files(folder)
    if "tokenizer.json" not in files:
        convert = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
        die(f"{folder}: no tokenizer.json in it; transformers makes one: {convert}")
    name = "generation_config.json"
    generation = read_json(folder / name, files.get(name, b"{}"))
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    settings = {
        "template": jinja_of(template),
        "date": datetime.now().date().isoformat(),
        "n_rows": config["vocab_size"],
        "eos": [i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int],
    }
    tokenizer = ForeignTokenizer(files, settings, folder)
    if "strftime_now" not in tokenizer.source:
        settings["date"] = datetime.min.date().isoformat()  # then two of one folder are equal
    tokenizer.chat = config.get("nanorlhf_chat", bool(template or tokenizer.own_template))
    if tokenizer.chat and tokenizer.roles_are_text:
        warn(f"{folder}: its template writes roles as plain text, so a text can pretend to be one")
    if tokenizer.chat and "enable_thinking" in tokenizer.source:
        note("its template is asked for answers without thoughts (enable_thinking=False)")
    return tokenizer
