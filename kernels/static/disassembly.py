"""Reads what the compilers produced: loops and kinds of instructions, spills, widths of memory accesses.

Machine code is split into blocks; a *loop* is what graph theory calls a natural loop: a block that dominates a jump
back to it, and everything that reaches that jump. The *main loop* is, among the innermost loops with matrix
instructions, the one with the most of them. A wait for a barrier that ptxas writes as a loop of its own (sm_90 and
later spin on ``mbarrier`` in two instructions, often moved behind the function's end) is not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = [
    "IDLE_KINDS",
    "KINDS",
    "Access",
    "Instruction",
    "TileAccess",
    "accesses",
    "count_kinds",
    "main_loop",
    "natural_loops",
    "read_gcn",
    "read_sass",
    "tile_accesses",
]

KINDS = (
    "mma", "global", "local", "shared", "barrier", "predicate", "float", "integer", "control", "other", "copy", "wait",
)  # fmt: skip

# What a register allocator and a scheduler put in to their own taste, from one build to the next: no part of the work.
IDLE_KINDS = ("copy", "wait")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        opcode: without predicate and operands, "HMMA.16816.F32.BF16" or "v_mfma_f32_32x32x8_bf16".
        kind: one of :data:`KINDS`; "integer" includes addresses and moves, "global" any access to device memory,
            "local" private memory, that is spills.
        target: index of the instruction a jump leads to; None for no jump (or one that cannot be followed).
        falls_through: whether the next instruction may come after it.
    """

    opcode: str
    kind: str
    target: int | None = None
    falls_through: bool = True


_SASS_LABEL = re.compile(r"^(\.L\w+):")
_SASS_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_JUMP = re.compile(r"`\((\.L\w+)\)")

_SASS_KINDS: dict[str, str] = {
    root: kind
    for kind, roots in {
        "global": "LDG STG LDGSTS LD ST RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP",
        "local": "LDL STL",
        "shared": "LDS STS LDSM STSM ATOMS LDTM STTM UTCCP LDT STT",
        "barrier": "BAR UCGABAR_ARV UCGABAR_WAIT DEPBAR LDGDEPBAR SYNCS MEMBAR FENCE WARPSYNC WARPGROUP ERRBAR CCTL "
        "BSSY BSYNC UTCBAR ARRIVES UTMACMDFLUSH UTMACCTL NANOSLEEP YIELD",
        "predicate": "ISETP FSETP UISETP UFSETP HSETP2 DSETP PLOP3 UPLOP3 P2R R2P UP2UR UR2UP PSETP VOTE VOTEU ELECT",
        "float": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FMNMX FMNMX3 FSEL FSET FCHK MUFU HADD2 HFMA2 HMUL2 HMNMX2 HSET2 "
        "DADD DMUL DFMA F2F F2FP F2I I2F I2FP FRND F2FP UF2FP UI2F UF2I FSWZADD UFADD UFMUL UFFMA UFSEL",
        "control": "BRA BRX JMP CALL RET EXIT NOP BREAK BMOV ACQBULK PREEXIT KILL",
        "other": "S2R S2UR CS2R CS2UR R2UR UTCATOMSWS SETMAXREG USETMAXREG",
        "integer": "IADD IADD3 IADD32I IMAD IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX IABS IMUL LEA LOP LOP3 SHF SHL SHR "
        "MOV32I SEL PRMT BREV FLO POPC SGXT BMSK MOVM SHFL REDUX LDC ULDC LDCU ISCADD I2I I2IP MOV",
    }.items()
    for root in roots.split()
}


def _sass_kind(opcode: str) -> str:
    root = opcode.split(".")[0]
    # HFMA2.MMA is a half-precision multiply-add on another pipe: only the first word counts.
    if root.endswith("MMA"):
        return "mma"
    if root in _SASS_KINDS:
        return _SASS_KINDS[root]
    if root.startswith("U") and _SASS_KINDS.get(root[1:]) == "integer":
        return "integer"
    return "other"


