"""Compile every kernel for every target without a GPU, and read what the compiler made of it.

    python -m flashvec.kernels.aot --check              # the common ones of each target; exit 1 on a fault
    python -m flashvec.kernels.aot --check --all        # every configuration, with every option; by hand
    python -m flashvec.kernels.aot --target sm_90 --only attention
    python -m flashvec.kernels.aot --dump DIR           # also write the cubins, for other people's tools
    python -m flashvec.kernels.aot --target sm_80 --read FILE       # the same figures of other people's cubins
    python -m flashvec.kernels.aot --write              # keep the figures as rows that later runs are compared with
    python -m flashvec.kernels.aot --roofline llama-3-8b --tokens 16384 --mean-length 256

A launch is recorded on tensors without storage (`backend.recording`), so what is compiled is what would be launched.
A fault is: a register spill beyond what `ALLOWED_SPILLS` lists, more shared memory than a block may have, no matrix
instruction in a kernel that multiplies matrices, or a figure worse than its committed row (same triton version). A row
that no committed one stands beside is marked.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvec.kernels.aot_cases import Case, allowed_spill, cases
from flashvec.kernels.aot_code import Code, blocks_per_sm, read_assembly, read_cubins
from flashvec.kernels.backend import TARGETS, Launch, Target, gluon, has_triton, recording, tl, triton

ROWS = Path(__file__).resolve().parents[1] / "bench" / "results"
BATCH = 8  # launches a worker compiles before it reads their code


@dataclass(frozen=True, kw_only=True)
class Report(Code):
    """What one launch compiled to."""

    case: str
    kernel: str
    place: int  # among the case's launches of this kernel: one for each class of lengths
    target: str
    triton: str
    num_warps: int
    shared_bytes: int
    blocks_per_sm: int
    exponentials_per_score: float | None  # where a loop over KV tiles takes any

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.target, self.case, self.kernel, self.place


# --- compiling ----------------------------------------------------------------------------------------


def specialise(launched: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes that Triton's launcher would derive from these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    compile_time = {name for name, kind in launched.kernel.fn.__annotations__.items() if kind is tl.constexpr}
    kept_general = {p.name for p in getattr(launched.kernel, "params", ()) if p.do_not_specialize}  # none interpreted
    for index, name in enumerate(launched.kernel.arg_names):
        value, general = launched.arguments[name], name in kept_general
        if name in compile_time or value is None or (type(value) is int and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _type_name(value.dtype)
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif hasattr(value, "block_shape"):  # a tensor descriptor, which the launcher encodes
            box = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_type_name(value.base.dtype)}[{box}],{value.layout!r}>"
            aligned = False
        elif isinstance(value, bool):
            signature[name], aligned = "i1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not general
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
    kind = gluon._runtime.GluonASTSource if launched.kernel.is_gluon() else ASTSource
    source = kind(launched.kernel, signature, constants, attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=dict(launched.options))


def compile_batch(batch: Sequence[tuple[Case, Launch, int]], target: Target, dump: Path | None) -> list[Report | str]:
    """Compile launches of cases and read their code; of one that does not compile, what the compiler says."""
    results: dict[int, Report | str] = {}
    kernels: dict[int, Any] = {}
    for index, (case, launched, _) in enumerate(batch):
        try:
            kernels[index] = compile_launch(launched, target)
        except (
            Exception
        ) as error:  # a compiler's faults have no common type; each is reported, none is fatal to the rest
            name = launched.kernel.__name__
            results[index] = f"{target.name} {case.name}: {name} does not compile: {str(error)[-400:]}"
    if target.backend == "hip":
        codes = [read_assembly(kernel.asm["amdgcn"], target) for kernel in kernels.values()]
    else:
        found = read_cubins([kernel.asm["cubin"] for kernel in kernels.values()], target)
        codes = [code for codes_of_one in found for code in codes_of_one.values()]
    for (index, kernel), code in zip(kernels.items(), codes, strict=True):
        case, launched, place = batch[index]
        results[index] = _report(case, launched, place, target, kernel.metadata, code)
        if dump is not None:
            kind = "amdgcn" if target.backend == "hip" else "cubin"
            file = re.sub(r"[^\w-]+", "_", f"{target.name}-{launched.kernel.__name__}-{case.name}-{place}")
            content = kernel.asm[kind]
            (dump / f"{file}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return [results[index] for index in range(len(batch))]


def _report(case: Case, launched: Launch, place: int, target: Target, metadata: Any, code: Code) -> Report:
    arguments, per_score = launched.arguments, None
    rows, warps = (64, 4) if "RING" in arguments else (arguments.get("ROWS"), metadata.num_warps)  # of one loop
    if code.loop_exponentials and rows and "KEYS" in arguments:
        per_score = round(code.loop_exponentials * warps * target.warp_size / (rows * arguments["KEYS"]), 2)
    return Report(
        case=case.name,
        kernel=launched.kernel.__name__,
        place=place,
        target=target.name,
        triton=triton.__version__,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        blocks_per_sm=blocks_per_sm(target, code.registers, metadata.num_warps, metadata.shared),
        exponentials_per_score=per_score,
        **asdict(code),
    )


# --- judging ------------------------------------------------------------------------------------------


def faults(found: Report, multiplies: bool, committed: Report | None) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    target = TARGETS[found.target]
    wrong = []
    allowed = allowed_spill(found.target, found.case, found.triton)
    if found.spill_bytes > allowed:
        listed = f", {allowed} are listed" if allowed else ""
        wrong.append(f"spills {found.spill_bytes} bytes of registers{listed}")
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
        if committed.group_matrix and not found.group_matrix:
            wrong.append(f"had {committed.group_matrix} matrix instructions of warp groups, now none")
        if found.async_copies < committed.async_copies:
            wrong.append(f"had {committed.async_copies} copies to shared memory, now {found.async_copies}")
        if found.loop_barriers > committed.loop_barriers:
            wrong.append(f"waited at {committed.loop_barriers} barriers a tile before, now at {found.loop_barriers}")
        before, now = (_exponentials(report) for report in (committed, found))
        if now > before:
            wrong.append(f"took {before} exponentials before, now {now}")
    return wrong


def _exponentials(report: Report) -> float:
    """For each score where a loop over KV tiles takes them, else all that are written."""
    return report.exponentials if report.exponentials_per_score is None else report.exponentials_per_score


def committed_reports(triton_version: str | None = None) -> dict[tuple[str, str, str, int], Report]:
    """The committed rows of a triton version, by target, case and kernel; default the one that is installed."""
    path = rows_path(triton_version)
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    reports = (Report(**{key: value for key, value in row.items() if key != "benchmark"}) for row in rows)
    return {report.key: report for report in reports}


def rows_path(triton_version: str | None = None) -> Path:
    return ROWS / f"aot-triton-{triton_version or triton.__version__}.jsonl"


# --- the command ------------------------------------------------------------------------------------------


def recorded(target: Target, only: str, every: bool) -> Iterator[tuple[Case, Launch, int]]:
    """Each case's launches for a target; equal ones, which another case has too, once."""
    seen = set()
    for case in cases(target):
        if only not in case.name or (case.extra and not every):
            continue
        with recording(target) as recorder:
            case.run()
        counts: Counter[str] = Counter()
        for launched in recorder.launches:
            place = counts[launched.kernel.__name__]
            counts[launched.kernel.__name__] += 1
            signature, constants, attributes = specialise(launched)
            same = (launched.kernel.__name__, *map(str, (signature, constants, attributes, launched.options)))
            if same not in seen:
                seen.add(same)
                yield case, launched, place


