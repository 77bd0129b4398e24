"""The network and its tensors: config, decoder, scorer, attention, cache, loss, weights, foreign models."""
