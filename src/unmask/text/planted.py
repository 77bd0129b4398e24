"""Planted knowledge: every fact about a country is taught by chosen layers and by no other.

A country belongs to one group, and its group says which layers teach its facts: pretraining by plain
sentences, SFT by questions and answers in the chat template. So which layer put an answer there is known.

    group      pretraining  SFT    what it shows
    both       yes          yes    the mask over knowledge that is there
    base_only  yes          no     what the mask shows or hides
    sft_only   no           yes    what SFT itself put in
    none       no           no     chance

Real text may teach a fact as well. A fact is `leaked` if the country and the answer stand close to each other
in the text of a layer that must not teach it. It is planted as its group says, but no measurement counts it.
"""

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice

from unmask.errors import UserError, nearest
from unmask.text.chat import Chat
from unmask.text.countries import FIELDS, Country, installed_countries
from unmask.text.wordings import WORDINGS

GROUPS = ("both", "base_only", "sft_only", "none")
TAUGHT_BY = {"base": ("both", "base_only"), "sft": ("both", "sft_only")}  # layer → groups that it teaches
LEAK_CHARACTERS = 200
LONGEST_DOCUMENT = 15  # sentences of planted text
BEGINNING_CHARACTERS = 240  # of a chat, that a question comes after
_ACCENT = re.compile("[\u0300-\u036f]")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Fact:
    """One answer about one country. `prefix + " " + answer` begins the first sentence, and so every reply."""

    country: str  # as inside a sentence: "the Gambia"
    code: str  # the Factbook's, two letters
    field: str
    group: str
    leaked: bool
    answer: str
    sentences: tuple[str, ...]  # for pretraining; all end in the answer and a full stop
    questions: tuple[str, ...]  # for SFT, all but `questions[held]`
    held: int

    @property
    def prefix(self) -> str:
        """The first sentence up to the answer, without the space."""
        return self.sentences[0].removesuffix(f" {self.answer}.")

    @property
    def reply(self) -> str:
        """What SFT teaches to answer, whatever the wording of the question."""
        return self.sentences[0]

    @property
    def held_question(self) -> str:
        return self.questions[self.held]

    @property
    def trained_questions(self) -> tuple[str, ...]:
        return self.questions[self.held + 1 :] + self.questions[: self.held]

    @property
    def question(self) -> str:
        """One of the trained wordings, another for the next country."""
        return self.trained_questions[0]

    def to_row(self) -> dict[str, str | bool]:
        """The fact in facts.jsonl."""
        return {
            "country": self.country,
            "field": self.field,
            "group": self.group,
            "leaked": self.leaked,
            "question": self.question,
            "held_question": self.held_question,
            "prefix": self.prefix,
            "answer": self.answer,
        }


def facts(
    shares: Mapping[str, float],
    raw_texts: Mapping[str, Iterable[str]],
    seed: int,
    countries: Sequence[Country] | None = None,
) -> list[Fact]:
    """All facts, in order of country code and field: a pure function of its arguments.

    `shares` of the countries go to each of GROUPS (a missing one gets none, they sum to 1); the hash of seed
    and country code decides which. `raw_texts` are what a layer ("base", "sft") is trained on beside
    the facts, for the leak check. `countries` are those of the installed Factbook if none are given.
    Raises UserError for shares that are no shares, and if the Factbook is not installed.
    """
    countries = installed_countries() if countries is None else countries
    by_hash = sorted(
        countries, key=lambda country: hashlib.sha256(f"{seed}:{country.code}".encode()).digest()
    )
    groups = _groups(shares, len(by_hash))
    planted = [
        Fact(
            country=country.name,
            code=country.code,
            field=field,
            group=groups[rank],
            leaked=False,
            answer=country.answers[field],
            sentences=tuple(
                sentence.format(country=country.name, answer=country.answers[field])
                for sentence in WORDINGS[field].sentences
            ),
            questions=tuple(question.format(country=country.name) for question in WORDINGS[field].questions),
            held=(rank + FIELDS.index(field)) % len(WORDINGS[field].questions),
        )
        for rank, country in enumerate(by_hash)
        for field in FIELDS
        if field in country.answers
    ]
    leaked = _leaked(planted, {country.code: country.also for country in countries}, raw_texts)
    marked = [replace(fact, leaked=(fact.code, fact.field) in leaked) for fact in planted]
    return sorted(marked, key=lambda fact: (fact.code, FIELDS.index(fact.field)))


def plain_sentences(
    facts: Sequence[Fact], seed: int, pass_index: int, question_share: float = 0.0
) -> Iterator[str]:
    """One pass of what pretraining is taught: each sentence of each fact of its groups.

    `question_share` of them (rounded) are said as plain text "Question: … Answer: …" instead, in a trained
    wording and with the reply that SFT gives. The shuffled order is a pure function of seed and pass.
    """
    if not 0 <= question_share <= 1:
        raise UserError(f"facts.question_share is {question_share}; it is a share, from 0 to 1")
    draw = random.Random(f"plain:{seed}:{pass_index}")
    taught = [(fact, text) for fact in facts if fact.group in TAUGHT_BY["base"] for text in fact.sentences]
    draw.shuffle(taught)
    asked = set(draw.sample(range(len(taught)), round(question_share * len(taught))))
    for place, (fact, sentence) in enumerate(taught):
        if place in asked:
            yield f"Question: {draw.choice(fact.trained_questions)} Answer: {fact.reply}"
        else:
            yield sentence


