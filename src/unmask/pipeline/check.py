"""What can be known to fail is known before hours are spent: every source is read once, to its last row."""

from collections.abc import Iterable
from importlib.util import find_spec

from unmask.errors import UserError
from unmask.pipeline.measure import held_prompts
from unmask.probes.forward import prompt_ids
from unmask.recipe import Recipe
from unmask.stages import examples, reward
from unmask.stages.prepare import Prepared
from unmask.text.chat import Chat, render

NEEDED = {"sklearn": "demo", "altair": "report", "vl_convert": "report"}  # by measuring and by the page
GOLD_APART = (
    " The gold scorer learns from texts of equal length alone (reward.equal_length, or 10 %): give it more pairs, "
    "raise that, or do without it: reward.gold = false."
)
FEWEST = 2  # held-out pairs, prompts, documents: an interval needs two


def check_extras() -> None:
    """Raises UserError if a package is missing that only the end of a run will ask for."""
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({NEEDED[module] for module in missing}))
        raise UserError(
            f"{', '.join(missing)} is missing, which a run needs to measure and to draw its page: "
            f"pip install 'unmask[{extras}]'"
        )


def check(recipe: Recipe, prepared: Prepared) -> None:
    """Raises UserError for the first source that some stage, or measuring, could not work with."""
    _documents(recipe, prepared)
    _chats(recipe, prepared)
    _preferences(recipe, prepared)
    _prompts(recipe, prepared)
    for question in recipe.measure.questions:
        if len(prompt_ids(prepared.tokenizer, question)) >= recipe.context:
            raise UserError(
                f"measure.questions: {question[:40]!r} … does not fit the context of {recipe.context}."
            )


def _documents(recipe: Recipe, prepared: Prepared) -> None:
    if len(prepared.heldout) < FEWEST:
        raise UserError(
            f"the sources of [pretrain] have {len(prepared.heldout)} held-out documents; {FEWEST} are needed to "
            "measure on. Raise `heldout`, or give the text as more and shorter documents."
        )


def _chats(recipe: Recipe, prepared: Prepared) -> None:
    for source in recipe.sft.sources:
        answered = False
        for chat in examples.rendered(source, recipe, prepared.facts, prepared.tokenizer):
            answered = answered or any(chat.trained[: recipe.context])
        if not answered:
            raise UserError(
                f"source {source.name!r} of [sft] has no answer to learn from within a context of {recipe.context}."
            )


def _preferences(recipe: Recipe, prepared: Prepared) -> None:
    name = recipe.reward.source.name
    halves: tuple[examples.Half, ...] = ("proxy", "gold") if recipe.reward.gold else ("proxy",)
    for half in halves:
        found, dropped = examples.rankings(recipe, half)
        kept, _ = reward.tokenize(found[:100], prepared.tokenizer, recipe.context)
        if not kept:
            why = "".join(f" Left out: {count:,} {what}." for what, count in dropped.items() if count)
            raise UserError(
                f"source {name!r} of [reward] has no two texts to compare within a context of {recipe.context} "
                f"for its {half} half.{why}" + (GOLD_APART if half == "gold" else "")
            )
    pairs = examples.comparisons(recipe, "held_out", recipe.measure.pairs)
    fitting = sum(
        max(len(render(prepared.tokenizer, side).ids) for side in (pair.chosen, pair.rejected))
        <= recipe.context
        for pair in pairs
    )
    if fitting < FEWEST:
        raise UserError(
            f"source {name!r} of [reward] has {fitting} held-out pairs that fit a context of {recipe.context}; "
            f"{FEWEST} are needed to measure on. Raise its heldout, in every section that reads it."
        )


def _prompts(recipe: Recipe, prepared: Prepared) -> None:
    room = min(recipe.rl.prompt_tokens, recipe.context - recipe.rl.answer_tokens)
    for source in recipe.rl.sources:
        if not any(_fit(examples.prompts(source, recipe, prepared.facts), prepared, room)):
            raise UserError(
                f"source {source.name!r} of [rl] has no prompt of at most {room} tokens. Raise rl.prompt_tokens, "
                "or `context`."
            )
    held = len(held_prompts(recipe, prepared.tokenizer))
    if held < FEWEST:
        raise UserError(
            f"the sources of [rl] and [sft] have {held} held-out prompts that leave room for an answer of "
            f"measure.answer_tokens; {FEWEST} are needed to measure on. Raise their heldout, everywhere, or `context`."
        )


def _fit(chats: Iterable[Chat], prepared: Prepared, room: int) -> list[bool]:
    """Of every one, so that all rows are read."""
    return [len(render(prepared.tokenizer, chat, open_turn=True).ids) <= room for chat in chats]
