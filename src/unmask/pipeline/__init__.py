"""Recipe → stages → lineage → probes → report: what `unmask run` does."""

from unmask.pipeline.runner import run

__all__ = ["run"]
