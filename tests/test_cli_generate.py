from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from rich.console import Console

from common.errors import ConfigError, InvalidRequestError
from common.types import SamplingParams
from nanodeploy import LLM
from services.cli import report
from services.cli.generate import read_prompts, run_generate
from services.cli.main import main


def test_lines_are_prompts_or_objects() -> None:
    lines = [
        "plain text\n",
        "\n",
        '{"prompt": "from json", "max_tokens": 3, "stop": ["."]}\n',
        '{"prompt_token_ids": [1, 2]}\n',
        "{not json\n",
    ]
    found = read_prompts(lines, {"max_tokens": 9, "temperature": 0.0})
    assert [line.prompt for line in found] == ["plain text", "from json", [1, 2], "{not json"]
    assert [line.number for line in found] == [1, 3, 4, 5]
    assert [line.params.max_tokens for line in found] == [9, 3, 9, 9]
    assert found[1].params == SamplingParams(max_tokens=3, temperature=0.0, stop=(".",))


def test_jsonl_holds_objects_alone() -> None:
    """By its name, or because it begins with one."""
    broken = ["bad {\n", '{"prompt": "x"\n', '"text"\n', "null\n", '{"prompt": "x"}\n']
    for lines, named in ((broken, True), (['{"prompt": "first"}\n', *broken], False)):
        errors = [line.error.message if line.error else "" for line in read_prompts(lines, {}, objects_only=named)]
        assert errors[-1] == ""
        assert errors[-5].startswith("not valid JSON")
        assert errors[-4].startswith("not valid JSON")
        assert errors[-3:-1] == ["not a JSON object"] * 2


def test_wrong_flags_are_said_once() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        read_prompts(["a", "b"], {"top_p": 7.0})


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ('{"prompt": 3}', "needs a string `prompt`"),
        ('{"prompt_token_ids": ["a"]}', "list of numbers"),
        ('{"prompt": "x", "max_tokenz": 3}', "unknown field 'max_tokenz'"),
        ('{"prompt": "x", "top_p": 7}', "top_p must be in"),
        ('{"prompt": "x", "top_p": "much"}', "top_p"),
    ],
)
def test_bad_lines_are_named(line: str, needle: str) -> None:
    fine, bad = read_prompts(["fine", line], {})
    assert (fine.error, bad.number) == (None, 2)
    assert isinstance(bad.error, InvalidRequestError)
    assert needle in bad.error.message


def test_offline_generation_writes_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make_llama(tmp_path / "tiny")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "The quick brown"}\n{"prompt": "Workers send", "n": 2, "temperature": 1.0, "seed": 5}\n'
    )
    engine = {"dtype": "float32", "kv_cache_memory_bytes": 2**22, "num_threads": 1}
    flags = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    assert run_generate(str(model), engine, flags, str(source), str(target)) == 0
    first, second = (json.loads(line) for line in target.read_text().splitlines())
    assert (first["index"], len(first["token_ids"]), first["finish_reason"]) == (0, 6, "length")
    assert isinstance(first["text"], str)
    assert [len(choice["token_ids"]) for choice in second["choices"]] == [6, 6]
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick brown\n"))
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    assert run_generate(str(model), engine, flags, "-", "-") == 0
    assert json.loads(out.getvalue())["token_ids"] == first["token_ids"]


def test_bad_lines_do_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.make_llama(tmp_path / "tiny")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [{"prompt": "The quick"}, {"prompt_token_ids": [5] * 60}, {"prompt": "brown"}, {"prompt_token_ids": [-1]}]
    source.write_text("bad {\n\n" + "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    engine = {"dtype": "float32", "kv_cache_memory_bytes": 2**22, "num_threads": 1, "max_model_len": 48}
    assert run_generate(str(model), engine, {"max_tokens": 4, "ignore_eos": True}, str(source), str(target)) == 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [len(row.get("token_ids", ())) for row in rows] == [0, 4, 0, 4, 0]
    assert [row["error"]["line"] for row in rows if "error" in row] == [1, 4, 6]
    assert "the prompt has 60 tokens" in rows[2]["error"]["message"]
    assert {row["error"]["code"] for row in rows if "error" in row} == {"invalid_request"}
    assert "\nerror: 3 of 5 prompts failed; line 1: not valid JSON" in capsys.readouterr().err


def test_no_prompt_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    with pytest.raises(InvalidRequestError, match="no prompt in"):
        run_generate("unused", {}, {}, str(empty), "-")


@pytest.mark.parametrize(
    ("command", "environ", "path"),
    [
        (["generate", "--model", "unused", "-i", "/nope"], {}, "/nope"),
        (["generate", "--model", "unused", "-i", __file__, "-o", "/nope/x"], {}, "/nope/x"),
        (["up", "--model", "unused"], {"NANODEPLOY_STATE_DIR": "/proc/x"}, "/proc/x"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(
    command: list[str],
    environ: dict[str, str],
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before any model is looked at."""
    monkeypatch.setattr("sys.argv", ["nanodeploy", *command])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert "No such file" in line


def test_loading_shows_bars_on_a_terminal_and_nothing_elsewhere(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    for is_terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=is_terminal, width=100)
        with report.bars(console) as bar:

            def tell(stage: str, done: int, total: int, bar: Callable[[str, int, int], None] = bar) -> None:
                told.append((stage, done, total))
                bar(stage, done, total)

            with LLM(
                tiny_models.make_llama(tmp_path / "model"), loading=tell, max_model_len=64, kv_cache_memory_bytes=2**22
            ):
                pass
        assert ("loading weights" in shown.getvalue()) is is_terminal
    weights = [(done, total) for stage, done, total in told if stage == "loading weights"]
    assert weights[-1][0] == weights[-1][1] > 0
    assert all(done <= total for done, total in weights)
