"""Cost of a program compiled for TPUs, by its text: cycles, collectives and kernels, loops times their trip counts.

Cycles are the compiler's estimates. Kernels have none: they are counted by their products and the static measure of
docs/kernels.md. Of a conditional the most expensive branch counts, or the cheapest.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Chip:
    """Device.

    Attributes:
        clock: cycles per second.
        macs: multiply-adds per cycle of one core.
        cores: that work as one device.
        hbm: GiB that a program may take.
        bandwidth: bytes per second of main memory, published.
        link: bytes per second to both neighbours along one axis of the torus (jax-ml.github.io/scaling-book).
        kernels: multiply-adds of attention at the static measure of docs/kernels.md, over `macs`: forward, gradient of
            the queries, gradient of keys and values.
        int4: weights per cycle of one core that `phi4mm_int4` multiplies up to 16 rows by, likewise.
        int4_start: bytes of them that are brought before it begins.
    """

    clock: float
    macs: int
    cores: int
    hbm: float
    bandwidth: float
    link: float
    kernels: tuple[float, float, float]
    int4: float
    int4_start: int

    @property
    def peak(self) -> float:
        """Operations a second."""
        return 2 * self.clock * self.macs * self.cores


CHIPS = {
    "v5e": Chip(1.503e9, 65536, 1, 15.75, 819e9, 9.0e10, (0.98, 0.96, 0.95), 1400, 512 << 10),
    "v5p": Chip(1.75e9, 65536, 2, 95.0, 2765e9, 1.8e11, (0.97, 0.97, 0.94), 1450, 2 << 20),
    "v6e": Chip(1.75e9, 262144, 1, 31.25, 1640e9, 1.8e11, (0.475, 0.465, 0.452), 1790, 1 << 20),
}


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    text: str

    @property
    def cycles(self) -> int:
        found = re.search(r'estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else 0

    @property
    def origin(self) -> str:
        """Place in the model that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