def read_sass(text: str) -> list[Instruction]:
    """Instructions of an ``nvdisasm -c`` listing, functions one after another."""
    labels: dict[str, int] = {}
    raw: list[tuple[str | None, str, str]] = []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label.group(1)] = len(raw)
        elif code := _SASS_CODE.search(line):
            raw.append((code.group(1), code.group(2), code.group(3)))
    instructions = []
    for predicate, opcode, operands in raw:
        root = opcode.split(".")[0]
        target = None
        falls_through = True
        if root in ("BRA", "JMP"):
            jump = _SASS_JUMP.search(operands)
            target = labels.get(jump.group(1)) if jump else None
            # "BRA.U !UP0, `(.L_1)" is conditional too, and so is a divergence test before the label.
            falls_through = predicate is not None or (jump is not None and bool(operands[: jump.start()].strip(" ,")))
        elif root in ("EXIT", "RET", "BRX"):
            falls_through = predicate is not None
        # ptxas copies a register by a byte permutation that permutes nothing, for 8 or 16 of them at a time.
        kind = "copy" if root == "PRMT" and _SASS_COPY.match(operands.strip()) else _sass_kind(opcode)
        instructions.append(Instruction(opcode, kind, target, falls_through))
    return instructions


_SASS_COPY = re.compile(r"R\d+, (R\d+)(?:\.reuse)?, 0x7610, \1(?:\.reuse)?$")
_GCN_LABEL = re.compile(r"^(\.?L\w+):")
_GCN_CODE = re.compile(r"^\s+([a-z]+_\w+)\b\s*([^;]*)")


def _gcn_kind(opcode: str) -> str:
    if opcode.startswith(("v_mfma", "v_smfmac", "v_wmma")):
        return "mma"
    if opcode.startswith(("global_", "buffer_", "flat_")):
        return "global"
    if opcode.startswith("scratch_"):
        return "local"
    if opcode.startswith("ds_"):
        return "shared"
    if opcode.startswith("s_barrier"):
        return "barrier"
    if opcode.startswith(("s_waitcnt", "s_sleep", "s_nop")):
        return "wait"
    if opcode.startswith(("v_cmp", "s_cmp", "s_bitcmp")) or "saveexec" in opcode:
        return "predicate"
    if opcode.startswith(("s_branch", "s_cbranch", "s_endpgm", "s_setpc", "s_swappc", "s_setprio")):
        return "control"
    if opcode.startswith("v_") and re.search(r"_(f16|bf16|f32|f64)(_|$)", opcode):
        return "float"
    return "integer" if opcode.startswith(("v_", "s_")) else "other"


def read_gcn(text: str) -> list[Instruction]:
    """Instructions of AMD assembly, as Triton keeps it in ``asm["amdgcn"]``."""
    labels: dict[str, int] = {}
    raw: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label.group(1)] = len(raw)
        elif code := _GCN_CODE.match(line):
            raw.append((code.group(1), code.group(2).strip()))
    instructions = []
    for opcode, operands in raw:
        jump = opcode.startswith(("s_branch", "s_cbranch"))
        target = labels.get(operands) if jump else None
        falls_through = not opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
        instructions.append(Instruction(opcode, _gcn_kind(opcode), target, falls_through))
    return instructions


def natural_loops(code: list[Instruction]) -> list[frozenset[int]]:
    """Loops as sets of instruction indices; those with a common head are one loop."""
    if not code:
        return []
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    bounds = sorted(s for s in starts if s < len(code))
    block_of = {start: b for b, start in enumerate(bounds)}
    ends = [*bounds[1:], len(code)]
    successors: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        after = [block_of[end]] if last.falls_through and end < len(code) else []
        successors.append(after + ([block_of[last.target]] if last.target in block_of else []))
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for s in successors[b]:
            predecessors[s].append(b)
    dominator = _dominators(order, predecessors)

    def dominates(a: int, b: int) -> bool:
        while b != a and b != order[0]:
            b = dominator[b]
        return a == b

    loops: dict[int, set[int]] = {}
    for b in order:
        for head in successors[b]:
            if dominates(head, b):
                body = loops.setdefault(head, {head})
                pending = [b]
                while pending:
                    here = pending.pop()
                    if here not in body:
                        body.add(here)
                        pending.extend(predecessors[here])
    return [frozenset(i for b in body for i in range(bounds[b], ends[b])) for body in loops.values()]


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    seen = {0}
    order: list[int] = []
    stack = [(0, iter(successors[0]))]
    while stack:
        here, rest = stack[-1]
        for s in rest:
            if s not in seen:
                seen.add(s)
                stack.append((s, iter(successors[s])))
                break
        else:
            order.append(here)
            stack.pop()
    return order[::-1]


