"""Record goldens: python -m convert.record --model HF_DIR --out DIR [--cases FILE | --prompt TEXT [--image FILE] ...].

Runs transformers' native `phi4_multimodal` on the CPU over the given prompts and media, and writes its outputs as
goldens, with which `python -m convert.verify CHECKPOINT --goldens DIR` proves this implementation on the same weights:

    python -m convert.to_torch Phi-4-multimodal-instruct native --layout native
    python -m convert.record --model native --out goldens
    python -m convert.verify Phi-4-multimodal-instruct --goldens goldens

HF_DIR is a folder in the native layout (or such a repository's name on the Hub), the adapters in `vision-lora/` and
`speech-lora/`. A FILE of cases is JSON:

    {"cases": [{"name": "chart", "prompt": "<|user|><|image_1|>Which year was the best?<|end|><|assistant|>",
                "images": ["chart.png"], "audios": [], "max_new_tokens": 40}, ...]}

with paths relative to it, or numbers of files in `inputs/` beside it: the goldens of one model are cases for another.
By default, in a clone, they are those of `tests/fixtures/ms_tiny`.

`convert.reference` says when transformers is right; it is used only so.

In float32 the release takes 22 GB of memory. In bfloat16 it takes half, and the goldens then find mistakes but prove no
parity.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phi4mm_jax.adapters import default_adapter
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.peft import PeftAdapter, adapter_folders
from phi4mm_jax.checkpoint.staging import check_room, staged
from phi4mm_jax.commands.options import adapter_folders_of, add_adapter_folder
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import parse_prompt
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Kind
from phi4mm_jax.testing import goldens
from phi4mm_jax.utils.checks import is_whole
from phi4mm_jax.utils.cli import cli_entrypoint, command_of, make_parser
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.progress import progress_bar
from phi4mm_jax.utils.strict_json import parse_json

from .reference import Reference, check_layout, load_reference

if TYPE_CHECKING:
    import torch

DEFAULT_CASES = Path(__file__).parents[1] / "tests" / "fixtures" / "ms_tiny" / "goldens.json"

Mode = Literal["vision", "speech"]  # of the projector of clips


@dataclass(frozen=True)
class Request:
    """A case to record."""

    name: str
    prompt: str
    images: tuple[Path, ...]
    audios: tuple[Path, ...]
    max_new_tokens: int


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("convert.record", __doc__)
    parser.add_argument("--model", metavar="HF_DIR", required=True, help="a native checkpoint, or its name on the Hub")
    parser.add_argument(
        "--out", metavar="DIR", type=path_argument, required=True, help="the goldens' folder; must not exist"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--cases", metavar="FILE", type=path_argument,
        help="JSON, as above; by default, in a clone, those of tests/fixtures/ms_tiny",
    )  # fmt: skip
    which.add_argument("--prompt", metavar="TEXT", help="one case: a raw prompt with its placeholders, <|image_1|> ...")
    parser.add_argument(
        "--image", metavar="FILE", type=path_argument, action="append", default=[], help="of --prompt, in order"
    )
    parser.add_argument(
        "--audio", metavar="FILE", type=path_argument, action="append", default=[], help="of --prompt, in order"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=12, help="of cases that do not say it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the reference")
    add_adapter_folder(parser, adapters_from=False)
    parsed = parser.parse_args(arguments)
    if parsed.prompt is None and (parsed.image or parsed.audio):
        parser.error("--image and --audio belong to --prompt")
    if parsed.prompt is None and parsed.cases is None:
        parsed.cases = DEFAULT_CASES
        if not DEFAULT_CASES.is_file():  # only a clone has it
            parser.error("--cases FILE or --prompt TEXT is needed: the default cases are in a clone alone, and here is "
                         "none; --help shows a FILE")  # fmt: skip
    if parsed.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    return parsed


# The cases.


def read_requests(path: Path, max_new_tokens: int) -> list[Request]:
    """Read the cases of a file, as the module's text describes it.

    Raises:
        InputError: the file is missing or malformed; it names the case and the key.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        cases = values["cases"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a file of cases") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path}: is not JSON with a list of "cases" ({error!r})') from None
    if not isinstance(cases, list) or not cases:
        raise InputError(f'{path}: "cases" must be a list of at least one case')
    requests = [_request(path, f"cases[{i}]", case, max_new_tokens) for i, case in enumerate(cases)]
    names = [r.name for r in requests]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: several cases have the name {', '.join(sorted(twice))}; give each its own")
    return requests


def _request(path: Path, where: str, case: Any, max_new_tokens: int) -> Request:
    def get(key: str, kind: type, default: Any) -> Any:
        value = case.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: {where}.{key} is {value!r:.60}, expected {kind.__name__}")
        return value

    def media(key: str, kind: Kind) -> tuple[Path, ...]:
        found = []
        for value in get(key, list, []):
            if not isinstance(value, str) and not is_whole(value):
                raise InputError(f"{path}: {where}.{key} holds {value!r:.60}, expected paths or numbers")
            named = isinstance(value, str)
            found.append(path.parent / value if named else goldens.input_file(path.parent, kind, value))
        return tuple(found)

    if not isinstance(case, Mapping):
        raise InputError(f"{path}: {where} is {case!r:.60}, expected an object with name and prompt")
    name, tokens = get("name", str, None), get("max_new_tokens", int, max_new_tokens)
    if not re.fullmatch(r"[\w-]+", name) or re.fullmatch(r"(image|audio)_\d+", name):
        raise InputError(f"{path}: {where}.name is {name!r}; use letters, digits, - and _, and not a medium's name")
    if tokens < 1:
        raise InputError(f"{path}: {where}.max_new_tokens is {tokens}, expected at least 1")
    return Request(name, get("prompt", str, None), media("images", "image"), media("audios", "audio"), tokens)


def check_packages() -> None:
    absent = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"recording needs {', '.join(absent)}, not installed here: pip install '.[torch]'")


