"""How well a reward model agrees with held-out people (M-1), beside what length alone and words alone
would say.

M-1 has no number in the list of probes; calibration is T1-7 carried over to pairs. A reward model is
judged by pairs of conversations of which people rated one higher. Intervals redraw conversations, not
pairs: a pair counts as often as its two conversations were drawn, multiplied.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unmask.errors import UserError
from unmask.probes.forward import Judge, dtype_of, judged
from unmask.probes.probe import (
    Estimate,
    Finding,
    Floats,
    Meter,
    Statistic,
    bounded,
    change_bounded,
    codes,
    estimate,
    percentiles,
    resampled,
    verdict,
    weighted_mean,
)
from unmask.stages.reward import through_stop
from unmask.text.chat import Message, render

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
BINS = 10
SIMULATIONS = 1000


class Compared(NamedTuple):
    """People preferred `chosen`. `chosen_from` and `rejected_from` name the conversations, equal if it
    is one."""

    chosen: Sequence[Message]
    rejected: Sequence[Message]
    chosen_from: Hashable
    rejected_from: Hashable


class Opinion(NamedTuple):
    """What people thought of a text, and the conversation or pair that it comes from."""

    text: str
    value: float
    owner: Hashable


class Scores:
    """A judge's scores. It reads each text once, however many pairs and groups the text stands in."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._known: dict[bool, dict[tuple[int, ...], float]] = {False: {}, True: {}}

    def of(self, texts: Sequence[Sequence[int]], meter: Meter, *, bf16: bool = False) -> Floats:
        known, keys = self._known[bf16], [tuple(text) for text in texts]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if new:
            found = judged(self.judge, new, meter=meter, bf16=bf16).tolist()
            known.update(zip(new, found, strict=True))
        return np.array([known[key] for key in keys])


class Redraw:
    """Pairs whose conversations are redrawn: the weight of a pair in a resample is the product of its
    conversations' counts."""

    def __init__(self, pairs: Sequence[Compared], seed: int) -> None:
        ends = [*(pair.chosen_from for pair in pairs), *(pair.rejected_from for pair in pairs)]
        code, self.units = codes(ends, len(ends))
        self.a, self.b = np.split(code, 2)
        self.pairs, self.seed = len(pairs), seed

    def weights(self, drawn: Floats) -> Floats:
        """(R, pairs) from how often each conversation was drawn (R, units)."""
        return np.where(self.a == self.b, drawn[:, self.a], drawn[:, self.a] * drawn[:, self.b])

    def samples(self, values: Floats, statistic: Statistic = weighted_mean) -> Floats:
        return resampled(
            lambda drawn: statistic(values, self.weights(drawn)), self.units, self.pairs, seed=self.seed
        )

    def estimate(
        self, values: Floats, statistic: Statistic = weighted_mean, *, share: bool = False
    ) -> Estimate:
        value = float(statistic(values, np.ones((1, self.pairs)))[0])
        interval = percentiles(self.samples(values, statistic)) if self.units > 1 else None
        if share and interval is not None:
            interval = bounded(value, interval, min(self.units, self.pairs))
        return Estimate(value, interval, self.units)


def wins(chosen: Floats, rejected: Floats) -> Floats:
    """1 where the chosen one scores higher, ½ where they tie, else 0."""
    return np.asarray((chosen > rejected) + 0.5 * (chosen == rejected))


