"""Compile every kernel for every target without a GPU, and read what the compiler made of it.

    python -m flashvec.kernels.aot --check              # what the tables choose, for all targets; exit 1 on a fault
    python -m flashvec.kernels.aot --target sm_90 --only attention
    python -m flashvec.kernels.aot --dump DIR           # also write the cubins, for other people's tools
    python -m flashvec.kernels.aot --write              # keep the figures as rows that later runs are compared with
    python -m flashvec.kernels.aot --roofline llama-3-8b --tokens 16384 --mean-length 256

A launch is recorded on tensors without storage (`backend.recording`), so what is compiled is what would be launched.
A fault is: a register spill that is not listed in `ALLOWED_SPILLS`, more shared memory than a block may have, no matrix
instruction in a kernel that multiplies matrices, or a figure worse than its committed row (same triton version).
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvec.kernels.aot_cases import ALLOWED_SPILLS, Case, cases
from flashvec.kernels.backend import TARGETS, Launch, Target, has_triton, recording, tl, triton

ROWS = Path(__file__).resolve().parents[1] / "bench" / "results"
MATRIX_INSTRUCTIONS = {"cuda": r"\b(?:HGMMA|HMMA|QGMMA|UTCHMMA|UTCQMMA)\b", "hip": r"\bv_mfma_"}


@dataclass(frozen=True)
class Report:
    """What one launch compiled to."""

    case: str
    kernel: str
    target: str
    triton: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    matrix: int  # matrix instructions in the code, each counted once however often it runs
    exponentials: int
    async_copies: int  # bulk and asynchronous copies to shared memory
    barriers: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.case, self.kernel


# --- compiling ----------------------------------------------------------------------------------------


def specialise(launched: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes that Triton's launcher would derive from these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    compile_time = {name for name, kind in launched.kernel.fn.__annotations__.items() if kind is tl.constexpr}
    for index, name in enumerate(launched.kernel.arg_names):
        value = launched.arguments[name]
        if name in compile_time or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _type_name(value.dtype)
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            signature[name], aligned = "i1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_name(dtype: torch.dtype) -> str:
    return {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int32: "i32",
        torch.int64: "i64",
        torch.uint8: "u8",
        torch.int8: "i8",
        torch.bool: "i1",
    }[dtype]


def compile_launch(launched: Launch, target: Target) -> Any:
    """Triton's compiled kernel of a recorded launch, for a target that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launched)
    source = ASTSource(launched.kernel, signature, constants, attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=dict(launched.options))


def report(case: Case, launched: Launch, target: Target, dump: Path | None = None) -> Report:
    """Compile one launch and count what is in its machine code."""
    compiled = compile_launch(launched, target)
    name = launched.kernel.__name__
    if dump is not None and "cubin" in compiled.asm:
        file = f"{target.name}-{name}-{case.name}".replace(" ", "_").replace("/", "-")
        (dump / f"{file}.cubin").write_bytes(compiled.asm["cubin"])
    num_warps = compiled.metadata.num_warps
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers, spill = _field(code, "vgpr_count"), 4 * _field(code, "vgpr_spill_count")
        counts = {"exponentials": "v_exp_f32", "async_copies": "global_load_lds", "barriers": "s_barrier"}
    else:
        registers, spill, code = _read_cubin(compiled.asm["cubin"])
        counts = {"exponentials": r"MUFU\.EX2", "async_copies": r"LDGSTS|UTMALDG|UBLKCP", "barriers": r"\bBAR\."}
    return Report(
        case.name,
        name,
        target.name,
        triton.__version__,
        num_warps,
        registers,
        spill,
        compiled.metadata.shared,
        _blocks_per_sm(target, registers, num_warps, compiled.metadata.shared),
        len(re.findall(MATRIX_INSTRUCTIONS[target.backend], code)),
        **{key: len(re.findall(pattern, code)) for key, pattern in counts.items()},
    )


