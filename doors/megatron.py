"""Megatron-LM and ModelLink (MindSpeed-LLM) checkpoints: a model cut into TP x PP files, one for each device that trains it.

    SAVE/latest_checkpointed_iteration.txt      "1", or "release": which of the folders beside it counts
    SAVE/iter_0000001/mp_rank_03_001/model_optim_rng.pt     tensor-parallel rank 3, pipeline stage 1
    SAVE/iter_0000001/mp_rank_03/model_optim_rng.pt         the same where there is one stage only
    SAVE/tokenizer/                             ours: Megatron keeps no tokenizer

A file is a dictionary {"args": Namespace, "checkpoint_version": 3.0, "iteration": 1, "model": {…}}. Pipeline parallelism gives each
stage a run of layers, counted from 0 in every file: L/PP each, or as a list says (6,8,8,10). Virtual stages ("model0", "model1" …
in one file) take turns: model0 of all stages first, then model1 of all stages. The first stage holds the embedding, the last one
the final norm and the head. Tensor parallelism cuts each tensor in its own way:

    | ours                     | Megatron-core (mcore)        | legacy                          | rank r of TP holds              |
    |--------------------------|------------------------------|---------------------------------|---------------------------------|
    | embed_tokens             | embedding.word_embeddings    | the same                        | rows r of the padded vocabulary |
    | input_layernorm          | input_layernorm              | input_norm                      | all of it                       |
    | q_proj, k_proj, v_proj   | self_attention.linear_qkv    | self_attention.query_key_value  | groups r, see below             |
    | o_proj                   | self_attention.linear_proj   | self_attention.dense            | columns r                       |
    | post_attention_layernorm | pre_mlp_layernorm            | post_attention_norm             | all of it                       |
    | gate_proj, up_proj       | mlp.linear_fc1               | mlp.dense_h_to_4h               | rows r of gate, then rows r of up |
    | down_proj                | mlp.linear_fc2               | mlp.dense_4h_to_h               | columns r                       |
    | norm                     | decoder.final_layernorm      | encoder.final_norm              | all of it                       |
    | lm_head                  | output_layer                 | the same                        | rows r of the padded vocabulary |

(megatron_layout.py; megatron_arguments.py has what the arguments say.)

Traps. Queries, keys and values are fused by group, not by kind: for every key/value head its H/K query heads, then its key head,
then its value head; so TP must divide K. Gate and up are each cut before they are put together. The vocabulary is padded to a
multiple of TP (times a divisor) by repeating the last row, and only the arguments or the tokenizer tell how many rows are real.
A tied model in several stages carries a second copy of the embedding in the last one ("word_embeddings_for_head" in legacy
files). Rotary embedding turns halves, like Hugging Face's. ModelLink's converter does not store rotary_base for Llama: a Llama-3
of its making claims 10,000, and only the Hugging Face config.json of the model (--hf-config) tells the truth.

Pickles are never run: see torch_files.py. Memory: reading holds a whole tensor (q, k and v, or gate and up, count as one: they
are kept until something else is read), and the shard that is being put into it twice, in the mapped file and copied; writing
holds whole tensors of ours that make one of theirs, and one shard.

Sources: Megatron-LM's megatron/training/checkpointing.py and tools/checkpoint; ModelLink's tasks/checkpoint.
"""

from __future__ import annotations

from settings import UserError

import argparse
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from config import LlamaConfig
from doors.megatron_arguments import NUMBERS, arguments, as_dict, rope_problems, rope_scaling, strangeness
from doors.megatron_layout import (
    EMBEDDING,
    HEAD,
    Piece,
    canonical,
    cut,
    indivisible,
    padded_vocabulary,
    parts,
    pieces,
    shard_shape,
)
from tokenizer import Tokenizer, load_tokenizer
from torch_files import TorchFile, TorchFileWriter
from weights import Lazy, Weights, same_bits, shapes_of

