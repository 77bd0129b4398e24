"""One file a stage: its objective and its batches. The one training loop (training/loop.py) runs them all."""
