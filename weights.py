"""A model on disk, tensor by tensor: what its files hold, without a copy of it in memory.

    Lazy, Weights       a tensor that is still in its file; a whole model of them, whatever format it comes from
    open_weights        a Hugging Face directory: safetensors or .bin, one file or shards with their index
    write_weights       the same, written as safetensors: one tensor in memory at a time
    plan, write_descriptions    which tensors share a file, and the small files beside them

checkpoint.py builds models from these and saves them; convert.py and doors/ carry them from one format to another.
"""

from __future__ import annotations

from settings import UserError, read_json

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files import write_json, written_beside
from model import Llama, LlamaConfig
from nf4 import STATE, Packed, damaged, dequantise, from_bitsandbytes, read_state
from tokenizer import Tokenizer, load_tokenizer
from torch_files import TorchFile, tensor_bytes

SHARD_BYTES = 5 * 10**9  # Hugging Face's customary shard size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                      "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
                      "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCAN = 1 << 18  # numbers looked at in one go: they and what is computed from them stay in the processor's cache
COMPUTED = "rotary_emb.inv_freq"  # old tools stored the rotary frequencies; every reader computes them
# What bitsandbytes stores in the place of a weight of 4 bits: the ends of the names. The last one tells the rest.
PACKED = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f".{STATE}nf4")
# Ends of names by which other quantisations are known, where config.json does not say which it is.
UNREAD = {".SCB": "bitsandbytes' LLM.int8", f".{STATE}fp4": "bitsandbytes' fp4", ".qweight": "GPTQ or AWQ"}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is still where it lies: in a file, and then `read()` gives it whole on the CPU in memory of its own, so that
    the file may go; or in a model that is being saved.

    storage, packed: of a weight that lies quantised in its file, how (a key of layers.STORAGES), and what reads its codes.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    storage: str = "none"
    packed: Callable[[], Packed] | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def stored(self, storage: str) -> Tensor | Packed:
        """For a layer that keeps its weight so: the codes, exactly, where the file has those; else the numbers."""
        return self.packed() if self.packed and self.storage == storage else self.read()

    def to(self, dtype: torch.dtype | None) -> Lazy:
        """The same tensor, cast after it is read. None keeps its dtype."""
        if dtype in (None, self.dtype):
            return self
        if self.packed:  # not rounded twice
            return Lazy(self.shape, dtype, lambda: dequantise(self.packed(), dtype))
        return dataclasses.replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


@dataclass
class Weights:
    """A model as its files describe it. Whatever the format, names and layouts are Hugging Face's.

    tensors     name -> Lazy of every parameter of the architecture, lm_head.weight only if it is not tied
    kind        the format, in words; facts: what else there is to know about it; odd: what a user should hear of
    """

    config: LlamaConfig
    tensors: dict[str, Lazy]
    tokenizer: Tokenizer | None = None
    kind: str = "Hugging Face"
    facts: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(lazy.nbytes for lazy in self.tensors.values())

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """dtype -> number of parameters stored in it, the most frequent first."""
        counts: dict[torch.dtype, int] = {}
        for lazy in self.tensors.values():
            counts[lazy.dtype] = counts.get(lazy.dtype, 0) + lazy.shape.numel()
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def shapes_of(config: LlamaConfig) -> dict[str, torch.Size]:
    """Hugging Face name -> shape of every parameter of an architecture, in the order of the model."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Llama(config).named_parameters()}


def misfits(config: LlamaConfig, shapes: dict[str, torch.Size], says: str = "config.json") -> list[str]:
    """What is wrong with tensors of these names and shapes for this architecture, each named with both shapes. `says`: the file
    that the architecture was read from."""
    wanted = shapes_of(config)
    found = [f"{name} is unknown" for name in shapes if name not in wanted]
    found += [f"{name} is {tuple(shapes[name])} and {says} says {tuple(shape)}" for name, shape in wanted.items()
              if name in shapes and shapes[name] != shape]  # fmt: skip
    return found + [f"{name} is missing" for name in wanted if name not in shapes]


def check_shapes(weights: Weights, where, says: str = "config.json") -> None:
    """Raises UserError that names the missing, unknown and misshapen tensors; puts the others in the model's order."""
    problems = misfits(weights.config, {name: lazy.shape for name, lazy in weights.tensors.items()}, says)
    check_dtypes(weights.tensors, where)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where} does not fit its {says}: {'; '.join(problems[:5])}{more}")
    weights.tensors = {name: weights.tensors[name] for name in shapes_of(weights.config)}


