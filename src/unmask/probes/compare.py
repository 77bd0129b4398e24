"""What `unmask diff` measures on any models of one vocabulary, and the text that it measures on."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unmask.errors import UserError
from unmask.files import read_json_lines
from unmask.lineage import Layer
from unmask.probes.compression import compression
from unmask.probes.divergence import divergence
from unmask.probes.forward import prompt_ids
from unmask.probes.probe import Finding
from unmask.probes.weights_change import weights_change
from unmask.text.chat import Message, messages_of
from unmask.text.sources import Document, read_rows, read_texts


class Texts(NamedTuple):
    """Conversations to answer, and held-out documents, of which `limit_bytes` a source are read, drawn by `seed`."""

    prompts: list[list[Message]]
    documents: list[Document]
    limit_bytes: int = 60_000
    seed: int = 0


def texts_beside(models: Sequence[Path], prompts: Path | None, text: Path | None) -> Texts:
    """From the files named, or else from the run that the models lie in (prompts.jsonl and heldout.jsonl, as much of
    it as the run was measured on, so that bits a byte are those of its page)."""
    places = [place for model in models for place in (model, model.resolve().parent)]
    runs = [place for place in places if (place / "heldout.jsonl").is_file()]
    if not runs and (prompts is None or text is None):
        raise UserError(
            f"{models[0]} does not lie in a run, which would have prompts and held-out text beside it: "
            "give both, --prompts FILE (rows with prompt or messages) and --text FILE."
        )
    if prompts is None:
        prompts = runs[0] / "prompts.jsonl"
    conversations = [_prompt(row, where) for where, row in read_rows(str(prompts))]
    if text is None:
        held = runs[0] / "heldout.jsonl"
        documents = [_document(row, f"{held}:{i}") for i, row in enumerate(read_json_lines(held), 1)]
        return Texts(conversations, documents, *_measured(runs[0]))
    return Texts(conversations, [Document(each, text.stem) for each in read_texts(str(text))])


def _measured(run: Path) -> tuple[int, int]:
    """How many bytes of a source the run was measured on, and the seed that drew them; what Texts has where it does not
    say."""
    _, _, limit_bytes, seed = Texts([], [])
    try:
        by = json.loads((run / "summary.json").read_bytes())["measured_by"]
        return int(by["measure"]["heldout_bytes"]), int(by.get("seed", seed))
    except (OSError, ValueError, KeyError, TypeError):  # under way or damaged
        return limit_bytes, seed


def compare(
    layers: Sequence[Layer],
    texts: Texts,
    *,
    limit: int = 64,
    template: bool = True,
    say: Callable[[str], None] = print,
) -> list[Finding]:
    """Weights, divergence on answers and on held-out text, and bits per byte, for each layer beside the
    one below it, and the last beside the first.

    `limit` prompts are answered, in the chat template or (not `template`) as plain text; those that leave no room for
    an answer in the context are left out, and how many these are is said.
    """
    if len(layers) < 2:
        raise UserError("there is one model here, and a difference needs two: name another one.")
    context = min(layer.model.config.max_position_embeddings for layer in layers)
    ids = [prompt_ids(layers[-1].tokenizer, prompt, template) for prompt in texts.prompts]
    new_tokens = min(48, context // 2)
    fitting = [prompt for prompt in ids if len(prompt) + new_tokens <= context]
    if len(fitting) < len(ids):
        say(
            f"left out: {len(ids) - len(fitting):,} of {len(ids):,} prompts, which leave no room for an answer of "
            f"{new_tokens} tokens in a context of {context}"
        )
    return [
        *divergence(
            layers,
            fitting,
            texts.documents,
            max_new_tokens=new_tokens,
            limit=limit,
            template="chat" if template else "plain",
            seed=texts.seed,
        ),
        *compression(layers, texts.documents, limit_bytes=texts.limit_bytes, seed=texts.seed),
        *weights_change(layers),
    ]


def _document(row: Mapping[str, object], where: str) -> Document:
    text, source = row.get("text"), row.get("source")
    if not isinstance(text, str) or not isinstance(source, str):
        raise UserError(
            f"{where}: held-out text needs source and text, both as text; this row has {sorted(row)}. Delete the file: "
            "`unmask run` writes it again."
        )
    return Document(text, source)


def _prompt(row: dict[str, object], where: str) -> list[Message]:
    key = "prompt" if "prompt" in row else "messages"
    if key not in row:
        raise UserError(f"{where}: a row of prompts needs prompt or messages; this one has {sorted(row)}.")
    messages = messages_of(row[key], where, key, "user")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where}: there is nobody to answer: every turn is the assistant's.")
    return messages
