"""The child's side of an offline contender: it loads once and answers on demand, alone in its process.

One JSON object a line. On stdin {"prompts": [[id]], "max_tokens": n, "concurrency": c}; on what was stdout first
{"about": {...}} or {"error": text}, then {"seconds": s, "cpu_s": s, "token_ids": [[id]]} an answer. What libraries
print goes to stderr. Standard library only: it also runs in environments that hold nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

Ids = list[int]
Generate = Callable[[Sequence[Ids], int], list[Ids]]
"""All prompts at once, greedily, exactly that many tokens each, whatever token comes."""


def serve(load: Callable[[], tuple[dict[str, str], Generate]]) -> None:
    """Until stdin ends. `load` gives what is to be said about the contender, and how it generates."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        about, generate = load()
        generate([[5] * 64, [7] * 80], 8)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    answer({"about": about})
    for line in sys.stdin:
        asked = json.loads(line)
        prompts, size = asked["prompts"], asked["concurrency"]
        cpu, began = time.process_time(), time.perf_counter()
        rows: list[Ids] = []
        for first in range(0, len(prompts), size):
            rows += generate(prompts[first : first + size], asked["max_tokens"])
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        answer({"seconds": seconds, "cpu_s": cpu_s, "token_ids": rows})
