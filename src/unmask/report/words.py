"""Numbers as people read them: with a unit, and with as many digits as their interval allows."""

import math

from unmask.probes.probe import Finding

# Metrics that are shares from 0 to 1: in prose and figures they are read as per cent.
SHARES = (
    "answers_stop",
    "facts_answered",
    "facts_answered_after_chat",
    "facts_answered_after_chat_change",
    "facts_answered_change",
    "facts_answered_held_wording",
    "facts_completed",
    "facts_hidden",
    "facts_kept",
    "facts_kept_after_chat",
    "reward_accuracy",
    "reward_accuracy_length",
    "reward_accuracy_over_length",
    "reward_accuracy_over_words",
    "reward_accuracy_words",
)

GROUPS = {
    "both": "both layers",
    "base_only": "base only",
    "sft_only": "SFT only",
    "none": "no layer",
    "sft_only_vs_both": "SFT only / both",
    "sft_only_vs_base_only": "SFT only / base only",
    "shuffled": "shuffled groups",
    "all": "all pairs",
    "equal_length": "pairs of equal length",
}


def value(finding: Finding, *, unit: bool = True) -> str:
    """The value of a finding, as "89.3 %" or "0.956" or "26.8 nats"."""
    if finding.value is None:
        return "–"
    scale = 100 if finding.metric in SHARES else 1
    text = number(scale * finding.value, decimals(finding, scale))
    return f"{text}{suffix(finding)}" if unit else text


def interval(finding: Finding) -> str:
    """The interval, as "86.1 to 92.0", in the unit of `value`; "exact" where nothing was sampled."""
    if finding.ci95 is None:
        return "exact" if finding.exact else "–"
    scale = 100 if finding.metric in SHARES else 1
    low, high = (number(scale * end, decimals(finding, scale)) for end in finding.ci95)
    return f"{low} to {high}"


def told(finding: Finding | None) -> str:
    """Value, interval and n in one breath, for a sentence."""
    if finding is None:
        return "not measured"
    if finding.ci95 is None:
        return value(finding)
    return f"{value(finding)} ({interval(finding)}; n = {finding.n:,} {plural(finding.n_unit, finding.n)})"


def suffix(finding: Finding) -> str:
    if finding.metric in SHARES:
        return " %"
    return "" if finding.unit == "1" else f" {finding.unit}"


def decimals(finding: Finding, scale: float = 1) -> int | None:
    """One digit more than the interval is sure of; None without an interval."""
    if finding.ci95 is None:
        return None
    half = scale * (finding.ci95[1] - finding.ci95[0]) / 2
    most = 1 if scale == 100 else 6
    return min(most, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else None


def number(value: float, decimals: int | None = None) -> str:
    """With a true minus sign; without `decimals` four significant digits."""
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def plural(unit: str | None, n: int | None) -> str:
    if not unit or n == 1:
        return unit or ""
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def group(name: str | None) -> str:
    return GROUPS.get(name or "", name or "")


def count(n: int) -> str:
    """A small count at the beginning of a sentence."""
    return ("No", "One", "Two", "Three", "Four", "Five", "Six")[n] if n <= 6 else str(n)


def amount(n: float) -> str:
    """A count in short: 1,234 or 3.1 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:,.0f}"
