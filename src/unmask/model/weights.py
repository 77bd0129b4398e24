"""Model directories in Hugging Face's layout: `config.json` and safetensors, in one file or in shards.

Nothing here unpickles. Sizes, names and shapes are compared with the config before anything is allocated.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LARGEST_JSON = 100_000_000
STORED = ("F64", "F32", "F16", "BF16")


def load(
    directory: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder | Scorer:
    """Read a model, one tensor after the other.

    UserError, naming file and tensor, for anything but whole, finite weights of exactly the config's shapes.
    """
    directory = Path(directory)
    config = read_config(directory)
    with torch.device("meta"):
        model = Scorer(config) if config.is_scorer else Decoder(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    tied_head = "lm_head.weight" if not config.is_scorer and config.tie_word_embeddings else None
    files = weight_files(directory)
    check_names(directory, files, expected, tied_head)
    state: dict[str, Tensor] = {}
    for path, name, tensor in read(files):
        if name in expected or name == tied_head:
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{path}: {name} holds NaN or infinite weights; make the model anew")
            # A copy, because a product's last bits depend on how its operands lie in memory, and in the file
            # they lie as the header happens to end: the saved model and the loaded one would differ.
            state[name] = tensor.to(device, dtype, copy=True)
    if tied_head in state and not torch.equal(state.pop(tied_head), state["model.embed_tokens.weight"]):
        raise UserError(
            f"{directory}: lm_head.weight differs from the embedding, but {CONFIG} says that they are tied; "
            "set tie_word_embeddings to false"
        )
    model.load_state_dict(state, assign=True)
    return model


def save(
    directory: Path | str,
    model: Decoder | Scorer,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `config.json` and the weights, in shards with an index where they are larger than `shard_bytes`.

    Not atomic: the caller hands in a directory that becomes visible as a whole.
    """
    directory = Path(directory)
    config = model.config.to_hf(str(dtype).removeprefix("torch."))
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if shards[-1] and size + stored.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
        total += stored.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    parameters = sum(tensor.numel() for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tensor_hashes(source: Decoder | Scorer | Path | str) -> dict[str, str]:
    """SHA-256 of each tensor over its dtype, shape and bytes ("float32|64,32|" and then the numbers, row by
    row).

    Of a model, or of the files in a directory; how those are cut into shards does not matter.
    """
    if isinstance(source, Decoder | Scorer):
        return {name: tensor_hash(tensor) for name, tensor in sorted(source.state_dict().items())}
    return dict(sorted((name, tensor_hash(tensor)) for _, name, tensor in read(weight_files(Path(source)))))


def tensor_hash(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    shape = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_config(directory: Path) -> ModelConfig:
    """The config of a model directory; UserError names the file."""
    path = directory / CONFIG
    config = read_json(path)
    try:
        return ModelConfig.from_hf(config)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory, in which no key occurs twice."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is too large for what it should be ({path.stat().st_size:,} bytes)")
        return parse_object(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Is this a model directory?") from None


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1)
            raise UserError(f"{path}: the name {twice!r} occurs twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a directory, each with the names that the index places there, or None."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: None}
    if not (directory / INDEX).exists():
        for pickle in sorted(path for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth")):
            raise UserError(f"{pickle} is a pickle, which may run code when read; convert it to {SINGLE}")
        raise UserError(f"{directory}: neither {SINGLE} nor {INDEX} is there; is this a model directory?")
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{directory / INDEX}: weight_map must say which file holds each tensor")
    files: dict[Path, list[str] | None] = {}
    for name, file in sorted(places.items()):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{directory / INDEX}: {name} is placed in {file!r}, no weight file beside it")
        names = files.setdefault(directory / file, [])
        assert names is not None
        names.append(name)
    return files


def header(path: Path) -> dict[str, Any]:
    """Name → {dtype, shape, …} of a safetensors file, whose own reader keeps the last of equal names."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise UserError(f"{path}: truncated or no safetensors file (a header of {length:,} bytes)")
            entries = parse_object(file.read(length), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise UserError(f"{path}: the entry of {name} is malformed")
    return entries


def check_names(
    directory: Path,
    files: Mapping[Path, list[str] | None],
    expected: Mapping[str, tuple[int, ...]],
    tied_head: str | None,
) -> None:
    """Every expected tensor once, in its shape, where the index places it, and no other tensor."""
    missing, seen = dict(expected), dict[str, Path]()
    for path, placed in files.items():
        entries = header(path)
        if placed is not None and sorted(entries) != placed:
            odd = sorted(set(entries).symmetric_difference(placed))[0]
            raise UserError(f"{path}: {INDEX} and this file do not agree on whether {odd} is here")
        for name, entry in entries.items():
            if name in seen:
                raise UserError(f"{path}: {name} is in {seen[name].name} too")
            seen[name] = path
            if name.endswith("rotary_emb.inv_freq"):  # old Llama files hold what we compute
                continue
            shape = expected["model.embed_tokens.weight"] if name == tied_head else missing.pop(name, None)
            if shape is None:
                raise UserError(f"{path}: {name} is no tensor of the model that {CONFIG} describes")
            if tuple(entry["shape"]) != shape:
                raise UserError(f"{path}: {name} has shape {entry['shape']}, {CONFIG} says {list(shape)}")
            if entry.get("dtype") not in STORED:
                raise UserError(f"{path}: {name} is stored as {entry.get('dtype')}, not {', '.join(STORED)}")
    if missing:
        raise UserError(f"{directory}: {next(iter(missing))} is missing ({len(missing)} tensors in all)")


def read(files: Mapping[Path, list[str] | None]) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of the files, mapped into memory."""
    for path in files:
        header(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for name in names:
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error})") from None
