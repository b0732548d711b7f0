"""Golden lists of what others rely on (`surfaces`), and rules that hold for the whole tree."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import surfaces
import typer.main
from pydantic import BaseModel
from typer.testing import CliRunner

from common.config.load import load
from common.config.schema import ClusterConfig
from services.cli.main import app

ROOT = Path(__file__).parent.parent
SOURCES = [path for top in ("common", "services", "nanodeploy") for path in sorted((ROOT / top).rglob("*.py"))]
OWN = [path for path in SOURCES if "nanodeploy/v1" not in str(path)]


@pytest.mark.parametrize("module", sorted(surfaces.EXPORTS))
def test_exported_names(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(surfaces.EXPORTS[module])
    assert all(hasattr(found, name) for name in surfaces.EXPORTS[module])


def test_rpcs() -> None:
    found: dict[str, list[str]] = {}
    for proto in sorted((ROOT / "proto/nanodeploy/v1").glob("*.proto")):
        pb2 = importlib.import_module(f"nanodeploy.v1.{proto.stem}_pb2")
        for name, service in pb2.DESCRIPTOR.services_by_name.items():
            found[name] = [method.name for method in service.methods]
    assert found == surfaces.RPCS


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Those of groups of commands by both names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def test_flags() -> None:
    group: Any = typer.main.get_command(app)
    found = {
        name: [spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)]
        for name, command in commands(group)
        if not command.hidden
    }
    assert {name: sorted(flags) for name, flags in found.items()} == {
        name: sorted(flags) for name, flags in surfaces.FLAGS.items()
    }


@pytest.mark.parametrize("words", [[], ["chat"], ["bench"], ["up"]])
def test_help_has_a_short_name(words: list[str]) -> None:
    short, full = (CliRunner().invoke(app, [*words, flag]) for flag in ("-h", "--help"))
    assert (short.exit_code, short.output) == (0, full.output)


def leaves(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation)
        else:
            yield name


def test_every_config_field_is_read() -> None:
    skipped = {ROOT / "common/config/schema.py", ROOT / "common/config/load.py"}
    code = "\n".join(path.read_text() for path in OWN if path not in skipped)
    unread = [name for name in leaves(ClusterConfig) if not re.search(rf"\.{name}\b", code)]
    assert unread == []


OF_OTHERS = {ROOT / "common/kernels/gpu/deepgemm.py"}  # a library that is told by its own variables alone


def test_common_reads_no_environment() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in OWN
        if path.is_relative_to(ROOT / "common") and path not in OF_OTHERS
        for line in path.read_text().splitlines()
        if re.search(r"\bos\.(environ|getenv)\b", line)
    ]
    assert wrong == []


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): n for path in OWN if (n := len(path.read_text().splitlines())) > 450}
    assert long == {}


@pytest.mark.parametrize(
    "modules",
    [
        "services.router.__main__, services.router.server",
        "services.controller.__main__, services.controller.app",
        "services.prefill_worker.__main__, services.prefill_worker.part, services.worker.app",
        "services.decode_worker.__main__, services.decode_worker.part, services.worker.app",
        "services.cli.main, services.cli.up, services.cli.status, services.cli.doctor.command",
        "nanodeploy, nanodeploy.v1.decode_pb2_grpc, common.rpc.client",
        "common.engine.client, common.engine.scheduler, common.kvtransfer.session, common.kvcache.manager",
    ],
)
def test_no_torch_at_run_time(modules: str) -> None:
    """The contract of import-linter, seen by the interpreter."""
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'safetensors'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generated_docs_are_current() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, page in module.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"docs/{name} is out of date: run `make docs`"


def test_example_config_loads() -> None:
    assert load(str(ROOT / "deploy/example.yaml"), {}).decode.engine.model == "/models/SmolLM2-135M-Instruct"


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "clients/README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert broken == []


def test_a_folder_named_like_a_package_does_not_shadow_it(tmp_path: Path) -> None:
    """A script beside a clone of that name imports the package, as the editable installation has it on its path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}, "makes setuptools write a .pth file"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/nanodeploy.pth").write_text(f"{ROOT}\n")
    (tmp_path / "nanodeploy/docs").mkdir(parents=True)
    script = tmp_path / "script.py"
    add_site = f"import site; site.addsitedir({str(tmp_path / 'site')!r})"
    script.write_text(f"{add_site}\nimport nanodeploy as n; print(n.__all__)")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(importlib.import_module("nanodeploy").__all__)


def test_the_gpu_extra_names_what_was_run_and_no_look_alike() -> None:
    """deep-ep, deep-gemm and flash-mla are other people's uploads; the libraries' own builds have longer names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert all(requirement.count("==") == 1 for requirement in extras["gpu"])
    everything = [*project["dependencies"], *(requirement for extra in extras.values() for requirement in extra)]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in everything}
    assert names.isdisjoint({"deep-ep", "deep-gemm", "flash-mla", "ucx-py-cu12"})
