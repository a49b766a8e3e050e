"""torch's own file format (.pth, .pt, .bin), one tensor at a time, and never running what is inside.

A file of torch.save is an uncompressed zip:

    NAME/data.pkl       a pickle of the structure; in place of each tensor its shape and the number of its storage
    NAME/data/0, 1 …    the storages: bare bytes
    NAME/version, NAME/byteorder

torch.save wants everything in memory at once. Here the structure is pickled first and the storages are streamed after it, so a
file of any size takes the memory of one tensor.

A pickle is a program, and a stranger's can do anything. torch.load(weights_only=True) runs none: it knows tensors, containers
and numbers, and refuses the rest. Training frameworks also store their settings as objects of their own classes; the names of
such classes may be declared inert, and then an empty `Inert` object stands in for them, whatever the real class would do.
"""

from __future__ import annotations

from settings import UserError

import argparse
import functools
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64  # of every storage within the file, as torch aligns them: a mapped tensor can then be used where it lies
STORAGES = {torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
            torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
            torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
            torch.bool: torch.BoolStorage}  # fmt: skip
NPU_TENSOR = "torch_npu.utils.storage._rebuild_npu_tensor"
REFUSED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")  # how torch names what it does not run


class Inert:
    """Stands in for an object of a class that is not to be run. Keeps what the pickle said of it: .args and .state."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"Inert{self.args}"


def _rebuild_npu_tensor(storage, offset, size, stride, requires_grad, hooks, *_):
    """What older torch_npu (Ascend) calls in the pickle of a tensor that lay on an NPU. The rest is about its layout there."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TorchFile:
    """A file of torch.save, opened without running code.

    content: the structure, with tensors on the meta device (shape and dtype, no data) in place of the weights. Raises UserError
    if the file is damaged or holds anything but tensors, containers, numbers, argparse namespaces and classes named `inert`
    (whole names, or prefixes that end in a dot).
    """

    def __init__(self, path: Path, inert: tuple[str, ...] = ()):
        self.path, self._stand_ins = Path(path), [argparse.Namespace, (_rebuild_npu_tensor, NPU_TENSOR)]
        if not self.path.is_file():
            raise UserError(f"{path} {'is a directory; a file is needed' if self.path.is_dir() else 'does not exist'}")
        with self.path.open("rb") as file:
            self._mapped = file.read(2) == b"PK"  # a zip; files older than torch 1.6 are not: they are read whole, one at a time
        if self._mapped and inert:
            try:
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
            except Exception as error:  # damaged bytes make the unpickler raise anything
                raise self._unreadable(error) from None
            wanted = [name for name in unknown if name in inert or name.startswith(tuple(n for n in inert if n.endswith(".")))]
            self._stand_ins += [(Inert, name) for name in wanted]
        self.content = self._load("meta")

    def mapped(self):
        """The structure with its tensors where they lie in the file: what is touched stays in memory as long as they do."""
        return self._load("cpu") if self._mapped else _whole(self)

    def reader(self, *keys, mapped: bool = False) -> Callable[[], Tensor]:
        """A function that reads content[keys[0]][keys[1]]…: a CPU tensor in memory of its own, the file closed again; or, `mapped`,
        where it lies in the file."""

        def read() -> Tensor:
            value = self.mapped()
            for key in keys:
                value = value[key]
            return value.detach() if mapped else value.detach().clone()

        return read

    def _load(self, device: str):
        try:
            with torch.serialization.safe_globals(self._stand_ins):
                return torch.load(self.path, map_location=device, weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            name = REFUSED.search(str(error))
            raise UserError(f"{self.path} is no file of tensors, or holds code beside them{f' ({name[1]})' if name else ''}, which is "
                            "never run; convert it to safetensors where it comes from") from None  # fmt: skip
        except Exception as error:  # damaged bytes make the unpickler raise anything
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        text = " ".join(str(error).split())[:160]
        return UserError(f"{self.path} cannot be read ({text}); it may be truncated: copy or download it again")


@functools.lru_cache(maxsize=1)
def _whole(file: TorchFile):
    """All of a file that cannot be mapped; of the last such file only."""
    return file._load("cpu")


class TorchFileWriter:
    """Write what torch.load reads, with one tensor in memory at a time.

        with TorchFileWriter(path, {"model": {"a.weight": torch.empty(3, 4, device="meta")}}) as writer:
            writer.write("model", "a.weight", tensor)

    content: the structure, with a tensor on the meta device where each tensor goes; write() takes them in any order. A tensor
    of another shape or dtype than announced is a ValueError, and so is leaving the block with tensors missing.
    """

    def __init__(self, path: Path, content):
        self.content, self._numbers = content, {}
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._folder = Path(path).stem
        self._record("data.pkl", self._pickled())
        self._record("byteorder", b"little")
        self._missing = dict(self._numbers)

    def _pickled(self) -> bytes:
        """torch's pickle of the content: a tensor is a call of _rebuild_tensor_v2 on ("storage", class, number, place, length)."""
        numbers = self._numbers

        class Storage:
            def __init__(self, tensor: Tensor):
                self.told = ("storage", STORAGES[tensor.dtype], numbers.setdefault(id(tensor), str(len(numbers))), "cpu", tensor.numel())

        class Pickler(pickle.Pickler):
            def reducer_override(self, value):
                if isinstance(value, Tensor):
                    layout = (Storage(value), 0, tuple(value.shape), value.contiguous().stride(), False, OrderedDict())
                    return torch._utils._rebuild_tensor_v2, layout
                return NotImplemented

            def persistent_id(self, value):
                return value.told if isinstance(value, Storage) else None

        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(self.content)
        return buffer.getvalue()

    def write(self, *keys_and_tensor) -> None:
        *keys, tensor = keys_and_tensor
        announced = self.content
        for key in keys:
            announced = announced[key]
        if (tensor.shape, tensor.dtype) != (announced.shape, announced.dtype):
            raise ValueError(f"{'.'.join(map(str, keys))} is {tuple(tensor.shape)} {tensor.dtype}, announced as "
                             f"{tuple(announced.shape)} {announced.dtype}")  # fmt: skip
        self._record(f"data/{self._missing.pop(id(announced))}", tensor_bytes(tensor))

    def _record(self, name: str, data) -> None:
        info = zipfile.ZipInfo(f"{self._folder}/{name}")
        info.file_size = len(data)
        large = len(data) > 2**31 - 1
        start = self._file.fp.tell() + 30 + len(info.filename.encode()) + 4 + (20 if large else 0)  # the record's header
        padding = -start % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._file.open(info, "w", force_zip64=large) as record:
            record.write(data)

    def __enter__(self) -> TorchFileWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self._missing:
            self._file.close()
            raise ValueError(f"{len(self._missing)} tensors were announced and not written")
        if kind is None:
            self._record("version", b"3\n")
        self._file.close()
