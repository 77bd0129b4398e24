"""What a finding is, how its interval comes about, and which word it may carry.

Intervals are percentile bootstraps over what was drawn independently (prompts, documents, countries,
conversations), never over tokens. A statistic takes weights instead of resampled rows: one resample is
how often each unit was drawn, so 2,000 resamples are one matrix product.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from unmask.lineage import Layer

VERSION = "1"  # of the definitions: raised when a number of the same name would come out differently
RESAMPLES = 2000
BLOCK = 2**23  # weights held at once: 64 MB

Floats: TypeAlias = npt.NDArray[np.float64]
Statistic: TypeAlias = Callable[[Floats, Floats], Floats]  # (values (N, …), weights (R, N)) -> (R,)


class Cost(BaseModel):
    """What the call that gave this finding spent; findings of one call share it, so it does not add up
    over them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fp_tokens: int = Field(ge=0)  # tokens of text × models that read them, generation included
    seconds: FiniteFloat = Field(ge=0)


class Literature(BaseModel):
    """What others found for this number: its sign, its size in words, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sign: str
    value: str
    source: str


class Finding(BaseModel):
    """One number with everything that is needed to believe it. All keys are always in the JSON; absent
    is null.

    `value` is null only where there was nothing to measure (verdict `abstain`). `n` counts what the
    interval resamples and `n_unit` names it. An exact number (a size, a norm of given weights) has
    neither. `floor_numeric` (N1) is what the same weights in bfloat16 give for a difference, and by how
    much they move a level.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: str = Field(min_length=1)
    metric: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    group: str | None = None
    version: str = VERSION
    child: str
    parent: str | None = None
    child_hash: str | None = None
    parent_hash: str | None = None
    text_source: str | None = None
    n: int | None = Field(default=None, ge=0)
    n_unit: str | None = None
    dtype: str | None = None
    template: str | None = None
    value: FiniteFloat | None
    unit: str = Field(min_length=1)
    exact: bool = False
    ci95: tuple[FiniteFloat, FiniteFloat] | None = None
    floor_numeric: FiniteFloat | None = None
    floor_seed: FiniteFloat | None = None
    floor_training: FiniteFloat | None = None
    split_half: FiniteFloat | None = None
    null_specific: FiniteFloat | None = None
    verdict: str | None = None
    cost: Cost | None = None
    literature: Literature | None = None

    @field_validator("floor_numeric", "null_specific", mode="before")
    @classmethod
    def _nothing_to_measure_it_on(cls, value: Any) -> Any:
        """A mean over no text, or over texts that are all alike, is NaN."""
        return None if isinstance(value, float) and np.isnan(value) else value

    @model_validator(mode="after")
    def _complete(self) -> "Finding":
        if self.value is None or (self.ci95 is None and not self.exact):
            if not (self.verdict or "").startswith("abstain"):
                raise ValueError(f"{self.metric}: a value needs an interval, or the verdict abstains")
        elif not self.exact and (not self.n or not self.n_unit):
            raise ValueError(f"{self.metric}: an interval needs n and what n counts")
        if self.ci95 is not None and self.ci95[0] > self.ci95[1]:
            raise ValueError(f"{self.metric}: the interval {self.ci95} is upside down")
        if self.ci95 is not None and self.value is not None:
            rounding = 1e-9 * max(1.0, abs(self.value))  # resampled means of equal values differ by as little
            if not self.ci95[0] - rounding <= self.value <= self.ci95[1] + rounding:
                raise ValueError(f"{self.metric}: {self.value} lies outside its interval {self.ci95}")
        return self

    def to_json(self) -> dict[str, Any]:
        """The record of PROBES.md: every key, in one order."""
        return self.model_dump(mode="json")


def of(child: Layer, parent: Layer | None = None) -> dict[str, Any]:
    """The keys of a Finding that say which layers it is about."""
    return {
        "child": child.name,
        "child_hash": child.hash or None,
        "parent": parent.name if parent else None,
        "parent_hash": (parent.hash or None) if parent else None,
    }


