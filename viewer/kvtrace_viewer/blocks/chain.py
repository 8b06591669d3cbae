"""Doubly linked lists in one array: what most cache policies are made of.

`links` is int32 [node, 2]: the neighbour towards the head, and the one towards the tail. Nodes
0 to num_blocks - 1 are blocks; each list has a node of its own behind them, its sentinel, linked
to itself while the list is empty. A block that is in no list has -1 towards its head.
"""

from __future__ import annotations

import numpy as np

from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@jit
def new_links(num_blocks: int, lists: int) -> Ids:
    """Links of so many blocks, in no list, and of so many empty lists."""
    links = np.full((num_blocks + lists, 2), -1, np.int32)
    for sentinel in range(num_blocks, num_blocks + lists):
        links[sentinel, 0] = sentinel
        links[sentinel, 1] = sentinel
    return links


@jit
def push_head(links: Ids, sentinel: int, node: int) -> None:
    """Put a node at the head of a list."""
    first = links[sentinel, 1]
    links[node, 0] = sentinel
    links[node, 1] = first
    links[first, 0] = node
    links[sentinel, 1] = node


@jit
def unlink(links: Ids, node: int) -> None:
    """Take a node out of its list."""
    before, behind = links[node, 0], links[node, 1]
    links[before, 1] = behind
    links[behind, 0] = before
    links[node, 0] = -1


@jit
def pop_tail(links: Ids, sentinel: int) -> int:
    """Take the node at the tail out of a list that is not empty, and return it."""
    node = int(links[sentinel, 0])
    unlink(links, node)
    return node


@jit
def push_tail(links: Ids, sentinel: int, node: int) -> None:
    """Put a node at the tail of a list."""
    last = links[sentinel, 0]
    links[node, 0] = last
    links[node, 1] = sentinel
    links[last, 1] = node
    links[sentinel, 0] = node
