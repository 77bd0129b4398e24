"""Recipe → stages → lineage → probes → report: what `unmask run` does."""

from unmask.pipeline.run import run

__all__ = ["run"]
