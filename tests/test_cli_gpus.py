from __future__ import annotations

from pathlib import Path

import pytest

from common.config import EngineConfig
from common.engine.gpus import has_driver, num_gpus
from common.errors import ConfigError
from services.cli.gpus import deal


def engines(*sizes: int) -> list[EngineConfig]:
    return [EngineConfig(tensor_parallel_size=size) for size in sizes]


def test_gpus_are_counted_by_the_drivers_files_and_by_what_is_visible(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia10"):
        (tmp_path / name).touch()
    assert num_gpus({}, tmp_path) == 3
    assert num_gpus({"CUDA_VISIBLE_DEVICES": "1,0"}, tmp_path) == 2
    assert num_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


def test_a_driver_without_a_gpu_to_use_is_still_a_driver(tmp_path: Path) -> None:
    version = tmp_path / "version"
    assert not has_driver(version)
    version.touch()
    assert has_driver(version)
    assert num_gpus({}, tmp_path) == 0


@pytest.mark.parametrize(
    ("sizes", "count", "devices"),
    [
        ((1, 1), 2, [(0,), (1,)]),
        ((2, 1, 1), 4, [(0, 1), (2,), (3,)]),
        ((1, 1), 1, [(0,), (0,)]),
        ((2, 2), 3, [(0, 1), (0, 1)]),
    ],
)
def test_engines_get_gpus_in_turn(sizes: tuple[int, ...], count: int, devices: list[tuple[int, ...]]) -> None:
    assert [engine.devices for engine in deal(engines(*sizes), count)[0]] == devices


def test_who_shares_a_gpu_shares_its_memory() -> None:
    dealt, notes = deal(engines(1, 1, 1), 2)
    assert [engine.gpu_memory_utilization for engine in dealt] == [0.45, 0.9, 0.45]
    assert notes == ("2 engines share GPU 0, and its memory",)
    assert deal(engines(1, 1), 2)[1] == ()


def test_gpus_that_the_user_names_stay() -> None:
    named = EngineConfig(devices=(3,))
    assert deal([named, *engines(1)], 2)[0][0].devices == (3,)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 4; this machine has 2"):
        deal(engines(4), 2)