def _dominators(order: list[int], predecessors: Mapping[int, list[int]]) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm)."""
    rank = {b: i for i, b in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            known = [p for p in predecessors[b] if p in dominator]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if rank[new] > rank[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
            if dominator.get(b) != new:
                dominator[b] = new
                changed = True
    return dominator


_SPIN = frozenset({"barrier", "control"})


def main_loop(code: list[Instruction], kind: str = "mma") -> list[Instruction]:
    """The innermost loop with the most instructions of ``kind``, waits for barriers left out; [] if there is none."""
    loops = natural_loops(code)
    weight = {loop: sum(code[i].kind == kind for i in loop) for loop in loops}
    candidates = [a for a in loops if weight[a] and not any(b < a and weight[b] for b in loops)]
    if not candidates:
        return []
    best = max(candidates, key=lambda loop: (weight[loop], len(loop)))
    waits = {i for loop in loops if loop < best and all(code[j].kind in _SPIN for j in loop) for i in loop}
    return [code[i] for i in sorted(best - waits)]


def count_kinds(code: Iterable[Instruction]) -> dict[str, int]:
    """Number of instructions of every kind of :data:`KINDS`."""
    counts = Counter(instruction.kind for instruction in code)
    return {kind: counts[kind] for kind in KINDS}


@dataclass(frozen=True)
class Access:
    """One access to device memory: "load" or "store", bytes per thread, and "file.py:line:column" of the source."""

    direction: str
    size: int
    place: str


@dataclass(frozen=True)
class TileAccess:
    """A two-dimensional load or store in Triton's GPU IR: its element type ("bf16"), elements, and source place."""

    direction: str
    element: str
    elements: int
    place: str


_PLACE = r"([\w.\-]+:\d+:\d+)"
_PTX_PLACE = re.compile(r"^\s*\.loc\b.*//\s*" + _PLACE)
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.[bfus](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.tensor\S*")
_GCN_PLACE = re.compile(r"^\s*\.loc\b.*;\s*" + _PLACE)
_GCN_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)")
_GCN_SIZES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def accesses(text: str) -> list[Access]:
    """Accesses to device memory in PTX or in AMD assembly. A bulk tensor copy counts as 16 bytes."""
    found = []
    place = ""
    # LLVM counts the lines of inline assembly on from the line it stands for: only the first place is one.
    inline = settled = False
    for line in text.splitlines():
        if "inline asm" in line:
            inline, settled = "begin" in line, False
        elif at := _PTX_PLACE.match(line) or _GCN_PLACE.match(line):
            place = place if settled else at.group(1)
            settled = inline
        elif access := _PTX_ACCESS.search(line):
            size = int(access.group(2) or 1) * int(access.group(3)) // 8
            found.append(Access("load" if access.group(1) == "ld" else "store", size, place))
        elif copy := _PTX_COPY.search(line):
            found.append(Access("load", int(copy.group(1), 0), place))
        elif bulk := _PTX_BULK.search(line):
            found.append(Access("store" if ".global.shared" in bulk.group() else "load", 16, place))
        elif access := _GCN_ACCESS.match(line):
            found.append(Access(access.group(1), _gcn_size(access.group(2)), place))
    return found


def _gcn_size(suffix: str) -> int:
    word, _, count = suffix.removesuffix("_d16_hi").removesuffix("_d16").partition("x")
    return _GCN_SIZES.get(word, 4) * int(count or 1)


_LOC = re.compile(r'^(#loc\d*) = loc\((?:callsite\((#loc\d*) at|"[^"]*"\((#loc\d*)\)|"([^"]+)":(\d+):(\d+))')
_TILE = re.compile(
    r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local|amdg?\w*\.buffer_load\w*|amdg?\w*\.buffer_store)\b"
    r".*?:.*?tensor<(\d+(?:x\d+)+)x!tt\.ptr<(\w+)>.*loc\((#loc\d*)\)\s*$"
)
_ELEMENTS = {"f32": "fp32", "f16": "fp16", "i8": "u8"}


def tile_accesses(ttgir: str) -> list[TileAccess]:
    """Loads and stores through tensors of pointers with two or more dimensions, in Triton's GPU IR."""
    named: dict[str, tuple[str | None, str]] = {}
    for line in ttgir.splitlines():
        if at := _LOC.match(line):
            name, caller, inner, path, row, column = at.groups()
            file = path.replace("\\", "/").rsplit("/", 1)[-1] if path else ""
            named[name] = (caller or inner, f"{file}:{row}:{column}" if path else "")

    def place(name: str) -> str:
        link, text = named.get(name, (None, ""))
        return place(link) if link else text

    found = []
    for line in ttgir.splitlines():
        if tile := _TILE.search(line):
            op, shape, element, loc = tile.groups()
            elements = 1
            for length in shape.split("x"):
                elements *= int(length)
            direction = "store" if op.endswith("store") else "load"
            found.append(TileAccess(direction, _ELEMENTS.get(element, element), elements, place(loc)))
    return found
