"""Text from models: sampling, the batched engine with its KV cache, and the dial over several layers."""
