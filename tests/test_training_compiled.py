"""The training step at full size, compiled by the TPU's compiler for eight chips, without one."""

import re

from benchmarks.training_static import CASES, compile_step, held


def test_tuning_the_speech_adapter_fits_eight_chips():
    compiled = compile_step(CASES["speech adapter"])
    assert held(compiled) < 12.0
    text = compiled.as_text()
    assert text is not None
    assert "phi4mm_flash" in text
    assert not re.search(r"\[200064,3072\]|\[3072,200064\]", text), "a chip holds the whole embedding"
