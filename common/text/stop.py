"""Stop strings in streamed text.

An Aho-Corasick automaton over all stop strings: its state is always the longest end of the text that begins
some stop string, so exactly those characters are held back and nothing else. The cost is O(text) whatever the
strings, and the result does not depend on where the text was cut into pieces: the first stop string to be
complete wins, and of several complete at the same character the longest.

    SEARCHING -> push(piece) returns safe text ... -> MATCHED (`matched` is set; push returns "")
                                                   `-> flush() returns what was held back
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The compiled stop strings of a request, shared by its choices."""

    __slots__ = ("depth", "edges", "fail", "match", "start")

    def __init__(self, stops: Sequence[str]) -> None:
        if not stops or not all(stops):
            raise ValueError("stop strings must not be empty")
        self.edges: list[dict[str, int]] = [{}]
        self.fail: list[int] = [0]
        self.depth: list[int] = [0]
        self.match: list[str] = [""]  # longest stop string that ends in the state
        for stop in stops:
            self._add(stop)
        self._link()
        self.start = re.compile("[" + "".join(re.escape(char) for char in self.edges[0]) + "]")

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            after = self.edges[state].get(char)
            if after is None:
                after = len(self.edges)
                self.edges[state][char] = after
                self.edges.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append("")
            state = after
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self.edges[0].values())
        while queue:
            state = queue.popleft()
            if not self.match[state]:
                self.match[state] = self.match[self.fail[state]]
            for char, after in self.edges[state].items():
                queue.append(after)
                back = self.fail[state]
                while back and char not in self.edges[back]:
                    back = self.fail[back]
                self.fail[after] = self.edges[back].get(char, 0)


class StopMatcher:
    """One choice's text. `matched` is the stop string found, None until then."""

    __slots__ = ("_automaton", "_held", "_include", "_state", "matched")

    def __init__(self, automaton: StopAutomaton, *, include_stop: bool = False) -> None:
        self._automaton = automaton
        self._include = include_stop
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now known to be outside any stop string."""
        if self.matched is not None:
            return ""
        automaton, state = self._automaton, self._state
        edges, fail, match = automaton.edges, automaton.fail, automaton.match
        position, end = 0, len(piece)
        while position < end:
            if not state:
                found = automaton.start.search(piece, position)
                if found is None:
                    break
                position = found.start()
            char = piece[position]
            while state and char not in edges[state]:
                state = fail[state]
            state = edges[state].get(char, 0)
            position += 1
            if match[state]:
                return self._finish(self._held + piece[:position], match[state])
        text = self._held + piece
        self._state = state
        safe = len(text) - automaton.depth[state]
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text is over: what was held back was no stop string."""
        text, self._held, self._state = self._held, "", 0
        return text

    def _finish(self, text: str, stop: str) -> str:
        self.matched = stop
        self._held, self._state = "", 0
        return text if self._include else text[: -len(stop)]
