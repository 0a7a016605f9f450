"""A compiled program read as text: collectives, and traffic to memory, loops unrolled by count.

    %name = TYPE opcode(%operand, ...), attribute=..., ...        one instruction
    %name (...) -> ... {                                          a computation begins

XLA tells neither how often a loop turns (its own analysis counts a body once) nor what collectives
move; both stand in the text. A buffer whose layout says S(1), S(2), ... is in the chip's own memory
and costs no traffic. Bytes are those of the arrays, without padding to tiles.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "partition-id",
    "replica-id", "after-all", "add-dependency", "opt-barrier",
}  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as often as it happens in one run of the program.

    Attributes:
        kind: all-gather, ...
        times: how often.
        bytes: of the full array, each time.
        devices: that take part in one group.
        wire: bytes one device sends (and receives) in all, by ring algorithms.
        crosses: whether a group spans several slices.
    """

    kind: str
    times: float
    bytes: float
    devices: int
    wire: float
    crosses: bool = False


@dataclasses.dataclass
class Program:
    """What is read from a compiled program, for one device.

    Attributes:
        collectives: all of them.
        traffic: bytes between memory and the compute units.
        open_loops: loops whose length the data decides, counted as one turn.
    """

    collectives: list[Collective]
    traffic: float
    open_loops: int


def read(text: str, slice_of: Callable[[int], int] = lambda device: 0) -> Program:
    """Read `compiled.as_text()`.

    Args:
        text: of a module.
        slice_of: device number to number of its slice.
    """
    return _Reader(text, slice_of).program


class _Reader:
    def __init__(self, text: str, slice_of: Callable[[int], int]):
        self.slice_of = slice_of
        self.computations, entry = _parse(text)
        self.program = Program([], 0.0, 0)
        self._channels: set[tuple[str, float]] = set()
        self._visit(entry, 1.0, traffic=True)

    def _visit(self, name: str, times: float, *, traffic: bool) -> None:
        body = self.computations.get(name, {})
        for ins in body.values():
            op = ins.opcode.removesuffix("-start")
            if op in COLLECTIVES:
                self._collective(op, ins, body, times)
            if ins.opcode == "while":
                turns = self._turns(ins)
                self.program.open_loops += turns is None
                inner = _attribute(ins.rest, "body")
                self._visit(inner, times * (turns or 1), traffic=traffic)
            elif ins.opcode in ("call", "conditional"):
                for inner in _called(ins.rest):
                    self._visit(inner, times, traffic=traffic)
            else:
                if "calls=" in ins.rest:  # fusions and asynchronous work may hold collectives
                    self._visit(_attribute(ins.rest, "calls"), times, traffic=False)
                if traffic:
                    self.program.traffic += times * self._traffic(ins, body)

    def _turns(self, ins: Instruction) -> int | None:
        known = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', ins.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(_attribute(ins.rest, "condition"), {})
        root = next((i for i in condition.values() if i.root), None)
        if root is None or "direction=LT" not in root.rest:
            return None
        bounds = [condition[o] for o in root.operands if o in condition]
        limit = next((b for b in bounds if b.opcode == "constant"), None)
        return None if limit is None else int(limit.operands[0])

    def _collective(self, kind: str, ins: Instruction, body: dict, times: float) -> None:
        channel = _attribute(ins.rest, "channel_id", r"\d+")
        if channel and (channel, times) in self._channels:
            return  # an asynchronous one stands in the text once per part of its way
        self._channels.add((channel, times))
        groups = _groups(ins.rest)
        result = math.fsum(s for s, _ in _arrays(ins.type))
        inputs = math.fsum(s for o in ins.operands if o in body for s, _ in _arrays(body[o].type))
        if ins.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            result = max(result - inputs, 0.0)  # the type repeats the operands
        n = groups.shape[1] if groups is not None else 1
        whole = result * n if kind == "reduce-scatter" else result
        share = (n - 1) / n if n else 0.0
        wire = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * whole
        slices = set() if groups is None else {self.slice_of(int(d)) for d in groups[0]}
        self.program.collectives.append(
            Collective(kind, times, whole, n, times * wire, len(slices) > 1)
        )

    def _traffic(self, ins: Instruction, body: dict) -> float:
        op = ins.opcode
        if op in _FREE or op.endswith(("-done", "-update")):
            return 0.0
        if op.endswith("-start"):  # source, destination and a flag: the move counts once
            sizes = [s for s, _ in _arrays(ins.type) if s > 16]
            return min(sizes, default=0.0)
        if op in ("dynamic-slice", "slice", "gather"):
            return 2 * _outside(ins.type)
        if op == "dynamic-update-slice":
            return 2 * _outside(body[ins.operands[1]].type) if ins.operands[1] in body else 0.0
        inner = self.computations.get(_attribute(ins.rest, "calls"), {}) if op == "fusion" else {}
        if not inner:
            read_ = math.fsum(_outside(body[o].type) for o in ins.operands if o in body)
            return read_ + _outside(ins.type)
        total, written = 0.0, _updates(inner)
        parameters = {int(p.operands[0]): p for p in inner.values() if p.opcode == "parameter"}
        for i, operand in enumerate(ins.operands):
            if operand not in body or i not in parameters:
                continue
            size = _outside(body[operand].type)
            total += min(size, _used(inner, parameters[i].name, size))
        return total + min(_outside(ins.type), written if written else math.inf)


