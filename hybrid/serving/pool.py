"""Kept prompts beyond the sequences: a tree of tokens whose nodes hold keys and values, and states where there are any.

What several prompts begin with is there once. A node has up to 256 tokens, in whole blocks of keys. Where layers have a
recurrent state a prompt can only go on from where that state was saved, which may be within a block: then a last node,
the tail, has the rest of the tokens, and nothing follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybrid.formats.block import BLOCK, round_up
from hybrid.serving.kept import Tokens, common_tokens
from hybrid.serving.prefix_files import Part, digests, open_files
from hybrid.serving.prefix_reader import Arrival, PrefixReader, Wanted

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine
    from hybrid.engine.saved import Saved

NODE_TOKENS = 256


@dataclass(eq=False)
class Node:
    """Tokens that follow those of `parent`, a root's are none. state: of recurrent layers after the last of them.

    children: by the bytes of their first block, or of all their tokens if these are fewer.
    """

    tokens: Tokens
    saved: Saved | None = None
    parent: Node | None = None
    state: npt.NDArray[np.uint8] | None = None
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return (self.saved.nbytes if self.saved else 0) + (0 if self.state is None else self.state.nbytes)

    @property
    def key(self) -> bytes:
        return self.tokens[:BLOCK].tobytes()

    def tail(self, tokens: Tokens) -> Node | None:
        """The longest child of less than a block that these tokens begin with."""
        sizes = range(min(BLOCK - 1, len(tokens)), 0, -1)
        return next((child for size in sizes if (child := self.children.get(tokens[:size].tobytes()))), None)


@dataclass(frozen=True)
class Pooled:
    """The first `tokens` tokens of a prompt, which nodes of the pool hold; of the last one perhaps only a part."""

    tokens: int
    path: tuple[Node, ...]


@dataclass(frozen=True)
class PoolReport:
    """What a pool holds, and what it did. limit: bytes that it may have. hits, hit_tokens: prompts that took something,
    and how many tokens; evicted: nodes that gave way.
    """

    nodes: int
    tokens: int
    bytes: int
    limit: int
    hits: int
    hit_tokens: int
    evicted: int


class PrefixPool:
    """The tree of an engine, within a number of bytes; what was used longest ago gives way.

    One thread calls it, between two steps. A phase (`ModelSpec.length_phase`) has a tree of its own.
    """

    def __init__(self, engine: Engine) -> None:
        self.limit: int = engine.plan.prefix_bytes
        self.nbytes = 0
        self._arriving = 0  # bytes that files being read may take
        self._tokens = self._hits = self._hit_tokens = self._evicted = 0
        self._engine = engine
        self._rewindable: bool = engine.plan.kv.repeatable
        self._files = open_files(engine)
        self._reader = PrefixReader(self._files, engine.kv.blank, not self._rewindable) if self._files else None
        self._roots: dict[int, Node] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()  # the oldest first, every node before its parent

    def __len__(self) -> int:
        return len(self._used)

    def report(self) -> PoolReport:
        """Any thread may ask."""
        counts = (self._hits, self._hit_tokens, self._evicted)
        return PoolReport(len(self._used), self._tokens, self.nbytes, self.limit, *counts)

    def find(self, prompt: Tokens, phase: int = 0) -> Pooled | None:
        """The longest beginning of a prompt that is here; its last token is always computed, for its logits."""
        known = prompt[:-1]
        path = list(self._descend(known, phase))
        if self._rewindable:
            return _pooled(path)
        return self._with_state(path, known, phase)

    def _with_state(self, path: list[tuple[Node, int]], known: Tokens, phase: int) -> Pooled | None:
        """The longest part of a path from whose end a recurrent state can go on."""
        if path and path[-1][1] < len(path[-1][0].tokens):
            path.pop()
        while True:
            end = path[-1][0] if path else self._roots.get(phase)
            tail = end.tail(known[sum(tokens for _, tokens in path) :]) if end else None
            if tail:
                path.append((tail, len(tail.tokens)))
            if tail or not path or path[-1][0].state is not None:
                return _pooled(path)
            path.pop()

    def load(self, found: Pooled, sequence: int) -> None:
        """Give a new sequence what was found."""
        start = 0
        for node in found.path:
            assert node.saved is not None
            tokens = min(len(node.tokens), found.tokens - start)
            self._engine.kv.load(node.saved, sequence, start, round_up(tokens, BLOCK))
            start += tokens
        if not self._rewindable and (state := found.path[-1].state) is not None:
            self._engine.kv.restore(sequence, state)
        self._hits += 1
        self._hit_tokens += found.tokens

    def touch(self, found: Pooled) -> None:
        """It is used now."""
        self._touch(found.path[-1])

    def cost(self, tokens: Tokens, phase: int) -> int:
        """About how many bytes more `put` needs."""
        kv, known = self._engine.plan.kv, sum(count for _, count in self._descend(tokens, phase))
        return (len(tokens) - known) * kv.token_bytes + (0 if self._rewindable else kv.fixed_bytes)

    def put(self, sequence: int, tokens: Tokens, phase: int, room: int) -> None:
        """Keep what a sequence holds after these tokens, as far as that is not here and `room` bytes are enough for the
        whole pool. Where the system has no memory left the rest is not kept either.
        """
        room -= self._arriving
        if self._rewindable:
            tokens = tokens[: len(tokens) // BLOCK * BLOCK]
        end, known, start = self._end_of(tokens, phase)
        self._touch(end)
        if self._rewindable and start == len(tokens):
            return
        with suppress(OSError, MemoryError):
            if known < len(end.tokens):
                end = self._split(end, known)
                self._touch(end)
            fresh = self._extend(end, sequence, tokens, start, room)
            if self._files and fresh:
                self._files.write(*self._parts([node for node, _ in fresh], tokens, phase))

    @property
    def reading(self) -> bool:
        """Whether files are being read, which are worth waiting for."""
        return self._reader is not None and self._reader.busy

    def fetch(self, tokens: Tokens, phase: int, room: int, begin: bool) -> bool:
        """Whether files have more of the beginning of a prompt. begin: have them read, as far as `room` bytes are
        enough for the whole pool, and nothing else is being read; then `collect` brings them.
        """
        if self._reader is None:
            return False
        assert self._files
        end, _, start = self._end_of(tokens, phase)
        entry = self._files.longest(tokens, start, phase)
        if entry is None or entry.tokens[:BLOCK].tobytes() in end.children:  # a tail that is there
            return False
        if begin and self._reader.idle:
            self._touch(end)
            self._arriving = max(0, room - self.nbytes, room // 4)
            self.shrink(room - self._arriving)
            self._reader.begin(Wanted(tokens.copy(), start, phase, self._arriving))
        return True

    def collect(self, room: int) -> None:
        """Take what was read of files, as far as `room` bytes are enough for the whole pool."""
        for arrival in self._reader.arrived() if self._reader else ():
            with suppress(OSError, MemoryError):
                self._attach(arrival, room)
        if self._reader and self._reader.idle and not self._reader.busy:
            self._arriving = 0

    def wait(self, seconds: float) -> None:
        """Until more of files was read, at most so long."""
        if self._reader:
            self._reader.wait(seconds)

    def close(self) -> None:
        """Have written what is to be kept in files."""
        if self._reader and self._files:
            self._reader.close()
            self._files.close()

    def abandon(self) -> None:
        """Leave the files to another pool, because this one is not closed; see `PrefixFiles.abandon`."""
        if self._files:
            self._files.abandon()

    def _attach(self, arrival: Arrival, room: int) -> None:
        """Have a node of what a file holds follow the tokens before it, if these are there still and it is not."""
        end, known, start = self._end_of(arrival.tokens, arrival.phase)
        part = arrival.part
        if start != arrival.start or part.tokens[:BLOCK].tobytes() in end.children:
            return
        if known < len(end.tokens):
            end = self._split(end, known)
        node = Node(part.tokens, arrival.saved, end, part.state if len(part.state) else None)
        self._link(node)
        if not self._make_room(room, set(_upwards(node))):
            self._drop(node)

    def _link(self, node: Node) -> None:
        """Count a new node, whose parent has it from now on."""
        assert node.parent is not None
        node.parent.children[node.key] = node
        self.nbytes += node.nbytes
        self._tokens += len(node.tokens)
        self._touch(node)

    def _parts(self, fresh: list[Node], tokens: Tokens, phase: int) -> tuple[list[Part], list[Part]]:
        """What files are to hold of fresh nodes, which end the path of these tokens, and of those before them."""
        nodes = [node for node in _upwards(fresh[-1]) if node.saved is not None][::-1]
        names = digests(tokens, list(accumulate((len(node.tokens) for node in nodes), initial=0)), phase)
        parts = [self._part(node, *ends) for node, ends in zip(nodes, pairwise(names), strict=True)]
        return parts[-len(fresh) :], parts[: -len(fresh)]

    def _part(self, node: Node, start: str, end: str) -> Part:
        """What a file is to hold of a node, between the beginnings with these digests."""
        assert node.saved is not None
        size = self._engine.plan.kv.token_bytes * round_up(len(node.tokens), BLOCK)
        state = np.empty(0, np.uint8) if node.state is None else node.state
        return Part(start, end, node.tokens, node.saved.memory[:size], state)

    def shrink(self, room: int) -> None:
        """Give up what was used longest ago, until this many bytes are enough."""
        while self._used and self.nbytes > room:
            self._drop(next(iter(self._used)))

    def _descend(self, tokens: Tokens, phase: int) -> Iterator[tuple[Node, int]]:
        """The nodes that hold the beginning of these tokens, and how many tokens of each: all, but for the last one."""
        node, start = self._roots.get(phase), 0
        while node and start + BLOCK <= len(tokens):
            node = node.children.get(tokens[start : start + BLOCK].tobytes())
            if node is None:
                return
            shared = common_tokens(node.tokens, tokens[start:]) // BLOCK * BLOCK
            yield node, shared
            start += shared
            if shared < len(node.tokens):
                return

    def _end_of(self, tokens: Tokens, phase: int) -> tuple[Node, int, int]:
        """The last node that holds of the beginning of these tokens, the root if none does; how many it holds, and how
        many it and those before it hold.
        """
        path = list(self._descend(tokens, phase))
        end, known = path[-1] if path else (self._roots.setdefault(phase, Node(tokens[:0])), 0)
        return end, known, sum(count for _, count in path)

    def _extend(self, end: Node, sequence: int, tokens: Tokens, start: int, room: int) -> list[tuple[Node, int]]:
        """Have the tokens from `start` on follow a node, and the state after them. Nothing before them gives way.

        Returns the nodes that have become more, each with the number of tokens up to its end.
        """
        held, fresh = set(_upwards(end)), list[tuple[Node, int]]()
        while start < len(tokens):
            size = min(NODE_TOKENS, len(tokens) - start)
            size = size // BLOCK * BLOCK or size
            part = tokens[start : start + size]
            node = end.children.get(part.tobytes())  # it may be there only if it is a tail
            if node is None:
                node = Node(part.copy(), self._engine.kv.save(sequence, start, start + round_up(size, BLOCK)), end)
                self._link(node)
                fresh.append((node, start + size))
            self._touch(node)
            held.add(node)
            if not self._make_room(room, held):
                self._drop(node)
                return fresh[:-1]
            end, start = node, start + size
        if not self._rewindable and end.state is None:
            end.state = self._engine.kv.snapshot(sequence)
            self.nbytes += end.state.nbytes
            if not self._make_room(room, held):
                self.nbytes -= end.state.nbytes
                end.state = None
                self._prune(end)
                return []
            if not fresh or fresh[-1][0] is not end:
                fresh.append((end, start))
        return fresh

    def _make_room(self, room: int, held: set[Node]) -> bool:
        """Give up what was used longest ago and is not held; returns whether that was enough."""
        while self.nbytes > room:
            oldest = next(iter(self._used))
            if oldest in held:
                return False
            self._drop(oldest)
        return True

    def _split(self, node: Node, tokens: int) -> Node:
        """Cut a node in two; returns the first, whose only child is the other."""
        assert node.saved is not None and node.parent is not None
        first = Node(node.tokens[:tokens], node.saved.part(0, tokens), node.parent)
        rest = node.saved.part(tokens, len(node.tokens))
        self.nbytes -= node.nbytes
        node.parent.children[first.key] = first
        node.tokens, node.saved, node.parent = node.tokens[tokens:], rest, first
        first.children[node.key] = node
        self.nbytes += first.nbytes + node.nbytes
        return first

    def _touch(self, node: Node) -> None:
        """It and what leads to it are used now."""
        for used in _upwards(node):
            self._used[used] = None
            self._used.move_to_end(used)

    def _drop(self, node: Node) -> None:
        """Forget a node without children."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.key], self._used[node]
        self.nbytes -= node.nbytes
        self._tokens -= len(node.tokens)
        self._evicted += 1
        self._prune(node.parent)

    def _prune(self, node: Node) -> None:
        """Forget nodes that lead nowhere: from which no recurrent state can go on."""
        if not self._rewindable and node.parent and not node.children and node.state is None:
            self._drop(node)


def _upwards(node: Node) -> Iterator[Node]:
    """A node and those that lead to it, without the root."""
    while node.parent:
        yield node
        node = node.parent


def _pooled(path: list[tuple[Node, int]]) -> Pooled | None:
    return Pooled(sum(tokens for _, tokens in path), tuple(node for node, _ in path)) if path else None
