"""Prompts for the identity tests: cut from the texts below by a seed, so that every machine makes the same ones.

English, five other languages, code, tables of numbers and a conversation; a prompt of many tokens strings several
together. Each prompt differs from every other one in its first tokens, so that none is a prefix hit of another.
"""

from __future__ import annotations

import math
import random

from common.text.tokenizer import Tokenizer

ENGLISH = (
    "The tide had gone out before anyone in the village was awake, and the boats lay on their sides in the mud.",
    "She counted the steps from the gate to the well every morning, and every morning there was one more than before.",
    "A good bridge says nothing about itself; people talk about the river, the weather and the price of bread.",
    "When the lamp was finished, the old man put it in the window, where it could be seen from the road.",
    "Water expands as it freezes, which is why a pipe that was full in the evening may be split in the morning.",
    "Nobody had told the clerk that the office was closed, so he went on stamping the letters until they ran out.",
    "The second experiment gave the same answer as the first, and that worried everybody more than a difference would.",
    "Plant the beans after the last frost, two fingers deep, and give them something to climb on within a week.",
)
LANGUAGES = (
    "Le train de nuit s'arrête dans une gare sans nom, où un homme vend du café chaud et des journaux d'hier.",
    "Der Uhrmacher stellte jede Uhr im Laden auf eine andere Zeit, damit es nie für alle zugleich Abend wurde.",
    "El panadero abre la puerta antes del amanecer y deja que el olor despierte a toda la calle.",
    "Зимой река замерзает, и дети идут в школу прямо по льду, если учитель уже проверил его палкой.",
    "雨が止んだあと、庭の石はしばらく黒く光り、それからゆっくりと乾いていった。",
)
CODE = (
    "def merge(left, right):\n    out = []\n    while left and right:\n"
    "        out.append((left if left[0] <= right[0] else right).pop(0))\n    return out + left + right\n",
    "for (size_t row = 0; row < rows; ++row) {\n  float sum = 0.f;\n"
    "  for (size_t k = 0; k < depth; ++k) sum += a[row * depth + k] * x[k];\n  y[row] = sum;\n}\n",
    "SELECT city, count(*) AS visits, avg(minutes) FROM journeys\n"
    "WHERE started >= '2021-04-01' GROUP BY city HAVING count(*) > 12 ORDER BY visits DESC;\n",
    '{"name": "harbour", "berths": [4, 8, 15, 16], "open": true, "depth_m": {"low": 3.25, "high": 7.9}}\n',
)
TALK = (
    "<|im_start|>user\nWhy does bread rise?<|im_end|>\n<|im_start|>assistant\nYeast eats sugar and gives off gas."
    "<|im_end|>\n<|im_start|>user\nAnd why does it stop?<|im_end|>\n<|im_start|>assistant\n",
)


def make_prompts(tokenizer: Tokenizer, lengths: list[int], seed: int) -> list[tuple[int, ...]]:
    """One prompt of token ids for each of `lengths`, all different from their first tokens on."""
    rng = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    openings: set[tuple[int, ...]] = set()
    for length in lengths:
        prompt = _prompt(tokenizer, length, rng)
        while prompt[:16] in openings:
            prompt = _prompt(tokenizer, length, rng)
        openings.add(prompt[:16])
        prompts.append(prompt)
    return prompts


def spread(count: int, longest: int) -> list[int]:
    """`count` lengths from 1 to `longest`, evenly spaced in their logarithm."""
    return [round(math.exp(math.log(longest) * i / (count - 1))) for i in range(count)]


def _prompt(tokenizer: Tokenizer, length: int, rng: random.Random) -> tuple[int, ...]:
    ids: list[int] = []
    skip = rng.randrange(12)
    while len(ids) < length + skip:
        ids += tokenizer.encode(_piece(rng), add_special_tokens=False)
    return tuple(ids[skip : skip + length])


def _piece(rng: random.Random) -> str:
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(ENGLISH) + rng.choice((" ", "\n", "\n\n"))
    if kind < 6:
        return rng.choice(LANGUAGES) + "\n"
    if kind < 8:
        return rng.choice(CODE)
    if kind < 9:
        return ", ".join(f"{rng.uniform(-999, 9999):.{rng.randrange(4)}f}" for _ in range(rng.randrange(3, 9))) + "\n"
    return rng.choice(TALK)
