"""The machine that figures are of."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """Return the processor's name as Linux gives it, its instructions for products, and the threads of this process."""
    facts = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.*)", facts, re.MULTILINE)
    kinds = [kind for kind in ("avx512f", "avx512_bf16", "amx_tile") if re.search(rf"\b{kind}\b", facts)]
    instructions = ", ".join(kinds) or "neither AVX-512 nor AMX"
    return f"{len(os.sched_getaffinity(0))} threads of {name[1] if name else platform.machine()} ({instructions})"
