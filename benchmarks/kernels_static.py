"""Attention kernels as the TPU's compiler makes them, without a TPU, next to those of others.

For each chip and kernel, the instruction bundles of one inner tile (about a cycle each, if nothing stalls) against the
fewest cycles that its products take on the matrix units at their peak. It leaves out stalls for transfers and the work
between tiles: good to rank kernels and block sizes, no prediction of time. Above 100% the bundles are no longer what
bounds the tile; the matrix units are. For decoding, against the cycles that the transfer of the block takes.

    python -m benchmarks.kernels_static [--chips v5e v6e] [--kernels forward cached backward decode] [--peers splash]

Needs libtpu (`pip install '.[tpu]'`); tokamax is compared where `pip install --no-deps tokamax==0.0.12` was run.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
LENGTH, GROUPS, GROUP, HEAD, PAGE = 8192, 8, 3, 128, 128
PEER_BLOCKS = ((512, 2048, 512), (1024, 2048, 1024), (2048, 2048, 1024))  # queries, keys, chunk
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


class Job(NamedTuple):
    """Kernel to compile, in a process of its own, and the inner tile to look for in it."""

    chip: str
    implementation: str  # "ours", "splash", "tokamax"
    kernel: str  # part of its name
    blocks: tuple[int, ...]  # of a peer


class Region(NamedTuple):
    bundles: int
    used: list[int]  # of each slot
    full: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    kernels, peers = ["forward", "cached", "backward", "decode"], ["splash", "tokamax"]
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        chip, implementation, kernel, blocks = json.loads(arguments.compile)
        return compile_kernel(Job(chip, implementation, kernel, tuple(blocks)))
    print("| chip | kernel | by | tile | bundles | ideal | ideal / bundles | slots, % full | spills |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chip in arguments.chips:
        if "forward" in arguments.kernels:
            report(Job(chip, "ours", "phi4mm_flash_fwd", ()))
            for peer in arguments.peers:
                jobs = [Job(chip, peer, "splash_m[a-z_]*fwd", blocks) for blocks in PEER_BLOCKS]
                report(max(jobs, key=lambda job: fraction(job) or 0.0))
        if "cached" in arguments.kernels:
            for kernel in ("phi4mm_cached", "phi4mm_cached int8"):
                report(Job(chip, "ours", kernel, ()))
        if "backward" in arguments.kernels:
            for kernel in ("phi4mm_flash_bwd_dq", "phi4mm_flash_bwd_dkv"):
                report(Job(chip, "ours", kernel, ()))
        if "decode" in arguments.kernels:
            for kernel in ("phi4mm_decode", "phi4mm_decode int8"):
                report(Job(chip, "ours", kernel, ()))


# --- compiling, in a child ---


def compile_kernel(job: Job) -> None:
    """Compile the job's kernel for its chip; the compiler writes what `measure` reads."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[job.chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, jax.P()))

    attention = None if job.implementation == "ours" else peer(job)
    with jax.set_mesh(mesh):
        if attention is not None:
            q, k = shape(GROUPS * GROUP, LENGTH, HEAD), shape(GROUPS, LENGTH, HEAD)
            jax.jit(attention).lower(q, k, k).compile()
        elif job.kernel.startswith(("phi4mm_decode", "phi4mm_cached")):
            from phi4mm_jax.kernels import cached_attention, decode_attention

            def attend(q, k, v, lengths, tables, scales):
                k_scales, v_scales = scales or (None, None)
                rows: Any = {"lengths": lengths, "tables": tables, "k_scales": k_scales, "v_scales": v_scales}
                if job.kernel.startswith("phi4mm_decode"):
                    return decode_attention(q[:, 0], k, v, layer=0, **rows)
                return cached_attention(q, k, v, layer=0, starts=lengths, **rows)

            int8 = job.kernel.endswith("int8")
            pages = shape(1, 4096, GROUPS, PAGE, HEAD, dtype=jnp.int8 if int8 else jnp.bfloat16)
            scales = (shape(1, 4096, GROUPS, PAGE, dtype=jnp.float32),) * 2 if int8 else None
            rows = shape(4, dtype=jnp.int32), shape(4, 1024, dtype=jnp.int32)
            jax.jit(attend).lower(shape(4, PAGE, GROUPS * GROUP, HEAD), pages, pages, *rows, scales).compile()
        else:
            from phi4mm_jax.kernels import flash_attention

            def with_gradients(q, k, v):
                out, gradients = jax.vjp(lambda *x: flash_attention(*x, causal=True), q, k, v)
                return out, gradients(out)

            def forward(q, k, v):
                return flash_attention(q, k, v, causal=True)

            operands = (shape(1, LENGTH, n, HEAD) for n in (GROUPS * GROUP, GROUPS, GROUPS))
            jax.jit(with_gradients if "bwd" in job.kernel else forward).lower(*operands).compile()


