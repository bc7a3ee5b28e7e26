"""Progress of programs where standard error is a log file."""

import time

from phi4mm_jax.utils import progress
from phi4mm_jax.utils.progress import count_bar, step_bar


def test_a_log_file_has_lines_while_items_are_answered(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.05)
    with count_bar("Answering", "tokens", 7, 2) as advance:
        time.sleep(0.2)
        advance(3, 40)
        time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Answering: programs are being compiled"
    assert any(line.startswith("Answering: 5 of 7, ") and line.endswith(" tokens/s") for line in lines)


def test_a_host_without_rows_in_a_step_shows_no_speed(capfd):
    with step_bar(4, 0) as advance:
        advance(4, {"loss": 0.5, "tokens_per_second": 0.0})
    told = capfd.readouterr().err
    assert "loss 0.5000" in told
    assert "tokens/s" not in told
