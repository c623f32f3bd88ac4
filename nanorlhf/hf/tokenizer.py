"""Other people's tokenizers and templates, read by the packages that made these formats.

A checkpoint keeps their files as they came, in step_N/tokenizer/, and in settings.json there what
ids depend on besides. An export has the same files again.
"""

import json
import re
from pathlib import Path

from nanorlhf.config import die, package, reason
from nanorlhf.data.values import system_as
from nanorlhf.hf.folder import read_json
from nanorlhf.hf.template import OURS, ChatTemplate, clean, jinja_of
from nanorlhf.tokenizer import ASSISTANT, PAD, USER

FILES = (  # what is kept of a folder
    "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja "
    "generation_config.json"
).split()
ALIAS = "\U000ffffe{}\U000fffff"  # in no text: see `clean`


class ForeignTokenizer:
    """The tokenizer of a folder in Hugging Face layout, with the methods of `tokenizer.Tokenizer`.

    Text that spells a special token is plain text, except where the chat template wrote it. `chat`:
    whether the model has learned the template. `eos_id` is what the template writes behind an
    assistant's words, or a base model's end of a text; `ends` are all ids that end a response."""

    user_id = assistant_id = None  # in our own template these are special tokens

    def __init__(self, files, settings, where):
        """files: {name: bytes}, of FILES. where: the folder, for messages. settings: "template", in
        Jinja, if it is not the folder's own; "date", which templates take for now; "n_rows", the
        size of the model's vocabulary; "eos", the ids that its configuration calls its end."""
        self.files, self.settings, self.where, self.chat = files, settings, where, False
        self.config = self.json_of("special_tokens_map.json") | self.json_of(FILES[1])
        self.names = named_tokens(self.config)
        self.own_template = self.find_template()
        self.source = settings["template"] or self.own_template or OURS
        self.engine = self.make_engine()
        self.start_ids = self.engine.encode("").ids
        self.engine.post_processor = None  # it trims the places of tokens
        self.find_special()
        self.find_ends()
        self.bos_id = self.special.get(self.names.get("bos_token"), self.eos_id)
        if "add_bos_token" in self.config:  # then this decides
            self.start_ids = [self.bos_id] if self.config["add_bos_token"] else []
        self.start_ids = self.start_ids or [self.eos_id]  # the end of the document before
        self.pad = self.find_pad()
        wanted = (self.pad, USER, ASSISTANT) if self.source == OURS else (self.pad,)
        self.added = [name for name in wanted if name not in self.special]
        self.engine.add_special_tokens(self.added)
        self.find_special()
        self.pad_id = self.special[self.pad]
        # where none but the end of the turn before tells whose turn it is, a text can fake a role
        of_role = map(self.special.get, self.any_special.findall(self.literals[1]))
        self.roles_are_text = {*of_role} <= {self.eos_id}
        self.size = max(self.engine.get_vocab().values()) + 1
        self.vocab_size = max(self.size, settings["n_rows"])  # a model may have rows to spare
        self.make_aliases()

    def find_special(self):
        """Set {name: id} of the special tokens, and a regex that finds their names."""
        added = self.engine.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        names = map(re.escape, sorted(self.special, key=len, reverse=True))
        self.any_special = re.compile("|".join(names) or "(?!)")

    def json_of(self, name):
        return read_json(Path(self.where, name), self.files.get(name, b"{}"))

    def find_template(self):
        """The folder's own chat template, in Jinja; "" if it has none."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode(errors="replace")
        source = self.config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        if isinstance(source, dict):
            source = source.get("default")
        return source if isinstance(source, str) else ""

    def make_engine(self):
        """tokenizers.Tokenizer of the files, with the tokens that only the configuration names."""
        tokenizers = package("tokenizers", "another project's tokenizer", "hub")
        try:
            engine = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
            engine.no_truncation()
            engine.no_padding()
            lists = map(self.config.get, ("additional_special_tokens", "extra_special_tokens"))
            more = (name_of(token) for some in lists if isinstance(some, list) for token in some)
            names = [*self.names.values(), *more, *map(engine.id_to_token, self.settings["eos"])]
            added = engine.get_added_tokens_decoder().values()
            known = {token.content for token in added if token.special}
            engine.add_special_tokens([name for name in names if name and name not in known])
            return engine
        except Exception as error:  # the engine raises Exception, and a damaged file anything
            die(f"{self.where}: its tokenizer cannot be read ({reason(error)})")

    def find_ends(self):
        """Compile the template, and set `eos_id` and `ends`."""
        of_config, names = self.settings["eos"], self.names
        if self.source == OURS:  # which always ends with one; another's is told what it was told
            ends = [names.get("eos_token"), *map(self.engine.id_to_token, of_config)]
            names = names | {"eos_token": next((n for n in ends if n in self.special), "")}
        self.template = ChatTemplate(self.source, names, self.settings["date"], self.where)
        self.literals, _ = self.template.frame(("user", "assistant"), False)
        if self.source == OURS and not names["eos_token"]:
            die(f"{self.where}: it names no end of a text: tokenizer_config.json has no eos_token")
        if not (end := self.any_special.search(self.literals[2])):
            die(f"{self.where}: its chat template writes no special token behind an answer")
        self.eos_id, self.tail = self.special[end[0]], self.literals[2][end.end() :]
        self.ends = tuple(dict.fromkeys([self.eos_id, *of_config]))

    def find_pad(self):
        """The name of the pad, which is no end: the model's own, or one without another use."""
        spare = [name for name in self.special if "pad" in name or "endoftext" in name]
        reserved = [name for name in self.special if "reserved" in name]
        names = [self.names.get("pad_token"), *spare, self.names.get("unk_token"), *reserved]
        return next((n for n in names if self.special.get(n, self.eos_id) not in self.ends), PAD)

    def make_aliases(self):
        """From here on the engine reads the names of special tokens as text, and for each it knows
        another name, which only `dialogue` gives it."""
        self.alias_of, self.id_of = {}, {}
        for i, token in self.engine.get_added_tokens_decoder().items():
            if token.special:
                alias = self.alias_of[token.content] = ALIAS.format(i)
                token.content, token.special = alias, False
                self.engine.add_tokens([token])
                self.id_of[self.engine.token_to_id(alias)] = i
        if self.id_of and min(self.id_of) < self.size:  # it counts tokens to number a new one
            die(f"{self.where}: the ids of its tokens have gaps")
        self.engine.encode_special_tokens = True

    def has_template(self, template):
        """Whether the chat template is the one for which --template stands."""
        return template == "" or jinja_of(template) == self.source

    def encode(self, text):
        """Any text -> list of ids, none of them special."""
        return self.engine.encode(clean(text), add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text; special tokens are dropped, broken UTF-8 is replaced."""
        return self.engine.decode([i for i in ids if i < self.size], skip_special_tokens=True)

    def token_text(self, id):
        """A token by itself: a special one's name, or what it adds to a text."""
        before = self.encode("a")
        text = self.engine.decode([*before, id], skip_special_tokens=False)
        text = text.removeprefix(self.engine.decode(before))
        return self.engine.id_to_token(id) if "\ufffd" in text else text

    def tokens_per_byte(self, ids):
        """Tokens for each byte of the text that an array of ids spells; special ones spell none."""
        return len(ids) / max(len(self.decode(ids.tolist()).encode()), 1)

    def dialogue(self, messages, answer=False):
        """As `tokenizer.Tokenizer.dialogue`. The whole text is encoded at once, as the field does,
        so what is learned is known for each character: an assistant's words, up to the special
        token that ends them. A token goes by the first of its characters."""
        turns = [(role, clean(content)) for role, content in system_as("system", messages)]
        spoken = [("assistant" if role == "unlearned" else role, text) for role, text in turns]
        text, is_learned, speaks = "", [], False
        for i, piece in self.template.write(spoken, answer):
            if i is None:  # behind an assistant's words, what ends them is learned
                piece = self.any_special.sub(lambda found: self.alias_of[found[0]], piece)
                n, speaks = piece.find(ALIAS[-1]) + 1 if speaks else 0, False
            else:
                speaks = turns[i][0] == "assistant"
                n = len(piece) if speaks else 0
            text += piece
            is_learned += [True] * n + [False] * (len(piece) - n)
        encoding = self.engine.encode(text, add_special_tokens=False)
        is_loss = [is_learned[start] for start, _ in encoding.offsets]
        return [self.id_of.get(i, i) for i in encoding.ids], is_loss

    def save(self, folder):
        folder = Path(folder, "tokenizer")
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / "settings.json").write_text(json.dumps(self.settings))

    @classmethod
    def load(cls, folder):
        folder = Path(folder, "tokenizer")
        return cls(kept_files(folder), json.loads((folder / "settings.json").read_text()), folder)

    def __eq__(self, other):
        is_foreign, names = type(other) is ForeignTokenizer, ("source", "settings", "special")
        same = is_foreign and all(getattr(self, name) == getattr(other, name) for name in names)
        return same and self.files["tokenizer.json"] == other.files["tokenizer.json"]


def kept_files(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def named_tokens(config):
    """{"eos_token": its name, ...} of a configuration, without those that have none."""
    extra = config.get("extra_special_tokens")
    tokens = {key: token for key, token in config.items() if key.endswith("_token")}
    tokens |= extra if isinstance(extra, dict) else {}
    return {key: name_of(token) for key, token in tokens.items() if name_of(token)}


def name_of(token):
    """A special token's name, which some files keep in an object; "" for anything else."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""