KIND = "Megatron"
TRACKER = "latest_checkpointed_iteration.txt"
NOT_WEIGHTS = ("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine")
FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")  # the second: older, with a distributed optimizer
# Settings, random states and transformer-engine's extra states are objects of these; they are not looked into.
INERT = ("megatron.", "mindspeed.", "mindspeed_llm.", "modellink.", "ascendspeed.", "transformer_engine.", "numpy.",
         "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "_io.BytesIO")  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Reading


def recognises(path: Path) -> bool:
    try:
        return (path / TRACKER).is_file() or any(_rank_folders(path))
    except OSError:
        return False


def _rank_folders(folder: Path) -> list[tuple[re.Match, Path]]:
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?", path.name), path) for path in sorted(folder.iterdir()))
    return [(match, path) for match, path in found if match and path.is_dir()]


def open_weights(path: Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None,
                 config: LlamaConfig | None = None) -> Weights:  # fmt: skip
    """`path`: the directory that training saves into, or one iteration's folder in it.

    vocab_size: how many rows of the padded embedding are real; else the config says it, else the arguments in the files, else
    the tokenizer; else all are kept. config: the model's own; it counts before the arguments in the files. tokenizer: else
    the one beside the weights. Raises UserError for missing ranks, damaged files, shapes that contradict the arguments (each
    tensor with both shapes) and models that are no Llama. Only headers are read here. What only the weights can show (norms
    that differ between ranks) is added to `odd` when they are read; a second copy of a tied embedding that differs is a UserError
    then.
    """
    path = Path(path)
    folder = _folder(path)
    beside = next((place for place in (path / "tokenizer", folder.parent / "tokenizer") if place.is_dir()), None)
    tokenizer = tokenizer or (load_tokenizer(beside) if beside else None)
    checkpoint = Checkpoint(folder)
    return checkpoint.weights(checkpoint.find_config(config, tokenizer, vocab_size), tokenizer)


def _folder(path: Path) -> Path:
    """Where the mp_rank_* are."""
    if any(_rank_folders(path)):
        return path
    if not (path / TRACKER).is_file():
        inside = ", ".join(found.name for found in sorted(path.glob("iter_*")) + sorted(path.glob("release"))) if path.is_dir() else ""
        raise UserError(f"{path} is no Megatron checkpoint: it has no {TRACKER} and no mp_rank_* folders"
                        + (f"; it holds {inside}: name one of these" if inside else ""))  # fmt: skip
    text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise UserError(f"{path / TRACKER} says {text[:40]!r}; it should say 'release' or the number of an iteration")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, although {path / TRACKER} names it")
    if not any(_rank_folders(folder)):
        if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
            raise UserError(f"{folder} is in torch's distributed format; let Megatron save it with --ckpt-format torch (mp_rank_* folders)")
        raise UserError(f"{folder} holds no mp_rank_* folders")
    return folder


class Run:
    """A run of layers in one stage, as all tensor-parallel ranks hold it. Tensors go by their Megatron-core name."""

    def __init__(self, files: list[TorchFile], key: str):
        self.files, self.key = files, key
        self.keys = [self._keys_of(file) for file in files]
        numbers = {int(match[1]) for name in self.keys[0] if (match := re.match(r"decoder\.layers\.(\d+)\.", name))}
        if gaps := [number for number in range(max(numbers, default=0) + 1) if number not in numbers]:
            raise UserError(f"{files[0].path} lacks layer {', '.join(map(str, gaps[:8]))} of its stage ({key})")
        self.layers = len(numbers)

    def _keys_of(self, file: TorchFile) -> dict[str, tuple[str, ...]]:
        """Megatron-core name -> the way to each tensor within the file, however the file spells it."""
        if not isinstance(file.content, dict) or not isinstance(file.content.get(self.key), Mapping):
            raise UserError(f'{file.path} has no "{self.key}", where Megatron keeps the weights')
        return {canonical(".".join(keys)): (self.key, *keys) for keys, value in _leaves(file.content[self.key])
                if isinstance(value, Tensor) and not keys[-1].endswith(("_extra_state", "inv_freq"))}  # fmt: skip

    def __contains__(self, mcore: str) -> bool:
        return mcore in self.keys[0]

    def tensor(self, mcore: str, rank: int = 0) -> Tensor:
        """Shape and dtype of a shard, without its data."""
        value = self.files[rank].content
        for key in self.keys[rank][mcore]:
            value = value[key]
        return value

    def shape(self, mcore: str) -> torch.Size | None:
        return self.tensor(mcore).shape if mcore in self else None

    def readers(self, mcore: str) -> list[Callable[[], Tensor]]:
        """Functions that read the shards of all ranks."""
        return [file.reader(*keys[mcore]) for file, keys in zip(self.files, self.keys)]

    def misfits(self, wanted: list[Piece], shapes: dict[str, torch.Size], padded: int) -> list[str]:
        """What is missing, unknown or misshapen, on each rank."""
        found, known = [], {piece.mcore for piece in wanted}
        for rank, (file, keys) in enumerate(zip(self.files, self.keys)):
            where = f"{file.path.parent.name}/{file.path.name}"
            found += [f"{where} lacks {piece.mcore}" for piece in wanted if piece.mcore not in keys]
            found += [f"{where} holds {'.'.join(way[1:])}, unknown here" for name, way in keys.items() if name not in known]
            for piece in (piece for piece in wanted if piece.mcore in keys):
                tensor, name = self.tensor(piece.mcore, rank), ".".join(keys[piece.mcore][1:])
                shape = shard_shape(piece, shapes, len(self.files), padded)
                if tensor.shape != shape:
                    found.append(f"{where}: {name} is {tuple(tensor.shape)} and should be {tuple(shape)}")
                elif piece.mcore in self and tensor.dtype != self.tensor(piece.mcore).dtype:
                    found.append(f"{where}: {name} is {tensor.dtype}, and {self.tensor(piece.mcore).dtype} on rank 0")
        return found


class Checkpoint:
    """The files of all ranks, opened and compared with each other before any weights are read."""

    def __init__(self, folder: Path):
        self.folder, self.odd, self._differing, self._fused = folder, [], [], ()
        paths = self._find_files()
        some = min(paths)
        opened = {some: TorchFile(paths[some], INERT)} if paths[some].is_file() else {}
        content = opened[some].content if opened and isinstance(opened[some].content, dict) else {}
        self.where, self.args = paths[some], as_dict(content.get("args"))
        if wrong := [name for name in NUMBERS if not isinstance(self.args.get(name, 0) or 0, (int, float))]:
            raise UserError(f"{self.where}: among the arguments, {', '.join(f'{name} {self.args[name]!r}' for name in wrong)} is no number")
        self._check_complete(paths)
        files = {place: opened.get(place) or TorchFile(path, INERT) for place, path in paths.items()}
        # Virtual stages take turns: model0 of all stages comes before model1 of the first.
        keys = sorted((key for key in content if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:]))
        self.virtual, self.iteration = len(keys), content.get("iteration")
        self.runs = [Run([files[rank, stage] for rank in range(self.tp)], key) for key in keys or ["model"] for stage in range(self.pp)]
        self._check_version(content)
        spelled = next(iter(self.runs[0].keys[0].values()), ())
        self.names = "legacy" if "language_model" in ".".join(spelled) else "mcore"
        ignored = {key for file in files.values() for key in file.content if key in NOT_WEIGHTS}
        self.odd += [f"left out: {', '.join(sorted(ignored))}"] if ignored else []

    def _find_files(self) -> dict[tuple[int, int], Path]:
        """(tensor-parallel rank, stage) -> file. Raises UserError where the folders do not fit together."""
        folders = _rank_folders(self.folder)
        if any(match[3] for match, _ in folders):
            raise UserError(f"{self.folder} holds {folders[0][1].name}: a model with experts, which is no Llama")
        if len({match[2] is None for match, _ in folders}) == 2:
            raise UserError(f"{self.folder} holds mp_rank_TT and mp_rank_TT_PPP folders: two checkpoints in one place; move one away")
        self.in_stages = folders[0][0][2] is not None
        paths = {}
        for match, place in folders:
            names = [name for name in FILE_NAMES if (place / name).is_file()]
            paths[int(match[1]), int(match[2] or 0)] = place / (names or FILE_NAMES)[0]
        return paths

    def _check_complete(self, paths: dict[tuple[int, int], Path]) -> None:
        """Every rank has a file; of ranks that are missing at the end, the arguments tell."""
        found = tuple(max(place[axis] for place in paths) + 1 for axis in (0, 1))
        told = tuple(int(self.args.get(f"{kind}_model_parallel_size") or 0) for kind in ("tensor", "pipeline"))
        self.tp, self.pp = map(max, found, told)
        places = [(rank, stage) for stage in range(self.pp) for rank in range(self.tp)]
        missing = [f"{rank_folder(rank, stage, self.in_stages or self.pp > 1)}/{FILE_NAMES[0]}" for rank, stage in places
                   if (rank, stage) not in paths or not paths[rank, stage].is_file()]  # fmt: skip
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise UserError(f"{self.folder} (tensor parallel {self.tp}, pipeline parallel {self.pp}) lacks {', '.join(missing[:4])}{more}")
        if told != found and all(told):
            self.odd.append(f"the arguments tell of tensor parallel {told[0]}, pipeline parallel {told[1]}; the folders are of {found[0]} "
                            f"and {found[1]}, which counts")  # fmt: skip

    def _check_version(self, content: dict) -> None:
        version = content.get("checkpoint_version")
        if version is None:
            self.odd.append("no checkpoint_version in the files: 3.0 is assumed")
        elif not isinstance(version, (int, float)) or version < 2:  # before, the rows of q, k and v were mixed in other ways
            raise UserError(f"{self.where} has checkpoint_version {version!r}; 2.0 and later are read: save it again with a newer Megatron")

    def find_config(self, given: LlamaConfig | None, tokenizer: Tokenizer | None, vocab_size: int | None) -> LlamaConfig:
        """The architecture: the one that is given or that we stored ourselves, else from the arguments and the shapes."""
        if strange := strangeness(self.args, rope=given is None):
            raise UserError(f"{self.where} is no Llama as Cria knows it: its arguments say {'; '.join(strange)}")
        embedding = self.runs[0].shape(EMBEDDING)
        if embedding is None or len(embedding) != 2:
            raise UserError(f"{self.where}: {EMBEDDING} is {'missing' if embedding is None else tuple(embedding)}")
        self.padded = embedding[0] * self.tp
        stored = self.args.get("hf_config")
        known = given or (LlamaConfig.from_dict(dict(stored)) if isinstance(stored, Mapping) else None)
        vocab = self._true_vocabulary(vocab_size, known, tokenizer)
        try:
            config = dataclasses.replace(known, vocab_size=vocab) if known else LlamaConfig(**self._values(vocab, embedding[1], tokenizer))
        except UserError as error:
            raise UserError(f"{self.where}: the arguments describe no Llama: {error}") from None
        if wrong := indivisible(config, self.tp):
            raise UserError(f"{self.folder}: {'; '.join(wrong)}")
        counts = [run.layers for run in self.runs]
        if sum(counts) != config.num_hidden_layers:
            raise UserError(f"{self.folder} holds {sum(counts)} layers ({', '.join(map(str, counts))} by stage); there should be "
                            f"{config.num_hidden_layers}, says {'the config' if known else 'num_layers of the arguments'}")  # fmt: skip
        if given and self.args.get("rotary_base") not in (None, given.rope_theta):
            self.odd.append(f"the arguments say rotary_base {self.args['rotary_base']:g}, the config {given.rope_theta:g}, which counts")
        return config

    def _true_vocabulary(self, vocab_size: int | None, known: LlamaConfig | None, tokenizer: Tokenizer | None) -> int:
        """Rows of the embedding that are no padding."""
        told = {"--vocab-size": vocab_size, "the config": known and known.vocab_size,
                "true_vocab_size of the arguments": self.args.get("true_vocab_size"),
                "vocab_size of the arguments": self.args.get("vocab_size"), "the tokenizer": tokenizer and len(tokenizer)}  # fmt: skip
        source, vocab = next(((source, count) for source, count in told.items() if count is not None), (None, self.padded))
        if not 1 <= vocab <= self.padded:
            raise UserError(f"{source} says {vocab} tokens, and the embedding has {self.padded} rows ({self.padded // self.tp} on each of "
                            f"{self.tp} ranks)")  # fmt: skip
        if source is None:
            self.odd.append(f"nothing tells how many of the {self.padded} rows of the embedding are padding: all are kept (--vocab-size N, "
                            "or a tokenizer, drops the rest)")  # fmt: skip
        elif vocab < self.padded:
            self.odd.append(f"{self.padded - vocab} of {self.padded} rows of the embedding are padding ({source} says {vocab}): left out")
        return vocab

    def _values(self, vocab: int, hidden: int, tokenizer: Tokenizer | None) -> dict:
        """The fields of LlamaConfig, from the arguments; what they lack, from the shapes."""
        args, run = self.args, self.runs[0]
        if not args.get("num_attention_heads"):
            raise UserError(f"{self.where} holds no arguments that tell the number of heads; give the model's config.json: --hf-config DIR")
        heads, hidden = args["num_attention_heads"], args.get("hidden_size") or hidden
        head_dim = args.get("kv_channels") or hidden // heads
        qkv, down = (run.shape(f"decoder.layers.0.{name}.weight") for name in ("self_attention.linear_qkv", "mlp.linear_fc2"))
        groups = args.get("num_query_groups") if args.get("group_query_attention") else heads
        if args.get("group_query_attention") is None and qkv:  # H/K + 2 heads of rows in each of K groups
            groups = (qkv[0] * self.tp // head_dim - heads) // 2
        told = {"norm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon"), "rotary_base": args.get("rotary_base"),
                "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length")}  # fmt: skip
        usual = {"norm_epsilon": 1e-5, "rotary_base": 10000.0, "max_position_embeddings": 2048}
        self.odd += [f"the arguments do not tell {name}: {usual[name]:g} is assumed (--hf-config DIR tells it)"
                     for name, value in told.items() if not value]  # fmt: skip
        told = {name: value or usual[name] for name, value in told.items()}
        untied = args.get("untie_embeddings_and_output_weights")
        if untied is None:
            head = self.runs[-1].keys[0].get(HEAD, ("word_embeddings_for_head",))
            untied = "word_embeddings_for_head" not in ".".join(head)
        ids = tokenizer and {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
        return dict(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=args.get("ffn_hidden_size") or (down[1] * self.tp if down else 0),
            num_hidden_layers=args.get("num_layers") or sum(run.layers for run in self.runs), num_attention_heads=heads,
            num_key_value_heads=groups, head_dim=head_dim, max_position_embeddings=told["max_position_embeddings"],
            rms_norm_eps=told["norm_epsilon"], rope_theta=float(told["rotary_base"]), rope_scaling=rope_scaling(args),
            tie_word_embeddings=not untied, attention_bias="decoder.layers.0.self_attention.linear_qkv.bias" in run,
            mlp_bias="decoder.layers.0.mlp.linear_fc1.bias" in run, **(ids or {}),
        )  # fmt: skip

    def weights(self, config: LlamaConfig, tokenizer: Tokenizer | None) -> Weights:
        shapes, tensors, problems, start = shapes_of(config), {}, [], 0
        second = None  # a run that holds the embedding of a tied model once more
        for run in self.runs:
            first, last = run is self.runs[0], run is self.runs[-1]
            wanted = pieces(config, range(start, start + run.layers), first, last)
            start += run.layers
            if config.tie_word_embeddings and last:
                wanted = [piece for piece in wanted if piece.mcore != HEAD]
                if HEAD in run:
                    second, wanted = run, [*wanted, Piece(HEAD, (), ("model.embed_tokens.weight",), "rows")]
            # Megatron's add_qkv_bias gives biases to q, k and v, and none to o_proj; our models have all four or none.
            wanted = [piece for piece in wanted if piece.mcore in run or not piece.mcore.endswith("self_attention.linear_proj.bias")]
            problems += run.misfits(wanted, shapes, self.padded)
            for piece in wanted:
                if not problems and not (second is run and piece.mcore == HEAD):
                    tensors |= self._lazies(run, piece, config, shapes)
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(f"{self.folder} does not fit together: {'; '.join(problems[:5])}{more}")
        if second:
            tensors["model.embed_tokens.weight"] = self._compared(tensors["model.embed_tokens.weight"], second)
        if biasless := [name for name in shapes if name not in tensors]:  # only biases of o_proj can be missing by now
            for name in biasless:
                dtype = tensors[name.replace("bias", "weight")].dtype
                tensors[name] = Lazy(shapes[name], dtype, functools.partial(torch.zeros, shapes[name], dtype=dtype))
            self.odd.append(f"{len(biasless)} output projections have no bias although their q, k and v have: zeros, which change nothing")
        facts = {"names": self.names, "tensor parallel": str(self.tp), "pipeline parallel": str(self.pp),
                 "layers by stage": ", ".join(str(run.layers) for run in self.runs), "rows of the embedding": str(self.padded),
                 "iteration": str(self.iteration)}  # fmt: skip
        facts |= {"virtual stages": str(self.virtual)} if self.virtual else {}
        return Weights(config, {name: tensors[name] for name in shapes}, tokenizer, KIND, facts, self.odd)

    def _lazies(self, run: Run, piece: Piece, config: LlamaConfig, shapes: dict[str, torch.Size]) -> dict[str, Lazy]:
        dtype = run.tensor(piece.mcore).dtype
        join = functools.partial(self._join, run, piece, config, shapes)
        if len(piece.ours) == 1:
            return {piece.ours[0]: Lazy(shapes[piece.ours[0]], dtype, lambda: join()[0])}
        return {name: Lazy(shapes[name], dtype, functools.partial(self._one_of, piece, index, join))
                for index, name in enumerate(piece.ours)}  # fmt: skip

    def _one_of(self, piece: Piece, index: int, join: Callable[[], list[Tensor]]) -> Tensor:
        """One of the tensors that are fused in a piece. They are mostly asked for one after the other: it is read once for all."""
        if not self._fused or self._fused[0] is not piece:
            self._fused = (piece, join())
        return self._fused[1][index].clone()

    def _join(self, run: Run, piece: Piece, config: LlamaConfig, shapes: dict[str, torch.Size]) -> list[Tensor]:
        """Our whole tensors, out of the shards of all ranks, which are read one at a time."""
        self._fused = ()  # what is kept of the last fused piece: not two at a time
        readers = run.readers(piece.mcore)
        if len(readers) == len(piece.ours) == 1:
            return [readers[0]()[: shapes[piece.ours[0]][0]]]
        if piece.how == "copy":
            tensor = readers[0]()
            if any(not same_bits(read(), tensor) for read in readers[1:]):
                self._remark_difference(piece.ours[0])
            return [tensor]
        wholes = [torch.empty(shapes[name], dtype=run.tensor(piece.mcore).dtype) for name in piece.ours]
        axis, filled = int(piece.how == "columns"), [0] * len(wholes)
        for read in readers:
            for i, part in enumerate(parts(piece, read(), config, self.tp)):
                size = min(part.shape[axis], wholes[i].shape[axis] - filled[i])  # less where the padding of the vocabulary begins
                wholes[i].narrow(axis, filled[i], size).copy_(part.narrow(axis, 0, size))
                filled[i] += size
        return wholes

    def _remark_difference(self, name: str) -> None:
        """One remark, however many tensors differ."""
        if name not in self._differing:
            self._differing.append(name)
            self.odd[:] = [remark for remark in self.odd if not remark.startswith("ranks differ")]
            more = f" and {len(self._differing) - 1} more" if len(self._differing) > 1 else ""
            self.odd.append(f"ranks differ in {self._differing[0]}{more}, which all should have alike: rank 0's is taken")

    def _compared(self, embedding: Lazy, run: Run) -> Lazy:
        """The embedding of a tied model; when it is read, it is compared with its copy in the last stage."""

        def read() -> Tensor:
            tensor, rows = embedding.read(), self.padded // self.tp
            for rank, read_copy in enumerate(run.readers(HEAD)):
                mine = tensor[rank * rows : (rank + 1) * rows]
                if not same_bits(read_copy()[: len(mine)], mine):
                    raise UserError(f"{self.folder}: the embedding in the first stage and its copy in the last one differ (tensor-parallel "
                                    f"rank {rank}): the model is not tied; give a config that says so (--hf-config DIR)")  # fmt: skip
            return tensor

        return Lazy(embedding.shape, embedding.dtype, read)


def _leaves(node, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(key, str):
                yield from _leaves(value, (*keys, key))
    else:
        yield keys, node


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def problems(source: Weights, tp: int = 1, pp: int = 1, layers: tuple[int, ...] | None = None, names: str = "legacy",
             vocab_divisor: int = 1, vpp: int | None = None) -> list[str]:  # fmt: skip
    config, found = source.config, []
    total = config.num_hidden_layers
    found += [f"--{name} must be at least 1, not {value}" for name, value in (("tp", tp), ("pp", pp), ("vocab-divisor", vocab_divisor),
                                                                             ("vpp", 1 if vpp is None else vpp)) if value < 1]  # fmt: skip
    if names not in ("legacy", "mcore"):
        found.append(f"--names is legacy or mcore, not {names!r}")
    if found:
        return found
    found += indivisible(config, tp)
    if layers is not None and (len(layers) != pp or sum(layers) != total or min(layers, default=0) < 1):
        found.append(f"--layers {','.join(map(str, layers))} is {len(layers)} stages and {sum(layers)} layers; --pp is {pp} and the model "
                     f"has {total} layers, at least 1 for each stage")  # fmt: skip
    if layers is None and pp > total:
        found.append(f"--pp {pp} is more stages than the {total} layers")
    elif layers is None and total % pp:
        spread = ",".join(str(total // pp + (stage < total % pp)) for stage in range(pp))
        found.append(f"--pp {pp} does not divide the {total} layers; name the stages: --layers {spread}")
    if vpp is not None and layers is not None:
        found.append("--vpp and --layers exclude each other: virtual stages are of equal size")
    elif vpp is not None and (pp < 2 or total % (pp * vpp)):
        found.append(f"--vpp {vpp} needs --pp of at least 2 and stages that divide the {total} layers ({pp} x {vpp} = {pp * vpp})")
    if config.mlp_bias and not config.attention_bias:
        found.append("biases in the MLP and none in attention: Megatron's add_bias_linear has both, add_qkv_bias the latter only")
    found += rope_problems(config)
    dtypes = [{source.tensors[name].dtype for name in piece.ours} for piece in pieces(config, range(total), True, True)]
    if any(len(kinds) > 1 for kinds in dtypes):
        found.append("q, k and v, or gate and up, of one layer have different dtypes, and become one tensor; give --dtype")
    return found


def stages(config: LlamaConfig, pp: int = 1, layers: tuple[int, ...] | None = None, vpp: int | None = None) -> list[dict[str, list[Piece]]]:
    """What each pipeline stage holds: {"model": pieces}, or {"model0": …, "model1": …} with virtual stages."""
    counts = layers or [config.num_hidden_layers // (pp * (vpp or 1))] * (pp * (vpp or 1))
    found: list[dict] = [{} for _ in range(pp)]
    for index, count in enumerate(counts):
        start, (turn, stage) = sum(counts[:index]), divmod(index, pp)
        first, last = index == 0, index == len(counts) - 1
        found[stage]["model" if vpp is None else f"model{turn}"] = pieces(config, range(start, start + count), first, last)
    return found


def rank_folder(rank: int, stage: int, in_stages: bool) -> str:
    return f"mp_rank_{rank:02d}_{stage:03d}" if in_stages else f"mp_rank_{rank:02d}"


def skeleton(stage: dict[str, list[Piece]], args: argparse.Namespace, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype],
             names: str) -> dict:  # fmt: skip
    """The content of one rank's file of a stage, with tensors on the meta device in place of the weights. shapes, dtypes: of our
    whole tensors."""
    content: dict = {"args": args, "checkpoint_version": 3.0, "iteration": 1, "num_floating_point_operations_so_far": 0}
    for key, held in stage.items():
        content[key] = {}
        for piece in held:
            *way, name = piece.keys(names)
            place = content[key]
            for step in way:
                place = place.setdefault(step, {})
            shape = shard_shape(piece, shapes, args.tensor_model_parallel_size, args.padded_vocab_size)
            place[name] = torch.empty(shape, dtype=dtypes[piece.ours[0]], device="meta")
    return content


def remarks(source: Weights, **options) -> list[str]:
    return []


def size(source: Weights, tp: int = 1, pp: int = 1, layers: tuple[int, ...] | None = None, names: str = "legacy",
         vocab_divisor: int = 1, vpp: int | None = None) -> int:  # fmt: skip
    shapes, padded = shapes_of(source.config), padded_vocabulary(source.config.vocab_size, tp, vocab_divisor)
    held = [piece for stage in stages(source.config, pp, layers, vpp) for run in stage.values() for piece in run]
    return tp * (8192 * pp + sum(shard_shape(piece, shapes, tp, padded).numel() * source.tensors[piece.ours[0]].dtype.itemsize + 512
                                 for piece in held))  # fmt: skip


def write(source: Weights, out: Path, tp: int = 1, pp: int = 1, layers: tuple[int, ...] | None = None, names: str = "legacy",
          vocab_divisor: int = 1, vpp: int | None = None) -> None:  # fmt: skip
    """What ModelLink's convert_ckpt.py writes, and the tokenizer beside it. The files of a stage are written side by side, so that
    each tensor is read once, cut, and forgotten (a tied embedding twice, if there are several stages)."""
    if wrong := problems(source, tp, pp, layers, names, vocab_divisor, vpp):
        raise UserError("; ".join(wrong))
    args = arguments(source, tp, pp, layers, names, vocab_divisor, vpp)
    shapes, dtypes = shapes_of(source.config), {name: lazy.dtype for name, lazy in source.tensors.items()}
    for number, stage in enumerate(stages(source.config, pp, layers, vpp)):
        with contextlib.ExitStack() as files:
            writers = []
            for rank in range(tp):
                place = out / "iter_0000001" / rank_folder(rank, number, pp > 1)
                place.mkdir(parents=True)
                content = skeleton(stage, args, shapes, dtypes, names)
                writers.append(files.enter_context(TorchFileWriter(place / FILE_NAMES[0], content)))
            for key, held in stage.items():
                for piece in held:
                    tensors = [source.tensors[name].read() for name in piece.ours]
                    for writer, shard in zip(writers, cut(piece, tensors, source.config, tp, args.padded_vocab_size)):
                        writer.write(key, *piece.keys(names), shard)
    if source.tokenizer is not None:
        source.tokenizer.save(out / "tokenizer")
    (out / TRACKER).write_text("1", encoding="utf-8")


def expected(source: Weights, name: str, tensor: Tensor, **options) -> Tensor:
    """Nothing is rounded."""
    return tensor
