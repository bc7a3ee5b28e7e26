"""Join a decoder that reads text with encoders that tell letters: media become what the decoder has learnt to read.

    python -m train.tiny.join MODEL PAGES CLIPS DESTINATION

The encoders' outputs are classes, one dimension each (`train.tiny.letters`); their projectors' last maps are composed
with the decoder's embeddings of these letters.
"""

import sys

import numpy as np

import phi4mm_jax
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.paths import path_argument
from train.tiny.letters import CLIP_CLASSES, PAGE_CLASSES

_PROJECTORS = {
    "params/image_embedder/projector": (PAGE_CLASSES, ("params/image_embedder/projector",)),
    "params/audio_projector": (CLIP_CLASSES, ("params/audio_projector", "params/audio_projector_with_images")),
}


@cli_entrypoint
def main() -> int:
    parser = make_parser("train.tiny.join", __doc__)
    parser.add_argument("model", metavar="MODEL", type=path_argument, help="the decoder, exported")
    parser.add_argument("pages", metavar="PAGES", type=path_argument, help="of train.tiny.letters")
    parser.add_argument("clips", metavar="CLIPS", type=path_argument, help="likewise")
    parser.add_argument("destination", metavar="DESTINATION", type=path_argument)
    arguments = parser.parse_args()
    model = phi4mm_jax.load(arguments.model, dtype="float32", fresh_adapters=True)
    embedding = np.asarray(model.variables["params"]["decoder"]["embedding"])
    encode = model.processor.tokenizer.encode
    found: dict[str, np.ndarray] = {}
    for folder in (arguments.pages, arguments.clips):
        with np.load(folder / "encoder.npz") as file:
            found |= dict(file)
    for projector, (classes, places) in _PROJECTORS.items():
        letters = embedding[[encode(c)[0] for c in classes]]  # (classes, E)
        for place in places:
            for name in ("up/kernel", "up/bias"):
                found[f"{place}/{name}"] = found[f"{projector}/{name}"]
        kernel, bias = (found[f"{projector}/down/{name}"] for name in ("kernel", "bias"))
        for place in places:
            found[f"{place}/down/kernel"] = kernel[:, : len(classes)] @ letters
            found[f"{place}/down/bias"] = bias[: len(classes)] @ letters
    trained = {tuple(path.split("/")): value for path, value in found.items()}
    to_torch(arguments.model, arguments.destination, "original", fresh_adapters=True, trained=trained)
    print(f"{arguments.destination}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
