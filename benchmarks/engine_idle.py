"""Time in which the device has nothing to do while the engine decodes: python -m benchmarks.engine_idle [FOLDER].

All slots are filled at once by short prompts, with answers of one length. A program is queued from its call until its
results are there; the idle share is that of the time from the first step of decoding to the last in which none is.
Tokens a second stand beside those of the compiled step alone, called in a loop for as many tokens of which none is read
before the end. With --draft-tokens the requests have drafts; how many tokens a step gives then depends on the answers,
and there is no such step to compare with. Another checkout of this project has a process of its own; the two take
turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import processor
from benchmarks.paths import ROOT, SMALL_MODEL

CODE = """
import copy, dataclasses, json, queue, sys, threading, time
import jax, numpy as np
import phi4mm_jax
from benchmarks.decode_cost import random_model
from phi4mm_jax.engine import Engine, EngineConfig, Request, Sampling
from phi4mm_jax.engine.sampling import SamplingRows
from phi4mm_jax.engine.step_io import DecodeInputs

place, (tokens, slots, draft_tokens), cache = sys.argv[1], map(int, sys.argv[2:]), 512
model = random_model(int(place)) if place.isdigit() else phi4mm_jax.load(place, dtype="float32", scan=True)
config = dataclasses.replace(model.config, stop_token_ids=(model.config.decoder.vocab_size - 1,))  # never likely
model = phi4mm_jax.Model(model.module.clone(config=config), model.variables, model.processor)
calls, spans = queue.SimpleQueue(), []

def watch():
    while True:
        begin, results = calls.get()
        jax.block_until_ready(results)
        spans.append((begin, time.perf_counter()))

def timed(program):
    def call(*arguments, **options):
        begin = time.perf_counter()
        *state, results = program(*arguments, **options)
        calls.put((begin, results))
        return *state, results
    return call

threading.Thread(target=watch, daemon=True).start()
programs = copy.copy(model.programs)
programs.decode, programs.decode_drafts = timed(programs.decode), timed(programs.decode_drafts)
draft = "lookup" if draft_tokens else None

def answered(engine, count):
    texts = [f"<|user|>{i}<|end|><|assistant|>" for i in range(slots)]
    requests = [Request(text, max_new_tokens=count + 1, draft=draft) for text in texts]
    answers = dict(engine.run(requests))
    assert all(len(a.tokens) == count + 1 for a in answers.values()), answers

def bare(engine, steps):
    runner, whole = engine.runner, np.zeros(slots, np.int32)
    each = min(runner.table_size, cache // engine.config.page_tokens)
    tables = np.zeros((slots, runner.table_size), np.int32)
    tables[:, :each] = np.arange(slots * each).reshape(slots, each)
    state, variables = [runner.kv_cache, runner.token_seen], {"params": model.variables["params"]}
    begin = time.perf_counter()
    for done in range(0, tokens, steps):
        inputs = DecodeInputs(
            last=whole, lengths=whole + 8 + done, num_decode_steps=whole + steps, tables=tables, adapters=whole,
            use_long_rope=whole.astype(bool), num_output_tokens=whole, sampling=SamplingRows.of([Sampling()] * slots),
        )
        *state[:], results = model.programs.decode(variables, *state, inputs, width=steps)
    jax.block_until_ready(results)
    runner.kv_cache, runner.token_seen = state
    return tokens * slots / (time.perf_counter() - begin)

def alone(engine, steps):
    return float("nan") if draft else bare(engine, steps)

engines = {}
for line in sys.stdin:
    steps = int(line)
    if steps not in engines:
        sizes = EngineConfig(
            slots=slots, cache_tokens=slots * cache, steps=steps, feature_blocks=16, draft_tokens=draft_tokens
        )
        engines[steps] = Engine(programs, model.variables, model.processor, sizes)
        answered(engines[steps], 3 * steps)  # compiles
        alone(engines[steps], steps)
    time.sleep(0.2)
    spans.clear()
    answered(engines[steps], tokens)
    time.sleep(0.2)
    begin, end, busy, until = min(spans)[0], max(end for _, end in spans), 0.0, 0.0
    for start, ready in sorted(spans):
        busy += max(0.0, ready - max(start, until))
        until = max(until, ready)
    rate = tokens * slots / (end - begin)
    print(json.dumps([1 - busy / (end - begin), rate, alone(engines[steps], steps)]), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_idle", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="another checkout, to compare with")
    parser.add_argument("--model", metavar="PATH", type=Path, default=SMALL_MODEL)
    parser.add_argument("--layers", metavar="N", type=int, help="instead: random weights of full width, and few layers")
    parser.add_argument("--slots", metavar="N", type=int, default=8)
    parser.add_argument("--tokens", metavar="N", type=int, default=256, help="of each answer")
    parser.add_argument("--steps", metavar="N", type=int, nargs="+", default=[1, 2, 4, 8], help="of a round")
    parser.add_argument("--draft-tokens", metavar="N", type=int, default=0)
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="the median counts")
    parsed = parser.parse_args()
    place = str(parsed.layers or parsed.model.resolve())
    command = [sys.executable, "-c", CODE, place, *map(str, (parsed.tokens, parsed.slots, parsed.draft_tokens))]
    folders = {"theirs": parsed.folder, "ours": ROOT} if parsed.folder else {"ours": ROOT}
    processes = {
        name: subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, folder in folders.items()
    }
    drafts = f", up to {parsed.draft_tokens} tokens a draft" if parsed.draft_tokens else ""
    print(f"{parsed.slots} slots, answers of {parsed.tokens} tokens{drafts}, {processor()}")
    print("| steps a round | checkout | idle share | tokens/s | of the bare step's |")
    print("|---|---|---|---|---|")
    for steps in parsed.steps:
        found = [{name: measured(process, steps) for name, process in processes.items()} for _ in range(parsed.rounds)]
        for name in processes:
            idle, rate, ratio = (
                statistics.median(values)
                for values in zip(*((i, r, r / bare) for i, r, bare in (x[name] for x in found)), strict=True)
            )
            beside = "" if parsed.draft_tokens else f"{ratio:.2f}"
            print(f"| {steps} | {name} | {idle:.2f} | {rate:.0f} | {beside} |", flush=True)
    for process in processes.values():
        process.communicate()
    return 0


def measured(process: subprocess.Popen, steps: int) -> list[float]:
    """Return the idle share, and tokens a second of the engine and of the bare step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


if __name__ == "__main__":
    sys.exit(main())
