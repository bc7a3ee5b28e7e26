"""Run the parts of benchmarks.gpu, and print their table."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from benchmarks import gpu
from benchmarks.gpu import common
from benchmarks.paths import ROOT


class Part(NamedTuple):
    """Rows that one process measures: a function of that name in a module here."""

    module: str
    share: float  # of the time, most of which is compilation


PARTS = {
    "ceilings": Part("kernels", 0.03),
    "numbers": Part("errors", 0.08),
    "kernels": Part("kernels", 0.08),
    "torch_kernels": Part("peers", 0.04),
    "model": Part("model", 0.41),
    "torch_model": Part("peers", 0.09),
    "quantized": Part("model", 0.21),
    "tuning": Part("model", 0.03),
    "load": Part("model", 0.03),
}
START_WITHIN = 0.8  # of a part's time, a row is started; at its end the part is ended
SIDES = ("ours", "XLA", "Triton", "cuDNN bare", "SDPA flash", "SDPA cuDNN", "transformers")
CEILINGS = {"TB/s": "ceiling: read", "TFLOP/s": "ceiling: bfloat16 product"}  # by unit


def main() -> int:
    parser = argparse.ArgumentParser(description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows only that it runs")
    parser.add_argument("--minutes", type=float, default=25.0, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.small, arguments.seconds)
        return 0
    rows = collect(arguments.parts, arguments.minutes * 60, arguments.small)
    print(f"\n{platform_line(rows)}\n\n{table(rows)}")
    return 0


# --- processes ---


def collect(parts: Sequence[str], seconds: float, small: bool) -> list[dict[str, Any]]:
    """Run the parts one after the other; what one leaves of its time the later ones have."""
    rows: list[dict[str, Any]] = []
    end, shares = time.monotonic() + seconds, sum(PARTS[name].share for name in parts)
    for name in parts:
        left = end - time.monotonic()
        limit = left * PARTS[name].share / shares
        shares -= PARTS[name].share
        rows += in_process(name, max(limit, 1.0), small)
    return rows


def in_process(name: str, limit: float, small: bool) -> list[dict[str, Any]]:
    """Return the rows that a part has printed before its end or its time's."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *["--small"] * small]
    command += ["--seconds", str(limit * START_WITHIN)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    rows, errors = [], []
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
    reader.start()
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(line, end="", flush=True)
    process.wait()
    reader.join()
    timed_out = not timer.is_alive()
    timer.cancel()
    if process.returncode:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no message")
        reason = f"its {limit:.0f} s were over" if timed_out else f"{last:.150}"
        rows.append({"row": f"{name}: the rest", "side": "ours", "error": reason})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def run_part(name: str, small: bool, seconds: float) -> None:
    """Print one line of JSON for each result, as soon as it is there; behind these seconds, that it was not started."""
    if small:
        common.max_calls = 1
    module = import_module(f"benchmarks.gpu.{PARTS[name].module}")
    part: Callable[[bool], Iterator[common.Measurement]] = getattr(module, name)
    end = time.monotonic() + seconds
    for row, side, unit, measure in part(small):
        try:
            result = {"value": measure()} if time.monotonic() < end else {"error": "not started: the time was over"}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {lines[0]:.120}"}
        print(json.dumps({"row": row, "side": side, "unit": unit, **result}), flush=True)


# --- the table ---


def platform_line(rows: Sequence[dict[str, Any]]) -> str:
    platform = [row["value"] for row in rows if row["row"] == "platform" and "value" in row]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return "; ".join([time.strftime("%Y-%m-%d"), f"commit {commit.stdout.strip() or 'unknown'}", *platform])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: a line a row, a column a side that has a value, and the ratios of ours to others.

    They are that to the best other side, XLA only where there is no other, and that to the ceiling of the row's unit.
    """
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["row"] != "platform":
            cells.setdefault(row["row"], {})[row["side"]] = row
    sides = [side for side in SIDES if any("value" in found.get(side, {}) for found in cells.values())]
    head = f"| row | unit | {' | '.join(sides)} | ours over the best other | over the ceiling | |"
    lines = [head, "|---" * (len(sides) + 5) + "|"]
    for name, found in cells.items():
        values = {side: x["value"] for side, x in found.items() if "value" in x}
        others = [value for side, value in values.items() if side not in ("ours", "XLA")]
        others = others or [value for side, value in values.items() if side == "XLA"]
        ratio = f"{values['ours'] / max(others):.2f}" if "ours" in values and others else ""
        unit = next((x["unit"] for x in found.values() if "unit" in x), "")
        ceiling = cells.get(CEILINGS.get(unit, ""), {}).get("ours", {}).get("value")
        share = f"{values['ours'] / ceiling:.2f}" if ceiling and "ours" in values else ""
        notes = "; ".join(f"{side}: {x['error']}" for side, x in found.items() if "error" in x).replace("|", "/")
        shown = [f"{values[side]:.4g}" if side in values else "" for side in sides]
        lines.append(f"| {name} | {unit} | {' | '.join(shown)} | {ratio} | {share} | {notes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
