"""From text to batches of tokens: sources, tokenizer, chat templates, shards, packing, order."""
