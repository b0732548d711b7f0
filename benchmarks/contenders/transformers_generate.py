"""transformers' `generate`: one static batch, padded on the left. Arguments: model folder, dtype, threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from benchmarks.contenders.child import Generate, Ids, serve


def load() -> tuple[dict[str, str], Generate]:
    folder, dtype, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # nothing ends early, and nothing is checked for it
    about = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }

    def generate(prompts: Sequence[Ids], max_tokens: int) -> list[Ids]:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        rows: list[Ids] = out[:, longest:].tolist()
        return rows

    return about, generate


if __name__ == "__main__":
    serve(load)