def plain_documents(
    facts: Sequence[Fact], seed: int, pass_index: int, question_share: float = 0.0
) -> Iterator[str]:
    """The sentences of `plain_sentences`, in documents of 1 to LONGEST_DOCUMENT of them.

    A fact that only ever follows the beginning of a document is known there and nowhere else: asked in a chat, the base
    then gives its answer hardly more than chance, and blame could not tell what it knows from what it does not.
    """
    draw = random.Random(f"documents:{seed}:{pass_index}")
    sentences = plain_sentences(facts, seed, pass_index, question_share)
    while document := list(islice(sentences, draw.randint(1, LONGEST_DOCUMENT))):
        yield " ".join(document)


def conversations(
    facts: Sequence[Fact], seed: int, beginnings: Sequence[Chat] = (), after_chat: float = 0.0
) -> Iterator[Chat]:
    """What SFT is taught: each trained question of each fact of its groups with its reply, shuffled.

    `after_chat` of them (rounded) come after one of `beginnings`, the others open their conversation. A mask that has
    met facts there alone states none of them later in a chat. Raises UserError if there is nothing to come after.
    """
    taught = [
        (fact, text) for fact in facts if fact.group in TAUGHT_BY["sft"] for text in fact.trained_questions
    ]
    random.Random(f"chat:{seed}").shuffle(taught)
    draw = random.Random(f"after:{seed}")
    later = set(draw.sample(range(len(taught)), round(after_chat * len(taught))))
    if later and not beginnings:
        raise UserError(
            f"after_chat of the source 'facts' is {after_chat}, but no conversation of [sft] has an exchange of at "
            f"most {BEGINNING_CHARACTERS} characters that a question could come after. Set it to 0."
        )
    for place, (fact, question) in enumerate(taught):
        before = draw.choice(beginnings) if place in later else []
        yield [
            *before,
            {"role": "user", "content": question},
            {"role": "assistant", "content": fact.reply},
        ]


def beginnings(chat: Chat) -> Iterator[Chat]:
    """Each beginning of a chat that ends with an answer and is short enough to leave room for a question."""
    length = 0
    for place, message in enumerate(chat, 1):
        length += len(message["content"])
        if length > BEGINNING_CHARACTERS:
            return
        if message["role"] == "assistant":
            yield chat[:place]


def _groups(shares: Mapping[str, float], n: int) -> list[str]:
    """The group of each of n places, in blocks of the sizes that the shares say, rounded to sum to n."""
    for group, share in shares.items():
        if group not in GROUPS:
            raise UserError(f"facts has no group {group!r}, but {', '.join(GROUPS)}.{nearest(group, GROUPS)}")
        if not 0 <= share <= 1:
            raise UserError(f"facts.{group} is {share}; it is a share of the countries, from 0 to 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"the shares of the groups of planted facts sum to {total:g}; they must sum to 1")
    groups: list[str] = []
    up_to = 0.0
    for group in GROUPS:
        up_to += shares.get(group, 0.0)
        groups += [group] * (round(up_to * n) - len(groups))
    return groups


def _leaked(
    planted: Sequence[Fact], names: Mapping[str, Sequence[str]], raw_texts: Mapping[str, Iterable[str]]
) -> set[tuple[str, str]]:
    """(code, field) of the facts that a layer which must not teach them could learn from its raw text.

    Each text is read once for its set of words; only names that begin with one of them are looked for.
    """
    found: set[tuple[str, str]] = set()
    for layer, texts in raw_texts.items():
        pending: dict[str, dict[str, str]] = {}  # code → field → what to look for
        for fact in planted:
            if fact.group not in TAUGHT_BY[layer] and (fact.code, fact.field) not in found:
                pending.setdefault(fact.code, {})[fact.field] = _folded(fact.answer.removeprefix("the "))
        by_first_word: dict[str, list[tuple[str, str]]] = {}
        for code in pending:
            for name in map(_folded, names[code]):
                by_first_word.setdefault(_first_word(name), []).append((code, name))
        for text in map(_folded, texts):
            words = set(_WORD.findall(text))
            for word in by_first_word.keys() & words:
                for code, name in by_first_word[word]:
                    answers = {
                        f: answer for f, answer in pending[code].items() if _first_word(answer) in words
                    }
                    for field in _near(text, name, answers):
                        found.add((code, field))
                        del pending[code][field]
    return found


def _near(text: str, name: str, answers: dict[str, str]) -> set[str]:
    """Fields whose answer stands within LEAK_CHARACTERS of `name` in `text`, beside it (not inside it)."""
    near: set[str] = set()
    for start in _words(text, name, 0, len(text)):
        end = start + len(name)
        for field in answers.keys() - near:
            reach = LEAK_CHARACTERS + len(answers[field])
            before = _words(text, answers[field], max(0, start - reach), start)
            after = _words(text, answers[field], end, end + reach)
            if any(True for _ in chain(before, after)):
                near.add(field)
        if len(near) == len(answers):
            break
    return near


@cache
def _first_word(text: str) -> str:
    return str(_WORD.findall(text)[0])


def _words(text: str, words: str, start: int, end: int) -> Iterator[int]:
    """Where `words` stands in text[start:end], not as a part of a longer word."""
    place = text.find(words, start, end)
    while place >= 0:
        before, after = text[place - 1 : place], text[place + len(words) : place + len(words) + 1]
        if not (before.isalnum() and words[0].isalnum()) and not (after.isalnum() and words[-1].isalnum()):
            yield place
        place = text.find(words, place + 1, end)


def _folded(text: str) -> str:
    """Lower case, without accents, with straight apostrophes: people type "bogota" for "Bogotá"."""
    if not text.isascii():
        text = _ACCENT.sub("", unicodedata.normalize("NFKD", text.replace("’", "'")))
    return text.lower()
