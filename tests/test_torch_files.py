"""torch_files.py: what torch.save writes is read without running it, and what is streamed is what torch.load reads."""

from __future__ import annotations

from settings import UserError

import argparse
import enum
import os
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch

from torch_files import ALIGNMENT, Inert, TorchFile, TorchFileWriter

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_what_is_streamed(tmp_path, mmap):
    tensors = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in DTYPES}
    structure = {
        "args": argparse.Namespace(layers=2, name="x", dtype=torch.bfloat16),
        "model": {name: meta(3, 5, dtype=tensor.dtype) for name, tensor in tensors.items()},
        "rest": [1, 2.5, None, "é", (True, {"deep": meta(())})],
    }
    with TorchFileWriter(tmp_path / "x.pth", structure) as writer:
        writer.write("rest", 4, 1, "deep", torch.tensor(7.0))
        for name in reversed(tensors):  # in any order
            writer.write("model", name, tensors[name].t().contiguous().t())  # not contiguous: its bytes are put in order
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert content["args"] == structure["args"] and content["rest"][:4] == structure["rest"][:4]
    assert content["rest"][4][1]["deep"].item() == 7
    for name, tensor in tensors.items():
        assert content["model"][name].dtype == tensor.dtype and torch.equal(content["model"][name], tensor)
        assert not mmap or content["model"][name].data_ptr() % ALIGNMENT == 0
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None


def test_a_tensor_that_is_not_as_announced_or_missing_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="announced as"), TorchFileWriter(tmp_path / "x.pth", {"a": meta(2)}) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="1 tensors were announced and not written"), \
            TorchFileWriter(tmp_path / "x.pth", {"a": meta(2), "b": meta(2)}) as writer:  # fmt: skip
        writer.write("b", torch.zeros(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_one_at_a_time(tmp_path, zipped):
    saved = {"model": {"a": torch.randn(4, 3), "b": torch.randn(2).half()}, "layers": [torch.arange(3)], "step": 7}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    file = TorchFile(tmp_path / "x.pt")
    assert file.content["step"] == 7 and file.content["model"]["a"].device.type == "meta"
    assert file.content["model"]["b"].shape == (2,) and file.content["model"]["b"].dtype == torch.float16
    assert torch.equal(file.reader("model", "a")(), saved["model"]["a"])
    assert torch.equal(file.reader("layers", 0)(), saved["layers"][0])
    first, second = file.reader("model", "a")(), file.reader("model", "a")()
    first.zero_()
    assert torch.equal(second, saved["model"]["a"])  # each has memory of its own


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_never_run(tmp_path, zipped):
    torch.save({"a": torch.zeros(2), "b": Evil(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    for inert in ((), ("megatron.",)):
        with pytest.raises(UserError, match=r"holds code beside them \(.*open\), which is never run"):
            TorchFile(tmp_path / "x.pt", inert=inert)
    assert not (tmp_path / "ran").exists()


def test_declared_classes_become_inert(tmp_path, monkeypatch):
    module = types.ModuleType("strange.enums")
    monkeypatch.setitem(sys.modules, "strange", types.ModuleType("strange"))
    monkeypatch.setitem(sys.modules, "strange.enums", module)
    module.Kind = enum.Enum("Kind", {"decoder": 1}, module="strange.enums")
    saved = {"args": argparse.Namespace(kind=module.Kind.decoder, heads=4), "a": torch.ones(2), "e": Evil(tmp_path / "ran")}
    torch.save({key: saved[key] for key in ("args", "a")}, tmp_path / "x.pt")
    torch.save(saved, tmp_path / "evil.pt")
    monkeypatch.delitem(sys.modules, "strange.enums")
    with pytest.raises(UserError, match=r"strange\.enums\.Kind"):
        TorchFile(tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt", inert=("strange.",))
    assert file.content["args"].heads == 4 and isinstance(file.content["args"].kind, Inert)
    assert file.reader("a")().sum() == 2
    with pytest.raises(UserError, match="never run"):  # what is not declared is still refused
        TorchFile(tmp_path / "evil.pt", inert=("strange.",))
    assert not (tmp_path / "ran").exists()


def test_blocked_modules_are_named_too(tmp_path):
    class Remover:
        def __reduce__(self):
            return (os.rmdir, (str(tmp_path / "folder"),))

    (tmp_path / "folder").mkdir()
    torch.save({"a": Remover()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"\(posix\.rmdir\), which is never run"):
        TorchFile(tmp_path / "x.pt")
    assert (tmp_path / "folder").exists()


def test_tensors_that_lay_on_an_npu_and_parameters_are_read(tmp_path, monkeypatch):
    module = types.ModuleType("torch_npu.utils.storage")

    def _rebuild_npu_tensor(storage, offset, size, stride, requires_grad, hooks, info):
        raise AssertionError("not to be called")

    _rebuild_npu_tensor.__module__, _rebuild_npu_tensor.__qualname__ = module.__name__, "_rebuild_npu_tensor"
    module._rebuild_npu_tensor = _rebuild_npu_tensor
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.setitem(sys.modules, name, module)

    class OnNpu(torch.Tensor):
        def __reduce_ex__(self, protocol):
            plain = self.as_subclass(torch.Tensor)
            layout = (plain.storage_offset(), tuple(plain.shape), plain.stride(), False, OrderedDict(), (0,))
            return _rebuild_npu_tensor, (torch.storage.TypedStorage(wrap_storage=plain.untyped_storage(), dtype=plain.dtype), *layout)

    weight = torch.randn(3, 4)
    torch.save({"a": weight.as_subclass(OnNpu), "b": torch.nn.Parameter(weight)}, tmp_path / "x.pt")
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.delitem(sys.modules, name)
    file = TorchFile(tmp_path / "x.pt")
    for name in "ab":
        read = file.reader(name)()
        assert torch.equal(read, weight) and type(read) is torch.Tensor and not read.requires_grad
        assert file.content[name].shape == (3, 4)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TorchFile(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a directory"):
        TorchFile(tmp_path)
    torch.save({"a": torch.randn(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for cut in (0, 1, 100, len(data) // 2, len(data) - 10):
        (tmp_path / "x.pt").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"x\.pt (cannot be read|is no file of tensors)"):
            TorchFile(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"something else entirely")
    with pytest.raises(UserError, match=r"x\.pt (cannot be read|is no file of tensors)"):
        TorchFile(tmp_path / "x.pt")
