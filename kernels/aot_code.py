"""What stands in compiled machine code: registers, spills, and counts of the instructions that matter.

A count tells how often an instruction is written, not how often it runs. What one KV tile costs is therefore read from
the shortest loop that multiplies matrices and takes exponentials (or multiplies alone, where none is taken): the loop
over tiles that no mask cuts.
"""

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashvec.kernels.backend import Target, triton

PATTERNS = {
    "cuda": {
        "matrix": r"\b(?:HGMMA|HMMA|QGMMA|UTCHMMA|UTCQMMA)\b",
        "group_matrix": r"\b(?:HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b",
        "exponentials": r"MUFU\.EX2",
        "async_copies": r"LDGSTS|UTMALDG|UBLKCP",
        "barriers": r"\bBAR\.|\bSYNCS\.",
    },
    "hip": {
        "matrix": r"\bv_mfma_",
        "group_matrix": r"(?!)",  # there are none
        "exponentials": r"\bv_exp_f32",
        "async_copies": r"\bglobal_load_lds|\bbuffer_load\w* .*\blds\b",
        "barriers": r"\bs_barrier",
    },
}
BRANCH = {"cuda": re.compile(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)"), "hip": re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)")}
INSTRUCTION_BYTES = 16
MACHINES = {90: "SM90a", 100: "SM100a", 120: "SM120a"}


@dataclass(frozen=True)
class Code:
    """What one kernel's machine code holds. `loop_...`: in the loop over KV tiles, 0 without one."""

    registers: int
    spill_bytes: int
    matrix: int
    exponentials: int
    async_copies: int  # bulk and asynchronous copies to shared memory
    barriers: int
    loop_matrix: int
    loop_exponentials: int
    loop_barriers: int
    group_matrix: int | None = None  # of the matrix instructions those of warp groups; None in rows that did not count


def read_cubins(cubins: Sequence[bytes], target: Target) -> list[dict[str, Code]]:
    """What the kernels in NVIDIA's cubins hold, by name.

    All are read together: it is the disassembler's start that takes time.
    """
    sections = [_text_sections(cubin) for cubin in cubins]
    lines = iter(_disassembled(b"".join(code for texts in sections for code in texts.values()), target).items())
    found: list[dict[str, Code]] = []
    for cubin, texts in zip(cubins, sections, strict=True):
        usage = _usage(cubin)
        codes = {}
        for name, code in texts.items():
            own = dict(itertools.islice(lines, len(code) // INSTRUCTION_BYTES))
            if max(own) - min(own) != len(code) - INSTRUCTION_BYTES:
                raise RuntimeError(f"the disassembler left out instructions of {name}")
            codes[name] = Code(*usage[name], **_counts(own, target))
        found.append(codes)
    return found


def read_assembly(assembly: str, target: Target) -> Code:
    """What AMD's assembly of one kernel holds."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    lines = dict(enumerate(assembly.splitlines()))
    return Code(field("vgpr_count"), 4 * field("vgpr_spill_count"), **_counts(lines, target))


def blocks_per_sm(target: Target, registers: int, num_warps: int, shared_bytes: int) -> int:
    """Blocks that fit one multiprocessor, by registers (allotted by 8 a thread), shared memory and threads."""
    threads = num_warps * target.warp_size
    by_registers = target.registers // (max(8, -(-registers // 8) * 8) * threads)
    by_shared = (target.shared_bytes + 1024) // (shared_bytes + 1024) if shared_bytes else 32
    return min(by_registers, by_shared, target.threads // threads, 32)


# --- cubins -------------------------------------------------------------------------------------------


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([_tool(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Of each kernel: registers of a thread, and the bytes of memory that those which did not fit take."""
    usage = _run("cuobjdump", cubin, "-res-usage")
    found = {}
    for name, text in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        (registers,) = re.findall(r"REG:(\d+)", text)
        found[name] = int(registers), max(map(int, re.findall(r"(?:LOCAL|STACK):(\d+)", text)), default=0)
    return found


def _text_sections(cubin: bytes) -> dict[str, bytes]:
    """The instructions of each kernel in a cubin, an ELF file of 64 bits."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(number)]
    found = {}
    for name_at, _, _, _, start, length in headers:
        first = headers[names][4] + name_at
        name = cubin[first : cubin.index(b"\0", first)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[start : start + length]
    return found


def _disassembled(instructions: bytes, target: Target) -> dict[int, str]:
    """Instructions by address."""
    assert isinstance(target.arch, int)
    listing = _run("nvdisasm", instructions, "--binary", MACHINES.get(target.arch, f"SM{target.arch}"))
    return {int(address, 16): text for address, text in re.findall(r"^\s*/\*([0-9a-f]+)\*/(.*)$", listing, re.M)}


# --- counting -----------------------------------------------------------------------------------------


def _counts(lines: dict[int, str], target: Target) -> dict[str, int]:
    patterns = {name: re.compile(pattern) for name, pattern in PATTERNS[target.backend].items()}
    at = {name: [i for i, text in lines.items() if pattern.search(text)] for name, pattern in patterns.items()}
    found = {name: len(places) for name, places in at.items()}
    loops = sorted(_loops(lines, target), key=lambda loop: loop[1] - loop[0])
    for wanted in (("matrix", "exponentials"), ("matrix",)):
        holding = (loop for loop in loops if all(any(loop[0] <= i <= loop[1] for i in at[name]) for name in wanted))
        first, last = next(holding, (0, -1))
        if last >= 0:
            break
    for name in ("matrix", "exponentials", "barriers"):
        found[f"loop_{name}"] = sum(first <= i <= last for i in at[name])
    return found


def _loops(lines: dict[int, str], target: Target) -> Iterator[tuple[int, int]]:
    """First and last place of what each jump backwards repeats."""
    labels = {text.split(":")[0]: i for i, text in lines.items() if text.startswith(".LBB")}
    for i, text in lines.items():
        if found := BRANCH[target.backend].search(text):
            to = int(found[1], 16) if target.backend == "cuda" else labels.get(found[1], i)
            if to < i:
                yield to, i
