"""What a finished run left for its page: summary, findings, blames and metrics, read and checked, nothing computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from unmask.errors import UserError
from unmask.files import read_json_lines
from unmask.probes.probe import Finding


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Stage(_Read):
    name: str
    kind: str
    path: str
    hash: str
    parent_hash: str | None
    tokens: int
    seconds: float
    peak_bytes: int
    flops: float
    metrics: dict[str, JsonValue] = {}
    inputs: dict[str, str] = {}  # role → hash of a further checkpoint that took part

    @property
    def ranks(self) -> int:
        """Processes that trained it."""
        return int(str(self.metrics.get("ranks", 1)))

    @property
    def writes(self) -> bool:
        """A reward model scores and writes nothing: it is no layer of language."""
        return self.kind != "reward"


class Summary(_Read):
    name: str = ""
    total_seconds: float
    prepare_seconds: float
    measure_seconds: float
    measure_peak_bytes: int
    parameters: int
    machine: str  # in words, with its rate of matrix products
    matmul_flops_per_second: float
    stages: list[Stage]
    gold: Stage | None = None  # the second scorer, which no layer is trained on
    claims: list[Finding]


class Token(_Read):
    """`parts` sum to `logprob`; `credits` are the parts with the base counted from chance; all in nats."""

    id: int
    text: str
    logprob: float
    parts: list[float]
    credits: list[float]
    layer: str | None  # with the largest credit; None below the noise floor


class Blame(_Read):
    prompt: str
    layers: list[str]
    answer: str
    tokens: list[Token]
    floor: float | None = None
    alone: dict[str, str] = {}  # layer → what it says in the same chat context
    plain: str | None = None  # what the base says to the prompt as plain text


@dataclass(frozen=True)
class Run:
    directory: Path
    summary: Summary
    findings: Sequence[Finding]
    blames: Sequence[Blame]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]  # stage → lines of its metrics.jsonl
    leaked: tuple[int, int] | None  # planted facts that raw text names by itself, of how many

    @property
    def name(self) -> str:
        return self.summary.name or self.directory.resolve().name

    @property
    def stages(self) -> list[Stage]:
        """All that was trained, the gold scorer after the stages of the lineage."""
        return [*self.summary.stages, *([self.summary.gold] if self.summary.gold else [])]

    @property
    def layers(self) -> list[str]:
        """Names of the layers of language, oldest first."""
        return [stage.name for stage in self.summary.stages if stage.writes]

    @property
    def tip(self) -> Stage:
        """The last layer of language: whose words these are."""
        return [stage for stage in self.summary.stages if stage.writes][-1]

    def place(self, layer: str | None) -> int:
        """Where a layer stands, as the table of colours counts: -1 if it is none."""
        return self.layers.index(layer) if layer in self.layers else -1

    def all(self, metric: str, child: str | None = None) -> list[Finding]:
        """Claims of this metric, or else findings: what the run stands by comes first."""
        for source in (self.summary.claims, self.findings):
            found = [f for f in source if f.metric == metric and child in (None, f.child)]
            if found:
                return found
        return []

    def get(self, metric: str, group: str | None = None, child: str | None = None) -> Finding | None:
        return next((f for f in self.all(metric, child) if f.group == group), None)


def read(directory: Path) -> Run:
    """Raises UserError if the run has no summary, or a file of it does not have its form."""
    if not (directory / "summary.json").is_file():
        raise UserError(
            f"{directory} has no summary.json: it is not a finished run. Finish it with `unmask run`, or name "
            "the directory of another, as runs/tiny."
        )
    return Run(
        directory,
        *measured(directory),
        {
            path.parent.name: [row for row in read_json_lines(path) if not row.get("skipped")]
            for path in sorted(directory.glob("work/*/metrics.jsonl"))
        },
        _leaked(directory / "facts.jsonl"),
    )


def measured(directory: Path) -> tuple[Summary, list[Finding], list[Blame]]:
    """What was measured of a run. Raises UserError if a file of it does not have its form."""
    blames, rows = directory / "blame.json", directory / "findings.jsonl"
    numbered = enumerate(read_json_lines(rows), 1) if rows.is_file() else ()
    return (
        _parse(Summary, directory / "summary.json"),
        [_validate(Finding, row, f"{rows}:{i}") for i, row in numbered],
        _parse(list[Blame], blames) if blames.is_file() else [],
    )


def _leaked(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    rows = read_json_lines(path)
    return sum(bool(row.get("leaked")) for row in rows), len(rows)


def _parse(kind: Any, path: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        raise _explained(error, str(path)) from error


def _validate(kind: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return UserError(
        f"{where}: {place or 'the file'}: {first['msg']}. Measure the run again with `unmask run`."
    )
