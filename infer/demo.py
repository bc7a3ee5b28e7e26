"""Answer a picture, a clip, a picture with a spoken question, and a text with the small model, and show what was
expected: make demo.
"""

import sys
from pathlib import Path

import phi4mm_jax
from phi4mm_jax.evaluation.items import read_items
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.progress import progress_bar

MODEL = Path(__file__).parents[1] / "assets" / "tiny"
EXAMPLES = MODEL / "examples" / "examples.jsonl"


@cli_entrypoint
def main() -> int:
    make_parser("infer.demo", __doc__).parse_args()
    items = read_items(EXAMPLES)
    with progress_bar("Reading the weights", size=True) as advance:
        model = phi4mm_jax.load(MODEL, dtype="float32", progress=advance)
    with progress_bar("Compiling and generating"):
        answers = model.generate([item.prompt for item in items], max_new_tokens=64)
    for item, answer in zip(items, answers, strict=True):
        for part in item.prompt[-1]["content"]:
            kind = part["type"]
            print(f"{kind:9}{part['text'] if kind == 'text' else _shown(Path(part[kind]))}")
        print(f"answer   {answer.text}\nexpected {item.references[0]}\n")
    print(
        "The model is 8 MB, made by this project's own recipes (assets/tiny/README.md); README.md tells how to run the "
        "real one."
    )
    return 0


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
