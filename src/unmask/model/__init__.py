"""The network and its tensors: decoder, scorer, cache, losses, weights on disk, foreign families."""