def peer(job: Job):
    """Return another library's causal attention of q (heads, T, H) with k and v (groups, T, H)."""
    import jax

    queries, keys, chunk = job.blocks
    if job.implementation == "splash":
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        sizes = kernel.BlockSizes(block_q=queries, block_kv=keys, block_kv_compute=chunk)
        mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * GROUP)
        attention = kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
        return lambda q, k, v: jax.vmap(attention)(q.reshape(GROUPS, GROUP, LENGTH, HEAD), k, v)
    spec = importlib.util.find_spec("tokamax")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("tokamax is not installed: pip install --no-deps tokamax==0.0.12")
    package: object = types.ModuleType("tokamax")  # without what its __init__ imports
    package.__path__ = list(spec.submodule_search_locations)  # type: ignore[attr-defined]
    sys.modules["tokamax"] = package  # type: ignore[assignment]
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # type: ignore[import-not-found]
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # type: ignore[import-not-found]
        splash_attention_mask as masks,
    )

    config = kernel.SplashConfig(block_q=queries, block_kv=keys, block_kv_compute=chunk)
    return kernel.make_splash_mha_single_device(masks.CausalMask((LENGTH, LENGTH)), config=config)


# --- measuring ---


def units(chip: str) -> tuple[int, float, float]:
    """Return multiply-adds a cycle at peak, bytes of main memory a cycle, and a head's share of a unit, of one core."""
    from jax.experimental.pallas import tpu as pltpu

    version = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}[chip]
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
    peak = 65536 if info.mxu_column_size == 128 else 262144
    cycles_a_second = info.bf16_ops_per_second / (2 * peak)
    return peak, info.mem_bw_bytes_per_second / cycles_a_second, HEAD / info.mxu_column_size


def tile_of(job: Job) -> tuple[int, int, int]:
    """Return the query rows, keys and products of the inner tile."""
    if job.blocks:
        return job.blocks[0], job.blocks[1], 2
    blocks = chip_blocks(job.chip)
    if job.kernel == "phi4mm_flash_fwd":
        return blocks.rows, blocks.keys, 2
    if job.kernel.startswith("phi4mm_cached"):
        return GROUP * PAGE, blocks.keys, 2
    return blocks.backward_rows, blocks.backward_keys, 3 if job.kernel.endswith("dq") else 4