def _used(inner: dict[str, Instruction], name: str, size: float) -> float:
    """Bytes of an operand that a fusion touches: only slices, where it is only sliced."""
    touched = 0.0
    for ins in inner.values():
        if name not in ins.operands:
            continue
        if ins.opcode in ("dynamic-slice", "slice"):
            touched += math.fsum(s for s, _ in _arrays(ins.type))
        elif ins.opcode == "dynamic-update-slice" and ins.operands[0] == name:
            continue
        elif ins.opcode == "bitcast":
            touched += _used(inner, ins.name, size)
        else:
            return size
    return touched


def _updates(inner: dict[str, Instruction]) -> float:
    """Bytes written by a fusion that updates slices in place, else 0."""
    return math.fsum(
        size
        for ins in inner.values()
        if ins.opcode == "dynamic-update-slice" and ins.operands[1] in inner
        for size, _ in _arrays(inner[ins.operands[1]].type)
    )


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = head[2]
            entry = current if head[1] else entry
            computations[current] = {}
        elif current and line.startswith("  "):
            ins = _instruction(line)
            if ins is not None:
                computations[current][ins.name] = ins
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    end = _closing("(" + rest) - 1
    inside, rest = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(inside.split(", "))
    return Instruction(found[2], kind, opcode, operands, rest, bool(found[1]))


def _closing(text: str) -> int:
    """Where the bracket at the beginning closes."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _attribute(rest: str, name: str, value: str = r"[\w.\-]+") -> str:
    found = re.search(rf"\b{name}=%?({value})", rest)
    return found[1] if found else ""


def _called(rest: str) -> Iterator[str]:
    one = _attribute(rest, "to_apply")
    if one:
        yield one
    several = re.search(r"branch_computations=\{([^}]*)\}", rest)
    names = several[1].split(",") if several else re.findall(r"_computation=%?([\w.\-]+)", rest)
    for name in names[:1]:  # one of the branches is run
        yield name.strip().lstrip("%")


def _arrays(text: str) -> list[tuple[float, bool]]:
    """(bytes, whether in memory outside the chip) of every array in a type."""
    found = []
    for kind, dims, layout in _ARRAY.findall(text):
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits[0]) if digits else 0)
        size = math.prod(int(d) for d in dims.split(",") if d) * bits / 8
        space = re.search(r"S\((\d+)\)", layout)
        found.append((size, space is None or int(space[1]) == 0))
    return found


def _outside(text: str) -> float:
    return math.fsum(size for size, outside in _arrays(text) if outside)


def _groups(rest: str) -> Any:
    """Device numbers [groups, members], or None where the text names none."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int)
    text = rest.partition("replica_groups=")[2]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(dims)))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    listed = re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text)
    if listed:
        found = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(d) for d in group.split(",")] for group in found])
    return None


def _mesh_groups(text: str) -> Any:
    """`mesh['x'=4,'y'=64] {'y'}`: all devices that differ in y only; `'y':(2)8` is a part of y."""
    found = re.match(r"mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", text)
    if not found:
        return None
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    dims: list[tuple[str, int]] = []
    wanted: list[int] = []
    parts = {name: (pre, n) for name, pre, n in re.findall(r"'([^']+)':\((\d+)\)(\d+)", found[2])}
    names = re.findall(r"'([^']+)'", found[2])
    for name, size in sizes.items():
        if name in parts:
            before, inside = (int(x) for x in parts[name])
            cuts = [before, inside, size // (before * inside)]
        else:
            cuts = [size]
        for i, cut in enumerate(cuts):
            if name in names and (len(cuts) == 1 or i == 1):
                wanted.append(len(dims))
            dims.append((name, cut))
    shape = [n for _, n in dims]
    others = [i for i in range(len(dims)) if i not in wanted]
    members = math.prod(shape[i] for i in wanted)
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(*others, *wanted)
    return ids.reshape(-1, members)