def calibration_error(margins: Floats, weights: Floats) -> Floats:
    """ECE of σ(margin) as the probability that people prefer the higher scored one: (R,).

    Confidence σ(|margin|) against whether the chosen one scored higher, in BINS bins of equal mass;
    weighted mean over bins of |share right − mean confidence|.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = wins(margins, np.zeros_like(margins))
    order = np.argsort(confidence, kind="stable")
    total = np.zeros(len(weights))
    for part in np.array_split(order, BINS):
        total += np.abs(weights[:, part] @ (right - confidence)[part])
    with np.errstate(invalid="ignore"):  # a resample that drew no pair has no error: NaN
        return np.asarray(total / weights.sum(1))


def calibration_floor(margins: Floats, seed: int = 0) -> float:
    """95th percentile of the error that a perfectly calibrated judge with these very confidences would
    show."""
    rng = np.random.default_rng(seed)
    right = rng.random((SIMULATIONS, len(margins))) < 1 / (1 + np.exp(-np.abs(margins)))
    errors = [_error(np.where(each, np.abs(margins), -np.abs(margins))) for each in right]
    return float(np.percentile(errors, 95))


def correlation(values: Floats, weights: Floats) -> Floats:
    """Pearson's r of the two columns of values (N, 2), for each row of weights: (R,). NaN where one
    does not vary, but for rounding."""
    share = weights / weights.sum(1, keepdims=True)
    x, y = values.T
    centred = [x - (share @ x)[:, None], y - (share @ y)[:, None]]
    (xx, xy), (_, yy) = [[(share * a * b).sum(1) for b in centred] for a in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        r: Floats = xy / np.sqrt(xx * yy)
    alike = (xx <= 1e-20 * np.square(x).max()) | (yy <= 1e-20 * np.square(y).max())
    return np.where(alike, np.nan, r)


def _error(margins: Floats) -> float:
    return float(calibration_error(margins, np.ones((1, len(margins))))[0])


def text_of(messages: Sequence[Message]) -> str:
    """The words of a conversation, a line a turn: what the baselines read."""
    return "\n".join(message["content"] for message in messages)


def words_baseline(train: Sequence[Opinion], seed: int = 0) -> Callable[[Sequence[str]], Floats] | None:
    """A ridge regression from TF-IDF of words and word pairs to people's opinion: fitted on `train`, scores texts.

    Its penalty is the best of ALPHAS where whole owners are set aside, a fifth of them at a time: texts of one owner
    share an opinion, and with the neighbours of what is set aside the regression would know it by heart. None where
    that leaves nothing to learn from: one owner, or no word that stands in two texts. Needs scikit-learn (extra
    `demo`): UserError without it.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
    except ImportError as error:
        raise UserError("the baseline on words needs scikit-learn: pip install 'unmask[demo]'") from error
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"
    )
    texts, values = [each.text for each in train], np.array([each.value for each in train])
    owner, owners = codes([each.owner for each in train], len(train))
    counts = Counter(word for text in texts for word in set(vectorizer.build_analyzer()(text)))
    if owners < 2 or not any(count >= vectorizer.min_df for count in counts.values()):
        return None
    features = vectorizer.fit_transform(texts)
    fold = (np.random.default_rng(seed).permutation(owners) % FOLDS)[owner]

    def error_of(alpha: float) -> float:
        def missed(aside: Any) -> Any:
            fitted = Ridge(alpha=alpha).fit(features[~aside], values[~aside])
            return np.square(fitted.predict(features[aside]) - values[aside])

        return float(np.concatenate([missed(fold == k) for k in np.unique(fold)]).mean())

    best = Ridge(alpha=min(ALPHAS, key=error_of)).fit(features, values)
    return lambda texts: np.asarray(best.predict(vectorizer.transform(texts)), dtype=np.float64)


def reward_quality(
    judge: Judge,
    pairs: Mapping[str, Sequence[Compared]],
    train: Sequence[Opinion] | None,
    *,
    floor_limit: int = 60,
    seed: int = 0,
) -> list[Finding]:
    """For each group of held-out pairs (`all`, `equal_length`, …): `reward_accuracy`, beside
    `reward_accuracy_length` (the one with more characters wins; ties count half) and
    `reward_accuracy_words` (ridge on words and word pairs, fitted on `train`); how far the judge is ahead of each;
    margin, calibration error of σ(margin), and how much of the score is length. Without `train` there is no baseline
    on words. A group of fewer than two pairs abstains.

    The numeric floor is how far bfloat16 moves the same figure on the first `floor_limit` pairs;
    `null_specific` of the calibration error is the 95th percentile of what a perfectly calibrated judge
    would show with as many pairs.
    """
    baseline = words_baseline(train, seed) if train is not None else None
    scores = Scores(judge)
    return [
        finding
        for group, compared in pairs.items()
        for finding in _of_group(scores, group, compared, baseline, len(train or ()), floor_limit, seed)
    ]


