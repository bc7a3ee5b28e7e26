"""The application: its endpoints, and who may ask them."""

import asyncio
import difflib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from phi4mm_jax import __version__
from phi4mm_jax.engine.user_adapters import UserAdapter
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve import audio
from phi4mm_jax.serve.adapters import add_adapters
from phi4mm_jax.serve.answering import EventStream, Service, events_of, response_of
from phi4mm_jax.serve.batches import Batches
from phi4mm_jax.serve.chat import chat_answer, chat_chunks, parse_chat
from phi4mm_jax.serve.completions import parse_completion, text_answer, text_chunks
from phi4mm_jax.serve.engine_host import EngineHost, ReadAdapter
from phi4mm_jax.serve.engine_messages import EngineStats
from phi4mm_jax.serve.engine_process import EnginePlace
from phi4mm_jax.serve.errors import ERRORS, ApiError, server_failed
from phi4mm_jax.serve.files import Store
from phi4mm_jax.serve.gate import Gate, StrictRoute, client_of, owner_of
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.media import MediaReader
from phi4mm_jax.serve.metrics import Metrics
from phi4mm_jax.serve.models import (
    PART_MODELS,
    PART_TYPES,
    BatchListQuery,
    BatchRequest,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    FileForm,
    FileListQuery,
    Only,
)
from phi4mm_jax.serve.queueing import FairQueue
from phi4mm_jax.serve.remote_media import Fetcher
from phi4mm_jax.serve.schemas import describe_limits
from phi4mm_jax.transcription.transcripts import TASKS, Task

PAGE = Path(__file__).parent / "page"
_log = logging.getLogger(__name__)
_FORM = Form(media_type="multipart/form-data")
_NO_KEYS = {"body", "query", "path", "str", "constrained-str", *PART_MODELS}  # what pydantic puts between the keys
_WORKERS = 32  # threads that read media: a slow one holds up few others
_PAGE_HEADERS = {  # nothing is loaded from elsewhere, and no other page shows this one
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
}


