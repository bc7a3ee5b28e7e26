"""/v1/load_lora_adapter and /v1/unload_lora_adapter: users' adapters that come and go while the server runs."""

import asyncio
import os
from collections.abc import Awaitable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.peft import SETTINGS_FILE, WEIGHTS_FILE
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.serve.answering import Service
from phi4mm_jax.serve.errors import ERRORS, ApiError
from phi4mm_jax.serve.models import LoadAdapterRequest, UnloadAdapterRequest


def add_adapters(app: FastAPI, service: Service, root: Path) -> None:
    """Add the endpoints; adapters are those in folders below `root`, and nothing outside of it is read."""

    async def in_time(change: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(service.limits.timeout):
                await change
        except TimeoutError:
            if not service.host.ready:
                raise service.host.unavailable() from None
            message = f"the adapter was not changed within {service.limits.timeout:.3g} seconds; it may still be: see "
            message += "whether /v1/models has it, and if not, send the request again"
            raise ApiError(504, message, kind="timeout_error", code="timeout") from None

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def load_lora_adapter(body: LoadAdapterRequest) -> str:
        """Load an adapter, which requests then ask for as their model."""
        if body.lora_name == service.name:
            raise ApiError(400, f"lora_name is {body.lora_name!r}, the model itself; give another", param="lora_name")
        folder = folder_below(root, body.lora_path)
        try:
            await in_time(service.host.load_adapter(body.lora_name, folder))
        except (InputError, CheckpointError, ConfigError) as error:
            raise ApiError(400, str(error)) from error
        return f"Success: LoRA adapter {body.lora_name!r} added successfully."

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> str:
        """Unload an adapter. Requests that have it already are answered with it."""
        if body.lora_name not in service.host.adapters:
            raise ApiError(404, f"lora_name is {body.lora_name!r:.200}, which is not loaded", param="lora_name",
                           code="model_not_found")  # fmt: skip
        await in_time(service.host.unload_adapter(body.lora_name))
        return f"Success: LoRA adapter {body.lora_name!r} removed successfully."


def folder_below(root: Path, path: str) -> Path:
    """Return the folder that a client names, absolute or within `root`: an adapter's, or an export that holds one.

    Raises:
        ApiError: it is outside of `root`, be it by a link, or is not there; the two look alike to the client.
    """
    base = os.path.realpath(root)
    given = os.path.join(base, path)
    places = [given, *(os.path.join(given, name) for a in ADAPTERS.values() for name in (a.folder, a.name))]
    within = _is_path(path) and all(
        os.path.commonpath([base, os.path.realpath(os.path.join(place, name))]) == base
        for place in places
        for name in ("", SETTINGS_FILE, WEIGHTS_FILE)
    )
    if not within or not any(os.path.isfile(os.path.join(place, SETTINGS_FILE)) for place in places):
        raise ApiError(404, f"lora_path is {path!r:.200}; expected the folder of an adapter, with its {SETTINGS_FILE}, "
                       "in the folder that --adapter-root names", param="lora_path")  # fmt: skip
    return Path(os.path.realpath(given))


def _is_path(text: str) -> bool:
    """Return whether the system could have a path of that name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