def check_dtypes(tensors: dict[str, Lazy], where) -> None:
    """Raises UserError if a tensor does not hold floating-point numbers as they are: quantised ones mean nothing without scales."""
    odd = [f"{name} ({str(lazy.dtype).removeprefix('torch.')})" for name, lazy in tensors.items() if lazy.dtype not in FLOATS]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{where} holds {', '.join(odd[:3])}{more}; weights are read as fp32, bf16, fp16 or fp64, so this model is "
                        "quantised or of another kind: convert it where it comes from")  # fmt: skip


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises UserError if that cannot hold all of its values."""
    cast = tensor.to(dtype)
    if (lost := not_finite(cast)) and lost > not_finite(tensor):
        raise UserError(f"{name} has values up to {tensor.abs().max():.3g}, more than {dtype_name(dtype)} holds; give --dtype bf16 or fp32")
    return cast


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def not_finite(tensor: Tensor) -> int:
    """How many NaN and infinite values a tensor holds."""
    pieces = tensor.reshape(-1).split(SCAN) if tensor.is_floating_point() else ()
    # A sum is finite only if all its terms are; most often that is all there is to find out, and much sooner.
    return sum(int((~torch.isfinite(piece)).sum()) for piece in pieces if not piece.sum(dtype=torch.float32).isfinite())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shapes, dtypes and bytes: NaN equals NaN, and 0 is not -0."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection, [heads · hd, …]: from Hugging Face's order to the interleaved one of Meta, llama2.c and GGUF.

    Rotary embedding turns pairs of rows. Hugging Face pairs row k of a head with row k + hd/2, Meta 2k with 2k + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """The opposite of permute."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face directories


def weight_files(directory: Path) -> list[Path]:
    """The files holding the weights; safetensors before .bin. Raises UserError if the index names a missing file."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # fmt: skip
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            names = sorted(set(weight_map(directory / index).values()))
            missing = [name for name in names if not (directory / name).exists()]
            if missing:
                raise UserError(f"{directory / index} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing")
            return [directory / name for name in names]
        if shards := sorted(directory.glob(single.replace(".", "-*-of-*."))):
            raise UserError(f"{directory} has {shards[0].name} and no {index}, which tells what is in which file; copy it there too")
    return []


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index. Raises UserError if it is none."""
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map")
    return found


def stored_tensors(directory: Path, mapped: bool = False) -> dict[str, Lazy]:
    """name -> Lazy of everything in a directory's weight files. Raises UserError for damaged files and a wrong index.

    mapped: they are read where they lie in the file, which is quick and takes no memory of its own; but what is touched counts
    as this process's as long as the tensor lives.
    """
    tensors: dict[str, Lazy] = {}
    where: dict[str, str] = {}
    files = weight_files(directory)
    for file in files:
        for name, lazy in tensors_in(file, mapped).items():
            if name in tensors:
                raise UserError(f"{directory}: {name} is in {where[name]} and in {file.name}; one of the two does not belong there")
            tensors[name], where[name] = lazy, file.name
    single = files and files[0].name in ("model.safetensors", "pytorch_model.bin")
    if files and not single:
        index = directory / f"{'model' if files[0].suffix == '.safetensors' else 'pytorch_model'}{files[0].suffix}.index.json"
        wrong = [f"{name} is in {where.get(name, 'no file')} and not in {file}" for name, file in weight_map(index).items()
                 if where.get(name) != file]  # fmt: skip
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{index} is wrong: {'; '.join(wrong[:3])}{more}; copy it again with its weights")
    return tensors


def tensors_in(file: Path, mapped: bool = False) -> dict[str, Lazy]:
    """name -> Lazy of all tensors of one file, .safetensors or .bin. UserError if it cannot be read."""
    return (_safetensors if file.suffix == ".safetensors" else _bin)(file, mapped)


