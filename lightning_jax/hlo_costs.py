"""What a compiled program does, read from its optimised HLO text: arithmetic, memory traffic, collectives.

`Compiled.cost_analysis()` counts the body of a loop once, and a model's layers are a loop. Here every computation is
counted as often as it runs: a loop of which the compiler knows how often, or whose condition compares a counter with a
constant (scans and maps are such; nothing is taken to end them sooner), any other once, so that the cost of a decode
round is that of one of its steps.

Memory traffic is what top-level instructions read and write, each array once, a sliced one by its slice; arrays that
the compiler keeps in a TPU's vector memory (layout `S(1)`) are free. It is an estimate: fusions may read less.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$\w+)"')
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing, or are counted where they are used.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_FREE |= {"copy-done", "async-done", "async-update", "opt-barrier", "optimization-barrier"}
_FREE |= {f"{kind}-done" for kind in _COLLECTIVES}


class Kernel(NamedTuple):
    """What one call of a custom kernel costs, which HLO does not say."""

    flops: float
    bytes: float


class Traffic(NamedTuple):
    """Collectives of one kind."""

    count: int
    bytes: float  # that each device sends, as a ring does it


@dataclasses.dataclass
class Costs:
    """Of one device.

    Attributes:
        flops: of matrix products and convolutions, two for each multiplication and addition.
        bytes: read and written in device memory.
        collectives: by kind, such as "all-gather".
        kernels: calls of each custom kernel, by name.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def collective_bytes(self) -> float:
        return sum(traffic.bytes for traffic in self.collectives.values())


def of_program(hlo_text: str, kernels: Mapping[str, Kernel] | None = None) -> Costs:
    """The costs of a compiled program, from `Compiled.as_text()`.

    Args:
        hlo_text: optimised, of one device.
        kernels: costs of custom kernels, by the beginning of their names; one that is not among them costs what its
            operands and results have in bytes.
    """
    computations, entry = _parse(hlo_text)
    walk = _Walk(computations, kernels or {})
    walk.visit(entry, 1)
    return walk.costs


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # operands and attributes as written
    is_root: bool

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def collective(self) -> str | None:
        kind = self.opcode.removesuffix("-start")
        return kind if kind in _COLLECTIVES else None


_Computation = dict[str, _Instruction]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))):
            root, name, type_, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", _inside_parentheses(rest))
            current[name] = _Instruction(name, type_, opcode, operands, rest, bool(root))
    return computations, entry


def _inside_parentheses(rest: str) -> str:
    depth = 1
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if not depth:
            return rest[:i]
    return rest


def _shapes(type_: str) -> Iterator[tuple[list[int], float, bool]]:
    """(dimensions, bytes, whether in device memory) of each array of a type."""
    for dtype, dims, layout in _SHAPE.findall(type_):
        sizes = [int(size) for size in dims.split(",") if size]
        itemsize = _BYTES.get(dtype)
        if itemsize is None:
            bits = re.search(r"\d+", dtype)
            itemsize = int(bits.group()) / 8 if bits else 0
        yield sizes, math.prod(sizes) * itemsize, "S(1)" not in layout


def _memory_bytes(type_: str) -> float:
    return sum(size for _, size, in_memory in _shapes(type_) if in_memory)


def _kernel_name(x: _Instruction) -> str:
    """Of a custom kernel; of Pallas's for GPU, which are all `pallas_call`, what it was called there."""
    name = x.name.rstrip("0123456789.")
    pallas = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call"', x.rest)
    return pallas.group(1) if pallas and name == "pallas_call" else name