_recorded: dict[str, list[tuple[Case, Launch, int]]] = {}  # by target; workers are forked and find it here


def _work(job: tuple[str, int, Path | None]) -> list[Report | str]:
    """Compile a batch in a worker: a launch holds closures, so where it stands is sent rather than itself."""
    name, start, dump = job
    return compile_batch(_recorded[name][start : start + BATCH], TARGETS[name], dump)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 on a fault (see above)")
    parser.add_argument("--all", action="store_true", help="also options and models beyond the common ones")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write cubins here")
    parser.add_argument("--read", type=Path, metavar="FILE", help="count in the kernels of a cubin for one --target")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--roofline", metavar="MODEL", help="floors of a layer's parts instead of compiling")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a batch, for --roofline")
    parser.add_argument("--mean-length", type=int, default=256, help="of a sequence, for --roofline")
    options = parser.parse_args(arguments)
    if options.roofline:
        from flashvec.kernels.roofline import print_roofline

        return print_roofline(options.roofline, options.tokens, options.mean_length)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, expected at least 1")
    if options.read:
        if len(options.target or ()) != 1 or TARGETS[options.target[0]].backend != "cuda":
            parser.error("--read needs one --target, an NVIDIA one")
        if not is_cubin(options.read):
            parser.error(f"--read {options.read}: no cubin can be read there")
    if options.dump:
        try:
            options.dump.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--dump {options.dump}: {error.strerror}")
    if not has_triton():
        parser.error("triton is not installed")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    if options.read:
        return print_cubin(options.read, TARGETS[options.target[0]], options.only)
    names = options.target or list(TARGETS)
    _recorded.update({name: list(recorded(TARGETS[name], options.only, options.all)) for name in names})
    if not any(_recorded[name] for name in names):
        parser.error(f"--only {options.only}: no case of {', '.join(names)} has this in its name")
    jobs = [(name, start, options.dump) for name in names for start in range(0, len(_recorded[name]), BATCH)]
    before = committed_reports()
    multiplies = {(name, case.name): case.multiplies for name in names for case, _, _ in _recorded[name]}
    found: list[Report] = []
    problems: list[str] = []
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for made in itertools.chain.from_iterable(pool.imap(_work, jobs)):
            if isinstance(made, str):
                problems.append(made)
                continue
            found.append(made)
            wrong = faults(made, made.kernel in multiplies[made.target, made.case], before.get(made.key))
            problems += [f"{made.target} {made.case} {made.kernel}: {w}" for w in wrong]
            print(format_row(made, wrong, made.key in before), flush=True)
    if options.write:
        write_rows(found)
    new = sum(made.key not in before for made in found)
    print(f"{len(found)} compiled, {len(problems)} faults, {new} without a committed row, triton {triton.__version__}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems) and options.check)


def format_row(row: Report, wrong: Iterable[str] = (), is_committed: bool = True) -> str:
    """One line of the report."""
    notes = [*wrong, *([] if is_committed else ["no committed row"])]
    per_score = "" if row.exponentials_per_score is None else f" = {row.exponentials_per_score} a score"
    return (
        f"{row.target:7} {row.case:34.34} {row.kernel:34.34} {row.shared_bytes / 1024:5.0f} KB "
        f"{row.blocks_per_sm:2} blocks {format_code(row)}{per_score}" + "".join(f"  <- {note}" for note in notes)
    )


def format_code(code: Code) -> str:
    """Counts of the whole kernel, and after a colon those of one KV tile, where tiles are walked in a loop."""
    whole = (
        f"{code.registers:3} registers {code.spill_bytes:4} spilled {code.matrix:3} matrix {code.exponentials:3} exp "
        f"{code.async_copies:3} copies {code.barriers:3} barriers"
    )
    tile = f": {code.loop_matrix} matrix {code.loop_barriers} barriers {code.loop_exponentials} exp"
    return whole + (tile if code.loop_matrix else "")


def is_cubin(path: Path) -> bool:
    """True of a file that can be read and begins as one."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def print_cubin(path: Path, target: Target, only: str) -> int:
    """The figures of each kernel in a file, whoever compiled it."""
    (codes,) = read_cubins([path.read_bytes()], target)
    for name, code in codes.items():
        if only in name:
            print(f"{name}\n    {format_code(code)}")
    return 0


def write_rows(rows: Iterable[Report]) -> None:
    """Replace the committed rows of the same target, case and kernel; keep the others."""
    merged = committed_reports() | {row.key: row for row in rows}
    facts = ({"benchmark": "aot", **asdict(merged[key])} for key in sorted(merged))
    uncounted = ("group_matrix", None)
    lines = (json.dumps(dict(item for item in row.items() if item != uncounted)) + "\n" for row in facts)
    rows_path().write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
