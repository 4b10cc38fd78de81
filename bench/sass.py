"""Machine code as a warp executes it: instructions, basic blocks, the loops they lie in, and the way through each.

Only what the compilers of this project emit is understood: branches with a fixed target, and loops with one head.
"""

import re
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
_CONDITION = re.compile(r"!?U?P\d")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate that it waits for, or "", and `opcode` has its modifiers."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for what is no branch.

        A call of a slow path returns, so it is none. A call under a predicate does not return: it leaves a loop.
        """
        if self.name == "BRA" or (self.name == "CALL" and self.guard):
            found = _TARGET.search(self.operands)
            return int(found[1], 16) if found else None
        return None

    @property
    def ends(self) -> bool:
        """Whether what follows is only reached by a branch."""
        always = not self.guard and not _CONDITION.match(self.operands)
        return always and self.name in ("BRA", "EXIT", "RET")


@dataclass
class Block:
    """Instructions that are executed together, and the indices of the blocks that can follow."""

    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)


@dataclass
class Region:
    """A loop, or a whole function: its first block, all its blocks, and the outermost loops in it."""

    head: int
    blocks: set[int]
    inner: list["Region"] = field(default_factory=list)

    @property
    def own(self) -> set[int]:
        """Blocks that lie in no inner loop."""
        return self.blocks.difference(*(loop.blocks for loop in self.inner))

    def loops(self) -> Iterator["Region"]:
        """All loops in it, outer ones first."""
        for loop in self.inner:
            yield loop
            yield from loop.loops()


class Way(NamedTuple):
    """Steps that follow each other, blocks or inner loops by their first block, and how many instructions they have."""

    length: int
    step: int
    rest: "Way | None"


def functions(sass: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Architecture, as "sm_90a", name and instructions of every function that cuobjdump printed."""
    arch = ""
    for part in re.split(r"^\s*(?=Function : |arch = )", sass, flags=re.M):
        if found := re.match(r"arch = (\w+)", part):
            arch = found[1]
        elif found := re.match(r"Function : (\S+)", part):
            yield arch, found[1], [Instruction(int(a, 16), g, o, rest.strip()) for a, g, o, rest in _LINE.findall(part)]


def blocks_of(code: list[Instruction]) -> list[Block]:
    """Basic blocks, in the order of their addresses."""
    starts = {code[0].address}
    for before, here in pairwise(code):
        if before.target is not None:
            starts |= {before.target, here.address}
        elif before.ends:
            starts.add(here.address)
    blocks: list[Block] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append(Block([]))
        blocks[-1].instructions.append(instruction)
    place = {block.instructions[0].address: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.target in place:
            block.after.append(place[last.target])
        if not last.ends and i + 1 < len(blocks):
            block.after.append(i + 1)
    return blocks


def region_of(blocks: list[Block]) -> Region:
    """The whole function, with its loops."""
    reached = _reached([block.after for block in blocks], 0, ())
    before: list[list[int]] = [[] for _ in blocks]
    for i in reached:
        for j in blocks[i].after:
            before[j].append(i)
    dominators = dict.fromkeys(reached, reached) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = {i}.union(set.intersection(*(dominators[j] for j in before[i])))
            changed |= new != dominators[i]
            dominators[i] = new
    bodies: dict[int, set[int]] = {}
    for i in reached:
        for head in set(blocks[i].after) & dominators[i]:
            bodies.setdefault(head, {head}).update(_reached(before, i, {head}))
    whole = Region(0, reached)
    for head, body in sorted(bodies.items(), key=lambda item: -len(item[1])):
        outer = whole
        while holding := [loop for loop in outer.inner if head in loop.blocks]:
            outer = holding[0]
        outer.inner.append(Region(head, body))
    return whole


def _reached(after: list[list[int]], start: int, stop: Collection[int]) -> set[int]:
    """Blocks that are reached from `start` without going on from those of `stop`."""
    found, waiting = set(), [start]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting += after[here] if here not in stop else []
    return found


def way_through(
    blocks: list[Block], region: Region, needed: Container[int], marks: Callable[[Instruction], int], most: int
) -> tuple[set[int], list[Region]]:
    """The blocks and the inner loops that one run of a region passes.

    Where the code branches, it is the shortest of the ways through all loops that are `needed` (by their first blocks)
    and through the most marks, up to `most`. Marks are on what a run has to do: what it need not pass for that, such as
    paths for rare values, is left out.
    """
    home = {i: loop for loop in region.inner for i in loop.blocks}
    step_of = {i: home[i].head if i in home else i for i in region.blocks}
    order: list[int] = []
    seen: set[int] = set()

    def inside(step: int) -> set[int]:
        return home[step].blocks if step in home else {step}

    def after(step: int) -> set[int]:
        found = {j for i in inside(step) for j in blocks[i].after if j in region.blocks and j not in inside(step)}
        return {step_of[j] for j in found} - {region.head}

    def visit(step: int) -> None:
        seen.add(step)
        for following in sorted(after(step)):
            if following not in seen:
                visit(following)
        order.append(step)

    visit(region.head)
    best: dict[int, dict[tuple[int, int], Way]] = {}  # by step, and by the loops and marks from there on
    for step in order:
        code = [x for i in inside(step) for x in blocks[i].instructions]
        here, loops = sum(map(marks, code)), int(step in home and step in needed)
        ways: dict[tuple[int, int], Way] = {}
        for tail in [best[following] for following in after(step)] or [{(0, 0): Way(0, step, None)}]:
            for (passed, found), rest in tail.items():
                total = passed + loops, min(found + here, most)
                if total not in ways or len(code) + rest.length < ways[total].length:
                    ways[total] = Way(len(code) + rest.length, step, rest)
        best[step] = ways
    way: Way | None = best[region.head][max(best[region.head])]
    steps = set()
    while way is not None:
        steps.add(way.step)
        way = way.rest
    return {step for step in steps if step not in home}, [home[step] for step in steps if step in home]