class _Walk:
    """Adds up the costs of computations, each as often as it runs."""

    def __init__(self, computations: dict[str, _Computation], kernels: Mapping[str, Kernel]):
        self.costs = Costs()
        self._computations = computations
        self._kernels = kernels
        self._channels: set[str] = set()

    def visit(self, name: str, times: int, *, fused: bool = False) -> None:
        computation = self._computations[name]
        for x in computation.values():
            if x.collective:
                self._collective(x, computation, times)
            elif x.opcode == "convolution":
                self.costs.flops += times * _convolution_flops(x, computation)
            elif x.opcode == "dot":
                self.costs.flops += times * _dot_flops(x, computation)
            if _KERNEL.search(x.rest):
                self._count_kernel(x, times)
            if not fused:
                self.costs.bytes += times * self._bytes(x, computation)
            self._callees(x, times, fused)

    def _callees(self, x: _Instruction, times: int, fused: bool) -> None:
        if x.opcode == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.rest)
            trips = int(known.group(1)) if known else self._trips(x.called("condition"))
            self.visit(x.called("body"), times * trips, fused=fused)
        elif x.opcode == "fusion":
            self.visit(x.called("calls"), times, fused=True)
        elif x.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
            names = re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
            names += [n for n in (x.called("true_computation"), x.called("false_computation")) if n]
            if names:  # the shortest: what is done at the least
                self.visit(min(names, key=lambda n: len(self._computations[n])), times, fused=fused)
        elif x.opcode == "call":
            self.visit(x.called("to_apply"), times, fused=fused)
        elif x.opcode == "async-start" and (called := x.called("calls")):
            self.visit(called, times, fused=fused)

    def _trips(self, condition: str) -> int:
        """How often a loop runs that counts from 0 to a constant, if nothing ends it sooner; 1 for any other."""
        known = dict(self._computations[condition])
        root = next(x for x in known.values() if x.is_root)
        if root.opcode == "fusion":
            inner = self._computations[root.called("calls")]
            for x in inner.values():
                known[x.name] = known[root.operands[int(x.rest.split(")")[0])]] if x.opcode == "parameter" else x
            root = next(x for x in inner.values() if x.is_root)
        for x in [known[name] for name in root.operands] if root.opcode == "and" else [root]:
            if x.opcode == "compare" and "direction=LT" in x.rest:
                limit = known[x.operands[1]]
                if limit.opcode == "constant" and (number := re.match(r"(\d+)\)", limit.rest)):
                    return int(number.group(1))
        return 1

    def _collective(self, x: _Instruction, computation: _Computation, times: int) -> None:
        # The steps of an asynchronous collective repeat it, with the same channel.
        channel = re.search(r"channel_id=(\d+)", x.rest)
        if channel and channel.group(1) in self._channels:
            return
        if channel:
            self._channels.add(channel.group(1))
        kind = x.collective
        types = [x.type, *(computation[o].type for o in x.operands if o in computation)]
        size = max((size for type_ in types for _, size, _ in _shapes(type_)), default=0.0)
        ways = _group_size(x.rest)
        share = {"all-reduce": 2 * (ways - 1) / ways, "collective-permute": 1.0}.get(kind, (ways - 1) / ways)
        before = self.costs.collectives.get(kind, Traffic(0, 0.0))
        self.costs.collectives[kind] = Traffic(before.count + times, before.bytes + times * size * share)

    def _bytes(self, x: _Instruction, computation: _Computation) -> float:
        if x.opcode in _FREE or x.opcode in ("while", "conditional", "call", "async-start"):
            return 0.0
        operand_types = [computation[o].type if o in computation else "" for o in x.operands]
        if x.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _memory_bytes(x.type)
        if x.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _memory_bytes(operand_types[1 if x.opcode == "dynamic-update-slice" else 2])
        if x.opcode == "custom-call":
            if not _KERNEL.search(x.rest):
                return 0.0  # the compiler's own marks
            if cost := self._cost(x):
                return cost.bytes
        if x.opcode == "fusion":
            called = x.called("calls")
            read = sum(self._read(called, i, type_) for i, type_ in enumerate(operand_types))
            return read + self._written(called, x.type)
        return _memory_bytes(x.type) + sum(map(_memory_bytes, operand_types))

    def _count_kernel(self, x: _Instruction, times: int) -> None:
        name = _kernel_name(x)
        self.costs.kernels[name] = self.costs.kernels.get(name, 0) + times
        if cost := self._cost(x):
            self.costs.flops += times * cost.flops

    def _cost(self, x: _Instruction) -> Kernel | None:
        return next((cost for prefix, cost in self._kernels.items() if _kernel_name(x).startswith(prefix)), None)

    def _read(self, name: str, index: int, type_: str) -> float:
        """Bytes that a fusion reads of its operand: only the slices, where nothing else is used of it."""
        whole = _memory_bytes(type_)
        if not whole:
            return 0.0
        computation = self._computations[name]
        parameter = next(
            (x for x in computation.values() if x.opcode == "parameter" and x.rest.startswith(f"{index})")), None
        )
        if parameter is None:
            return whole
        total, aliases = 0.0, [parameter.name]
        for alias in aliases:
            for x in computation.values():
                if alias not in x.operands:
                    continue
                if x.opcode == "bitcast":
                    aliases.append(x.name)
                elif x.opcode in ("dynamic-slice", "gather", "slice") and x.operands[0] == alias:
                    total += sum(size for _, size, _ in _shapes(x.type))
                elif x.opcode == "fusion":
                    inner = x.called("calls")
                    total += sum(self._read(inner, i, type_) for i, o in enumerate(x.operands) if o == alias)
                elif x.opcode not in ("dynamic-update-slice", "scatter") or x.operands[0] != alias:
                    return whole
        return min(whole, total)

    def _written(self, name: str, type_: str) -> float:
        """Bytes that a fusion writes: only the slice, where it updates an operand in place."""
        computation = self._computations[name]
        root = next(x for x in computation.values() if x.is_root)
        roots = [computation[o] for o in root.operands if o in computation] if root.opcode == "tuple" else [root]
        total = 0.0
        for x in roots:
            while x.opcode == "bitcast" and x.operands[0] in computation:
                x = computation[x.operands[0]]
            update = {"dynamic-update-slice": 1, "scatter": 2}.get(x.opcode)
            if update is not None and x.operands[update] in computation:
                total += sum(size for _, size, _ in _shapes(computation[x.operands[update]].type))
            else:
                total += sum(size for _, size, _ in _shapes(x.type))
        return min(total, _memory_bytes(type_))


