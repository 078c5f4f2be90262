"""The codegen gate: what it reads from machine code, that it refuses what breaks a limit, and that
a subset of the block table passes (`python -m benchmarks.codegen` takes all of it)."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import codegen, limits, sass
from kernels import linear_logprob_kernels
from kernels.blocks import COMPILER_BUGS

# As nvdisasm prints it: the inner loop turns over .L_x_1, the outer one over .L_x_0.
HOPPER = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   UMOV UR5, URZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   UTMALDG.2D [UR8], [UR12] ;
        /*0070*/                   UIADD3 UR5, UR5, 0x1, URZ ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   FMUL R24, R24, R3 ;
        /*00a0*/                   STG.E.128 desc[UR14][R92.64], R24 ;
        /*00b0*/                   BRA.U UP0, `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   NANOSLEEP 0x20 ;
        /*00e0*/                   BRA `(.L_x_1) ;
"""
HOPPER_KERNEL = limits.Kernel(
    arch=90, kind="tensor", num_warps=8, block_v=256, tile_bytes=16 * 256, aligned=True
)
CLEAN = sass.Resources(registers=168, stack_bytes=0, local_bytes=0)
BLACKWELL = """
        /*0000*/                   UMOV UR27, 0x8400490 ;
.L_x_0:
        /*0010*/                   UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR25], idesc[UR27], UP1 ;
        /*0020*/                   UTMALDG.2D [UR8], [UR12] ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""


def read(text: str = HOPPER, kernel=HOPPER_KERNEL, resources=CLEAN, **facts) -> limits.Report:
    facts = {"total_warps": kernel.num_warps, "shared_bytes": 200 * 1024} | facts
    return limits.report(kernel, text, resources, **facts)


def broken(text: str = HOPPER, kernel=HOPPER_KERNEL, **facts) -> list[str]:
    return limits.broken_limits(kernel, read(text, kernel, **facts))


def test_main_loop_is_the_cheapest_cycle_through_a_matrix_instruction():
    loop = sass.main_loop(sass.parse_sass(HOPPER))
    assert [i.opcode.split(".")[0] for i in sorted(loop, key=lambda i: i.opcode)] == [
        "BRA", "BRA", "HGMMA", "HGMMA", "SYNCS", "UIADD3", "UTMALDG",
    ]  # fmt: skip


def test_clocks_of_the_main_loop():
    seen = read()
    # 64 x 256 x 16 multiply-adds at 2048 a clock of the SM, two of them for each of two warpgroups.
    assert seen.tensor_clocks == 2 * 2 * 64 * 256 * 16 / 2048
    assert seen.other_clocks == 5 * 8 / 4
    assert seen.matrix == "HGMMA.64x256x16.F32.BF16"
    assert (seen.by_tma, seen.load_bytes, seen.loop_arithmetic) == (True, None, ())
    assert broken() == []


@pytest.mark.parametrize("num_warps, total_warps, other", [(8, 8, 2 * 8 / 4), (8, 12, 2)])
def test_blackwell_reads_the_tile_from_the_instruction_descriptor(num_warps, total_warps, other):
    kernel = replace(HOPPER_KERNEL, arch=100, num_warps=num_warps, tile_bytes=0)
    seen = read(BLACKWELL, kernel, total_warps=total_warps, tensor_columns=256)
    assert seen.tensor_clocks == 128 * 256 * 16 / 4096
    assert seen.other_clocks == other  # with extra warps one warp alone issues the MMAs
    assert limits.broken_limits(kernel, seen) == []


def in_loop(instruction: str) -> str:
    return HOPPER.replace("UIADD3 UR5, UR5, 0x1, URZ", instruction)


@pytest.mark.parametrize(
    "text, facts, complaint",
    [
        (HOPPER.replace("FMUL R24, R24, R3", "STL [R1], R24"), {}, "spills: 1 "),
        (HOPPER, {"resources": sass.Resources(200, 32, 0)}, "32 bytes of stack"),
        (HOPPER.replace("HGMMA.64x256x16", "HMMA.16816"), {}, "expected HGMMA.64x256x16"),
        (HOPPER.replace("HGMMA.64x256x16", "HGMMA.64x128x16"), {}, "expected HGMMA.64x256x16"),
        (HOPPER.replace("HGMMA.64x256x16.F32.BF16", "IMAD"), {}, "matrix instruction: None"),
        (HOPPER.replace("FMUL", "HMMA.16816.F32"), {}, "['HMMA.16816.F32']"),
        (in_loop("FFMA R1, R2, R3, R1"), {}, "float32 arithmetic in the main loop: FFMA"),
        (in_loop("MUFU.EX2 R1, R2"), {}, "float32 arithmetic in the main loop: MUFU.EX2"),
        (in_loop("NOP ;\n /*0071*/ " * 200 + "NOP"), {}, "clocks: 0.801 > 0.25"),
        (HOPPER.replace("UTMALDG.2D", "LDGSTS.E.64"), {}, "loads: 8 bytes"),
        (HOPPER.replace("UTMALDG.2D", "LDG.E.U16"), {}, "loads: 2 bytes"),
        (HOPPER.replace("UTMALDG.2D", "LDS"), {}, "loads: None bytes"),
        (HOPPER.replace("STG.E.128", "STG.E.U16"), {}, "stores: 0 of a tile's 4096 bytes"),
        (HOPPER, {"shared_bytes": 228 * 1024}, "shared memory: 233472 bytes > 232448"),
        (HOPPER, {"tensor_columns": 513}, "tensor memory: 513 columns > 512"),
        (HOPPER, {"total_warps": 24}, "not one program fits an SM"),
    ],
)
def test_refuses(text, facts, complaint):
    assert any(complaint in found for found in broken(text, **facts)), broken(text, **facts)


def test_refuses_tensor_cores_for_exact_float32():
    kernel = replace(HOPPER_KERNEL, kind="float32")
    assert broken(HOPPER.replace("HGMMA.64x256x16.F32.BF16", "FFMA"), kernel) == []
    (found,) = broken(in_loop("FFMA R1, R2, R3, R1"), kernel)
    assert "expected FFMA alone" in found


def test_refuses_narrow_accesses_of_an_elementwise_kernel():
    kernel = replace(HOPPER_KERNEL, kind="elementwise", tile_bytes=16 * 256)
    wide = "/*00*/ LDG.E.128 R4, desc[UR4][R2.64] ; \n/*00*/ STG.E.128 [R2.64], R4 ;\n"
    wide = wide.replace("/*00*/", "/*0000*/")
    assert broken(wide, kernel) == []
    assert ["loads" in x for x in broken(wide.replace("LDG.E.128", "LDG.E.64"), kernel)] == [True]


def test_occupancy_follows_the_scarcest_resource():
    def programs(**facts) -> int:
        registers = sass.Resources(facts.pop("registers", 32), 0, 0)
        return read(resources=registers, **{"shared_bytes": 0, **facts}).programs_per_sm

    assert programs() == 8  # 64 warps
    assert programs(registers=128) == 2
    assert programs(registers=129) == 1  # given out in units of 8 registers a thread
    assert programs(shared_bytes=56 * 1024) == 4
    assert programs(tensor_columns=256) == 2


def test_resources_of_one_kernel():
    usage = " Function k:\n  REG:252 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:448 TEXTURE:0\n"
    assert sass.parse_resources(usage) == sass.Resources(252, 8, 4)
    with pytest.raises(ValueError, match="0 kernels"):
        sass.parse_resources("nothing")


def some_row(failures: tuple[str, ...]) -> codegen.Row:
    launch = SimpleNamespace(kernel="some_kernel", constexprs={"HAS_BIAS": True}, signature={})
    return codegen.Row("large", launch, HOPPER_KERNEL, read(), failures)


def test_command_fails_and_names_kernel_arch_entry_and_limit(monkeypatch, capsys):
    monkeypatch.setattr(codegen, "launches", lambda *_: [])
    rows = {"tasks": [some_row(())], "bugs": []}
    monkeypatch.setattr(codegen, "forbidden", lambda _: rows["bugs"])
    monkeypatch.setattr(codegen, "examine", lambda x, _: x if x is rows["bugs"] else rows["tasks"])
    assert codegen.main(["--arch", "90"]) == 0
    rows["tasks"].append(some_row(("spills: 3 instructions",)))
    assert codegen.main(["--arch", "90"]) == 1
    expected = "FAILED some_kernel arch=90 entry=large [has_bias]: spills: 3 instructions"
    assert expected in capsys.readouterr().err


def test_a_crash_of_the_compiler_is_a_failure(monkeypatch):
    monkeypatch.setattr(codegen, "kernel_of", lambda _: HOPPER_KERNEL)
    (row,) = codegen.examine([("large", SimpleNamespace(compile=os.abort))], jobs=1)
    assert row.report is None
    assert row.failures == ("the compiler crashed (exit -6)",)


def compile_subset() -> None:
    """Prints results as JSON. In a process of its own: tests/conftest.py has Triton interpret."""
    from benchmarks.launches import Call, record
    from benchmarks.roofline import work
    from kernels import linear_logprob_triton
    from kernels.blocks import Blocks

    tasks = []
    for arch in (80, 90, 100):
        for name, call in (
            ("small", Call(arch=arch, d=576, v=50257, cached=True)),
            ("large", Call(arch=arch, v=50257)),
            ("large softcap", Call(arch=arch, bias=True, softcap=True, cached=True)),
        ):
            tasks += [(name, launch) for launch in record(call)[0]]
    tasks.append(("float32", record(Call(arch=80, dtype=torch.float32))[0][0]))
    tasks.append(("other", record(Call(arch="gfx942"))[0][0]))
    bug = {"arch": 80, "kernel": tasks[0][1].kernel, "constants": {"HAS_BIAS": True}}
    tasks += codegen.forbidden([SimpleNamespace(name="mended", **bug)])
    distinct = {launch.key(): (name, launch) for name, launch in tasks}
    results = {"rows": [(r.name, r.failures) for r in codegen.examine([*distinct.values()], 1)]}

    results["variants"] = {}
    for call in (Call(arch=90, cached=True), Call(arch=80, d=576, entropy=True)):
        for n in (8192, 8191, 8190, 129, 1):
            for launch in record(replace(call, n=n))[0]:
                name = f"{launch.kernel} {call.arch}"
                results["variants"].setdefault(name, set()).add(launch.key())
    results["variants"] = {name: len(keys) for name, keys in results["variants"].items()}

    results["flops"] = {}
    for mode in ("strict", "cached"):
        call = Call(arch=90, cached=mode == "cached")
        recorded, library = record(call)
        total = library + sum(work(launch).flops for launch in recorded)
        results["flops"][mode] = total / (call.n * call.d * call.v)
    odd = record(Call(arch=80, n=130, d=100, v=257, dtype=torch.float32))[0][0]
    counted = work(odd)
    results["odd"] = [counted.flops, counted.useful_flops, counted.floor_bytes, counted.tile_bytes]
    results["slices"] = odd.constexprs["SLICES"]

    tile = Blocks(block_v=256, num_stages=3)
    linear_logprob_triton.blocks_for = lambda *_: tile
    bad = record(Call(arch=90, bias=True, softcap=True, cached=True))[0][0]
    results["bad"] = [row.failures for row in codegen.examine([("bad", bad)], 1)]
    print(json.dumps(results))


@pytest.fixture(scope="module")
def compiled() -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from tests.ops import test_codegen as t; t.compile_subset()"]
    done = subprocess.run(
        command, env=environment, cwd=os.getcwd(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_subset_of_the_table_keeps_every_limit(compiled):
    assert len(compiled["rows"]) >= 20
    assert [row for row in compiled["rows"] if row[1]] == []


def test_refuses_a_tile_that_spills(compiled):
    (failures,) = compiled["bad"]
    assert any(failure.startswith("spills: ") for failure in failures)


def test_no_kernel_is_compiled_again_for_another_number_of_tokens(compiled):
    assert compiled["variants"] and set(compiled["variants"].values()) == {1}, compiled["variants"]


def test_a_mended_compiler_bug_is_seen(compiled):
    assert any("entry=mended" in name and not failures for name, failures in compiled["rows"])


def test_flops_counted_from_the_grid(compiled):
    assert compiled["flops"]["strict"] == pytest.approx(8, rel=0.02)
    assert compiled["flops"]["cached"] == pytest.approx(6, rel=0.02)


def test_work_of_a_launch_with_ragged_tiles(compiled):
    flops, useful, floor_bytes, tile_bytes = compiled["odd"]
    tiles, depth = 3 * 5, 112  # of 64 x 64, over D = 100 in steps of 16
    assert flops == 2 * tiles * 64 * 64 * depth
    assert useful == 2 * 130 * 100 * 257
    assert tile_bytes == tiles * depth * (64 + 64) * 4
    statistics = 4 * 130 * (2 * 5 * compiled["slices"] + 1)  # two of each slice, one of the row
    assert floor_bytes == 4 * 100 * (130 + 257) + statistics


def test_compiler_bugs_name_constants_of_their_kernel():
    for bug in COMPILER_BUGS:
        source = inspect.getsource(linear_logprob_kernels).split(f"def {bug.kernel}(")[1]
        assert all(f"{name}: tl.constexpr" in source.split("):")[0] for name in bug.constants)
