"""Serve a model by the OpenAI API, with a page to try it: python -m infer.serve --model PATH.

Clients send chats, prompts, clips and batches to http://127.0.0.1:8000/v1; a browser shows the page at /. Only this
host reaches it, unless --host names another address, which needs an API key: --api-key, or the variable PHI4MM_API_KEY
(several: separated by commas). SIGTERM ends it once all requests that it has are answered.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any

import uvicorn

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.contents import read_config
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.commands.options import (
    adapter_places,
    add_adapter_folder,
    add_compilation_cache,
    add_mesh,
    add_precision,
    add_user_adapters,
    load_model,
    user_adapters_of,
)
from phi4mm_jax.engine import Engine, EngineConfig
from phi4mm_jax.engine.user_adapters import UserAdapter, read_user_adapter
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.engine_process import EngineProcess
from phi4mm_jax.serve.files import Store
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.transcription.transcripts import TASKS
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.compilation import keep_compiled
from phi4mm_jax.utils.paths import path_argument

_KEYS = "PHI4MM_API_KEY"
_LIMITS = {
    "max_new_tokens": "of answers whose request does not say",
    "max_waiting": "requests that may wait; more are told to come again",
    "timeout": "seconds that a request may take, waiting included",
    "max_body_bytes": "of a request",
    "max_images": "of a request, frames of videos included",
    "max_pixels": "of an image",
    "max_audio_seconds": "of all clips of a request",
    "clip_seconds": "of a clip that is transcribed as one; longer ones are cut at silence",
    "pause": "seconds of silence that end a clip of a longer recording in any case",
    "top_logprobs": "alternatives of a token that a request may ask for",
    "beams": 'of a request with "use_beam_search"; 1 for no such requests',
    "draft_tokens": 'the most that are guessed in a step, of requests with "draft"; 0 for no such requests',
}


def parse_arguments() -> argparse.Namespace:
    limits = Limits()
    parser = make_parser("infer.serve", __doc__)
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--name", help="of the model, for clients; by default the folder's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="0 for any (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", action="append", default=[], help="may be given several times")
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="requests that are decoded at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="of all requests together; by default what fits")
    parser.add_argument("--cache-dtype", choices=("int8",), help="by default the model's")
    parser.add_argument(
        "--merge", choices=tuple(ADAPTERS), help="add this adapter to the weights; others are gone then"
    )
    add_adapter_folder(parser)
    add_user_adapters(parser)
    parser.add_argument(
        "--adapter-root", metavar="DIR", type=path_argument,
        help="let clients load and unload adapters (/v1/load_lora_adapter), of folders below this one",
    )  # fmt: skip
    for name, what in _LIMITS.items():
        default = getattr(limits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", type=type(default), default=default,
            help=f"{what} (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--allow-remote-media", action="store_true", help="fetch media of http(s) URLs, public ones only"
    )
    parser.add_argument(
        "--files", metavar="DIR", type=path_argument,
        help="for files and batches of clients; by default a folder that goes with the server",
    )  # fmt: skip
    parser.add_argument("--transcription-prompt", metavar="TEXT", help=f"by default {TASKS['transcribe']!r}")
    parser.add_argument("--translation-prompt", metavar="TEXT", help=f"by default {TASKS['translate']!r}")
    parser.add_argument("--no-warmup", action="store_true", help="compile programs when a request first needs them")
    add_compilation_cache(parser)
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    keys = read_keys(arguments)
    check_address(arguments, keys)
    with named_options(arguments):
        limits = Limits(**{name: getattr(arguments, name) for name in _LIMITS})
        config = EngineConfig(
            slots=arguments.slots, cache_tokens=arguments.cache_tokens, cache_dtype=arguments.cache_dtype,
            top_logprobs=limits.top_logprobs, beams=limits.beams, draft_tokens=limits.draft_tokens, cli=True,
            **adapter_places(arguments),
        )  # fmt: skip
    name = arguments.name or Path(os.path.abspath(arguments.model)).name
    if name in user_adapters_of(arguments):
        raise InputError(f"--adapter has {name}, which is the model itself; give it another name, or --name")
    if arguments.adapter_root is not None and not arguments.adapter_root.is_dir():
        raise InputError(f"--adapter-root is {arguments.adapter_root}, and there is no such folder; make it first")
    if arguments.files is not None:
        Store(arguments.files, limits)  # makes the folder

    own = cache(lambda: read_config(local_folder(arguments.model)))
    tokenizer = cache(lambda: Tokenizer.from_folder(local_folder(arguments.model)))

    def read_adapter(name: str, folder: Path) -> UserAdapter:
        return read_user_adapter(name, folder, own(), tokenizer(), config)

    # before the weights, which take minutes
    adapters = {key: read_adapter(key, Path(folder)) for key, folder in user_adapters_of(arguments).items()}
    prompts = {"transcribe": arguments.transcription_prompt, "translate": arguments.translation_prompt}
    with ExitStack() as stack:
        bound = stack.enter_context(listen(arguments))
        files = arguments.files
        if files is None:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phi4mm-files-")))
        settings = ServerSettings(
            name=name, files=files, limits=limits,
            api_keys=keys, loopback=is_loopback(arguments.host), remote_media=arguments.allow_remote_media,
            instructions={task: text for task, text in prompts.items() if text is not None},
            adapters=adapters, adapter_root=arguments.adapter_root, warm_up=not arguments.no_warmup,
        )  # fmt: skip
        place = EngineProcess(partial(load_engines, arguments, config))
        app = create_app(place, tokenizer(), config.slots, settings, read_adapter)
        stack.callback(place.close)
        place.start()
        return serve(app, bound, arguments)


def load_engines(arguments: argparse.Namespace, config: EngineConfig) -> Callable[[], Engine]:
    """Load the model; return what makes its engines. In the engines' process, which has the devices."""
    keep_compiled(arguments.compilation_cache)
    model = load_model(arguments, notice=True, merge=arguments.merge)
    return lambda: model.engine(config)


