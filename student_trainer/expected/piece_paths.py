"""The student's tokens as paths of the teacher's pieces: which tokens a piece of the teacher begins.

Every student token is cut into the teacher's pieces (` little` -> ` l`, `it`, `t`, `le`). The paths of all tokens make a
tree. Tokens below one node are the student's ways to begin a text that the teacher begins with the node's pieces, so a
teacher's probability of a piece is the probability of a set of student tokens. In the order of their paths, the tokens of a
node lie side by side: a set is a range of places.

A piece below which no token lies is longer than the student's tokens there. It stands for the longest student token that
begins the text so far. Pieces are compared as bytes, and a piece that occurs twice counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import pairwise

import numpy as np

Cut = Callable[[bytes], "tuple[bytes, ...] | None"]
"""Bytes -> the teacher's pieces of them; None where it has none."""

AS_IT_IS, WITHOUT_SPACE, WITH_SPACE = range(3)
"""How a teacher's piece reads at the beginning of a text, where one side alone puts a space before it."""


def cut_by_merges(pieces: Sequence[bytes]) -> Cut:
    """Byte-pair encoding, where pieces were numbered in the order of their merges, as trainers do."""
    numbers = {piece: number for number, piece in enumerate(pieces) if piece}  # of two equal ones, the later one

    def cut(text: bytes) -> tuple[bytes, ...] | None:
        parts = [text[i : i + 1] for i in range(len(text))]
        if any(part not in numbers for part in parts):
            return None
        while True:
            joined = [(numbers.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            known = [(number, i) for number, i in joined if number is not None]
            if not known:
                return tuple(parts)
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    return cut


def cut_by_length(pieces: Sequence[bytes]) -> Cut:
    """The longest piece that fits, again and again."""
    known = {piece for piece in pieces if piece}

    def cut(text: bytes) -> tuple[bytes, ...] | None:
        parts: list[bytes] = []
        while text:
            first = longest_prefix(known, text)
            if first is None:
                return None
            parts.append(first)
            text = text[len(first) :]
        return tuple(parts)

    return cut


def longest_prefix(pieces: Container[bytes], text: bytes) -> bytes | None:
    """The longest of `pieces` (a set or a mapping) that `text` begins with."""
    return next((text[:size] for size in range(len(text), 0, -1) if text[:size] in pieces), None)


def better_cut(pieces: Sequence[bytes], seen: Iterable[tuple[bytes, ...]]) -> Cut:
    """Of the two ways to cut, the one that agrees with more of the teacher's own cuts of some texts."""
    cuts, texts = (cut_by_merges(pieces), cut_by_length(pieces)), set(seen)
    return max(cuts, key=lambda cut: sum(cut(b"".join(parts)) == parts for parts in texts))


class PiecePaths:
    """The tree of paths. Nodes are numbers, 0 is the root; -1 is no node."""

    def __init__(
        self,
        teacher: Sequence[bytes],
        student: Sequence[bytes],
        cut: Cut,
        *,
        special: Iterable[int] = (),
        ends: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Cut every student token.

        teacher   bytes of the teacher's pieces
        student   bytes of the student's tokens that have a logit
        special   ids of the student that are no text
        ends      id of the end of a text, of teacher and student
        """
        self.teacher, self.size, self._student = list(teacher), len(teacher), list(student)
        first = {piece: number for number, piece in reversed(list(enumerate(teacher))) if piece}
        self.piece = np.array([first.get(piece, -1) for piece in teacher], dtype=np.int64)
        """[V_t] the number of each piece: that of the first one with these bytes; -1 for pieces without bytes."""
        self.piece_bytes = np.array([len(piece) for piece in teacher], dtype=np.int64)
        """[V_t]"""
        self.token_bytes = np.array([len(token) for token in student], dtype=np.int64)
        """[V]"""
        left_out = set(special)
        paths = {
            number: self._path(token, first, cut) for number, token in enumerate(student) if number not in left_out
        }
        if ends[0] is not None and ends[0] < self.size:
            self.piece[ends[0]] = ends[0]
            if ends[1] is not None and ends[1] < len(student):
                paths[ends[1]] = (ends[0],)
                self.token_bytes[ends[1]] = self.piece_bytes[ends[0]]
        self._tokens = {student[number]: number for number in sorted(paths, reverse=True) if student[number]}
        self._build(paths, len(student))
        plain = [piece[1:] if piece.startswith(b" ") else piece for piece in teacher]
        self._read = (self.teacher, plain, [b" " + piece for piece in teacher])
        self._numbers = [np.array([first.get(piece, -1) for piece in pieces], dtype=np.int64) for pieces in self._read]
        self._numbers[AS_IT_IS] = self.piece
        self._fallback: dict[tuple[int, int, int], int] = {}

    def _path(self, token: bytes, first: dict[bytes, int], cut: Cut) -> tuple[int, ...]:
        """The pieces of a token: itself where the teacher has it; () for a token that cannot be cut."""
        parts = (token,) if token in first else cut(token)
        return () if parts is None else tuple(first[part] for part in parts)

    def _build(self, paths: dict[int, tuple[int, ...]], width: int) -> None:
        """Number the nodes in the order of the paths; tokens without a path come last."""
        known = sorted((path, number) for number, path in paths.items() if path)
        others = sorted(set(range(width)) - {number for _, number in known})
        self.position = np.empty(width, dtype=np.int64)
        """[V] where each of the student's ids is in the order of the paths."""
        self.position[[number for _, number in known] + others] = np.arange(width)
        self.node = np.full(width, -1, dtype=np.int64)
        """[V] the node of each id's whole path; -1 for tokens without one."""
        nodes: dict[tuple[int, ...], int] = {(): 0}
        starts, stops, self._texts = [0], [len(known)], [b""]
        edges: list[tuple[int, int]] = []
        for position, (path, token) in enumerate(known):
            for depth in range(1, len(path) + 1):
                part = path[:depth]
                if part not in nodes:
                    nodes[part] = len(starts)
                    parent = nodes[part[:-1]]
                    edges.append((parent * self.size + part[-1], len(starts)))
                    starts.append(position)
                    stops.append(position)
                    self._texts.append(self._texts[parent] + self.teacher[part[-1]])
                stops[nodes[part]] = position + 1
            self.node[token] = nodes[path]
        edges.sort()
        self._keys = np.array([key for key, _ in edges] + [2**62], dtype=np.int64)
        self._children = np.array([child for _, child in edges] + [-1], dtype=np.int64)
        self.starts, self.stops = np.array(starts), np.array(stops)
        """[nodes] the range of places of the tokens below each node."""

    def child(self, nodes: np.ndarray, pieces: np.ndarray, reading: np.ndarray | int = AS_IT_IS) -> np.ndarray:
        """The node below each of `nodes` for each of `pieces` (numbers as in `piece`), all of one shape; -1 where none is."""
        read = self._numbers[AS_IT_IS][pieces]
        for other in (WITHOUT_SPACE, WITH_SPACE):
            read = np.where(reading == other, self._numbers[other][pieces], read) if np.any(reading == other) else read
        keys = np.where((nodes >= 0) & (read >= 0), nodes * self.size + read, -1)
        slots = self._keys.searchsorted(keys)
        return np.asarray(np.where(self._keys[slots] == keys, self._children[slots], -1))

    def ranges(self, nodes: np.ndarray, pieces: np.ndarray, reading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(starts, stops)` `[n]`: places of what each piece after each node stands for; -1 where the student has nothing."""
        below = self.child(nodes, pieces, reading)
        starts = np.where(below >= 0, self.starts[below], -1)
        stops = np.where(below >= 0, self.stops[below], -1)
        longer = np.flatnonzero(below < 0)
        keys = zip(nodes[longer].tolist(), pieces[longer].tolist(), reading[longer].tolist(), strict=True)
        places = np.array([self._first_token(*key) for key in keys], dtype=np.int64)
        starts[longer], stops[longer] = places, np.where(places >= 0, places + 1, -1)
        return starts, stops

    def _first_token(self, node: int, piece: int, reading: int) -> int:
        """Place of the longest student token that begins the text of a node and a piece; -1 where none does."""
        key = (node, piece, reading)
        if key not in self._fallback:
            token = longest_prefix(self._tokens, self._texts[node] + self._read[reading][piece])
            self._fallback[key] = -1 if token is None else int(self.position[self._tokens[token]])
        return self._fallback[key]

    def reading(self, piece: int, piece_end: int, token: int, token_end: int) -> int:
        """How the teacher's pieces read at the beginning of a text, given both first tokens and the bytes where these end."""
        marks = [
            bytes_.startswith(b" ") and end == len(bytes_) - 1
            for bytes_, end in ((self.teacher[piece], piece_end), (self._student[token], token_end))
        ]
        return AS_IT_IS if marks[0] == marks[1] else WITHOUT_SPACE if marks[0] else WITH_SPACE
