"""The offline compiler: what it compiles is what would be launched, and every fault it promises to find is found."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from flashvec.kernels import aot, aot_cases, aot_code, roofline
from flashvec.kernels.backend import TARGETS, recording, triton

VERSIONS = ("3.6.0", "3.9.0")  # of triton: beside torch 2.11 and 2.13
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
GOOD = aot.Report(
    case="attention 64 plain",
    kernel="_attention_fwd_kernel",
    place=0,
    target="sm_90",
    triton="3.9.0",
    num_warps=8,
    shared_bytes=48_000,
    blocks_per_sm=2,
    registers=125,
    spill_bytes=0,
    matrix=16,
    exponentials=68,
    async_copies=16,
    barriers=11,
    loop_matrix=8,
    loop_exponentials=34,
    loop_barriers=3,
    exponentials_per_score=1.06,
)


def run(*arguments: str, environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashvec.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_compiles_attention_for_hopper_and_agrees_with_the_committed_rows():
    done = run("--check", "--target", "sm_90", "--only", "attention 64 plain")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("sm_90")]
    assert len(rows) == 2 and all("   0 spilled" in row for row in rows)
    assert done.stdout.splitlines()[-1].startswith("2 compiled, 0 faults, 0 without a committed row")


def test_refuses_to_compile_interpreted_kernels():
    done = run("--check", environment=ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2 and "unset it" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 240_000}, "needs 240000 bytes of shared memory"),
        ({"matrix": 0}, "without matrix instructions"),
    ],
    ids=str,
)
def test_faults_are_named(change, message):
    found = aot.faults(replace(GOOD, **change), True, None)
    assert [message in fault for fault in found] == ([True] if message else [])


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({}, None),
        ({"blocks_per_sm": 3}, "3 blocks fitted a multiprocessor before, now 2"),
        ({"matrix": 40}, "had 40 matrix instructions, now 16"),
        ({"registers": 64}, None),
        ({"group_matrix": 12}, "had 12 matrix instructions of warp groups, now none"),
        ({"async_copies": 17}, "had 17 copies to shared memory, now 16"),
        ({"async_copies": 15}, None),
        ({"loop_barriers": 2}, "waited at 2 barriers a tile before, now at 3"),
        ({"exponentials_per_score": 1.0}, "took 1.0 exponentials before, now 1.06"),
        ({"exponentials_per_score": 1.1, "exponentials": 60}, None),
    ],
    ids=str,
)
def test_a_worse_figure_than_the_committed_one_is_a_fault(before, message):
    found = aot.faults(GOOD, True, replace(GOOD, **before))
    assert [message in fault for fault in found] == ([True] if message else [])


def test_exponentials_without_a_loop_are_counted_all():
    short = replace(GOOD, exponentials_per_score=None)
    assert not aot.faults(short, True, short)
    (fault,) = aot.faults(short, True, replace(short, exponentials=66))
    assert fault == "took 66 exponentials before, now 68"


def test_a_row_without_a_committed_one_says_so():
    assert "no committed row" in aot.format_row(GOOD, is_committed=False)
    assert "no committed row" not in aot.format_row(GOOD)


def test_a_listed_spill_is_allowed_on_its_target_alone_and_no_further():
    spilling = replace(GOOD, case="attention 256 fp32", spill_bytes=112)
    assert not aot.faults(spilling, True, None)
    (fault,) = aot.faults(replace(spilling, spill_bytes=120), True, None)
    assert fault == "spills 120 bytes of registers, 112 are listed"
    for other in ({"case": "attention 64 fp32"}, {"case": "attention 128 fp32"}, {"target": "gfx942"}):
        assert aot.faults(replace(spilling, **other), True, None) == ["spills 112 bytes of registers"]


@pytest.mark.parametrize("version", VERSIONS)
def test_listed_spills_are_those_of_the_committed_rows(version):
    """No limit is wider than what is compiled, and none stands for a spill that is gone."""
    rows = [row for row in aot.committed_reports(version).values() if row.spill_bytes]
    for spill in aot_cases.OLDER_SPILLS.get(version, aot_cases.ALLOWED_SPILLS):
        for target, most in spill.most.items():
            own = [row.spill_bytes for row in rows if row.target == target and spill.cases in row.case]
            assert max(own, default=0) == most, (spill.cases, target)


def test_an_older_compilers_spills_are_allowed_to_it_alone():
    case = "attention bwd 128 plain"
    assert aot_cases.allowed_spill("sm_90", case, "3.6.0") > 0 == aot_cases.allowed_spill("sm_90", case, "3.9.0")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_case_records_what_it_claims(target):
    for case in aot_cases.cases(target):
        with recording(target) as recorder:
            case.run()
        assert recorder.launches, case.name
        launched = {launch.kernel.__name__ for launch in recorder.launches}
        assert case.multiplies <= launched, case.name


def test_arguments_are_specialised_as_at_a_launch():
    with recording(TARGETS["sm_90"]) as recorder:
        next(case for case in aot_cases.cases(TARGETS["sm_90"]) if case.name == "attention 64 causal").run()
    signature, constants, attributes = aot.specialise(recorder.launches[0])
    names = list(signature)
    assert signature["q_ptr"] == "*bf16" and signature["T"] == "i32" and signature["scale"] == "fp32"
    assert constants["HAS_RIGHT"] is True and constants["cos_ptr"] is None
    assert (names.index("q_ptr"),) in attributes and (names.index("left"),) not in attributes


@pytest.mark.parametrize("version", VERSIONS)
def test_committed_rows_hold_no_fault(version):
    reports = aot.committed_reports(version)
    assert {report.triton for report in reports.values()} == {version}
    multiplying = {case.name: case.multiplies for target in TARGETS.values() for case in aot_cases.cases(target)}
    for report in reports.values():
        assert report.case in multiplying, f"{report.case} is no case any more; run aot --write anew"
        assert not aot.faults(report, report.kernel in multiplying[report.case], None), report


# --- what stands in code -----------------------------------------------------------------------------------

ASSEMBLY = """
.LBB0_1:
  v_mfma_f32_32x32x8 a, b
  v_exp_f32 a, b
  s_barrier
  s_cbranch_scc1 .LBB0_1
