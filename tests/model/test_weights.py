"""Model directories: what is saved comes back, and what is not whole, finite and as described is refused."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, decoder, token_ids
from torch import Tensor

from unmask.errors import UserError
from unmask.model import weights
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weights.save(tmp_path, decoder())
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Save the weights again after `change` has had its way with them."""
    tensors = load_file(directory / weights.SINGLE)
    change(tensors)
    save_file(tensors, directory / weights.SINGLE)


def reconfigure(directory: Path, **changes: object) -> None:
    path = directory / weights.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def raw_safetensors(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000])
def test_a_model_comes_back_with_the_same_bits(config: ModelConfig, shard_bytes: int, tmp_path: Path) -> None:
    model, ids = decoder(config), token_ids(2, 12)
    weights.save(tmp_path, model, shard_bytes=shard_bytes)
    assert (tmp_path / weights.INDEX).exists() == (shard_bytes == 10_000)
    loaded = weights.load(tmp_path)
    assert isinstance(loaded, Decoder)
    assert loaded.config == config
    assert weights.tensor_hashes(loaded) == weights.tensor_hashes(model) == weights.tensor_hashes(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_shards_open_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = decoder(), token_ids(1, 8)
    weights.save(tmp_path, model, shard_bytes=10_000)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(theirs, model(ids), rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_stored_once_and_a_loaded_one_is_still_tied(directory: Path) -> None:
    assert "lm_head.weight" not in load_file(directory / weights.SINGLE)
    model = weights.load(directory)
    assert isinstance(model, Decoder)
    assert model.head is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loaded_model_trains_and_leaves_the_file_as_it_was(directory: Path) -> None:
    before = weights.tensor_hashes(directory)
    model = weights.load(directory)
    model(token_ids(1, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert weights.tensor_hashes(directory) == before
    assert weights.tensor_hashes(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_saved_and_loaded_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    weights.save(tmp_path, decoder(), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / weights.CONFIG).read_text())
    assert config["dtype"] == config["torch_dtype"] == name
    assert {tensor.dtype for tensor in load_file(tmp_path / weights.SINGLE).values()} == {dtype}
    assert {tensor.dtype for tensor in weights.load(tmp_path).parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in weights.load(tmp_path, dtype=dtype).parameters()} == {dtype}


def test_a_hash_tells_dtype_shape_and_every_bit() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    changed = tensor.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    variants = [tensor, changed, tensor.reshape(3, 2), tensor.bfloat16(), tensor.view(torch.int32)]
    assert len({weights.tensor_hash(each) for each in variants}) == len(variants)
    assert weights.tensor_hash(tensor) == weights.tensor_hash(tensor.T.contiguous().T)
    assert weights.tensor_hash(torch.tensor(1.0)) != weights.tensor_hash(torch.tensor([1.0]))


def test_hashes_of_a_directory_do_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    for name, size in (("whole", 5_000_000_000), ("cut", 10_000)):
        (tmp_path / name).mkdir()
        weights.save(tmp_path / name, decoder(), shard_bytes=size)
    assert weights.tensor_hashes(tmp_path / "whole") == weights.tensor_hashes(str(tmp_path / "cut"))


def test_a_stored_copy_of_a_tied_head_is_taken_if_equal_and_refused_if_not(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = weights.load(directory)
    assert "lm_head.weight" not in model.state_dict()
    rewrite(directory, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        weights.load(directory)


def test_the_frequencies_that_old_llama_files_hold_are_passed_over(tmp_path: Path) -> None:
    weights.save(tmp_path, decoder(CONFIGS["llama2"]))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    weights.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, directory: Path) -> None:
    rewrite(directory, lambda t: t[Q_PROJ][0, 3].fill_(value))
    with pytest.raises(UserError, match=rf"model\.safetensors: {Q_PROJ} holds NaN or infinite"):
        weights.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"{Q_PROJ} is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is no tensor of the model"),
        (lambda t: t.update({Q_PROJ: torch.ones(48, 31)}), r"q_proj.weight has shape \[48, 31\]"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.ones(97, 32)}), r"embed_tokens.*\[97, 32\]"),
        (lambda t: t.update({Q_PROJ: torch.ones(48, 32, dtype=torch.int8)}), "is stored as I8"),
    ],
    ids=["missing", "unexpected", "shape", "vocabulary", "dtype"],
)
def test_tensors_other_than_the_config_describes_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, directory: Path
) -> None:
    rewrite(directory, change)
    with pytest.raises(UserError, match=message):
        weights.load(directory)