def read_keys(arguments: argparse.Namespace) -> list[str]:
    """Return the API keys of the arguments and of the environment.

    Raises:
        InputError: an argument is empty.
    """
    given = [key.strip() for key in arguments.api_key]
    if "" in given:
        raise InputError("--api-key is empty (a variable that is not set?); give a key, or leave it out")
    return [*given, *filter(None, map(str.strip, os.environ.get(_KEYS, "").split(",")))]


def check_address(arguments: argparse.Namespace, keys: list[str]) -> None:
    """Raise an InputError for an address that others reach, and no key to keep them out."""
    if not is_loopback(arguments.host) and not keys:
        raise InputError(
            f"--host is {arguments.host}, which others may reach: give an --api-key (or {_KEYS}), or leave --host out"
        )
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port is {arguments.port}; expected a number from 0 to 65535")


def is_loopback(host: str) -> bool:
    """Return whether only this host reaches an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listen(arguments: argparse.Namespace) -> socket:
    """Return a socket that is bound to the address, where nothing answers before it is served.

    Raises:
        InputError: the address is taken, or is none of this host.
    """
    found = socket(AF_INET6 if ":" in arguments.host else AF_INET)
    found.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    try:
        found.bind((arguments.host, arguments.port))
    except OSError as error:
        found.close()
        raise _cannot_listen(arguments, error) from None
    return found


def _cannot_listen(arguments: argparse.Namespace, error: OSError) -> InputError:
    return InputError(
        f"--port is {arguments.port}, which cannot be listened at on {arguments.host} ({error.strerror}); give another "
        "--port or --host"
    )


def serve(app: Any, bound: socket, arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, and until what was asked before is answered."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", server_header=False, timeout_keep_alive=30
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # uvicorn handles it while it serves, and raises it again after
    signal.signal(signal.SIGTERM, lambda *_: print("ended by SIGTERM, with all requests answered", file=sys.stderr))
    host, port = bound.getsockname()[:2]
    notice = "requests wait until every program is compiled, which /ready tells (--no-warmup compiles what is needed)"
    notice = "programs are compiled as requests need them" if arguments.no_warmup else notice
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{at} has the page, and /v1 below it the API; {notice}", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(config).run([bound])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _cannot_listen(arguments, error) from None  # another program was bound to it as well, and was first
    return 0


if __name__ == "__main__":
    sys.exit(main())