@dataclass
class Cost:
    """Cost of a program on one device.

    Attributes:
        cycles: of everything but kernels and collectives; `products` of these, of fusions with a matrix product.
        macs: multiply-adds of the products.
        kernels: cycles of each kernel.
        counts, bytes: of collectives by kind; results for gathers, operands for sums.
        overlapped: bytes moved while products are computed; `exposed`: while nothing else is done.
        seconds: estimated: in each loop what is longer, work or overlapped transfers, and all that is exposed.
        cycles_by_place: by place in the model; `other_cycles` of these, of neither products nor kernels.
        exposed_by_place: bytes of `exposed`, by what is sent and the place in the model.
    """

    cycles: float = 0.0
    products: float = 0.0
    macs: float = 0.0
    kernels: Any = field(default_factory=Counter)
    counts: Any = field(default_factory=Counter)
    bytes: Any = field(default_factory=Counter)
    overlapped: float = 0.0
    exposed: float = 0.0
    seconds: float = 0.0
    cycles_by_place: Any = field(default_factory=Counter)
    other_cycles: Any = field(default_factory=Counter)
    exposed_by_place: Any = field(default_factory=Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add another program's cost, run so many times."""
        for name in ("cycles", "products", "macs", "overlapped", "exposed", "seconds"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("kernels", "counts", "bytes", "cycles_by_place", "other_cycles", "exposed_by_place"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


def parse_module(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the computations of a compiled module, and the name of the first."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)) and not line.startswith(" "):
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple: up to where its brackets are closed
        depths = accumulate((letter == "(") - (letter == ")") for letter in rest)
        end = next(i for i, depth in enumerate(depths, 1) if depth == 0)
    return Instruction(name, rest[:end], rest[end:].strip().split("(")[0], rest)


def num_bytes(type_: str) -> float:
    """Return the bytes of an array, or of a tuple of arrays, by its type in the text."""
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", type_):
        count = BYTES.get(dtype, 0)
        for length in filter(None, shape.split(",")):
            count *= int(length)
        total += count
    return total


def cost(text: str, chip: Chip, unknown_trips: int = 1, branch: Callable[..., Cost] = max) -> Cost:
    """Count what one device does in one run of the program.

    Args:
        unknown_trips: how often a loop of unknown trips counts.
        branch: which branch of a conditional counts: max, the most expensive, or min, the cheapest.
    """
    computations, entry = parse_module(text)

    @cache
    def of(name: str) -> Cost:
        total, own = Cost(), Cost()
        body = computations.get(name, [])
        for x in body:
            if x.op == "while":
                total.add(of(_called(x, "body")), _trips(computations, _called(x, "condition"), unknown_trips))
            elif x.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", x.text)
                names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
                total.add(branch(map(of, names), key=lambda cost: cost.seconds, default=Cost()))
            elif x.op == "call":
                total.add(of(_called(x, "to_apply")))
            else:
                _add_one(own, x, body, computations, chip)
        work = (own.cycles + sum(own.kernels.values())) / chip.clock
        own.seconds = max(work, own.overlapped / chip.link) + own.exposed / chip.link
        total.add(own)
        return total

    return of(entry)


def _add_one(
    total: Cost,
    x: Instruction,
    beside: Sequence[Instruction],
    computations: Mapping[str, list[Instruction]],
    chip: Chip,
) -> None:
    total.cycles += x.cycles
    inside = computations.get(_called(x, "calls"), []) if x.op == "fusion" else []
    macs = _macs_within(inside, computations)
    if macs:
        total.products += x.cycles
        total.macs += macs
    elif x.cycles:
        total.other_cycles[_place(x)] += x.cycles
    if x.cycles:
        total.cycles_by_place[_place(x)] += x.cycles
    for kernel in (i for i in (x, *inside) if i.op == "custom-call" and "phi4mm" in i.name):
        name = re.sub(r"\.\d+$", "", kernel.name)
        cycles = _kernel_cycles(name, kernel, inside or beside, chip)
        total.kernels[name] += cycles
        total.cycles_by_place[name] += cycles
    base = x.op.removesuffix("-start")
    if base in COLLECTIVES:
        _add_collective(total, base, x, x.op.endswith("-start"), _place(x))
    elif inside:
        root = inside[-1]
        if "AsyncCollectiveStart" in root.text:
            for i in inside:
                if i.op in COLLECTIVES:
                    _add_collective(total, i.op, i, True, _place(x))
        elif _called(x, "calls").startswith("all-reduce-scatter"):
            for i in inside:
                if i.op == "all-reduce":
                    _add_collective(total, "reduce-scatter", i, False, _place(x))


def _add_collective(total: Cost, kind: str, x: Instruction, overlapped: bool, place: str) -> None:
    moved = num_bytes(x.type) / (2 if x.op.endswith("-start") else 1)  # a start has its operand beside its result
    total.counts[kind] += 1
    total.bytes[kind] += moved
    crossing = moved * (2 if kind == "all-reduce" else 1)
    if overlapped:
        total.overlapped += crossing
    else:
        total.exposed += crossing
        total.exposed_by_place[f"{kind} of {place}"] += crossing


def _macs_within(body: Sequence[Instruction], computations: Mapping[str, list[Instruction]]) -> int:
    """Count the multiply-adds of a fusion's products, those of the fusions within it included."""
    products = sum(_macs(x, body) for x in body if x.op in ("convolution", "dot"))
    inner = (computations.get(_called(x, "calls"), []) for x in body if x.op == "fusion")
    return products + sum(_macs_within(other, computations) for other in inner)


def _macs(x: Instruction, beside: Sequence[Instruction]) -> int:
    """Count the multiply-adds of a product, of which padding and the gaps of dilated operands have none.

    A batched or an outer product is to the TPU's compiler a convolution over the axis.
    """
    types = {i.name: i.type for i in beside}
    left, right = (_shape(types.get(n, "")) for n in re.findall(r"%?([\w.\-]+)", x.text.split(f" {x.op}(")[1])[:2])
    out = _shape(x.type)
    if x.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", x.text)
        return math.prod(out) * math.prod(left[int(n)] for n in contracted[1].split(",")) if contracted else 0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.text)
    if labels is None:
        return 0
    of_left, of_right, of_out = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(
        labels.groups(), (left, right, out), strict=True
    ))  # fmt: skip
    count = of_out["b"] * of_out["f"] * of_right["i"]
    window = _window(x.text)
    for axis in sorted(of_out.keys() - {"b", "f"}):
        n = int(axis)
        (low, _), stride = window["pad"][n], window["stride"][n][0]
        spread, gap = window["lhs_dilate"][n][0], window["rhs_dilate"][n][0]
        places = np.arange(of_out[axis])[:, None] * stride + np.arange(of_right[axis]) * gap - low
        count *= int(((places >= 0) & (places <= (of_left[axis] - 1) * spread) & (places % spread == 0)).sum())
    return count


def _window(text: str) -> Mapping[str, Sequence[tuple[int, ...]]]:
    """Read what a convolution's window says of each axis; nothing said is no padding, and steps of one."""
    found = re.search(r"window=\{([^}]*)\}", text)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

    def of(name: str, default: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
        if name not in given:
            return [default] * 8
        return [tuple(int(n) for n in axis.split("_")) for axis in given[name].split("x")]

    return {"pad": of("pad", (0, 0))} | {name: of(name, (1,)) for name in ("stride", "lhs_dilate", "rhs_dilate")}


def _shape(type_: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", type_)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _kernel_cycles(name: str, x: Instruction, beside: Sequence[Instruction], chip: Chip) -> float:
    """Count the matmuls of an attention kernel over the causal half of its pairs, or over all in the image encoder.

    And of a linear map of int4 weights what takes longer, their transfer or the work on them; the work alone where
    they were brought to vector memory ahead.
    """
    if name == "phi4mm_int4":
        operands = re.findall(r"%([\w.\-]+)", x.text.split("custom-call(")[1].split(")")[0])
        values = next(i.type for i in beside if i.name in operands and i.type.startswith("s4["))
        weights, transfer = math.prod(_shape(values)), chip.clock / chip.bandwidth  # cycles of a byte
        work = weights / (chip.int4 * chip.cores)
        return work if "S(1)" in values else max(weights / 2 * transfer, work) + chip.int4_start * transfer
    shapes = [[int(n) for n in s.split(",")] for s in re.findall(r"\bbf16\[([\d,]+)\]", x.text.split("metadata=")[0])]
    keys = next((s for s in shapes if len(s) == 4), None)
    queries = next((s for s in shapes if len(s) == 5), None)
    kinds = {"phi4mm_flash_fwd": (2, 0), "phi4mm_flash_bwd_dq": (3, 1), "phi4mm_flash_bwd_dkv": (4, 2)}
    if name not in kinds or keys is None or queries is None:
        return 0.0
    products, place = kinds[name]
    batch, kv_heads, group, length, head = queries
    # Of crops, of what is in the cache, and of what other devices have.
    whole = any(part in x.origin for part in ("vision", "shard_map/while", "keys_of_others"))
    visited = keys[2] if whole else min(keys[2] / 2 + 384, keys[2])  # blocks on the diagonal are whole
    macs = products * batch * kv_heads * group * length * visited * head
    return macs / (chip.macs * chip.cores * chip.kernels[place])


def _place(x: Instruction) -> str:
    """Return a short name of where in the model an instruction comes from."""
    parts = [p for p in x.origin.split("/") if p and not re.match(r"jit|while|body|closed_call|checkpoint|vmap", p)]
    backward = "gradient of " if "transpose(" in x.origin else ""
    return backward + "/".join(p for p in parts[-4:] if "(" not in p)


def _called(x: Instruction, attribute: str) -> str:
    found = re.search(attribute + r"=%?([\w.\-]+)", x.text)
    return found.group(1) if found else ""


def _trips(computations: Mapping[str, list[Instruction]], condition: str, unknown: int) -> int:
    """Read the one constant that a loop's counter is compared with, there or in what is called there.

    A loop that ends at 0 is one step; one that may end sooner, such as that of decoding, has unknown trips.
    """
    if computations[condition][-1].op == "and":
        return unknown
    names = [condition, *(_called(x, "calls") for x in computations[condition])]
    for name in names:
        texts = [x.text for x in computations.get(name, ())]
        constants = [int(n) for t in texts for n in re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", t)]
        if len(constants) == 1:
            return max(constants[0], 1)
    return unknown


def copies(text: str, at_least: int) -> list[str]:
    """Return the copies and transposes of at least so many elements in a compiled module, but for those in place."""
    in_place = set(re.findall(r"output_to_operand_aliasing=\{\{\}: \(0, \{\}\)\}, calls=(%\S+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        copy = re.search(r"= (\w+\[([\d,]+)\]\S*) (?:copy|transpose|copy-start)\((.*)", line)
        if copy and np.prod([int(n) for n in copy[2].split(",")]) >= at_least and computation not in in_place:
            found.append(f"{copy[1]} {copy[3]}")
    return found


def float_copies(text: str, at_least: int, vocabulary: int) -> list[str]:
    """Return the float arrays of at least so many elements that a module makes in main memory, but for logits.

    What is within a fusion is never in memory, and what lies in the vector memory, S(1), is not read from there.
    """
    computations, _ = parse_module(text)
    fused = {name for body in computations.values() for x in body if (name := _called(x, "calls"))}
    found = []
    for name, body in computations.items():
        for x in body if name not in fused else ():
            shape = re.match(r"(bf16|f16|f32)\[([\d,]+)\](\S*)", x.type)
            made = x.op in ("fusion", "copy", "convert", "multiply", "transpose", "dynamic-slice", "reshape")
            if not made or shape is None or "S(1)" in shape[3]:
                continue
            sizes = [int(n) for n in shape[2].split(",")]
            if sizes[-1] != vocabulary and np.prod(sizes) >= at_least:
                found.append(f"{x.name} {x.type}")
    return found