def _safetensors(file: Path, mapped: bool) -> dict[str, Lazy]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
            strange = [f"{name} ({part.get_dtype()})" for name, part in slices.items() if part.get_dtype() not in SAFETENSORS_DTYPES]
            if strange:
                raise UserError(f"{file} holds {', '.join(strange[:3])}, a dtype that is not read here")
            return {name: Lazy(torch.Size(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()], _reader(file, name, mapped))
                    for name, part in slices.items()}  # fmt: skip
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _reader(file: Path, name: str, mapped: bool) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            # Opened for one tensor: what the file's mapping has brought into memory goes when it is closed, and only the copy stays.
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name) if mapped else tensors.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from None

    return read


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read ({error}); it may be truncated: copy or download it again")


def _bin(file: Path, mapped: bool) -> dict[str, Lazy]:
    torch_file = TorchFile(file)
    content = torch_file.content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} is no file of named tensors")
    if strange := [name for name, value in content.items() if value.layout != torch.strided or value.is_quantized]:
        raise UserError(f"{file} holds {', '.join(strange[:3])} in a sparse or quantised layout; save it dense where it comes from")
    return {name: Lazy(value.shape, value.dtype, torch_file.reader(name, mapped=mapped)) for name, value in content.items()}


def open_weights(directory: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """A Hugging Face directory, its weights still on disk. `tokenizer` replaces the directory's own.

    Raises UserError that names every missing, unknown and misshapen tensor.
    """
    config = LlamaConfig.from_json(directory)
    tensors, odd = parameters_in(directory, config)
    own = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    files = weight_files(directory)
    facts = {"files": f"{len(files)} {files[0].suffix}"}
    if len(files) == 1 and (directory / f"{files[0].name}.index.json").exists():
        odd = [*odd, f"{files[0].name} is read; the shards that its index names beside it are not"]
    if packed := [lazy.storage for lazy in tensors.values() if lazy.packed]:
        facts["quantised"] = f"{len(packed)} weights in {' and '.join(sorted(set(packed)))}, in bitsandbytes' layout"
    return Weights(config, tensors, tokenizer or (load_tokenizer(directory) if own else None), facts=facts, odd=odd)


def parameters_in(directory: Path, config: LlamaConfig, mapped: bool = False) -> tuple[dict[str, Lazy], list[str]]:
    """The parameters of this architecture among a directory's tensors, and remarks on those that were left out.

    Weights that bitsandbytes has packed in nf4 are dequantised as they are read. Raises UserError that names every missing, unknown
    and misshapen tensor, or another quantisation.
    """
    stored, odd = joined(stored_tensors(directory, mapped), directory), []
    if frequencies := [name for name in stored if name.endswith(COMPUTED)]:
        odd += [f"{len(frequencies)} stored tensors of rotary frequencies (an old tool's) are left out: they are computed"]
    if "lm_head.weight" in stored and config.tie_word_embeddings:
        odd += ["lm_head.weight is stored although the embeddings are tied: left out"]
    kept = {name: lazy for name, lazy in stored.items() if not name.endswith(COMPUTED)
            and (name != "lm_head.weight" or not config.tie_word_embeddings)}  # fmt: skip
    weights = Weights(config, kept)
    check_shapes(weights, directory)
    return weights.tensors, odd


def joined(stored: dict[str, Lazy], directory: Path) -> dict[str, Lazy]:
    """The same with one Lazy in the place of the tensors that stand for a packed weight. UserError for what cannot be unpacked."""
    said = read_json(directory / "config.json").get("quantization_config") or {}
    method = said.get("quant_method", "bitsandbytes")
    foreign = [kind for ending, kind in UNREAD.items() if any(name.endswith(ending) for name in stored)]
    if foreign or method != "bitsandbytes":
        kind = foreign[0] if method == "bitsandbytes" else method.upper()
        raise UserError(f"{directory} is quantised by {kind}; of quantised models those in nf4 by bitsandbytes can be read: take the model "
                        "that it was made from")  # fmt: skip
    result = dict(stored)
    for name in [key.removesuffix(PACKED[-1]) for key in stored if key.endswith(PACKED[-1])]:
        parts = {name + end: result.pop(name + end) for end in PACKED if name + end in result}
        result[name] = _packed(name, parts)
    return result


def _packed(name: str, parts: dict[str, Lazy]) -> Lazy:
    def packed() -> Packed:
        return from_bitsandbytes(name, {part: lazy.read() for part, lazy in parts.items()})

    state = read_state(name, parts[name + PACKED[-1]].read())
    try:
        shape, dtype = torch.Size(state["shape"]), {str(dtype): dtype for dtype in FLOATS}[f"torch.{state['dtype']}"]
    except (TypeError, KeyError):
        raise damaged(name) from None
    return Lazy(shape, dtype, lambda: dequantise(packed(), dtype), "nf4-double" if "nested_offset" in state else "nf4", packed)


def storage_of(directory: Path, wanted: str = "none") -> str:
    """How the projections of a model are to be kept, a key of layers.STORAGES: as `wanted`, or where they lie quantised in its
    directory, as they lie there. A directory that has some of them quantised, or in several ways, is read as if it had none.

    Raises UserError if something is wanted of a model that is quantised already.
    """
    tensors = parameters_in(directory, LlamaConfig.from_json(directory))[0]
    found = {lazy.storage for name, lazy in tensors.items() if ".layers." in name and len(lazy.shape) == 2}
    if wanted != "none" and found != {"none"}:
        own = " and ".join(sorted(found - {"none"}))
        raise UserError(f"--base-quant {wanted}: {directory} is quantised already, in {own}; without the flag it is used as it is")
    return wanted if found == {"none"} else found.pop() if len(found) == 1 else "none"


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def plan(stem: str, tensors: Iterable[tuple[str, Lazy]], shard_bytes: int = SHARD_BYTES) -> dict[str, dict[str, Lazy]]:
    """Which tensors share a file: {file name: {name: Lazy}}."""
    shards, room = [{}], shard_bytes
    for name, lazy in tensors:
        if shards[-1] and lazy.nbytes > room:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][name] = lazy
        room -= lazy.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_weights(weights: Weights, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A complete Hugging Face directory, one tensor in memory at a time; its tokenizer beside, config.json last."""
    out.mkdir(parents=True, exist_ok=True)
    files = plan("model", weights.tensors.items(), shard_bytes)
    for name, tensors in files.items():
        write_safetensors(out / name, tensors)
    write_descriptions(out, weights.config, files, weights.tokenizer, dtype=next(iter(weights.dtypes)))


def write_safetensors(path: Path, tensors: dict[str, Lazy]) -> None:
    """One safetensors file: 8 bytes with the length of a JSON header, the header, then the tensors one after the other.

    The package's own writer wants all tensors in memory at once.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each starts at a multiple of its item size
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, lazy in ordered:
        header[name] = {"dtype": names[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [at, at + lazy.nbytes]}
        at += lazy.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written_beside(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, lazy in ordered:
            file.write(tensor_bytes(lazy.read()))


def write_descriptions(path: Path, config: LlamaConfig, files: dict[str, dict[str, Lazy]], tokenizer: Tokenizer | None = None, *,
                       dtype: torch.dtype, template: str | None = None) -> None:  # fmt: skip
    """All of a model directory but the weights: index, tokenizer, generation_config.json, and config.json last."""
    for left in [*path.glob("model*.safetensors"), *path.glob("model*.safetensors.index.json")]:
        if left.name not in files:  # weights that were here before and would be read instead of these
            left.unlink()
    if len(files) > 1:
        total = sum(lazy.nbytes for tensors in files.values() for lazy in tensors.values())
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is not None:
        tokenizer.save(path, template=template)
    described = config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    generation = {"bos_token_id": described["bos_token_id"], "eos_token_id": described["eos_token_id"]}
    if tokenizer is not None:
        stops = tokenizer.stop_ids(template) if template or tokenizer.template else [tokenizer.eos_id]
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    write_json(path / "generation_config.json", {**generation, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    write_json(path / "config.json", described)