def _of_group(
    scores: Scores,
    group: str,
    compared: Sequence[Compared],
    baseline: Callable[[Sequence[str]], Floats] | None,
    fitted_on: int,
    floor_limit: int,
    seed: int,
) -> Iterator[Finding]:
    judge = scores.judge
    context = judge.model.config.max_position_embeddings
    ids = [
        [through_stop(render(judge.tokenizer, side)) for side in (pair.chosen, pair.rejected)]
        for pair in compared
    ]
    fits = [max(map(len, both)) <= context for both in ids]
    kept = [pair for pair, good in zip(compared, fits, strict=True) if good]
    dropped = len(compared) - len(kept)
    source = f"{len(kept)} held-out pairs" + (
        f" ({dropped} beyond the context were dropped)" if dropped else ""
    )
    if len(kept) < 2:
        nothing = Estimate(None, None, len(kept)).fields("conversation")
        yield Finding(
            probe="M-1",
            metric="reward_accuracy",
            group=group,
            child=judge.name,
            child_hash=judge.hash or None,
            unit="1",
            text_source=source,
            **nothing,
        )
        return
    meter, redraw = Meter(), Redraw(kept, seed)
    sides = [side for both, good in zip(ids, fits, strict=True) if good for side in both]
    texts = [text_of(side) for pair in kept for side in (pair.chosen, pair.rejected)]
    few = slice(0, 2 * floor_limit)
    score, length = (
        scores.of(sides, meter),
        np.array([float(len(text.replace("\n", ""))) for text in texts]),
    )
    rounded = scores.of(sides[few], meter, bf16=True)

    def margin(values: Floats) -> Floats:
        return values[0::2] - values[1::2]

    def accuracy(values: Floats) -> Floats:
        return wins(values[0::2], values[1::2])

    def moved(read: Callable[[Floats], Any]) -> float:
        return abs(float(np.mean(read(rounded)) - np.mean(read(score[few]))))

    def finding(metric: str, unit: str, found: Estimate, **keys: Any) -> Finding:
        fields = {
            "probe": "M-1",
            "metric": metric,
            "group": group,
            "child": judge.name,
            "child_hash": judge.hash or None,
            "unit": unit,
            "dtype": dtype_of([judge]),
            "template": "chat",
            "cost": meter.cost(),
            "text_source": source,
            **found.fields("conversation"),
        }
        return Finding(**(fields | keys))

    right, floor = accuracy(score), moved(accuracy)
    agrees = redraw.estimate(right, share=True)
    yield finding(
        "reward_accuracy",
        "1",
        agrees,
        floor_numeric=floor,
        null_specific=0.5,
        verdict=verdict(agrees.ci95, zero=0.5, numeric=floor),
    )
    others = {"length": accuracy(length)} | ({"words": accuracy(baseline(texts))} if baseline else {})
    for name, theirs in others.items():
        saw = f"{source}; fitted on {fitted_on:,} texts" if name == "words" else source
        yield finding(
            f"reward_accuracy_{name}",
            "1",
            redraw.estimate(theirs, share=True),
            null_specific=0.5,
            dtype=None,
            text_source=saw,
        )
        ahead = redraw.estimate(right - theirs)
        ahead = ahead._replace(ci95=change_bounded(ahead.ci95, min(ahead.n, len(kept))))
        yield finding(
            f"reward_accuracy_over_{name}",
            "1",
            ahead,
            floor_numeric=floor,
            verdict=verdict(ahead.ci95, numeric=floor),
        )
    yield finding("reward_margin", "log-odds", redraw.estimate(margin(score)), floor_numeric=moved(margin))

    error, chance = redraw.estimate(margin(score), calibration_error), calibration_floor(margin(score), seed)
    floor = moved(lambda values: _error(margin(values)))
    if error.ci95 is not None and error.value is not None:
        # Redrawing adds noise, which can only raise this error: its lower end is reflected about the value, and the
        # upper one is left as it is, which is too high rather than too low.
        high = max(error.ci95[1], error.value)
        error = error._replace(ci95=(max(0.0, 2 * error.value - high), high))
    yield finding(
        "reward_calibration_error",
        "1",
        error,
        floor_numeric=floor,
        null_specific=chance,
        verdict=verdict(error.ci95, numeric=max(floor, chance)),
    )
    alike = np.ones((1, len(rounded)))
    owners = [owner for pair in kept for owner in (pair.chosen_from, pair.rejected_from)]
    long = estimate(np.stack([score, length], 1), owners, correlation, seed=seed)
    yield finding(
        "reward_length_correlation",
        "1",
        long,
        floor_numeric=moved(lambda values: correlation(np.stack([values, length[few]], 1), alike)),
    )