.LBB0_2:
  v_mfma_f32_32x32x8 a, b
  v_exp_f32 a, b
  v_exp_f32 a, b
.LBB0_3:
  v_mul_f32 a, b
  s_cbranch_scc0 .LBB0_3
  s_cbranch_vccz .LBB0_2
  v_exp_f32 a, b
  s_branch .LBB0_4
.LBB0_4:
  .vgpr_count:     96
  .vgpr_spill_count: 3
"""


def test_a_tile_costs_what_its_shortest_loop_holds():
    code = aot_code.read_assembly(ASSEMBLY, TARGETS["gfx942"])
    assert (code.registers, code.spill_bytes) == (96, 12)
    assert (code.matrix, code.exponentials, code.barriers) == (2, 4, 1)
    assert (code.loop_matrix, code.loop_exponentials, code.loop_barriers) == (1, 1, 1)


def test_code_without_a_loop_has_no_cost_of_a_tile():
    code = aot_code.read_assembly("  v_mfma_f32_32x32x8 a, b\n  v_exp_f32 a, b\n", TARGETS["gfx942"])
    assert (code.matrix, code.loop_matrix, code.loop_exponentials) == (1, 0, 0)


def test_matrix_instructions_of_warp_groups_are_counted_apart():
    instructions = ["HGMMA.64x64x16.F32", "HMMA.16816.F32", "HMMA.1688.F32.TF32", "UTCHMMA gdesc"]
    lines = {16 * i: f"  {text} R24, R4 ;" for i, text in enumerate(instructions)}
    counts = aot_code._counts(lines, TARGETS["sm_90"])
    assert (counts["matrix"], counts["group_matrix"]) == (4, 2)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"), [(128, 8, 0, 2), (32, 4, 0, 16), (32, 4, 100 * 1024, 2), (255, 8, 0, 1)]
)
def test_blocks_that_fit(registers, warps, shared, blocks):
    assert aot_code.blocks_per_sm(TARGETS["sm_90"], registers, warps, shared) == blocks


# --- roofline ---------------------------------------------------------------------------------------------


def test_floors_of_a_known_layer():
    """Llama 3 8B at 16,384 tokens: 7.15 TFLOP of products; attention moves 336 MB, with the log-sum-exp 338."""
    shape, lengths = roofline.MODELS["llama-3-8b"], [256] * 64
    parts = {part.name: part for part in roofline.layer_parts(shape, lengths)}
    products = sum(part.flops for name, part in parts.items() if name.endswith("product"))
    assert products == pytest.approx(7.147e12, rel=1e-3)
    assert parts["attention"].flops == 4 * 64 * 256**2 * 128 * 32
    assert parts["attention"].bytes == 335_544_320 + 4 * 16_384 * 32
    seconds, bound = parts["attention"].floor(roofline.MEASURED)
    assert bound == "memory" and seconds == parts["attention"].bytes / 3.0e12


def test_tiles_cost_at_least_the_floor():
    for name, shape in roofline.MODELS.items():
        lengths = roofline.lengths_of(16_384, 256)
        assert sum(lengths) == 16_384 and min(lengths) > 0
        seconds, useful = roofline.tile_time(shape, lengths, {})
        attention = next(part for part in roofline.layer_parts(shape, lengths) if part.name == "attention")
        assert seconds >= attention.floor(roofline.MEASURED)[0] * 0.999 and 0 < useful <= 1, name


def test_roofline_command(capsys):
    assert aot.main(["--roofline", "qwen3-0.6b", "--tokens", "4096"]) == 0
    assert "qwen3-0.6b: one layer, 4,096 tokens" in capsys.readouterr().out
    assert aot.main(["--roofline", "gpt-2"]) == 2
    assert "choose one of llama-3-8b" in capsys.readouterr().out
    assert aot.main(["--roofline", "qwen3-0.6b", "--tokens", "0"]) == 2


def test_meta_tensors_have_no_storage():
    assert aot_cases.meta(2, 3).device.type == "meta" and aot_cases.meta(1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "atention"], "--only atention: no case of sm_90 has this in its name"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--read", __file__], "no cubin can be read there"),
        (["--read", "missing/README.md"], "missing/README.md: no cubin can be read there"),
        (["--dump", f"{__file__}/figures"], "figures: Not a directory"),
    ],
    ids=lambda x: x[0],
)
def test_arguments_that_mean_nothing_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--check", "--target", "sm_90", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