def _content(*types: str) -> dict[int | str, dict[str, Any]]:
    """Describe answers of other types than JSON."""
    return {200: {"content": {kind: {} for kind in types}}}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        name: of the model, for clients.
        files: folder of the files for batches, which one server at a time has.
        api_keys: one of which a client has to send; none: everybody on this host may ask.
        loopback: clients reach the server by the names of this host only, so that no page of another name can ask it.
        remote_media: URLs of media are fetched.
        instructions: what the model is told to do with a clip, by task ("transcribe", "translate").
        adapters: of users, by name, that are loaded from the start.
        adapter_root: folder below which clients may have adapters loaded; None: they may not.
        warm_up: compile everything before the first request.
    """

    name: str
    files: Path
    limits: Limits = field(default_factory=Limits)
    api_keys: Collection[str] = ()
    loopback: bool = True
    remote_media: bool = False
    instructions: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, UserAdapter] = field(default_factory=dict)
    adapter_root: Path | None = None
    warm_up: bool = True


def create_app(
    place: EnginePlace, tokenizer: Tokenizer, slots: int, settings: ServerSettings,
    read_adapter: ReadAdapter | None = None,
) -> FastAPI:  # fmt: skip
    """Return the application; its engine is made as it starts.

    Args:
        place: where engines with so many `slots` run.
        read_adapter: reads users' adapters that clients have loaded; see `EngineHost`.

    Raises:
        InputError: the folder of files cannot be made, or another server uses it.
    """
    limits = settings.limits
    store = Store(settings.files, limits)
    store.lock()
    fetch = Fetcher(limits.remote_bytes) if settings.remote_media else None
    service = Service(
        name=settings.name, tokenizer=tokenizer,
        host=EngineHost(place, warm_up=settings.warm_up, adapters=settings.adapters, read_adapter=read_adapter),
        # as many as run, as have their last tokens decoded, and as have their media processed meanwhile
        queue=FairQueue(3 * slots, limits.max_waiting),
        limits=limits, read_media=MediaReader(limits, fetch), metrics=Metrics(), created=int(time.time()),
        workers=ThreadPoolExecutor(_WORKERS, "phi4mm-media"),
    )  # fmt: skip
    batches = Batches(store, _batch_answer(service), parallel=slots)
    _watch(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.host.start()
        batches.resume()
        try:
            yield
        finally:
            await batches.close()
            store.unlock()
            await service.host.close()
            service.workers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="phi4mm-jax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={status: ERRORS[status] for status in (401, 403)},
    )  # fmt: skip
    app.router.route_class = StrictRoute
    app.state.service = service
    app.openapi = lambda: _described(app, limits)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_failure)
    _add_generation(app, service, settings)
    if settings.adapter_root is not None:
        add_adapters(app, service, settings.adapter_root)
    _add_files(app, store, batches)
    _add_status(app, service)
    app.add_middleware(
        Gate, metrics=service.metrics, limits=limits, api_keys=settings.api_keys, loopback=settings.loopback
    )
    return app


def _described(app: FastAPI, limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI document, with these limits, without the answers to bad input that FastAPI would give."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        describe_limits(schema["components"]["schemas"], limits)
        error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= error.pop("$defs") | {"ErrorBody": error}
        app.openapi_schema = schema
    return app.openapi_schema


def _batch_answer(service: Service) -> Callable[[str, dict[str, Any], str], Any]:
    async def answer(endpoint: str, body: dict[str, Any], owner: str) -> dict[str, Any]:
        while not service.host.ready:
            await asyncio.sleep(0.2)
        client = f"batches of {owner}"
        if endpoint == "/v1/chat/completions":
            chat = await parse_chat(service, _validated(ChatRequest, body))
            return await chat_answer(service, client, chat, unlimited=True)
        text = await parse_completion(service, _validated(CompletionRequest, body))
        return await text_answer(service, client, text, unlimited=True)

    return answer


def _validated(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error.errors(), kind) from None


# ---------------------------------------------------------------------------------------------- endpoints


def _add_generation(app: FastAPI, service: Service, settings: ServerSettings) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS | _content("text/event-stream"))
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a chat, at once or as server-sent events."""
        job = await parse_chat(service, body)
        if body.stream:
            return EventStream(events_of(service, client_of(http), job, chat_chunks))
        return await response_of(http, chat_answer(service, client_of(http), job))

    @app.post("/v1/completions", responses=ERRORS | _content("text/event-stream"))
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue raw prompts, at once or as server-sent events."""
        job = await parse_completion(service, body)
        if body.stream:
            return EventStream(events_of(service, client_of(http), job, text_chunks))
        return await response_of(http, text_answer(service, client_of(http), job))

    async def listen(task: Task, http: HttpRequest, form: audio.TranslationForm) -> Response:
        job = await audio.parse_audio(service, task, form, settings.instructions.get(task, TASKS[task]))
        if form.stream:
            return EventStream(events_of(service, client_of(http), job, audio.audio_chunks), last=None)
        return await response_of(http, audio.audio_answer(service, client_of(http), job))

    @app.post("/v1/audio/transcriptions", responses=ERRORS | _content("text/event-stream", "text/plain"))
    async def transcriptions(http: HttpRequest, form: Annotated[audio.TranscriptionForm, _FORM]) -> Response:
        """Write down what is said in a clip."""
        return await listen("transcribe", http, form)

    @app.post("/v1/audio/translations", responses=ERRORS | _content("text/event-stream", "text/plain"))
    async def translations(http: HttpRequest, form: Annotated[audio.TranslationForm, _FORM]) -> Response:
        """Translate what is said in a clip to English."""
        return await listen("translate", http, form)

    def described(name: str) -> dict[str, Any]:
        parent = {"parent": service.name} if name != service.name else {}
        return {"id": name, "object": "model", "created": service.created, "owned_by": "phi4mm-jax", **parent}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models: the server's own, and users' adapters of it, which have it as their `parent`."""
        return {"object": "list", "data": [described(name) for name in (service.name, *service.host.adapters)]}

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str) -> dict[str, Any]:
        """Describe a model."""
        service.check_model(model)
        return described(model)


def _add_files(app: FastAPI, store: Store, batches: Batches) -> None:
    @app.post("/v1/files", responses=ERRORS)
    async def add_file(http: HttpRequest, form: Annotated[FileForm, _FORM]) -> dict[str, Any]:
        """Keep a file for batches."""
        name = (form.file.filename or "")[-255:]
        return await asyncio.to_thread(store.add_file, form.file.file, name, form.purpose, owner_of(http))

    @app.get("/v1/files", responses=ERRORS)
    async def list_files(http: HttpRequest, query: Annotated[FileListQuery, Query()]) -> dict[str, Any]:
        """List files."""
        files = await asyncio.to_thread(store.list, "file", owner_of(http))
        if query.order == "asc":
            files.reverse()
        return _listed([file for file in files if query.purpose in (None, file["purpose"])], query)

    @app.get("/v1/files/{file_id}", responses=ERRORS)
    async def read_file(file_id: str, http: HttpRequest) -> dict[str, Any]:
        """Describe a file."""
        return store.read(file_id, owner_of(http))

    @app.delete("/v1/files/{file_id}", responses=ERRORS)
    async def delete_file(file_id: str, http: HttpRequest) -> dict[str, Any]:
        """Delete a file."""
        store.delete_file(file_id, owner_of(http))
        return {"id": file_id, "object": "file", "deleted": True}

    @app.get("/v1/files/{file_id}/content", responses=ERRORS | _content("application/octet-stream"))
    async def file_content(file_id: str, http: HttpRequest) -> Response:
        """Return what is in a file."""
        store.read(file_id, owner_of(http))
        return FileResponse(store.content(file_id), media_type="application/octet-stream")

    @app.post("/v1/batches", responses=ERRORS)
    async def create_batch(body: BatchRequest, http: HttpRequest) -> dict[str, Any]:
        """Begin to answer the requests of a file."""
        return batches.create(body, owner_of(http))

    @app.get("/v1/batches", responses=ERRORS)
    async def list_batches(http: HttpRequest, query: Annotated[BatchListQuery, Query()]) -> dict[str, Any]:
        """List batches, the newest first."""
        return _listed(batches.list(owner_of(http)), query)

    @app.get("/v1/batches/{batch_id}", responses=ERRORS)
    async def read_batch(batch_id: str, http: HttpRequest) -> dict[str, Any]:
        """Describe a batch."""
        return batches.read(batch_id, owner_of(http))

    @app.post("/v1/batches/{batch_id}/cancel", responses=ERRORS)
    async def cancel_batch(batch_id: str, http: HttpRequest) -> dict[str, Any]:
        """End a batch; its answers so far stay."""
        return batches.cancel(batch_id, owner_of(http))


