"""Rows of a data set, answered by engines that Ray places on chips."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from phi4mm_jax.engine.answer_lines import answer_of
from phi4mm_jax.engine.jsonl import Line, parse_line
from phi4mm_jax.engine.request import Completion, Request
from phi4mm_jax.errors import InputError
from phi4mm_jax.ray.chips import restrict_to_chips, restrict_to_processors
from phi4mm_jax.ray.media import REQUEST, as_json, fetch_remote
from phi4mm_jax.utils.checks import is_whole

_STOPPED = 70  # status of a worker whose engine has stopped; Ray starts another, and asks it the rows again
ANSWER = pa.schema(
    [
        ("text", pa.string()), ("tokens", pa.list_(pa.int32())), ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()), ("error", pa.string()),
        ("tool_calls", pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))),
        ("logprobs", pa.list_(pa.float64())),
        ("alternatives", pa.list_(pa.struct(
            [("text", pa.string()), ("tokens", pa.list_(pa.int32())), ("score", pa.float64())]
        ))),
    ]
)  # fmt: skip


class Answer:
    """An engine as a callable class for `Dataset.map_batches`: a row of the data set is a prompt, and an answer.

        ds = ray.data.read_parquet("gs://bucket/prompts").map_batches(
            Answer, fn_constructor_args=[MODEL], batch_size=32, batch_format="pyarrow",
            resources={"TPU": 1}, compute=ray.data.ActorPoolStrategy(size=8, max_concurrent_calls_per_actor=4),
        )

    Several batches are answered at once (`max_concurrent_calls_per_actor`), so that an engine's slots are full while
    the last rows of a batch are decoded. A row has columns named as the keys of a line of infer.batch ("prompt" or
    "messages", "images", "audios", "max_new_tokens", ...). Media are paths, bytes, references to Ray's object store
    (`ray.put` of a file's bytes) or URLs (gs://, s3://, ...). The answer's row has the other columns as they are, and
    the columns of `ANSWER`: those of a row that could not be answered are null but for "error".

    Args:
        model: a checkpoint's folder, which each host has, or a repository on the Hub.
        mesh: "tensor=N" to share the engine among so many chips; by default all that Ray gives it.
        engine: arguments of `EngineConfig`, which is made beside the chips.
        defaults: what rows without the column have: {"max_new_tokens": 64, "temperature": 0.7}.
        user_adapters: folders of adapters to load, by the names that rows ask for them by ("adapter"); the engine has
            `max_adapters` for them.
        warm_up: compile every program before the first row.
        compilation_cache: a folder that keeps compiled programs; by default the user's.
        options: further arguments of `phi4mm_jax.load`: dtype, adapters, merge, ...

    Raises:
        InputError, CheckpointError, ConfigError: as of `load` and `Model.engine`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        mesh: str | None = None,
        engine: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        user_adapters: Mapping[str, str | Path] | None = None,
        warm_up: bool = False,
        compilation_cache: str | None = None,
        **options: Any,
    ):
        _restrict()  # before jax looks for devices
        import phi4mm_jax
        from phi4mm_jax.checkpoint.hub import local_folder
        from phi4mm_jax.config import Phi4MMConfig
        from phi4mm_jax.engine import AsyncEngine, EngineConfig
        from phi4mm_jax.mesh import inference_mesh
        from phi4mm_jax.utils.compilation import keep_compiled

        self._defaults = {"max_new_tokens": 256, **(defaults or {})}
        if unknown := sorted(self._defaults.keys() - REQUEST):
            raise InputError(f"defaults has {unknown[0]!r}; expected some of {', '.join(sorted(REQUEST))}")
        if compilation_cache is not None:
            keep_compiled(compilation_cache)
        on = inference_mesh(mesh, Phi4MMConfig.from_folder(local_folder(model)).decoder)
        made = phi4mm_jax.load(model, mesh=on, **options).engine(EngineConfig(**(engine or {})))
        for name, folder in (user_adapters or {}).items():
            made.load_adapter(name, folder)
        self._adapters = tuple(user_adapters or ())
        if warm_up:
            made.warm_up()
        self._engine = AsyncEngine(made)
        self.settings = {
            key: self._defaults[key] for key in ("max_new_tokens", "adapter", "draft") if key in self._defaults
        }

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a batch.

        Raises:
            InputError: it is not an Arrow table.
        """
        if not isinstance(batch, pa.Table):
            raise InputError(f'a batch is a {type(batch).__name__}; give map_batches batch_format="pyarrow"')
        answers = await asyncio.gather(*(self._answer_row(row) for row in batch.to_pylist()))
        others = [name for name in batch.column_names if name not in REQUEST and name not in ANSWER.names]
        return with_columns(batch.select(others), answers)

    async def answer_line(self, line: Line) -> Completion | str:
        """Return the completion of a line of a request file, or what was wrong."""
        if line.request is None:
            return line.error or ""
        try:
            completion = await self._complete(line.request)
        except InputError as error:
            return f"{line.where}: {error}"
        return completion if completion.error is None else f"{line.where}: {completion.error}"

    async def _answer_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            line = await asyncio.to_thread(self._line_of, row)  # reads and encodes media
        except (InputError, TypeError) as error:
            return {"error": str(error)}
        found = await self.answer_line(line)
        if isinstance(found, str):
            return {"error": found.removeprefix(f"{line.where}: ")}
        return answer_of(line, found, "plain")

    def _line_of(self, row: Mapping[str, Any]) -> Line:
        """Return a row as a line of a request file; without a digest, which no column of its answer has.

        Raises:
            InputError, TypeError: a medium cannot be read, or is nothing that JSON has.
        """
        given = {key: value for key, value in row.items() if key in REQUEST and value is not None}
        values = as_json(self._defaults | given)
        name = row.get("id")  # what seeds a row without a seed
        if not isinstance(name, str) and not is_whole(name):
            name = blake2b(json.dumps(values).encode()).hexdigest()
        text = json.dumps({"id": name, **values}).encode()
        return replace(parse_line(0, text, Path(), self.settings), digest=None)

    async def _complete(self, request: Request) -> Completion:
        request = await asyncio.to_thread(fetch_remote, request)
        try:
            completion = await self._engine.generate(request)
        except InputError:  # of a closed engine; a request's own is its completion's
            completion = Completion("", [], "error", 0, error="closed")
        if not self._engine.running:
            print(f"the engine has stopped ({completion.error}); Ray starts another", file=sys.stderr, flush=True)
            os._exit(_STOPPED)
        return completion


def with_columns(rows: pa.Table, answers: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows with the columns of their answers."""
    for field in ANSWER:
        values = [answer.get(field.name) for answer in answers]
        if field.name == "tool_calls":
            values = [calls and [{**c, "arguments": json.dumps(c["arguments"])} for c in calls] for calls in values]
        rows = rows.append_column(field, pa.array(values, field.type))
    return rows


def _restrict() -> None:
    """See only the chips, or use only the processors, that Ray has given this actor."""
    if not ray.is_initialized():  # no actor, but a caller of its own
        return
    context = ray.get_runtime_context()
    if chips := context.get_accelerator_ids().get("TPU"):
        restrict_to_chips([int(chip) for chip in chips])
    elif not context.get_accelerator_ids().get("GPU"):  # Ray itself sets CUDA_VISIBLE_DEVICES
        restrict_to_processors(max(1, int(context.get_assigned_resources().get("CPU", 1))))
