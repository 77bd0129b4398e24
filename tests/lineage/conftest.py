from checkpoints import run, tokenizer, whole_run

__all__ = ["run", "tokenizer", "whole_run"]
