"""Reading of machine code, on snippets written by hand."""

from __future__ import annotations

import pytest

from bcos_rt.kernels.static.disassembly import (
    Access,
    TileAccess,
    accesses,
    count_kinds,
    main_loop,
    natural_loops,
    read_gcn,
    read_sass,
    tile_accesses,
)

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0028*/                   MOV R4, RZ ;
.L_x_1:
        /*0030*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R2.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR17], R10 ;
        /*0080*/              @!P2 BRA `(.L_x_2) ;
.L_x_4:
        /*0090*/                   IMAD.SHL.U32 R2, R2, 0x10, RZ ;
        /*00a0*/                   ISETP.GE.AND P1, PT, R2, R3, PT ;
        /*00b0*/                   BRA.U !UP1, `(.L_x_1) ;
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00d0*/               @P3 BRA `(.L_x_3) ;
        /*00e0*/                   STL [R1], R4 ;
        /*00f0*/                   STG.E [R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR17], R10 ;
        /*0120*/              @!P2 BRA `(.L_x_2) ;
        /*0130*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
"""

GCN = """
kernel:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tv_add_u32_e32 v1, s8, v44
\ts_cmp_lg_u32 s91, s8
\ts_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 30 9                          ; file.py:30:9
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[74:75], v[88:89], v[2:17]
\ts_waitcnt vmcnt(0)
\ts_cbranch_execz .LBB0_1
\tds_write_b128 v1, v[2:5]
\ts_branch .LBB0_1
.LBB0_4:
\t.loc\t1 40 5                          ; file.py:40:5
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\tscratch_store_dword off, v2, s32
\ts_endpgm
"""


def test_main_loop_of_sass():
    code = read_sass(SASS)
    loop = main_loop(code)
    # The inner loop with both products; its spin, moved behind the end, left out but for the jump back.
    opcodes = [i.opcode for i in loop]
    assert opcodes[0] == "HFMA2.MMA"
    assert opcodes[-1] == "BRA"
    assert len(loop) == 10
    assert count_kinds(loop) == {
        "mma": 2, "global": 1, "local": 0, "shared": 0, "barrier": 1, "predicate": 1, "float": 1, "integer": 1,
        "control": 3, "other": 0, "copy": 0, "wait": 0,
    }  # fmt: skip


def test_register_copies_and_waits_are_told_from_work():
    code = read_sass(
        "        /*0010*/                   PRMT R68, R140, 0x7610, R140 ;\n"
        "        /*0020*/                   PRMT R69, R141.reuse, 0x7610, R141 ;\n"
        "        /*0030*/                   PRMT R69, R141, 0x5410, R141 ;\n"
        "        /*0040*/                   PRMT R69, R141, 0x7610, R142 ;\n"
    )
    assert [i.kind for i in code] == ["copy", "copy", "integer", "integer"]
    waits = read_gcn("\ts_waitcnt vmcnt(0)\n\ts_nop 7\n\ts_barrier\n")
    assert [i.kind for i in waits] == ["wait", "wait", "barrier"]


def test_spills_show_as_local_accesses():
    assert sum(i.kind == "local" for i in read_sass(SASS)) == 1
    assert sum(i.kind == "local" for i in read_gcn(GCN)) == 1


def test_loop_around_the_main_loop_is_not_the_main_loop():
    sizes = sorted(len(loop) for loop in natural_loops(read_sass(SASS)))
    # Load loop, spin, main loop with its spin, and the loop around it.
    assert sizes == [2, 2, 12, 15]


def test_main_loop_of_gcn_whose_latch_comes_first():
    loop = main_loop(read_gcn(GCN))
    assert len(loop) == 9
    assert sum(i.kind == "mma" for i in loop) == 1
    assert sum(i.kind == "global" for i in loop) == 1


def test_no_matrix_instructions_no_main_loop():
    assert main_loop(read_sass(SASS.replace("HMMA.16816.F32.BF16", "FFMA"))) == []
    assert main_loop(read_gcn(GCN.replace("v_mfma_f32_32x32x8_bf16", "v_fma_f32"))) == []
    assert main_loop([]) == []


@pytest.mark.parametrize(
    "mnemonic", ["HGMMA.64x128x16.F32.BF16", "UTCHMMA", "UTCQMMA", "HMMA.1688.F32.TF32", "IMMA.16832"]
)
def test_matrix_instructions_are_known(mnemonic: str):
    (instruction,) = read_sass(f"        /*0010*/   {mnemonic} R4, R4 ;")
    assert instruction.kind == "mma"


PTX = """
\t.loc\t1 30 17, function_name $L__info_string0, inlined_at 1 195 11 // file.py:30:17
\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
\tcp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
\t// begin inline asm
\t.loc\t1 40 14                         // file.py:40:14
\tmov.u32 %r387, %r288;
\t.loc\t1 41 14                         // file.py:41:14
\tmov.u32 %r388, %r288;
\t@%p45 ld.global.v4.b32 { %r387, %r388, %r389, %r390 }, [ %rd80 + 0 ];

\t// end inline asm
\t.loc\t1 50 5                          // file.py:50:5
\tst.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
\tst.global.b16 [ %rd1 + 0 ], { %rs1 };
"""


def test_accesses_of_ptx():
    assert accesses(PTX) == [
        Access("load", 16, "file.py:30:17"),
        Access("load", 4, "file.py:30:17"),
        Access("load", 16, "file.py:40:14"),
        Access("store", 8, "file.py:50:5"),
        Access("store", 2, "file.py:50:5"),
    ]


def test_accesses_of_gcn():
    assert accesses(GCN) == [Access("load", 16, "file.py:30:9"), Access("store", 8, "file.py:40:5")]
    assert [a.size for a in accesses("\tglobal_load_ushort v1, v2, off\n\tbuffer_load_dwordx3 v1, v2, off")] == [2, 12]
    assert [
        a.size for a in accesses("\tglobal_load_short_d16_hi v1, v2, off\n\tglobal_store_byte v[1:2], v3, off")
    ] == [2, 1]


TTGIR = """
#loc1 = loc("/some/where/file.py":30:17)
#loc2 = loc("/some/where/file.py":40:5)
#loc3 = loc("a"(#loc1))
#loc4 = loc(callsite(#loc3 at #loc2))
    %a = ttg.async_copy_global_to_local %1, %2 mask %3 : tensor<128x64x!tt.ptr<bf16>, #blocked1> -> <128x64xbf16, #shared> loc(#loc4)
    %b = tt.load %1, %2 : tensor<64x!tt.ptr<f32>, #ttg.slice<{dim = 0, parent = #linear}>> loc(#loc1)
    tt.store %1, %2, %3 : tensor<128x8x!tt.ptr<i8>, #blocked> loc(#loc2)
"""  # noqa: E501


def test_tiles_of_the_gpu_ir():
    assert tile_accesses(TTGIR) == [
        TileAccess("load", "bf16", 8192, "file.py:30:17"),
        TileAccess("store", "u8", 1024, "file.py:40:5"),
    ]
