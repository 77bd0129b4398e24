"""Byte-level BPE: text to token ids and back.

`tokenizer.json` of the library `tokenizers` is the file of record, which everybody opens. That library
trains; tiktoken, ten times as fast, encodes wherever it provably gives the same ids, and `tokenizers` does
elsewhere.

Encoding is always ordinary: no text, whatever it holds, becomes a control token. Those are inserted by id, by
whoever builds a sequence. There is no normaliser, so that decoding gives back what was encoded, byte for byte
(only lone surrogates, which no UTF-8 text holds, become U+FFFD).
"""

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from unmask.errors import UserError
from unmask.files import hash_json, sha256_hex
from unmask.text.bpe import BYTE_CHARACTERS, canonical_merges, fast_ranks, to_bytes, to_characters
from unmask.text.template import CHATML

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
# Qwen2's pattern, one digit a token: llama.cpp knows it by name ("qwen2").
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SMALLEST = len(CONTROL) + 256
# tiktoken's regex engine panics on a run of a million white-space characters; `tokenizers` does not.
_LONGEST_BLANK = 500_000
_BLANK = re.compile(rf"(?<!\s)\s{{{_LONGEST_BLANK}}}")  # tried at the beginning of each run of spaces, once
# Under these names other houses' tokenizers hold the tokens around turns and after texts.
_TURN_STARTS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|user|>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer:
    """A byte-level BPE vocabulary with its control tokens and its chat template. Immutable.

    `control`: name → id of every control token (the "special" ones of tokenizer.json). `token_bytes`: the
    bytes of each of `rows` ids, b"" for control tokens and for ids that pad the rows. `vocabulary`: how
    many ids there are; `rows`: that number up to a multiple of 64, the rows of an embedding. `end_of_text`
    stands before every document; `turn_start` and `turn_end` around a turn; generation ends at any of
    `stop_ids`. `bos` is the id that other houses' models want before every sequence; None, also for ours,
    if there is none. `hash`: of what in tokenizer.json decides ids; `template_hash`: of the chat template ("" if it
    has none).
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        config: Mapping[str, Any],
        chat_template: str,
        stops: Iterable[int] = (),
    ) -> None:
        """`content`, `config`: of tokenizer.json and tokenizer_config.json. `stops`: further stop ids."""
        model = content.get("model") or {}
        if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
            raise UserError("it is not a byte-level BPE tokenizer (as of Qwen, Llama 3, GPT-2, SmolLM).")
        self._content, self._config = content, config
        added = {token["content"]: token for token in content.get("added_tokens") or ()}
        self.control: dict[str, int] = {
            name: token["id"] for name, token in added.items() if token["special"]
        }
        if not self.control:
            raise UserError("it has no control token (no special added token) to mark the end of a text.")
        ids = {**model["vocab"], **{name: token["id"] for name, token in added.items()}}
        self.vocabulary = max(ids.values()) + 1
        self.rows = -(-self.vocabulary // 64) * 64
        self.token_bytes: list[bytes] = [b""] * self.rows
        for token, id in ids.items():
            if token not in self.control:
                self.token_bytes[id] = token.encode() if token in added else to_bytes(token)
        self.chat_template = chat_template
        self.template_hash = sha256_hex(chat_template.encode())

        self.bos = self._default_bos()
        # tokenizer_config.json may order a token before every text: that decides ids as much as the vocabulary does.
        self.hash = hash_json({"content": _deciding(content), "bos": self.bos})
        bos, eos = self._named("bos_token"), self._named("eos_token")
        some = next(iter(self.control.values()))
        self.end_of_text = self.bos if self.bos is not None else self._first(CONTROL[:1], bos, eos, some)
        self.turn_end = self._first(_TURN_ENDS, eos, self.end_of_text)
        self.turn_start = self._first(_TURN_STARTS, self.end_of_text)
        self.pad = self._first(CONTROL[3:], self._named("pad_token"), self.end_of_text)
        ends = [self.control[name] for name in (*_TURN_ENDS, *_TEXT_ENDS) if name in self.control]
        self.stop_ids = tuple(sorted({self.turn_end, *ends, *stops, *([] if eos is None else [eos])}))

        self.names = {id: name for name, id in self.control.items()}
        self._slow = _plain(content)
        for name, id in self.control.items():
            if id in self._slow.encode(name, add_special_tokens=False).ids:
                raise UserError(f"the text {name!r} becomes the control token of this name in it.")
        self._ranks = fast_ranks(content, PATTERN, set(self.control))
        self._threads = threading.local()

    @staticmethod
    def train(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
        """A tokenizer of at most `vocabulary` ids, control tokens included: fewer if the texts have no more.

        The merges are rebuilt from the vocabulary (`canonical_merges`), so that encoding with tiktoken does not
        rest on the trainer's never listing two merges for one token. Deterministic in the texts. UserError
        for a vocabulary that has no room for the bytes.
        """
        if vocabulary < SMALLEST:
            raise UserError(
                f"a vocabulary of {vocabulary} has no room for the 256 bytes: {SMALLEST} is the least."
            )
        trained = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trained.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(CONTROL),
            initial_alphabet=sorted(BYTE_CHARACTERS),
            show_progress=False,
        )
        trained.train_from_iterator((_sound(text) for text in texts), trainer)
        content = json.loads(trained.to_str())
        vocab: dict[str, int] = content["model"]["vocab"]
        in_order = [to_bytes(token) for token in sorted(vocab, key=vocab.__getitem__) if token not in CONTROL]
        merges = canonical_merges(in_order)
        content["model"]["merges"] = [[to_characters(left), to_characters(right)] for left, right in merges]
        return Tokenizer(content, _CONFIG, CHATML)

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """The tokenizer of a model directory, ours or another house's. UserError names the file at fault."""
        path = directory / "tokenizer.json"
        content = _read_json(path)
        if content is None:
            raise UserError(f"{path}: no such file. A model directory needs its tokenizer.json.")
        config = _read_json(directory / "tokenizer_config.json") or {}
        eos = (_read_json(directory / "generation_config.json") or {}).get("eos_token_id")
        stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
        template = _chat_template(directory, config)
        try:
            return Tokenizer(content, config, template, stops)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r}). Restore it from a copy.") from error

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        for name, value in (("tokenizer.json", self._content), ("tokenizer_config.json", config)):
            (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
        if self.chat_template:
            (directory / "chat_template.jinja").write_bytes(self.chat_template.encode())

    @property
    def _fast(self) -> tiktoken.Encoding | None:
        """tiktoken, where it gives the same ids. One for each thread: sharing one costs them a fifth of their time."""
        if self._ranks is not None and not hasattr(self._threads, "encoding"):
            # Without special tokens `encode_to_numpy` would look for one at every byte. No text is ever taken for one.
            self._threads.encoding = tiktoken.Encoding(
                "", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=self.control
            )
        return self._threads.encoding if self._ranks is not None else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text; never a control id, whatever the text."""
        if self._fast and not _long_blank(text):
            return self._fast.encode_ordinary(text)
        return self._slow.encode(_sound(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each text, as arrays: quicker than lists, and other threads can do the same meanwhile."""
        sound = [_sound(text) for text in texts]
        if self._fast and not any(map(_long_blank, sound)):
            return [self._fast.encode_to_numpy(text, disallowed_special=()) for text in sound]
        encodings = self._slow.encode_batch_fast(sound, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; control tokens stand for none."""
        return b"".join([self.token_bytes[id] for id in ids])

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """The text of the ids, with control tokens' names if asked. What is no UTF-8 becomes U+FFFD."""
        if not control:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        named = [self.names[id].encode() if id in self.names else self.token_bytes[id] for id in ids]
        return b"".join(named).decode("utf-8", "replace")

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token's name, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))))

    @property
    def special_names(self) -> dict[str, str]:
        """The names that a chat template may use: bos_token, eos_token, pad_token, unk_token."""
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {role: _name(self._config[role]) for role in roles if self._config.get(role) is not None}

    def _named(self, role: str) -> int | None:
        return self.control.get(self.special_names.get(role, ""))

    def _first(self, names: Sequence[str], *otherwise: int | None) -> int:
        """The id of the first of the names that is a control token, else the first that is not None."""
        found = [self.control[name] for name in names if name in self.control]
        return next(id for id in (*found, *otherwise) if id is not None)

    def _default_bos(self) -> int | None:
        """The id that other software puts before every text it encodes with this tokenizer, if it does."""
        if self._config.get("add_bos_token"):
            return self._named("bos_token")
        processor = self._content.get("post_processor") or {}
        for part in processor.get("processors") or [processor]:
            for piece in (part.get("single") or [])[:1]:
                if "SpecialToken" in piece:
                    return self.control.get(piece["SpecialToken"]["id"])
        return None


# eos_token is what ends an answer, as chat software expects. No BOS: `tok("text").input_ids` is the text
# alone.
_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "bos_token": None,
    "eos_token": CONTROL[2],
    "pad_token": CONTROL[3],
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
}


def _plain(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer, to which control tokens' names are plain text, and which adds nothing."""
    try:
        plain = tokenizers.Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"the library `tokenizers` refuses it ({error}).") from error
    plain.encode_special_tokens = True
    return plain


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
    """chat_template.jinja, else the template in the configuration, else ""."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}). Restore it from a copy.") from error
    inline = config.get("chat_template") or ""
    if isinstance(inline, list):  # several by name, as transformers 4 wrote them
        named = {each.get("name"): each.get("template") for each in inline if isinstance(each, dict)}
        inline = named.get("default") or ""
    return str(inline)


def _deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a library leaves in the file when it saves it again: how a batch was last padded and cut, what is
    put around a text (of which `bos` says all that we do), and the older spelling of merges."""
    model = dict(content["model"])
    model["merges"] = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()
    ]
    return {**content, "model": model, "padding": None, "truncation": None, "post_processor": None}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Restore it from a copy.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object. Restore it from a copy.")
    return found


def _name(token: Any) -> str:
    """A token in a configuration: its name, or an object with its name and how it is matched."""
    return str(token["content"] if isinstance(token, dict) else token)


def _sound(text: str) -> str:
    """The text with lone surrogates (from JSON escapes) replaced by U+FFFD, exactly as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _long_blank(text: str) -> bool:
    return len(text) >= _LONGEST_BLANK and _BLANK.search(text) is not None