def _listed(values: list[dict[str, Any]], query: BatchListQuery) -> dict[str, Any]:
    if query.after is not None:
        ids = [value["id"] for value in values]
        if query.after not in ids:
            raise ApiError(404, f"after: there is no {query.after!r:.80} in this list", param="after", code="not_found")
        values = values[ids.index(query.after) + 1 :]
    page = values[: query.limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(page) < len(values), **ends}


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell that the server runs, be its model ready or not."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Tell that requests are answered now: everything is compiled."""
        if not service.host.ready:
            raise ApiError(503, f"the model cannot answer yet: {service.host.cause}", kind="server_error",
                           code="not_ready", retry_after=5)  # fmt: skip
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))


def _watch(service: Service) -> None:
    """Add the metrics that are read when they are asked for."""
    host, queue, watch = service.host, service.queue, service.metrics.watch

    def of_engine(value: Callable[[EngineStats], int]) -> Callable[[], float]:
        return lambda: value(host.stats)

    watch("waiting", "Requests that wait for their turn", lambda: queue.waiting)
    watch("running", "Requests that the engine has", lambda: queue.running)
    watch("ready", "Whether requests are answered", lambda: float(host.ready))
    watch("engine_restarts", "How often the engine was made anew after an error", lambda: host.restarts)
    watch("slots", "Requests that are decoded at once", of_engine(lambda f: f.slots))
    watch("slots_in_use", "Those of them that are taken", of_engine(lambda f: f.slots_in_use))
    watch("cache_pages", "Pages of the KV cache", of_engine(lambda f: f.cache_pages))
    watch("cache_pages_in_use", "Those of them that requests hold", of_engine(lambda f: f.cache_pages_in_use))
    watch(
        "prefilled_tokens", "Tokens of prompts that were computed; the others were in the prefix cache",
        of_engine(lambda f: f.prefilled_tokens),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- errors


async def _on_http_error(_: HttpRequest, error: Any) -> Response:
    if not isinstance(error, ApiError):
        message = {404: "there is no such path", 405: "the path is not asked this way"}.get(error.status_code)
        headers = error.headers or {}  # such as Allow
        error = ApiError(error.status_code, message or str(error.detail), code=None)
        error.headers = {**(error.headers or {}), **headers}
    return error.response()


async def _on_invalid(http: HttpRequest, error: Any) -> Response:
    body = http.scope["route"].body_field
    return invalid(error.errors(), body and body.field_info.annotation).response()


async def _on_failure(_: HttpRequest, error: Exception) -> Response:
    _log.error("a request failed by %s: %s", type(error).__name__, error)
    return server_failed().response()


def invalid(errors: Any, model: type[BaseModel] | None) -> ApiError:
    """Return the error of a body that its model refuses: of the fault that lies deepest in it."""
    first = max(errors, key=lambda error: len(error["loc"]))  # of the forms that a value may have the nearest one
    keys = [place for place in first["loc"] if place not in _NO_KEYS and not str(place).startswith("list[")]
    places = [key for before, key in zip(["", *keys], keys, strict=False) if type(before) is str or type(key) is int
              or key not in PART_TYPES]  # fmt: skip
    name = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).lstrip(".")
    cause = {"extra_forbidden": "is not known, and not ignored; leave it out", "missing": "is missing"}.get(
        first["type"]
    )
    known = [
        field.alias or key
        for key, field in (model.model_fields if model else {}).items()
        if not any(isinstance(mark, Only) for mark in field.metadata)
    ]
    if first["type"] == "extra_forbidden" and (close := difflib.get_close_matches(name, known, 1)):
        cause = f"is not known, and not ignored; did you mean {close[0]}? Else leave it out"
    return ApiError(400, f"{name or 'the body'}: {cause or first['msg']}", param=name or None)
