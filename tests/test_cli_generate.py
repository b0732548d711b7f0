from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny_models

from common.errors import InvalidRequestError
from common.types import SamplingParams
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
    prompts, params = read_prompts(lines, {"max_tokens": 9, "temperature": 0.0})
    assert prompts == ["plain text", "from json", [1, 2], "{not json"]
    assert [p.max_tokens for p in params] == [9, 3, 9, 9]
    assert params[1] == SamplingParams(max_tokens=3, temperature=0.0, stop=(".",))


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
    with pytest.raises(InvalidRequestError) as caught:
        read_prompts(["fine", line], {})
    assert caught.value.message.startswith("line 2: ")
    assert needle in caught.value.message


def test_offline_generation_writes_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make_llama(tmp_path / "tiny")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('The quick brown\n{"prompt": "Workers send", "n": 2, "temperature": 1.0, "seed": 5}\n')
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
