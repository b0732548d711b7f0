from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import text_support

from common.errors import ConfigError, InvalidRequestError
from common.text import Tokenizer


def test_load_reads_the_whole_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(text_support.write_checkpoint(tmp_path, temperature=0.6, eos_token_id=[2, 0]))
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.generation_config["temperature"] == 0.6
    assert tokenizer.decode(tokenizer.encode("Hello, world!")) == "Hello, world!"
    assert Tokenizer(text_support.byte_level(), special_tokens={"eos_token": "<|im_end|>"}).eos_token_ids == (2,)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    text_support.write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ConfigError, match="not readable JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.json", b"{"),
        ("chat_template.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": [{"template": "x"}]}'),
    ],
)
def test_a_chat_template_that_cannot_be_read_is_said(tmp_path: Path, name: str, content: bytes) -> None:
    text_support.write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="chat template"):
        Tokenizer.load(tmp_path)


def test_special_tokens_are_added_on_demand() -> None:
    tokenizer = Tokenizer(text_support.byte_fallback())
    assert tokenizer.encode("a")[0] == 1
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)


def test_truncation_left_in_a_checkpoint_is_ignored() -> None:
    raw = type(text_support.byte_level()).from_str(text_support.byte_level().to_str())
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    assert len(Tokenizer(raw).encode("Hello, world! " * 4)) > 4
    assert len(Tokenizer(raw).encode("a")) == 1


def test_lone_surrogates_are_a_bad_request() -> None:
    with pytest.raises(InvalidRequestError, match="Unicode"):
        Tokenizer(text_support.byte_level()).encode("\ud800")


def test_fewest_tokens_is_a_lower_bound() -> None:
    tokenizer = Tokenizer(text_support.byte_level())
    text = "Because molecules scatter blue light " * 4000
    assert 0 < tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens("short") == 0
    assert Tokenizer(text_support.word_piece()).fewest_tokens(text) == 0


def test_encoding_lets_other_threads_run() -> None:
    tokenizer = Tokenizer(text_support.byte_level())
    text = "the quick brown fox jumps over the lazy dog " * 20000
    thread = threading.Thread(target=tokenizer.encode, args=(text,))
    beats = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.002)
        beats += 1
    thread.join()
    assert beats >= 5


def test_no_torch_no_transformers() -> None:
    code = "import sys, common.text; sys.exit(bool({'torch', 'transformers', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
