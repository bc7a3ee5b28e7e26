"""The training step on meshes of eight devices, and of recipes, in a process of their own.

Two collectives of eight devices at once take more threads than XLA's CPU client has on a machine with few cores, and it
then waits for ever: hence PJRT_NPROC, which it reads once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import fast_are

CASES = Path(__file__).with_name("on_meshes.py")
FAST = "vision_stage_4"


@pytest.mark.parametrize("cases", fast_are([FAST], [FAST, f"not ({FAST})"]), ids=["some", "others"])
def test_a_step_on_a_mesh_is_that_of_one_device(cases):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", CASES, "-k", cases]
    done = subprocess.run(command, env=os.environ | {"PJRT_NPROC": "32"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
