"""Conversations to token ids, by the model's own chat template: one function for training, evaluation and
serving.

The template never sees what was said. It renders placeholders; its own text alone is searched for control
tokens; what was said is encoded as ordinary text and put in their place. So nobody can say a control token,
and the template decides everything else, exactly as in `transformers.apply_chat_template`, whose ids these
are. They differ from them in these cases only:

- what was said holds a control token's name (ours stays text);
- an assistant's turn begins with a line break that would have become one token with the header's: the
  header is encoded by itself, so that an open turn is always a prefix of the finished one;
- the template looks into what was said, other than at the white space around it (Qwen3 cuts thinking out of
  earlier turns): here nothing is cut;
- the tokenizer puts a BOS before every text and the template writes none: it is added here, once.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from unmask.errors import UserError, nearest
from unmask.text.template import CHATML, render_text
from unmask.text.tokenizer import Tokenizer

__all__ = ["CHATML", "Chat", "Message", "Rendered", "render", "to_messages"]

Message = dict[str, str]  # role, content
Chat: TypeAlias = list[Message]
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = ("system", "user", "assistant", "tool", "developer")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_FORMATS = "messages, conversations (ShareGPT), prompt and completion, or instruction and output (Alpaca)"
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"  # private characters around the number of a placeholder
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class Rendered(NamedTuple):
    """`trained[i]`: whether ids[i] is what an assistant said, or the stop token after it."""

    ids: list[int]
    trained: list[bool]

    def last_answer(self) -> "Rendered":
        """The same ids, of which only the last of the assistant's turns is trained on."""
        end = max((place for place, each in enumerate(self.trained, 1) if each), default=0)
        start = end
        while start and self.trained[start - 1]:
            start -= 1
        return Rendered(self.ids, [start <= place < end for place in range(len(self.ids))])


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, open_turn: bool = False) -> Rendered:
    """The ids of a conversation; with `open_turn`, up to where the assistant is about to speak.

    Raises UserError for no messages, an unknown role, content that is no text, and what the template refuses.
    """
    if not messages:
        raise UserError("a conversation needs at least one message.")
    shape, said = [], []
    for number, message in enumerate(messages):
        role, content = message.get("role", ""), message.get("content")
        if role not in ROLES:  # it becomes part of the template's text, where control tokens are looked for
            raise UserError(f"message {number} has the role {role!r}; roles are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise UserError(f"message {number} ({role}) has no text as its content.")
        core = content.strip()
        before, _, after = content.partition(core) if core else (content, "", "")
        shape.append(_Shape(role, before, bool(core), after))
        said.append(core)
    ids: list[int] = []
    trained: list[bool] = []
    for part in _layout(tokenizer, tuple(shape), open_turn):
        text = "".join(said[piece] if isinstance(piece, int) else piece for piece in part.pieces)
        more = list(part.ids) if part.ids else tokenizer.encode(text)
        ids += more
        trained += [part.trained] * len(more)
    return Rendered(ids, trained)


class _Shape(NamedTuple):
    """All of a message that the template sees: its role, and the white space around what was said."""

    role: str
    before: str
    spoken: bool
    after: str


class _Part(NamedTuple):
    """A stretch that is encoded as a whole: fixed `ids`, or template text and numbers of messages."""

    ids: tuple[int, ...]
    pieces: tuple[str | int, ...]
    trained: bool


@lru_cache(maxsize=4096)
def _layout(tokenizer: Tokenizer, shape: tuple[_Shape, ...], open_turn: bool) -> tuple[_Part, ...]:
    """What the template makes of messages of this shape, cut where encoding must not join.

    Cuts are the control tokens, and the two ends of what the assistant said.
    """
    text = _fill(tokenizer, shape, open_turn)
    places = {int(match[1]): match.span() for match in _PLACEHOLDER.finditer(text)}
    for number, each in enumerate(shape):
        if each.spoken and number not in places:
            raise UserError(f"the chat template leaves out message {number} ({each.role}).")
    spans = [
        _assistant_span(tokenizer, shape, number, text, places.get(number))
        for number, each in enumerate(shape)
        if each.role == "assistant"
    ]
    cuts = sorted({0, len(text), *(place for span in spans for place in span)})
    parts: list[_Part] = []
    if tokenizer.bos is not None and not text.startswith(tokenizer.names[tokenizer.bos]):
        parts.append(_Part((tokenizer.bos,), (), False))
    for start, end in pairwise(cuts):
        trained = any(first <= start and end <= last for first, last in spans)
        done = start
        for match in tokenizer.control_pattern.finditer(text, start, end):
            parts += _text_part(tokenizer, text[done : match.start()], trained)
            parts.append(_Part((tokenizer.control[match[0]],), (), trained))
            done = match.end()
        parts += _text_part(tokenizer, text[done:end], trained)
    return tuple(parts)


def _fill(tokenizer: Tokenizer, shape: Sequence[_Shape], open_turn: bool) -> str:
    """The template's text for messages of this shape, with placeholders for what was said."""
    messages = [
        {
            "role": each.role,
            "content": each.before + (f"{_OPEN}{number}{_CLOSE}" if each.spoken else "") + each.after,
        }
        for number, each in enumerate(shape)
    ]
    return render_text(tokenizer.chat_template, messages, tokenizer.special_names, open_turn=open_turn)


def _assistant_span(
    tokenizer: Tokenizer, shape: tuple[_Shape, ...], number: int, text: str, place: tuple[int, int] | None
) -> tuple[int, int]:
    """Where in `text` an assistant's turn is trained: from where it was opened to the end of its stop token.

    It is opened where the template ends for the conversation before it with an open turn, if at most white space
    stands between there and what was said: that is for the model to say (Llama 2's space). Where the template
    opens a turn otherwise than it writes one, it is opened by what was said. The stop is the control token
    after that; a template that writes none gets no stop.
    """
    start, spoken_to = place or (len(text), len(text))
    try:
        opening = _fill(tokenizer, shape[:number], open_turn=True)
    except UserError:  # no template has to accept a conversation that is cut here
        opening = _OPEN
    if text.startswith(opening) and (place is None or not text[len(opening) : start].strip()):
        start = len(opening)
        spoken_to = spoken_to if place else start
    stop = tokenizer.control_pattern.search(text, spoken_to)
    if stop and not text[spoken_to : stop.start()].strip():
        return start, stop.end()
    return start, spoken_to


def _text_part(tokenizer: Tokenizer, text: str, trained: bool) -> list[_Part]:
    """The template's text without control tokens as a part; none for no text."""
    split = _PLACEHOLDER.split(text)  # text, number, text, number, …, text
    pieces = tuple(int(piece) if i % 2 else piece for i, piece in enumerate(split) if piece)
    if not pieces:
        return []
    if len(split) > 1:
        return [_Part((), pieces, trained)]
    return [_Part(tuple(tokenizer.encode(text)), (), trained)]


def to_messages(row: Mapping[str, Any], where: str) -> list[Message]:
    """The conversation that a row of a data set holds, in a format of `conversation_of`. Raises UserError beginning
    with `where` if it is none of them, if content is missing or no text, a role unknown, or if no assistant says
    anything."""
    if (messages := conversation_of(row, where)) is None:
        raise UserError(f"{where}: no conversation among {sorted(row)}. Known formats: {_FORMATS}.")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UserError(f"{where}: no assistant says anything, so there is nothing to learn. Remove the row.")
    return messages


def conversation_of(row: Mapping[str, Any], where: str) -> list[Message] | None:
    """`messages`; ShareGPT's `conversations`; `prompt` and `completion` (texts or messages); Alpaca's `instruction`,
    `input` and `output`; each after what a column `system` says. None for a row that has none of these. UserError for
    content that is missing or no text."""
    if "messages" in row:
        messages = messages_of(row["messages"], where, "messages")
    elif "conversations" in row:
        messages = messages_of(row["conversations"], where, "conversations")
    elif "prompt" in row and "completion" in row:
        messages = answered(messages_of(row["prompt"], where, "prompt", "user"), row, "completion", where)
    elif "instruction" in row and "output" in row:
        messages = [*instruction_of(row, where), _message("assistant", row["output"], f"{where}: output")]
    else:
        return None
    return under_system(messages, row, where)


def instruction_of(row: Mapping[str, Any], where: str) -> list[Message]:
    """What is asked in Alpaca's `instruction` (Orca's `question`) and `input`, of which one may be missing."""
    first = "question" if row.get("question") and not row.get("instruction") else "instruction"
    keys = [key for key in (first, "input") if row.get(key)] or [first]
    asked = [_message("user", row[key], f"{where}: {key}")["content"] for key in keys]
    return [{"role": "user", "content": "\n\n".join(asked)}]


def under_system(messages: list[Message], row: Mapping[str, Any], where: str) -> list[Message]:
    """The messages after what the row's column `system` says, unless they begin with a system message."""
    if not row.get("system") or (messages and messages[0]["role"] == "system"):
        return messages
    system = _message("system", row["system"], f"{where}: system")
    return [system, *messages] if system["content"].strip() else messages


def messages_of(value: Any, where: str, key: str, role: str | None = None) -> list[Message]:
    """Messages from a list of them (OpenAI's role/content or ShareGPT's from/value), from a single one, or,
    where a `role` is given, from a text that is said in it, or whose turns are marked as in Anthropic's HH
    ("\\n\\nHuman: …\\n\\nAssistant: …", where the turn that a user's text only opens is none). UserError names `where`,
    `key` and what is wrong."""
    if isinstance(value, str) and role:
        if not _in_hh_turns(value):
            return [_message(role, value, f"{where}: {key}")]
        turns = _hh_turns(value)
        return turns[:-1] if role == "user" and turns[-1] == {"role": "assistant", "content": ""} else turns
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        wanted = "a text or a list of messages" if role else "a list of messages"
        raise UserError(f"{where}: {key} is {_kind(value)}; it must be {wanted}.")
    found = []
    for number, each in enumerate(values):
        place = f"{where}: {key}[{number}]"
        if not isinstance(each, dict):
            raise UserError(f"{place} is {_kind(each)}; a message is an object with role and content.")
        said_by = each.get("role", each.get("from"))
        known = _SHAREGPT if "role" not in each else {role: role for role in ROLES}
        if not isinstance(said_by, str) or said_by not in known:
            hint = nearest(str(said_by), known)
            raise UserError(f"{place} has the role {said_by!r}; roles are {', '.join(known)}.{hint}")
        found.append(_message(known[said_by], each.get("content", each.get("value")), place))
    return found


def _in_hh_turns(value: Any) -> bool:
    """Whether it is a text of Anthropic's HH, whose turns are marked."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _hh_turns(text: str) -> list[Message]:
    _, *turns = _HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": words.strip()}
        for name, words in zip(turns[::2], turns[1::2], strict=True)
    ]


def answered(prompt: list[Message], row: Mapping[str, Any], key: str, where: str) -> list[Message]:
    """The prompt and what is said after it in `key`, as text or messages. If the prompt is said again there, first or
    (in a whole chat) as the last that is asked, with or without its system message, it stands once."""
    value = row[key]
    said = messages_of(value, where, key, "assistant")
    systems, asked = _system_apart(prompt)
    own_systems, rest = _system_apart(said)
    wanted, told = _stripped(asked), _stripped(rest)
    last = 1 + max((i for i, (role, _) in enumerate(told) if role == "user"), default=-1)
    empty = last > 0 and wanted == [("user", "")]
    whole = begins_with_user(said) and told[max(0, last - len(asked)) : last] == wanted
    again = empty or whole or told[: len(asked)] == wanted
    if again and (not systems or not own_systems or _stripped(systems) == _stripped(own_systems)):
        return (own_systems or systems) + rest
    if _in_hh_turns(value):  # an answer that goes on with turns of its own
        return [*prompt, _message("assistant", value, f"{where}: {key}")]
    if isinstance(value, str) and _in_hh_turns(row.get("prompt")):
        return [*prompt, {"role": "assistant", "content": value.strip()}]
    return prompt + said


def begins_with_user(messages: Sequence[Message]) -> bool:
    """Whether it is a chat from its beginning, perhaps after a system message."""
    return next((message["role"] for message in messages if message["role"] != "system"), "") == "user"


def _system_apart(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    n = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:n], messages[n:]


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _message(role: str, content: Any, place: str) -> Message:
    if not isinstance(content, str):
        raise UserError(f"{place}: the content is {_kind(content)}; it must be text.")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "missing or null" if value is None else "empty" if value == [] else f"a {type(value).__name__}"