def _dims(instruction: str, computation: _Computation) -> list[int]:
    return next(_shapes(computation[instruction].type))[0]


def _dot_flops(x: _Instruction, computation: _Computation) -> float:
    lhs = _dims(x.operands[0], computation)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest).group(1)
    return 2 * math.prod(next(_shapes(x.type))[0]) * math.prod(lhs[int(i)] for i in contracted.split(",") if i)


def _convolution_flops(x: _Instruction, computation: _Computation) -> float:
    """TPU programs have matrix products as convolutions; batch axes are spatial ones, whose holes do not count."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest).groups()
    lhs, rhs = (_dims(operand, computation) for operand in x.operands[:2])
    out = next(_shapes(x.type))[0]
    window = re.search(r"window=\{([^}]*)\}", x.rest)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}

    def numbers(key: str, default: int) -> list[int]:
        return [int(n) for n in fields[key].split("x")] if key in fields else [default] * len(lhs)

    strides, lhs_dilations, rhs_dilations = (numbers(key, 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    pads = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")] if "pad" in fields else [0] * len(lhs)
    flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for axis in range(len(lhs) - 2):
        size, kernel, places = (
            dims[labels.index(str(axis))] for dims, labels in ((lhs, lhs_labels), (rhs, rhs_labels), (out, out_labels))
        )
        last = (size - 1) * lhs_dilations[axis]
        flops *= sum(
            0 <= (at := o * strides[axis] + k * rhs_dilations[axis] - pads[axis]) <= last
            and at % lhs_dilations[axis] == 0
            for o in range(places)
            for k in range(kernel)
        )
    return flops


def _group_size(attributes: str) -> int:
    """Devices that take part in a collective together."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed.group(1).split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return pairs.group(1).count("{")
    return 1
