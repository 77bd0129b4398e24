"""Other people's models, optimizers and trainers, from clones that a user names or from packages; nothing of their code
is here."""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.model.config import ModelConfig


class Peer(NamedTuple):
    """`loss` of inputs and targets (B, T), compiled if asked; `logits` (B, T, V) of inputs, uncompiled."""

    model: Any
    optimizer: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]

    def step(self, inputs_BT: Tensor, targets_BT: Tensor, clip: float | None = None) -> None:
        torch.autograd.backward(self.loss(inputs_BT, targets_BT))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def clone_with(file: str) -> Callable[[str], Path]:
    """For argparse: a folder that holds `file`."""

    def folder(given: str) -> Path:
        if not (Path(given) / file).is_file():
            raise argparse.ArgumentTypeError(f"{given} is no clone of it: there is no {file}")
        return Path(given)

    return folder


def nanogpt(
    clone: Path,
    config: ModelConfig,
    *,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compile: bool = True,
) -> Peer:
    """github.com/karpathy/nanoGPT, as its train.py makes it: autocast, no dropout, no biases."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    with redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
        given = module.GPTConfig(
            block_size=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
            dropout=0.0,
            bias=False,
        )
        model = module.GPT(given).to(device)
        optimizer = model.configure_optimizers(0.1, lr, betas, device)
    run = torch.compile(model) if compile else model

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype is torch.bfloat16):
            found: Tensor = run(inputs, targets)[1]
        return found

    # Without targets it gives the last position's alone.
    return Peer(model, optimizer, loss, lambda inputs: model(inputs, inputs)[0])


def nanochat(clone: Path, config: ModelConfig, *, compile: bool = True, **rates: float) -> Peer:
    """github.com/karpathy/nanochat, with full attention in every layer: bfloat16, and its own Muon with AdamW."""
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"  # read when it is first imported
    sys.path.insert(0, str(clone))
    with redirect_stdout(sys.stderr):
        from nanochat.gpt import GPT, GPTConfig

        given = GPTConfig(
            sequence_len=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_kv_head=config.num_attention_heads,
            n_embd=config.hidden_size,
            window_pattern="L",
        )
        with torch.device("meta"):
            model: Any = GPT(given)
        model.to_empty(device="cpu")
        model.init_weights()
        optimizer = model.setup_optimizer(**rates)
    run: Any = torch.compile(model, dynamic=False) if compile else model
    return Peer(model, optimizer, run, model)


def trl(
    stage: str,
    config: ModelConfig,
    rows: Sequence[dict[str, list[int]]],
    batch: int,
    dtype: torch.dtype,
    after_step: Callable[[], None],
) -> None:
    """TRL's SFTTrainer ("sft") or RewardTrainer on a Llama of these sizes: autocast, no checkpointing.

    One pass over the rows, ids by column, `batch` of them a step. Token 1 ends a text: TRL writes it, rows have it not.
    """
    import transformers as hf
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    package: Any = importlib.import_module("trl")
    named = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, config.vocab_size)}
    words = Tokenizer(models.WordLevel(named, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    sizes = hf.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )
    # An answer begins with a space, or its first word would be one with the prompt's last.
    texts = [
        {name: " " * (name != "prompt") + " ".join(f"w{i}" for i in ids) for name, ids in row.items()}
        for row in rows
    ]

    class After(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    imitates = stage == "sft"
    kind = hf.AutoModelForCausalLM if imitates else hf.AutoModelForSequenceClassification
    settings = package.SFTConfig if imitates else package.RewardConfig
    trainer = package.SFTTrainer if imitates else package.RewardTrainer
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        trainer(
            model=kind.from_config(sizes),
            args=settings(
                output_dir=directory,
                per_device_train_batch_size=batch,
                num_train_epochs=1,
                learning_rate=1e-5,
                bf16=dtype is torch.bfloat16,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=[After()],
        ).train()