def _field(code: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", code)
    return int(found[1]) if found else 0


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes spilled, and the disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    registers = re.findall(r"REG:(\d+)", usage)
    local = re.findall(r"(?:LOCAL|STACK):(\d+)", usage)
    return max(map(int, registers)), max(map(int, local), default=0), code


def _blocks_per_sm(target: Target, registers: int, num_warps: int, shared: int) -> int:
    """Blocks that fit one multiprocessor, by registers (allotted by 8 a thread), shared memory and threads."""
    threads = num_warps * target.warp_size
    by_registers = target.registers // (max(8, -(-registers // 8) * 8) * threads)
    by_shared = (target.shared_bytes + 1024) // (shared + 1024) if shared else 32
    return min(by_registers, by_shared, target.threads // threads, 32)


# --- judging ------------------------------------------------------------------------------------------


def faults(found: Report, multiplies: bool, committed: Report | None) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    target = TARGETS[found.target]
    wrong = []
    reason = next(
        (r for (t, pattern), r in ALLOWED_SPILLS.items() if t == found.target and pattern in found.case), None
    )
    if found.spill_bytes and reason is None:
        wrong.append(f"spills {found.spill_bytes} bytes of registers")
    if found.shared_bytes > target.shared_bytes:
        wrong.append(f"needs {found.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}")
    if multiplies and not found.matrix:
        wrong.append("multiplies without matrix instructions")
    if committed is not None:
        if found.spill_bytes > committed.spill_bytes:
            wrong.append(f"spilled {committed.spill_bytes} bytes before, now {found.spill_bytes}")
        if found.blocks_per_sm < committed.blocks_per_sm:
            wrong.append(f"{committed.blocks_per_sm} blocks fitted a multiprocessor before, now {found.blocks_per_sm}")
        if found.matrix < committed.matrix // 2:
            wrong.append(f"had {committed.matrix} matrix instructions, now {found.matrix}")
    return wrong


def committed_reports() -> dict[tuple[str, str, str], Report]:
    """The committed rows of this triton version, by target, case and kernel."""
    path = rows_path()
    if not path.exists():
        return {}
    rows = (Report(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.key: row for row in rows}


def rows_path() -> Path:
    return ROWS / f"aot-triton-{triton.__version__}.jsonl"


# --- the command ------------------------------------------------------------------------------------------


def recorded(target: Target, only: str, every: bool) -> Iterator[tuple[Case, Launch]]:
    """Each case's launches for a target; equal ones, which another case has too, once."""
    seen = set()
    for case in cases(target):
        if only not in case.name or (case.extra and not every):
            continue
        with recording(target) as recorder:
            case.run()
        for launched in recorder.launches:
            signature, constants, attributes = specialise(launched)
            same = (launched.kernel.__name__, *map(str, (signature, constants, attributes, launched.options)))
            if same not in seen:
                seen.add(same)
                yield case, launched


def _work(job: tuple[str, int, str, bool, str | None]) -> tuple[Report | None, str, bool]:
    """One compilation in a worker: a launch holds closures, so it is recorded again there rather than sent."""
    name, index, only, every, dump = job
    target = TARGETS[name]
    case, launched = _recorded_once(name, only, every)[index]
    multiplies = launched.kernel.__name__ in case.multiplies
    try:
        return report(case, launched, target, Path(dump) if dump else None), case.name, multiplies
    except Exception as error:  # a compiler's faults have no common type; each is reported, none is fatal to the rest
        return (
            None,
            f"{case.name}: {launched.kernel.__name__} does not compile for {name}: {str(error)[-400:]}",
            multiplies,
        )


_memo: dict[tuple[str, str, bool], list[tuple[Case, Launch]]] = {}


def _recorded_once(name: str, only: str, every: bool) -> list[tuple[Case, Launch]]:
    if (name, only, every) not in _memo:
        _memo[name, only, every] = list(recorded(TARGETS[name], only, every))
    return _memo[name, only, every]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 on a fault (see above)")
    parser.add_argument("--all", action="store_true", help="also what the tables do not choose by default")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write cubins here")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--roofline", metavar="MODEL", help="floors of a layer's parts instead of compiling")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a batch, for --roofline")
    parser.add_argument("--mean-length", type=int, default=256, help="of a sequence, for --roofline")
    options = parser.parse_args(arguments)
    if options.roofline:
        from flashvec.kernels.roofline import print_roofline

        return print_roofline(options.roofline, options.tokens, options.mean_length)
    if not has_triton():
        parser.error("triton is not installed")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    jobs = [
        (name, index, options.only, options.all, str(options.dump) if options.dump else None)
        for name in options.target or TARGETS
        for index in range(len(_recorded_once(name, options.only, options.all)))
    ]
    before = committed_reports()
    found, problems = [], []
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for made, what, multiplies in pool.imap(_work, jobs):
            if made is None:
                problems.append(what)
                continue
            found.append(made)
            wrong = faults(made, multiplies, before.get(made.key))
            problems += [f"{made.target} {made.case} {made.kernel}: {w}" for w in wrong]
            print(format_row(made, wrong), flush=True)
    if options.write:
        write_rows(found)
    print(f"{len(found)} compiled, {len(problems)} faults, triton {triton.__version__}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems) and options.check)


def format_row(row: Report, wrong: Iterable[str] = ()) -> str:
    """One line of the report."""
    return (
        f"{row.target:7} {row.case:34.34} {row.kernel:34.34} {row.registers:3} registers {row.spill_bytes:4} spilled "
        f"{row.shared_bytes / 1024:5.0f} KB {row.blocks_per_sm:2} blocks {row.matrix:3} matrix "
        f"{row.exponentials:3} exp {row.async_copies:3} copies {row.barriers:3} barriers"
        + "".join(f"  <- {w}" for w in wrong)
    )


def write_rows(rows: Iterable[Report]) -> None:
    """Replace the committed rows of the same target, case and kernel; keep the others."""
    merged = committed_reports() | {row.key: row for row in rows}
    lines = [json.dumps(asdict(merged[key])) + "\n" for key in sorted(merged)]
    rows_path().write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
