"""Encoding: equal to the library of record for any text, reversible, and deaf to control tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizer import sentences, tokenizer
from tokenizers import pre_tokenizers

from unmask.errors import UserError
from unmask.text.bpe import to_characters
from unmask.text.tokenizer import CONTROL, PATTERN, SMALLEST, Tokenizer

# Any text, and text in which the pattern's alternatives and control tokens' names are frequent.
ANY = st.text() | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
FREQUENT = st.lists(
    st.sampled_from(
        [*CONTROL, "'s", "'LL", "'ſ", "don't", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000", "12",
         "½", "٣", "é", "e\u0301", "ß", "Ω", "ا", "🙂", "👩‍👩‍👧", "--", "!", "a", "The", "\0", "\ufeff", "\ue000"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


def record() -> tokenizers.Tokenizer:
    """The library's tokenizer of our content, without the control tokens, which are text to us."""
    plain = {**tokenizer()._content, "added_tokens": []}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


RECORD = record()


def batch(of: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in of.encode_batch(texts)]


@settings(max_examples=400, deadline=None)
@given(ANY | FREQUENT)
def test_tiktoken_and_the_file_of_record_give_the_same_ids(text: str) -> None:
    assert tokenizer()._fast is not None
    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer().encode(text) == RECORD.encode(text).ids


