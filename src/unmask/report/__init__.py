"""The page of a run: reads what was measured and computes nothing."""