# The program.


@dataclass(frozen=True)
class Medium:
    """Image or clip: the outputs of the processor, and of the reference."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, "torch.Tensor"]

    @property
    def tokens(self) -> int:
        return int(self.inputs["num_tokens"][0])

    def tensors(self) -> dict[str, np.ndarray]:
        outputs = {name: value.float().numpy() for name, value in self.outputs.items()}
        return {name: goldens.thinned(name, x, self.tokens) for name, x in {**self.inputs, **outputs}.items()}


def record_case(
    reference: Reference,
    request: Request,
    images: Sequence[Medium],
    audios: Sequence[Medium],
    context: int,
    advance: Callable[[], None],
) -> tuple[dict[str, np.ndarray], float]:
    """Return the tensors of a case, and the smallest margin of its greedy tokens.

    These end with a stop token, at the request's limit or at the context; `advance` is called after each.
    """
    import torch

    ids = reference.token_ids(request.prompt, [i.tokens for i in images], [a.tokens for a in audios])
    limit = min(request.max_new_tokens, context - len(ids))
    if limit < 1:
        raise InputError(
            f"case {request.name}: {len(ids)} tokens leave no room in the context of {context}; shorten it"
        )
    mode: Mode = "vision" if images else "speech"
    default = default_adapter(bool(images), bool(audios))
    adapter = None if default is None else default.name
    embeds = reference.embed(ids, [i.outputs["embeds"] for i in images], [a.outputs[f"embeds_{mode}"] for a in audios])
    first, last = range(len(ids))[: goldens.FIRST], range(len(ids))[-goldens.LAST :]
    logits = reference.logits(embeds, adapter, [*first, *last])
    kept = {"logits_first": logits[: len(first)].numpy(), "logits": logits[len(first) :].numpy()}
    generated, margins = [], []
    while True:
        best = logits[-1].topk(2)
        generated.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        advance()
        if len(generated) == limit or generated[-1] in reference.config.stop_token_ids:
            break
        # A generated placeholder is a token like any other.
        embeds = torch.cat([embeds, reference.embed_tokens(generated[-1:])], dim=1)
        logits = reference.logits(embeds, adapter, [embeds.shape[1] - 1])
    kept |= {"input_ids": np.array(ids, np.int32), "generated": np.array(generated, np.int32)}
    return {f"{request.name}.{name}": value for name, value in kept.items()}, min(margins)


def record(parsed: argparse.Namespace, out: Path) -> None:
    """Read the cases and the media, run the reference over them, write the goldens."""
    check_packages()
    import torch

    if parsed.prompt is None:
        requests = read_requests(parsed.cases, parsed.max_new_tokens)
    else:
        requests = [Request("prompt", parsed.prompt, tuple(parsed.image), tuple(parsed.audio), parsed.max_new_tokens)]
    folder = local_folder(parsed.model)
    check_layout(folder)
    adapters = adapter_folders(adapter_folders_of(parsed))
    own = Phi4MMConfig.from_folder(folder)
    config = own.with_loras({name: PeftAdapter(place, name, own).lora for name, place in adapters.items()})
    processor = Processor.from_folder(folder, config)
    for request in requests:
        try:
            parse_prompt(request.prompt, processor.tokenizer, list(request.images), list(request.audios))
        except InputError as error:
            raise InputError(f"case {request.name}: {error}") from error
    images = list(dict.fromkeys(path for request in requests for path in request.images))
    audios = list(dict.fromkeys(path for request in requests for path in request.audios))
    inputs = {path: goldens.image_inputs(processor, path)[1] for path in images}
    inputs |= {path: goldens.audio_inputs(processor, path)[1] for path in audios}

    logits = len(requests) * (goldens.FIRST + goldens.LAST) * config.decoder.vocab_size * 4
    size = logits + sum(path.stat().st_size for path in inputs)
    check_room(out, size)
    with progress_bar("Reading the weights"):
        reference = load_reference(folder, config, parsed.dtype, adapters)
    tensors: dict[str, np.ndarray] = {}
    media: dict[Path, Medium] = {}
    cases = []
    with progress_bar("Recording") as advance, torch.inference_mode():
        total, steps = len(inputs) + sum(r.max_new_tokens for r in requests), count(1)
        for kind, paths, encode in (("image", images, reference.image), ("audio", audios, reference.audio)):
            for number, path in enumerate(paths):
                media[path] = Medium(inputs[path], encode(inputs[path]))
                tensors |= {f"{kind}_{number}.{name}": x for name, x in media[path].tensors().items()}
                advance(next(steps), total)
        for request in requests:
            of_case = [media[p] for p in request.images], [media[p] for p in request.audios]
            found, margin = record_case(
                reference, request, *of_case, processor.context, lambda: advance(next(steps), total)
            )
            tensors |= found
            numbers = tuple(images.index(p) for p in request.images), tuple(audios.index(p) for p in request.audios)
            mode, length = bool(request.images) + 2 * bool(request.audios), len(found[f"{request.name}.input_ids"])
            cases.append(goldens.Case(request.name, request.prompt, *numbers, mode, length, margin))
    recorded = {"dtype": parsed.dtype} | {name: version(name) for name in ("torch", "transformers", "peft")}
    goldens.write_goldens(out, cases, tensors, {"image": images, "audio": audios}, recorded)


@cli_entrypoint
def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    with staged(parsed.out) as out:
        record(parsed, out)
    print(f"{parsed.out}: ready for {command_of('convert.verify')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
