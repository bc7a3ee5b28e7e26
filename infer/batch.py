"""Answer a file of prompts: python -m infer.batch --model PATH --input prompts.jsonl --output answers.jsonl.

Each line of the input is an object:

    {"id": "a1", "prompt": "<|user|><|image_1|>What is this?<|end|><|assistant|>", "images": ["a.png"], "audios": [],
     "max_new_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
     "seed": 0, "stop": []}

"messages" (chat messages as in the OpenAI API) may stand in place of "prompt"; all else but the prompt may be left out.
Without "id", a line's id is its number, from 0. Paths are relative to the input file; media may be `data:` URLs. Each
line of the output has the id and the text, tokens, finish_reason and prompt_tokens, or the id and "error".

A run that was stopped goes on where it was: what the output has is not answered again. With --hosts N --host I, this
run answers the lines whose number is I modulo N.
"""

import argparse
import sys
from pathlib import Path

import phi4mm_jax
from phi4mm_jax.generation import EngineConfig
from phi4mm_jax.generation.jsonl import AnswerFile, read_requests
from phi4mm_jax.progress import count_bar, progress_bar


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--input", metavar="FILE", type=Path, required=True)
    parser.add_argument("--output", metavar="FILE", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="for lines that do not say")
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="rows that are decoded at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, default=32768, help="of all rows together")
    parser.add_argument("--cache-dtype", choices=("int8",), help="by default the model's")
    parser.add_argument("--ordered", action="store_true", help="answers in the order of the input")
    parser.add_argument("--hosts", metavar="N", type=int, default=1)
    parser.add_argument("--host", metavar="I", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        lines = read_requests(
            arguments.input, max_new_tokens=arguments.max_new_tokens, hosts=arguments.hosts, host=arguments.host
        )
        config = EngineConfig(
            slots=arguments.slots, cache_tokens=arguments.cache_tokens, cache_dtype=arguments.cache_dtype
        )
        with AnswerFile(arguments.output, lines, ordered=arguments.ordered) as answers:
            if answers.answered:
                print(f"{answers.answered} of {len(lines)} lines are answered already; going on", file=sys.stderr)
            with progress_bar("Reading the weights", size=True) as advance:
                model = phi4mm_jax.load(arguments.model, dtype=arguments.dtype, progress=advance)
            with count_bar("Answering", "tokens", len(lines), answers.answered) as advance:
                for _, tokens in answers.run(model.engine(config)):
                    advance(1, tokens)
    except (phi4mm_jax.InputError, phi4mm_jax.ConfigError, phi4mm_jax.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {answers.answered} answers, {answers.errors} of them errors", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
