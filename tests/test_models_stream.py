"""Tensors streamed from files: boxes of any shape, rows in more pieces than there are buffers, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigError
from common.models import stream as streaming
from common.models.checkpoint import read_index
from common.models.stored import box
from common.models.stream import Wanted, is_streamable, stream


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BUFFER_NBYTES", 512)
    monkeypatch.setattr(streaming, "_NUM_BUFFERS", 3)


def test_boxes_of_tensors(tmp_path: Path) -> None:
    tensors = {
        "plane": torch.randn(70, 24),
        "line": torch.randn(300, dtype=torch.bfloat16),
        "cube": torch.randn(5, 6, 8).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    infos = read_index(tmp_path)
    boxes = [("plane", 0, 3, 60), ("plane", 1, 5, 9), ("line", 0, 100, 200), ("cube", 1, 2, 3), ("cube", 0, 0, 5)]
    wanted = []
    for name, dim, start, length in boxes:
        shape = list(tensors[name].shape)
        shape[dim] = length
        target = torch.full(shape, -1.0).to(torch.float32 if name == "line" else tensors[name].dtype)
        wanted.append(Wanted(infos[name], box(tuple(tensors[name].shape), dim, start, length), target))
    assert [one.info.name for one in stream(wanted)] == [name for name, *_ in boxes]
    for (name, dim, start, length), one in zip(boxes, wanted, strict=True):
        assert torch.equal(one.target.float(), tensors[name].narrow(dim, start, length).float())
    assert not list(stream([]))


def test_what_is_not_streamed(tmp_path: Path) -> None:
    save_file({"wide": torch.zeros(2, 200), "whole": torch.zeros(4, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert not any(is_streamable(info) for info in read_index(tmp_path).values())


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"plane": torch.randn(70, 24)}, path)
    info = read_index(tmp_path)["plane"]
    target = torch.empty(70, 24)
    wanted = Wanted(info, box((70, 24), 0, 0, 70), target)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut short"):
        list(stream([wanted]))
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        list(stream([wanted]))
