"""Triton compiles a kernel anew for a number that is 1 or that 16 divides: what a step brings must not decide that.

Else the first batch of sixteen, or the first prompt of an odd length, waits for the compiler in the middle of serving.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("common/kernels/gpu", "common/parallel")
ROOT = Path(__file__).parents[1]
OF_A_STEP = {
    *("chunks", "length", "m", "num_gates", "num_items", "num_pairs", "num_rows", "num_seqs", "num_sequences"),
    *("num_slots", "num_splits", "num_tokens", "pairs", "rows", "rows_of_tile", "table_stride", "tiles", "tokens"),
}


def launched() -> Iterator[tuple[str, set[str], set[str]]]:
    """Kernels that Python launches: name, numbers among their parameters, and those that decide nothing."""
    texts = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            others = () if node.name.startswith("_") else texts.values()
            if not any(f"{node.name}[" in code for code in (text, *others)):
                continue
            for decorator in node.decorator_list:
                if ast.unparse(decorator).startswith("triton.jit"):
                    words = decorator.keywords if isinstance(decorator, ast.Call) else []
                    free = next((ast.literal_eval(w.value) for w in words if w.arg == "do_not_specialize"), [])
                    numbers = {a.arg for a in node.args.args if a.annotation is None and not a.arg.endswith("_ptr")}
                    yield f"{path.name}:{node.name}", numbers, set(free)


def test_no_kernel_is_compiled_anew_for_what_a_step_brings() -> None:
    found = list(launched())
    assert len(found) > 40
    assert {
        name: sorted(numbers & OF_A_STEP - free) for name, numbers, free in found if numbers & OF_A_STEP - free
    } == {}
    assert all(free <= numbers for _, numbers, free in found)