def chip_blocks(chip: str):
    from phi4mm_jax.kernels.tpu import BLOCKS

    return BLOCKS[{"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}[chip]]


def report(job: Job) -> None:
    """Print a line of the table."""
    peak, bytes_a_cycle, _ = units(job.chip)
    regions = measure(job)
    if isinstance(regions, str):
        print(f"| {job.chip} | {job.kernel} | {job.implementation} | {job.blocks} | {regions} |" + " |" * 4, flush=True)
        return
    if job.kernel.startswith("phi4mm_decode"):
        size = chip_blocks(job.chip).decode_bytes
        region, ideal = max(loops(regions), key=lambda r: r.used[0]), 2 * size / bytes_a_cycle
        tile = f"{size >> 20} MiB of keys"
    else:
        rows, keys, products = tile_of(job)
        region, ideal = inner(job, regions), products * rows * keys * HEAD / peak
        tile = f"{rows} x {keys}" + (f", {job.blocks[2]}" if job.blocks else "")
    full = ", ".join(f"{slot} {region.full[slot]:.0f}" for slot in ("MXU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE"))
    kernel = job.kernel if job.implementation == "ours" else "forward"
    print(
        f"| {job.chip} | {kernel} | {job.implementation} | {tile} |"
        f" {region.bundles} | {ideal:.0f} | {100 * ideal / region.bundles:.1f}% | {full} | {region.used[8]} |",
        flush=True,
    )


def fraction(job: Job) -> float | None:
    regions = measure(job)
    if isinstance(regions, str):
        return None
    rows, keys, products = tile_of(job)
    return products * rows * keys * HEAD / units(job.chip)[0] / inner(job, regions).bundles


def inner(job: Job, regions: list[Region]) -> Region:
    """Return the smallest region that has all of a tile's products."""
    rows, keys, products = tile_of(job)
    peak, _, filled = units(job.chip)
    matrix_units = 4 if peak == 65536 else 2
    needed = 0.8 * products * rows * keys * HEAD / peak * matrix_units / filled
    return min((r for r in regions if r.used[0] >= needed), key=lambda r: r.bundles)


def loops(regions: list[Region]) -> list[Region]:
    """Return the loops, without the whole program: the kernel's step begins with regions that hold everything."""
    max_used = max(r.used[0] for r in regions)
    holding = sorted((r for r in regions if r.used[0] >= 0.95 * max_used), key=lambda r: r.bundles)
    return holding[:1]


_MEASURED: dict[Job, list[Region] | str] = {}


def measure(job: Job) -> list[Region] | str:
    """Return the regions of the compiled kernel; what went wrong, if it does not compile."""
    if job not in _MEASURED:
        with tempfile.TemporaryDirectory() as folder:
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "LIBTPU_INIT_ARGS": dump,
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.kernels_static", "--compile", json.dumps(job)]
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            if child.returncode:
                lines = child.stderr.strip().splitlines()
                _MEASURED[job] = next((x for x in lines if re.match(r"\w[\w.]*Error|tokamax is not", x)), lines[-1])[
                    :150
                ]
            else:
                _MEASURED[job] = read_regions(Path(folder), job.kernel.split()[0])
    return _MEASURED[job]


def read_regions(folder: Path, kernel: str) -> list[Region]:
    """Return the regions of the final schedule, from the compiler's listing and its table of used slots."""
    named = [f for f in folder.iterdir() if re.search(kernel, f.name)]
    usage = next(f for f in named if "final_hlo-static-per-bundle" in f.name).read_text()
    capacity = [int(n) for n in usage.split("== CAP")[1].split("\n")[2].split()]
    lines = usage.split("== UTILIZATION:")[1].strip().split("\n")
    used = [[int(n) for n in line.split()] for line in lines if line[:1].isdigit()]
    opened: dict[str, int] = {}
    regions, address = [], 0
    with next(f for f in named if re.search(r"\d+-final_bundles", f.name)).open() as listing:
        for line in listing:
            if found := re.match(r"\s*(0x[0-9a-f]+|0)\b", line):
                address = int(found.group(1), 16)
            for start in re.findall(r"Start(?:/End empty)? region (\d+)", line):
                if f"empty region {start}" not in line:
                    opened[start] = address
            for end in re.findall(r"End region (\d+)", line):
                if end in opened:
                    part = used[opened[end] : address + 1]
                    total = [sum(column) for column in zip(*part, strict=True)]
                    full = {s: 100 * n / (len(part) * c) for s, n, c in zip(SLOTS, total, capacity, strict=True)}
                    regions.append(Region(len(part), total, full))
    return regions


if __name__ == "__main__":
    main()