def pairs(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Places (parent, child) that are compared: each layer with the one below it, and the last with the
    first."""
    n = len(layers)
    return [*pairwise(range(n)), *([(0, n - 1)] if n > 2 else [])]


class Estimate(NamedTuple):
    """A statistic, its 95 % interval, and how many independent units it rests on. Nothing measured:
    (None, None, n)."""

    value: float | None
    ci95: tuple[float, float] | None
    n: int

    def fields(self, n_unit: str) -> dict[str, Any]:
        """As keys of a Finding. Fewer than two units have no interval: such a finding abstains."""
        abstains = {"verdict": f"abstain: n = {self.n}"} if self.ci95 is None else {}
        return {"value": self.value, "ci95": self.ci95, "n": self.n, "n_unit": n_unit, **abstains}


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Σ w·v / Σ w for each row of weights; NaN where a resample drew nothing. values (N,), weights (R, N)."""
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = (weights @ values) / total
    return mean


def weighted_ratio(values: Floats, weights: Floats) -> Floats:
    """Σ w·a / Σ w·b of the two columns of values (N, 2): a ratio of sums, as bits per byte."""
    sums = weights @ values
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = sums[:, 0] / sums[:, 1]
    return ratio


def draws(units: int, resamples: int, seed: int) -> Floats:
    """How often each of `units` was drawn in each of `resamples` draws of `units` with replacement: (R,
    U)."""
    picked = np.random.default_rng(seed).integers(0, units, (resamples, units))
    picked += np.arange(resamples)[:, None] * units
    return (
        np.bincount(picked.ravel(), minlength=resamples * units).reshape(resamples, units).astype(np.float64)
    )


def codes(clusters: Sequence[Any] | None, n: int) -> tuple[npt.NDArray[np.int64], int]:
    """Number of each value's cluster, and how many there are; without clusters every value is its own."""
    if clusters is None:
        return np.arange(n), n
    assert len(clusters) == n, f"{len(clusters)} clusters for {n} values"
    number: dict[Any, int] = {}
    return np.array([number.setdefault(c, len(number)) for c in clusters], dtype=np.int64), len(number)


def resampled(
    statistic: Callable[[Floats], Floats], units: int, width: int, *, n: int = RESAMPLES, seed: int = 0
) -> Floats:
    """The statistic of each resample (R,), from `statistic(draws (r, units))`, in blocks that fit memory.

    `width` is how many weights the statistic makes of one draw (its number of values).
    """
    drawn = draws(units, n, seed)
    step = max(1, BLOCK // max(1, width))
    return np.concatenate([statistic(drawn[i : i + step]) for i in range(0, n, step)])


def percentiles(samples: Floats) -> tuple[float, float] | None:
    """The middle 95 % of what could be computed; None if nothing could."""
    good = samples[np.isfinite(samples)]
    if not len(good):
        return None
    low, high = np.percentile(good, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(
    values: npt.ArrayLike,
    clusters: Sequence[Any] | None = None,
    statistic: Statistic = weighted_mean,
    *,
    n: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of statistic(values, weights) when clusters (default: single values) are
    redrawn.

    None with fewer than two clusters: there is nothing to resample.
    """
    array = np.asarray(values, dtype=np.float64)
    code, units = codes(clusters, len(array))
    if units < 2:
        return None
    return percentiles(
        resampled(lambda drawn: statistic(array, drawn[:, code]), units, len(array), n=n, seed=seed)
    )


def estimate(
    values: npt.ArrayLike,
    clusters: Sequence[Any] | None = None,
    statistic: Statistic = weighted_mean,
    *,
    share: bool = False,
    seed: int = 0,
) -> Estimate:
    """The statistic of all values with its interval.

    `share=True` says that values are 0 or 1. Where all are the same, resampling sees no spread, yet 0
    of 100 still allows 3 %: the interval is then the exact binomial bound (Clopper–Pearson) with the
    clusters as trials.
    """
    array = np.asarray(values, dtype=np.float64)
    _, units = codes(clusters, len(array))
    if not len(array):
        return Estimate(None, None, 0)
    value = float(statistic(array, np.ones((1, len(array))))[0])
    if not np.isfinite(value):
        return Estimate(None, None, units)
    interval = bootstrap(array, clusters, statistic, seed=seed)
    if share and interval is not None:
        interval = bounded(value, interval, units)
    return Estimate(value, interval, units)


def change_bounded(interval: tuple[float, float] | None, units: int) -> tuple[float, float] | None:
    """The interval of a change of a share. Where every unit changed alike, resampling sees no spread: then it reaches
    as far as that of a share of 0 does for so many trials, and no change is larger than 1."""
    if interval is None or interval[1] - interval[0] > 1e-9:  # a statistic of equal values is rounded
        return interval
    reach = 1 - 0.025 ** (1 / units)
    return max(-1.0, interval[0] - reach), min(1.0, interval[1] + reach)


def bounded(share: float, interval: tuple[float, float], units: int) -> tuple[float, float]:
    """The interval of a share; of 0 or 1 the exact binomial bound (Clopper–Pearson) for so many trials."""
    reach = 1 - 0.025 ** (1 / units)
    return {0.0: (0.0, reach), 1.0: (1 - reach, 1.0)}.get(share, interval)


def share_estimate(right: npt.ArrayLike, clusters: Sequence[Any] | None = None, *, seed: int = 0) -> Estimate:
    """A share of things that are right (0 or 1 each); see `estimate`."""
    return estimate(right, clusters, share=True, seed=seed)


def verdict(
    ci95: tuple[float, float] | None,
    *,
    zero: float = 0.0,
    numeric: float | None,
    seed: float | None = None,
    training: float | None = None,
) -> str:
    """The word for an effect that would be `zero` if nothing had changed, and the floors that are missing.

    The effect's distance from zero, at the near end of its interval, is compared with f = max(numeric, seed).
    With a seed floor: `detected`, or `specific` if it also exceeds the training floor (N3); without one only
    `above the numeric floor` can be said. Otherwise `not distinguishable`.
    """
    if ci95 is None or numeric is None or np.isnan(numeric):
        return "abstain: no interval" if ci95 is None else "abstain: no numeric floor"
    low, high = ci95[0] - zero, ci95[1] - zero
    near = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    floors = {"seed": seed, "training": training}
    missing = [name for name, floor in floors.items() if floor is None]
    if near <= max(numeric, seed or 0.0):
        word = "not distinguishable"
    elif seed is None:
        word = "above the numeric floor"
    else:
        word = "specific" if training is not None and near > training else "detected"
    return f"{word} (no {' or '.join(missing)} floor)" if missing else word


@dataclass
class Meter:
    """Counts tokens that models read, and the time since it was made."""

    fp_tokens: int = 0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def cost(self) -> Cost:
        return Cost(fp_tokens=self.fp_tokens, seconds=round(time.perf_counter() - self.started, 3))
