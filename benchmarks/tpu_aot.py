"""Full-size programs compiled for TPU slices by the TPU's compiler, without a TPU: python -m benchmarks.tpu_aot.

For each, what a chip holds, what it computes and sends, and the time that the compiler's own estimates come to, and
what stands between a training step and its bound; see `phi4mm_jax.testing.compiled` for how they are counted. Every row
is full and every position a target, so that the work counted is the work done. With --recipe, the steps of recipes as
they stand, for the slices that their head comments name. Needs libtpu (`pip install '.[tpu]'`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import engine_aot
from benchmarks.paths import release_config
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.model.layers import Remat
from phi4mm_jax.testing.compiled import CHIPS, Chip, Cost, cost
from phi4mm_jax.testing.recipe_steps import ANY, compile_recipe, recipe_flops, resolved_recipes, shape_of, topology_of
from phi4mm_jax.testing.training_steps import CASES, case_flops, chips_of, compile_step, hbm_gib
from phi4mm_jax.training.named_recipes import recipe_path
from phi4mm_jax.training.recipe import load_recipe
from phi4mm_jax.utils.paths import path_argument
from train.dpo import DPO
from train.sft import SFT


class Step(NamedTuple):
    """Training step of the table: what it is, and the FLOP of one step on all chips."""

    name: str
    topology: str
    shape: str
    remat: Remat
    tokens: int
    flops: float
    devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.split(" ")[-1].split(":")[0]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_aot", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=[*CASES, *engine_aot.CASES], help="some alone")
    parser.add_argument(
        "--recipe", nargs="+", default=[], help="recipes as they stand: files, or names of those in train/recipes"
    )
    parser.add_argument("--topology", help="of the recipes; by default each names its own")
    parser.add_argument("--chips", type=int, help="of the topology's, for the recipes; by default all")
    parser.add_argument("--text", type=path_argument, help="a folder for the compiled modules' text")
    parser.add_argument("--top-ops", metavar="N", type=int, default=0, help="list the N most expensive operations")
    arguments = parser.parse_args()
    if (arguments.topology or arguments.chips) and not arguments.recipe:
        parser.error("--topology and --chips are those of recipes: give --recipe, too")
    cases = arguments.case or ([] if arguments.recipe else [*CASES, *engine_aot.CASES])
    training, engine = ([name for name in cases if name in of] for of in (CASES, engine_aot.CASES))
    config = release_config()
    steps = [
        *(case_step(name, config) for name in training),
        *(
            step
            for recipe in arguments.recipe
            for step in recipe_steps(recipe, arguments.topology, arguments.chips, config)
        ),
    ]
    failed = compile_steps(steps, arguments.text, arguments.top_ops) if steps else False
    if engine:
        print(
            "| program | chips | rows | of HBM, GiB | temporaries | collectives, MB | floor, ms | estimated | ratio |"
            " tokens/s | compiled in, s |"
        )
        print("|" + "---|" * 11)
    for name in engine:
        start = time.perf_counter()
        compiled = engine_aot.compile_program(engine_aot.CASES[name], config)
        seconds = time.perf_counter() - start
        _keep(arguments.text, name, str(compiled.as_text()))
        print(engine_aot.row(name, compiled, config, hbm_gib(compiled), seconds), flush=True)
    return int(failed)


def case_step(name: str, config: Phi4MMConfig) -> tuple[Step, Callable[[], jax.stages.Compiled]]:
    """Return a case of the table, and what compiles it."""
    case = CASES[name]
    step = Step(
        name, case.topology, f"{case.rows} x {case.length}", case.remat, case.rows * case.length,
        case_flops(case, config), len(chips_of(case.topology, case.slices)),
    )  # fmt: skip
    return step, partial(compile_step, case, config)


def recipe_steps(
    name: str, topology: str | None, count: int | None, config: Phi4MMConfig
) -> Iterator[tuple[Step, Callable[[], jax.stages.Compiled]]]:
    """Yield the steps of a recipe as it stands, and what compiles them; none where it is for any machine.

    Args:
        count: of the topology's chips, by default all.
    """
    path = recipe_path(name)
    topology = topology or topology_of(path)
    if topology == ANY:
        print(f"{path}: for any machine; give --topology to compile it for one", file=sys.stderr)
        return
    recipe, chips = load_recipe(path), chips_of(topology)[:count]
    topology = topology if count is None else f"{count} of {topology}"
    method = DPO if recipe.data.kind == "preferences" else SFT
    for kind, of_kind in resolved_recipes(recipe, chips, config).items():
        shape = shape_of(of_kind)
        media = [f"{count} {what}" for what, count in (("crops", shape.crops), ("chunks", shape.chunks)) if count]
        sizes = ", ".join([f"{shape.accumulate} x {shape.rows} x {shape.length}", *media])
        tokens = shape.accumulate * shape.rows * shape.length
        step = Step(path.stem + kind, topology, sizes, of_kind.remat, tokens, recipe_flops(of_kind, config), len(chips))
        yield step, partial(compile_recipe, of_kind, method.objective, method.add_reference_params, config, chips)


def compile_steps(
    steps: Sequence[tuple[Step, Callable[[], jax.stages.Compiled]]], texts: Path | None, top_ops: int
) -> bool:
    """Compile training steps, and print a row of each; return whether one could not be compiled, or not be held."""
    print(
        "| trained | chips | rows | recomputed | parameters and optimizer, GiB | temporaries | of HBM "
        "| collectives | products, ms | kernels | all else | step, ms | MFU | tokens/s | compiled in, s |"
    )
    print("|" + "---|" * 15)
    bounds, failed = [], False
    for step, compile_ in steps:
        start = time.perf_counter()
        try:
            compiled = compile_()
        except jax.errors.JaxRuntimeError as error:  # such as too little HBM
            failed = True
            print(f"| {step.name} | {step.topology} | {step.shape} | {step.remat} | {error!s:.300} |", flush=True)
            continue
        seconds, text = time.perf_counter() - start, str(compiled.as_text())
        _keep(texts, step.name, text)
        found = cost(text, step.chip)
        print(row(step, compiled, found, seconds), flush=True)
        failed |= hbm_gib(compiled) > step.chip.hbm  # without chips the compiler itself does not say so
        for place, cycles in found.cycles_by_place.most_common(top_ops):
            print(f"    {cycles / step.chip.clock * 1e3:8.1f} ms  {place}")
        bounds.append(beyond_the_bound(step, found))
    if bounds:
        print("", *bounds, "", sep="\n", flush=True)
    return failed


def _keep(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text)


def row(step: Step, compiled: jax.stages.Compiled, found: Cost, seconds: float) -> str:
    """Return a line of the table."""
    chip = step.chip
    memory: Any = compiled.memory_analysis()
    over = ", too much" if hbm_gib(compiled) > chip.hbm else ""
    kernels = sum(found.kernels.values())
    moved = ", ".join(f"{kind} {found.counts[kind]} x, {n / 1e9:.2f} GB" for kind, n in found.bytes.items())
    mfu = step.flops / step.devices / chip.peak / found.seconds

    def ms(cycles: float) -> str:
        return f"{cycles / chip.clock * 1e3:.0f}"

    return (
        f"| {step.name} | {step.topology} | {step.shape} | {step.remat} "
        f"| {memory.argument_size_in_bytes / 2**30:.1f} | {memory.temp_size_in_bytes / 2**30:.1f} "
        f"| {hbm_gib(compiled):.1f} of {chip.hbm:.1f}{over} | {moved} | {ms(found.products)} | {ms(kernels)} "
        f"| {ms(found.cycles - found.products)} | {found.seconds * 1e3:.0f} | {100 * mfu:.0f} % "
        f"| {step.tokens / found.seconds:.0f} | {seconds:.0f} |"
    )


def beyond_the_bound(step: Step, found: Cost) -> str:
    """Tell what a step takes beyond its work at the chip's peak, and which operations it is."""
    chip = step.chip
    bound = step.flops / step.devices / chip.peak
    products, at_peak = found.products / chip.clock, found.macs / (chip.macs * chip.cores) / chip.clock

    def largest(of: Mapping[str, float], a_second: float) -> str:
        first = sorted(of.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{place} {1e3 * amount / a_second:.0f}" for place, amount in first)

    return (
        f"- {step.name}, ms: {1e3 * found.seconds:.0f}, and {1e3 * bound:.0f} at peak without what is computed again; "
        f"products {1e3 * products:.0f}, which peak would do in {1e3 * at_peak:.0f}; "
        f"kernels {1e3 * sum(found.kernels.values()) / chip.clock:.0f}; "
        f"waits for transfers {1e3 * found.exposed / chip.link:.0f} ({largest(found.exposed_by_place, chip.link)}); "
        f"all else {1e3 * (found.cycles - found.products) / chip.clock:.0f} ({largest(found.other_cycles, chip.clock)})"
    )


if __name__ == "__main__":
    sys.exit(main())
