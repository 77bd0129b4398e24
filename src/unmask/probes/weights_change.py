"""W-1: how far a layer moved the weights. Exact: no text, no sampling."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from unmask.lineage import Layer
from unmask.probes.probe import Finding, Meter, of, pairs

# The first pattern that a parameter's name holds says its kind of module (Hugging Face's names).
KINDS = (
    ("norms", r"norm\.|ln_|layernorm"),
    ("attention", r"attn\.|attention\."),
    ("feed-forward", r"mlp\.|feed_forward\.|experts"),
    ("embedding", r"embed_tokens|wte|embed_in|word_embeddings"),
    ("head", r"lm_head|embed_out"),
)


def kind_of(name: str) -> str:
    """attention, feed-forward, norms, embedding, head or other."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def block_of(name: str) -> str | None:
    """ "block 3" for a parameter of the fourth block, None for one outside the blocks."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    return f"block {found[1]}" if found else None


def weights_change(layers: Sequence[Layer]) -> list[Finding]:
    """For each pair of layers: ‖ΔW‖_F / ‖W_parent‖_F of all weights, of each kind of module and of each
    block, each one's share of ‖ΔW‖²_F, and the largest |ΔW|. Sums in float64; tied weights count once.

    Where the two have different parameters, there is no such distance: one finding abstains.
    """
    return [finding for a, b in pairs(layers) for finding in _pair(layers[a], layers[b])]


def _pair(parent: Layer, child: Layer) -> Iterator[Finding]:
    meter = Meter()
    old, new = dict(parent.model.named_parameters()), dict(child.model.named_parameters())
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name].shape != new[name].shape:
            yield Finding(
                probe="W-1",
                metric="relative_weight_change",
                value=None,
                unit="1",
                verdict=f"abstain: they differ in shape at {name}",
                **of(child, parent),
            )
            return
    changed: dict[str | None, float] = defaultdict(float)
    before: dict[str | None, float] = defaultdict(float)
    largest = 0.0
    for name, weight in old.items():
        was = weight.detach().double()
        change = new[name].detach().to(was.device).double() - was
        largest = max(largest, float(change.abs().max()))
        for group in {None, kind_of(name), block_of(name)}:  # block_of is None outside the blocks
            changed[group] += float(change.square().sum())
            before[group] += float(was.square().sum())

    def finding(metric: str, group: str | None, value: float) -> Finding:
        return Finding(
            probe="W-1",
            metric=metric,
            group=group,
            value=value,
            unit="1",
            exact=True,
            dtype="float64",
            cost=meter.cost(),
            **of(child, parent),
        )

    for group in sorted(before, key=lambda g: (g is not None, g or "")):
        if before[group] > 0:
            yield finding("relative_weight_change", group, (changed[group] / before[group]) ** 0.5)
        if group is not None and changed[None] > 0:
            yield finding("share_of_weight_change", group, changed[group] / changed[None])
    yield finding("largest_weight_change", None, largest)
