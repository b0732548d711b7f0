"""`nanodeploy kernels build`: which kernels it is about, and what it says where there is nothing to compile with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from engine_support import llama
from typer.testing import CliRunner

from common.attention import ragged
from common.attention.flashinfer import HEAD_DIMS
from common.attention.flashinfer_modules import Module, wanted
from common.config import HandoffConfig
from common.engine.build import BuiltEngine, build_engine
from common.engine.kernels import latent_modules_for, modules_for, start_engines, xqa_modules_for
from services.cli import kernels
from services.cli.main import app

__all__ = ["llama"]

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def test_usual_kernels() -> None:
    found = modules_for("", "bfloat16", ["auto", "fp8_e4m3"], hopper=True)
    assert {(m.kind, m.kv_dtype, m.head_dim) for m in found} == {
        (kind, kv, dim) for kind, kv in (("fa2", BF16), ("fa3", BF16), ("fa2", FP8)) for dim in HEAD_DIMS
    }
    assert len({m.name for m in found}) == len(found)
    assert all(m.kind == "fa2" for m in modules_for("", "bfloat16", ["auto"], hopper=False))


def test_kernels_of_windows_and_drafts() -> None:
    found = wanted(BF16, BF16, 128, windows=True, drafts=True, hopper=True)
    assert [(m.kind, m.window, m.first) for m in found] == [
        ("fa2", False, False),
        ("fa2", True, False),
        ("fa3", False, False),
        ("fa3", True, False),
        ("fa2", False, True),
    ]


def test_a_name_says_what_the_kernel_is_made_from() -> None:
    names = [Module("fa2", BF16, kv, 128, window).name for kv in (BF16, FP8) for window in (False, True)]
    assert len(set(names)) == 4
    assert names[0].startswith("nanodeploy_paged_fa2_bf16_bf16_128_")


def test_kernels_of_latent_attention(llama: Path) -> None:
    assert latent_modules_for("", "bfloat16", hopper=True) == [ragged.Module(BF16, 192, 128)]
    assert latent_modules_for("", "bfloat16", hopper=False) == []
    assert latent_modules_for(str(llama), "bfloat16", hopper=True) == []


def test_a_config_without_weights_is_enough(tmp_path: Path, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_bytes()) | {"head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = modules_for(str(tmp_path), "bfloat16", ["auto"], hopper=True)
    assert [(m.kind, m.head_dim) for m in found] == [("fa2", 128), ("fa3", 128)]
    (group,) = xqa_modules_for(str(tmp_path), "bfloat16", ["auto"], hopper=True)
    assert group.head_dim == 128


def test_a_model_that_flashinfer_does_not_serve(llama: Path) -> None:
    with pytest.raises(ValueError, match="no kernels for heads of"):
        modules_for(str(llama), "bfloat16", ["auto"], hopper=True)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="flashinfer is installed")
def test_without_flashinfer() -> None:
    done = CliRunner().invoke(app, ["kernels", "build"])
    assert done.exit_code == 1
    assert "flashinfer is not installed" in done.output


def test_an_engine_is_started_for_what_triton_compiles(llama: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 128}
    start_engines(str(llama), ["auto", "fp8_e4m3"], "cpu", options)
    notes = [orjson.loads(line)["note"] for line in capfdbinary.readouterr().out.splitlines() if line.startswith(b"{")]
    assert [note for note in notes if "are" in note] == ["they are there"] * 2
    start_engines(str(llama), ["auto"], "cpu", options | {"kv_cache_memory_bytes": 1})
    (_, note) = [orjson.loads(line)["note"] for line in capfdbinary.readouterr().out.splitlines()[-2:]]
    assert note.startswith("its kernels are left to the first start: ")


def test_it_hands_kv_over_as_a_worker_s_engine_does(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To itself, before it is ready: the kernels of that are compiled too."""
    transports: list[str] = []

    def observed(*args: Any) -> BuiltEngine:
        built = build_engine(*args)
        transports.append(built.transport.name)
        return built

    monkeypatch.setattr("common.engine.kernels.build_engine", observed)
    start_engines(str(llama), ["auto"], "cpu", {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 128})
    assert transports == list(HandoffConfig().transports)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_s_kernels_are_left(llama: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    start_engines(str(llama), ["auto"], "cuda", {})
    assert b"left to the first start: there is no GPU" in capfdbinary.readouterr().out


def test_lines_of_others_are_passed_over() -> None:
    assert kernels._parse(b"[1/2] nvcc ...\n") == {}
    assert kernels._parse(b"3\n") == {}
    assert kernels._parse(b'{"done": 1, "total": 2}\n') == {"done": 1, "total": 2}
