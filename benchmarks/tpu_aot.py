"""Full-size programs compiled for TPU slices by the TPU's compiler, without a TPU: python -m benchmarks.tpu_aot.

For each, what a chip holds, what it computes and sends, and the time that the compiler's own estimates come to, and
what stands between a training step and its bound; see `phi4mm_jax.testing.compiled` for how they are counted. Every row
is full and every position a target, so that the work counted is the work done. Needs libtpu (`pip install '.[tpu]'`).
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import serving
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.testing.compiled import Cost, cost
from phi4mm_jax.testing.training_steps import CASES, chip_of, chips_of, compile_step, held, work
from phi4mm_jax.utils.paths import path_argument

RELEASE = Path(__file__).parent.parent / "tests" / "fixtures" / "ms_release_config.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_aot", description=__doc__)
    parser.add_argument(
        "--case", nargs="+", choices=[*CASES, *serving.CASES], default=[*CASES, *serving.CASES], help="some alone"
    )
    parser.add_argument("--text", type=path_argument, help="a folder for the compiled modules' text")
    parser.add_argument("--dear", type=int, default=0, help="how many of the dearest operations to list")
    arguments = parser.parse_args()
    training, engine = ([name for name in arguments.case if name in of] for of in (CASES, serving.CASES))
    config = Phi4MMConfig.from_dict(read_json(RELEASE))
    if training:
        print(
            "| trained | chips | rows | recomputed | parameters and optimizer, GiB | temporaries | of HBM "
            "| collectives | products, ms | kernels | all else | step, ms | MFU | tokens/s | compiled in, s |"
        )
        print("|" + "---|" * 15)
    bounds = []
    for name in training:
        start = time.perf_counter()
        compiled = compile_step(CASES[name], config)
        seconds, text = time.perf_counter() - start, str(compiled.as_text())
        _keep(arguments.text, name, text)
        found = cost(text, chip_of(CASES[name]))
        print(row(name, compiled, config, found, seconds), flush=True)
        for place, cycles in found.dear.most_common(arguments.dear):
            print(f"    {cycles / chip_of(CASES[name]).clock * 1e3:8.1f} ms  {place}")
        bounds.append(beyond_the_bound(name, config, found))
    if bounds:
        print("", *bounds, "", sep="\n")
    if engine:
        print(
            "| program | chips | rows | of HBM, GiB | temporaries | collectives, MB | floor, ms | estimated | ratio |"
            " tokens/s | compiled in, s |"
        )
        print("|" + "---|" * 11)
    for name in engine:
        start = time.perf_counter()
        compiled = serving.compile_serving(serving.CASES[name], config)
        seconds = time.perf_counter() - start
        _keep(arguments.text, name, str(compiled.as_text()))
        print(serving.row(name, compiled, config, held(compiled), seconds), flush=True)
    return 0


def _keep(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text)


def row(name: str, compiled: jax.stages.Compiled, config: Phi4MMConfig, found: Cost, seconds: float) -> str:
    """A line of the table."""
    case, chip = CASES[name], chip_of(CASES[name])
    memory: Any = compiled.memory_analysis()
    kernels = sum(found.kernels.values())
    moved = ", ".join(f"{kind} {found.counts[kind]} x, {n / 1e9:.2f} GB" for kind, n in found.bytes.items())
    devices = len(chips_of(case))
    mfu = work(case, config) / devices / chip.peak / found.seconds

    def ms(cycles: float) -> str:
        return f"{cycles / chip.clock * 1e3:.0f}"

    return (
        f"| {name} | {case.topology} | {case.rows} x {case.length} | {case.remat} "
        f"| {memory.argument_size_in_bytes / 2**30:.1f} | {memory.temp_size_in_bytes / 2**30:.1f} "
        f"| {held(compiled):.1f} of {chip.hbm:.1f} | {moved} | {ms(found.products)} | {ms(kernels)} "
        f"| {ms(found.cycles - found.products)} | {found.seconds * 1e3:.0f} | {100 * mfu:.0f} % "
        f"| {case.rows * case.length / found.seconds:.0f} | {seconds:.0f} |"
    )


def beyond_the_bound(name: str, config: Phi4MMConfig, found: Cost) -> str:
    """Tell what a step takes beyond its work at the chip's peak, and which operations it is."""
    case, chip = CASES[name], chip_of(CASES[name])
    bound = work(case, config) / len(chips_of(case)) / chip.peak
    products, at_peak = found.products / chip.clock, found.macs / (chip.macs * chip.cores) / chip.clock

    def dearest(of: Mapping[str, float], a_second: float) -> str:
        largest = sorted(of.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{place} {1e3 * amount / a_second:.0f}" for place, amount in largest)

    return (
        f"- {name}, ms: {1e3 * found.seconds:.0f}, and {1e3 * bound:.0f} at peak without what is computed again; "
        f"products {1e3 * products:.0f}, which peak would do in {1e3 * at_peak:.0f}; "
        f"kernels {1e3 * sum(found.kernels.values()) / chip.clock:.0f}; "
        f"waits for transfers {1e3 * found.exposed / chip.link:.0f} ({dearest(found.waits, chip.link)}); "
        f"all else {1e3 * (found.cycles - found.products) / chip.clock:.0f} ({dearest(found.others, chip.clock)})"
    )


if __name__ == "__main__":
    sys.exit(main())