def test_a_truncated_file_is_refused(directory: Path) -> None:
    path = directory / weights.SINGLE
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
            weights.load(directory)


def test_a_tensor_that_occurs_twice_in_a_file_is_refused(directory: Path) -> None:
    path = directory / weights.SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.dumps({Q_PROJ: json.loads(raw[8 : 8 + length])[Q_PROJ]})[1:-1].encode()
    raw_safetensors(path, b"{" + entry + b"," + raw[9 : 8 + length], raw[8 + length :])
    with pytest.raises(UserError, match=f"{Q_PROJ}' occurs twice"):
        weights.load(directory)
    with pytest.raises(UserError, match=f"{Q_PROJ}' occurs twice"):
        weights.tensor_hashes(directory)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"a": 3}', "the entry of a is malformed"),
        (b'{"a": {"dtype": "F32", "shape": "no", "data_offsets": [0, 4]}}', "the entry of a is malformed"),
    ],
)
def test_a_header_that_is_no_header_is_refused(header: bytes, message: str, directory: Path) -> None:
    raw_safetensors(directory / weights.SINGLE, header)
    with pytest.raises(UserError, match=message):
        weights.load(directory)


def test_a_header_of_a_terabyte_is_refused(directory: Path) -> None:
    (directory / weights.SINGLE).write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        weights.load(directory)


def test_overlapping_tensors_are_refused(directory: Path) -> None:
    path = directory / weights.SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[Q_PROJ]["data_offsets"] = header["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]
    raw_safetensors(path, json.dumps(header).encode(), raw[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged"):
        weights.load(directory)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "config.json", 7]
)
def test_an_index_that_points_out_of_its_directory_is_refused(file: object, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    weights.save(directory, decoder(), shard_bytes=10_000)
    save_file({Q_PROJ: torch.ones(48, 32)}, tmp_path / "outside.safetensors")
    index = json.loads((directory / weights.INDEX).read_text())
    index["weight_map"][Q_PROJ] = file
    (directory / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{Q_PROJ} is placed in"):
        weights.load(directory)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    weights.save(tmp_path, decoder(), shard_bytes=10_000)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q_PROJ] = next(file for file in files if file != index["weight_map"][Q_PROJ])
    (tmp_path / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"do not agree on whether {Q_PROJ} is here"):
        weights.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weights.save(tmp_path, decoder(), shard_bytes=10_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone.name} cannot be read"):
        weights.load(tmp_path)


def test_a_pickle_is_never_opened(directory: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return open, (str(tmp_path / "sprung"), "w")  # type: ignore[return-value]

    (directory / weights.SINGLE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        weights.load(directory)
    assert not (tmp_path / "sprung").exists()


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is this a model directory"):
        weights.load(tmp_path)
    (tmp_path / weights.CONFIG).write_text(json.dumps(CONFIGS["qwen3"].to_hf()))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        weights.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"vocab_size": 1, "vocab_size": 2}', "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, directory: Path) -> None:
    (directory / weights.CONFIG).write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        weights.load(directory)


@pytest.mark.parametrize("size", [-1, 0, 10**12, 1.5, "32", None, True])
def test_absurd_sizes_are_refused_before_anything_is_allocated(size: object, directory: Path) -> None:
    reconfigure(directory, vocab_size=size)
    with pytest.raises(UserError, match=r"config\.json: vocab_size must be a whole number"):
        weights.load(directory)


def test_sizes_that_are_allowed_but_not_those_of_the_file_allocate_nothing(directory: Path) -> None:
    reconfigure(directory, vocab_size=2**22, hidden_size=2**17, intermediate_size=2**20)  # terabytes
    with pytest.raises(UserError, match=r"config\.json says"):
        weights.load(directory)


def test_code_that_a_config_names_is_ignored(directory: Path) -> None:
    reconfigure(directory, auto_map={"AutoModelForCausalLM": "evil.Model"}, custom_pipelines={"x": "y"})
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    assert isinstance(weights.load(directory), Decoder)


def test_a_scorer_is_no_decoder_without_its_head(directory: Path) -> None:
    reconfigure(directory, architectures=["Qwen3ForSequenceClassification"], num_labels=1)
    with pytest.raises(UserError, match=r"score\.weight is missing"):
        weights.load(directory)
    rewrite(directory, lambda t: t.update({"score.weight": torch.ones(1, 32)}))
    assert isinstance(weights.load(directory), Scorer)