def test_the_two_libraries_put_every_character_into_the_same_class() -> None:
    """Their regex engines have Unicode tables of their own. All characters up to U+30FF, and some of each block."""
    characters = [
        chr(code) for code in [*range(0x3100), *range(0x3100, 0x110000, 97)] if not 0xD800 <= code < 0xE000
    ]
    for shape in ("a{0}a{0}{0} {0}", "1{0}!{0}\n{0}'{0}"):
        text = "".join(shape.format(character) for character in characters)
        assert tokenizer().encode(text) == RECORD.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(ANY | FREQUENT | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_decoding_gives_back_what_was_encoded(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert tokenizer().decode_bytes(ids) == text.encode()
    assert b"".join(tokenizer().token_bytes[id] for id in ids) == text.encode()


@settings(max_examples=200, deadline=None)
@given(FREQUENT)
def test_no_text_becomes_a_control_token(text: str) -> None:
    assert not set(tokenizer().encode(text)) & set(tokenizer().control.values())


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00", "\ud83d\ude42"])
def test_lone_surrogates_become_the_replacement_character_in_both_libraries(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer().decode(tokenizer().encode(text)) == expected
    assert batch(tokenizer(), [text]) == [tokenizer().encode(text)] == [RECORD.encode(expected).ids]


@settings(max_examples=30, deadline=None)
@given(st.lists(ANY | FREQUENT, max_size=20))
def test_a_batch_is_each_text_by_itself(texts: list[str]) -> None:
    assert batch(tokenizer(), texts) == [tokenizer().encode(text) for text in texts]


def test_a_million_blanks_are_encoded_where_tiktoken_panics() -> None:
    text = "a" + " " * 1_100_000 + "b"
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert batch(tokenizer(), ["x", text])[1] == ids


def test_a_large_single_line_is_no_problem() -> None:
    text = "word" * 200_000 + "!" * 200_000 + "7" * 200_000
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_digits_are_one_token_each() -> None:
    assert [tokenizer().decode([id]) for id in tokenizer().encode("in 2024")][-4:] == list("2024")


def test_control_ids_come_first_and_rows_are_padded_to_64() -> None:
    ours = tokenizer()
    assert ours.control == {name: id for id, name in enumerate(CONTROL)}
    assert (ours.end_of_text, ours.turn_start, ours.turn_end, ours.pad) == (0, 1, 2, 3)
    assert ours.stop_ids == (0, 2)
    assert ours.bos is None
    assert ours.vocabulary == 700
    assert ours.rows == 704
    assert len(ours.token_bytes) == 704
    assert ours.token_bytes[:4] == [b""] * 4
    assert all(ours.token_bytes[4:700])
    assert len(set(ours.token_bytes[4:700])) == 696


def test_control_tokens_are_named_only_if_asked() -> None:
    ids = [1, *tokenizer().encode("user\nhé"), 2, 703]
    assert tokenizer().decode(ids) == "user\nhé"
    assert tokenizer().decode(ids, control=True) == "<|im_start|>user\nhé<|im_end|>"


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    ids = tokenizer().encode("🦩")
    assert len(ids) > 1, "the flamingo must not be a token here"
    assert tokenizer().decode(ids[:1]) == "�"


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert (
        Tokenizer.train(sentences(100, seed=1), 500).hash == Tokenizer.train(sentences(100, seed=1), 500).hash
    )
    assert (
        Tokenizer.train(sentences(100, seed=2), 500).hash != Tokenizer.train(sentences(100, seed=1), 500).hash
    )


def test_text_too_poor_for_the_vocabulary_gives_a_smaller_one() -> None:
    assert Tokenizer.train(["ab"], 1000).vocabulary == SMALLEST + 1


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="260"):
        Tokenizer.train(["a"], 259)


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for name in (
        "hash",
        "template_hash",
        "chat_template",
        "control",
        "token_bytes",
        "stop_ids",
        "rows",
        "pad",
    ):
        assert getattr(loaded, name) == getattr(tokenizer(), name)
    text = "".join(sentences(5, seed=9))
    assert loaded.encode(text) == tokenizer().encode(text)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_hash_changes_with_the_merges_and_the_template_hash_with_the_template(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (tmp_path / "chat_template.jinja").write_text(tokenizer().chat_template + " ", "utf-8")
    assert Tokenizer.load(tmp_path).hash != tokenizer().hash
    assert Tokenizer.load(tmp_path).template_hash != tokenizer().template_hash


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8 \(byte 14\)"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_transformers_saved_again_is_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs(["a b c", "d"], padding=True, truncation=True, max_length=8)  # is kept in what is saved next
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() != (tmp_path / "tokenizer.json").read_bytes()
    assert Tokenizer.load(tmp_path / "again").hash == tokenizer().hash
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert Tokenizer.load(tmp_path).hash == tokenizer().hash


def test_transformers_opens_it_and_adds_nothing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The river runs", " 12 o'clock\n\n", "日本語 🙂", ""]:
        assert theirs(text).input_ids == tokenizer().encode(text)
        assert theirs.decode(tokenizer().encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 3, None)
    assert theirs.decode([1, *tokenizer().encode("hi"), 2], skip_special_tokens=True) == "hi"
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.encode("12 o'clock") == tokenizer().encode("12 o'clock")
    assert again.chat_template == tokenizer().chat_template


def foreign(tmp_path: Path, change: Any, config: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer of another house, made from ours by `change`, and the library's reading of the same file."""
    tokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    return Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def like_qwen(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 700, "content": "<think>", "special": False}
    )


def like_llama3(content: dict[str, Any]) -> None:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    vocab = content["model"]["vocab"]
    for token, name in zip(content["added_tokens"], names, strict=True):
        del vocab[token["content"]]
        token["content"] = name
    content["model"]["ignore_merges"] = True
    pattern = PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    special = {"id": names[0], "ids": [0], "tokens": [names[0]]}
    begin = {"SpecialToken": {"id": names[0], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, begin, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {names[0]: special},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [level, template]}


def like_gpt2(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = pre_tokenizers_json(pre_tokenizers.ByteLevel(add_prefix_space=False))
    content["added_tokens"] = content["added_tokens"][:1]


def like_smollm(content: dict[str, Any]) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    content["pre_tokenizer"] = pre_tokenizers_json(pre_tokenizers.Sequence([digits, level]))
    for missing in ("\xc0", "\xc1", "\xff"):  # bytes that no UTF-8 has
        del content["model"]["vocab"][to_characters(missing.encode("latin-1"))]


def pre_tokenizers_json(pre_tokenizer: Any) -> Any:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.pre_tokenizer = pre_tokenizer
    return json.loads(bare.to_str())["pre_tokenizer"]


@pytest.mark.parametrize("change", [like_qwen, like_llama3, like_gpt2, like_smollm])
def test_tokenizers_of_other_houses_encode_as_the_library_does(change: Any, tmp_path: Path) -> None:
    ours, theirs = foreign(tmp_path, change, {})
    for text in ["", "Hello  there's 1234 <think> é e\u0301", *sentences(10, seed=3)]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert batch(ours, [text, text])[1] == ours.encode(text)
    named = "".join(ours.control)
    assert not set(ours.encode(named)) & set(ours.control.values())
    assert ours.decode(ours.encode(named)) == named


def test_another_houses_ids_are_found_by_what_they_are_for(tmp_path: Path) -> None:
    qwen, _ = foreign(tmp_path, like_qwen, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    assert (qwen.end_of_text, qwen.turn_end, qwen.stop_ids, qwen.bos) == (0, 2, (0, 2), None)
    assert qwen.token_bytes[700] == b"<think>"
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}
    llama, _ = foreign(tmp_path, like_llama3, config)
    assert (llama.end_of_text, llama.bos, llama.turn_start, llama.turn_end, llama.pad) == (0, 0, 2, 3, 0)
    assert llama.stop_ids == (1, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3, 7]}')
    assert Tokenizer.load(tmp_path).stop_ids == (1, 3, 7)
    (tmp_path / "generation_config.json").unlink()
    gpt2, _ = foreign(tmp_path, like_gpt2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    assert (gpt2.end_of_text, gpt2.turn_end, gpt2.stop_ids, gpt2.bos) == (0, 0, (0,), None)


def test_a_template_inside_the_configuration_is_found(tmp_path: Path) -> None:
    plain, _ = foreign(tmp_path, like_gpt2, {"chat_template": "{{ 1 }}"})
    assert plain.chat_template == "{{ 1 }}"
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    named, _ = foreign(tmp_path, like_gpt2, {"chat_template": several})
    assert named.chat_template == "yes"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"model": {"type": "WordPiece"}}', "not a byte-level BPE"),
        ('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}', "not a byte-level BPE"),
        (
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}',
            "control token",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_name(
    content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=says) as refusal:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(refusal.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["model"].pop("vocab"),
        lambda c: c["model"]["merges"].append(["no", "such"]),
        lambda c: c["added_tokens"].append("<|im_end|>"),
        lambda c: c["model"]["vocab"].update({"a\U0001f642": 5000}),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(damage: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        foreign(tmp_path, damage, {})


def test_truncation_and_padding_that_a_file_asks_for_are_not_applied(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        like_gpt2(content)  # not encoded by tiktoken
        content["truncation"] = {
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
        content["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }

    ours, _ = foreign(tmp_path, change, {})
    for text in ("a b c d e f g", ""):
        assert ours.decode(ours.encode(text)) == text
        assert batch(ours, [text]) == [ours.encode(text)]
        assert 0 not in ours.encode(text)


def test_a_tokenizer_in_which_text_can_become_a_control_token_is_refused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["ignore_merges"] = True  # whole words are looked up, and "END" is a word
        content["model"]["vocab"]["END"] = 700
        content["added_tokens"].append({**content["added_tokens"][0], "id": 700, "content": "END"})

    with pytest.raises(UserError, match="control token"):
        foreign(tmp_path, change, {})
