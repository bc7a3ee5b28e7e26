"""Speed beside transformers' own Phi4Multimodal on PyTorch: same weights, same answers, same threads, in one run.

    python -m benchmarks.vs_transformers [--small | --whole-encoders] [--rows NAME ...] [--rounds N]

The model has the release's widths and vocabulary, in float32, and two layers in each stack: with `--whole-encoders`
only in the decoder's. A ratio is PyTorch's time over ours: from 1.0 on, ours is as fast. Both sides are warm, run in
turns, and their fastest round counts. Before a row is timed both must give the same result. PyTorch is given its best:
the faster of its two kinds of attention (the vision tower's SDPA, which is causal by mistake, put right), the unused
vision layer and pooling head left out, media of one size in a batch, so that nothing is padded but the text. The column
"products" has the ratio of the row's linear maps alone, multiplied by XLA and by PyTorch: where XLA's are slower, no
row that is made of them can be much better.

Needs `pip install '.[tests]'`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, Phi4MultimodalFeatureExtractor, PreTrainedTokenizerFast

import phi4mm_jax
from benchmarks.bare_products import LinearMap, recorded
from benchmarks.machine import processor
from benchmarks.models import STEPS, Timed, decoding, endless, random_row, small_checkpoint, timed, wide_checkpoint
from benchmarks.paths import ROOT
from phi4mm_jax.batch import ImageStack
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.processing.audio_features import log_mel, num_audio_tokens
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.images import choose_grid, load_image, preprocess_image
from phi4mm_jax.processing.prompt import Media
from tests.helpers import torch_native

IMAGE, AUDIO = "<|endoftext10|>", "<|endoftext11|>"  # their placeholders, as transformers' users repeat them
RATE = 16000


class Sizes(NamedTuple):
    """Sizes of the rows."""

    crops: tuple[int, ...]
    seconds: tuple[int, ...]
    prompts: tuple[int, ...]
    cached: int
    images: tuple[int, int]
    clip: int
    mixed: int  # prompts
    answers: tuple[int, int]  # tokens of theirs: from, and to below
    calls: float  # seconds of the calls of a bare product in a round; the fastest counts


FULL = Sizes((1, 8), (10, 40), (256, 2048), 512, (1600, 1200), 30, 32, (8, 65), 0.3)
SMALL = Sizes((1, 2), (1, 2), (64, 128), 128, (600, 500), 2, 8, (2, 9), 0.01)


class Contest(NamedTuple):
    """Row of the table: the work of both sides, and the time of each."""

    amount: float
    unit: str
    ours: Timed
    theirs: dict[str, Timed]
    maps: Counter[LinearMap] | None = None  # linear maps of theirs


class Prompt(NamedTuple):
    """Prompt of the mixed batch."""

    text: str
    image: Image.Image | None
    clip: np.ndarray | None
    new_tokens: int

    @property
    def adapter(self) -> torch_native.Adapter | None:
        return "vision" if self.image is not None else "speech" if self.clip is not None else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="the tests' tiny checkpoint: shows only that it runs")
    sizes.add_argument("--whole-encoders", action="store_true", help="with all layers of the encoders")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="NAME", help="those whose name begins so")
    parser.add_argument("--rounds", type=int, default=5, help="of each row; the fastest counts")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))  # as many as XLA takes
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    print(f"{processor()}, jax {jax.__version__}, torch {torch.__version__}, float32", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small, whole = arguments.small, arguments.whole_encoders
        checkpoint = small_checkpoint(folder) if small else wide_checkpoint(folder, whole)
        sides = Sides(checkpoint, SMALL if small else FULL)
    rows = dict(sides.rows())
    if not (chosen := [name for name in rows if name.startswith(tuple(arguments.rows))]):
        parser.error(f"--rows: none begins so; there are {'; '.join(rows)}")
    print("| row | ours | PyTorch | its way | products | ratio |\n|---|---|---|---|---|---|", flush=True)
    for name in chosen:
        contest = rows[name]()
        ours, theirs = fastest(contest, arguments.rounds)
        kind = min(theirs, key=lambda k: theirs[k])
        shown = [f"{contest.amount / seconds:.4g}" for seconds in (ours, theirs[kind])]
        calls = sides.sizes.calls
        products = "" if contest.maps is None else f"{products_ratio(contest.maps, arguments.rounds, calls):.2f}"
        cells = [f"{name}, {contest.unit}/s", *shown, kind, products, f"{theirs[kind] / ours:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def fastest(contest: Contest, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of ours, and of each of theirs."""
    sides = {"": contest.ours, **contest.theirs}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, call in sides.items():
            time.sleep(0.1)  # until the other side's threads have stopped spinning
            best[name] = min(best[name], call())
    return best.pop(""), best


def products_ratio(maps: Counter[LinearMap], rounds: int, seconds: float) -> float:
    """Return PyTorch's time for all of these products over XLA's."""
    ours = theirs = 0.0
    for sizes, count in maps.items():
        fast, others = fastest(product(sizes, seconds), rounds)
        ours, theirs = ours + count * fast, theirs + count * others["linear"]
    return theirs / ours


def product(sizes: LinearMap, seconds: float) -> Contest:
    """Multiply by a weight that lies on each side as the model's do: XLA's by inputs, PyTorch's by outputs."""
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape, np.float32) for shape in (sizes[:2], sizes[1:]))
    multiply, *own = jax.jit(lambda x, weight: x @ weight), jax.device_put(x), jax.device_put(weight)
    mine, theirs = torch.from_numpy(x), torch.from_numpy(weight.T.copy())
    agree("bare product", multiply(*own), torch.nn.functional.linear(mine, theirs))
    again = fastest_call(lambda: torch.nn.functional.linear(mine, theirs), seconds)
    return Contest(1, "products", fastest_call(lambda: multiply(*own), seconds), {"linear": again})


def fastest_call(function: Callable[[], Any], seconds: float) -> Timed:
    """Return a call that takes the seconds of the fastest of those started within `seconds`."""
    call = timed(function)

    def calls() -> float:
        end = time.perf_counter() + seconds
        best = call()
        while time.perf_counter() < end:
            best = min(best, call())
        return best

    return calls


def agree(name: str, ours: Any, theirs: Any, tolerance: float = 1e-3) -> None:
    """End the program if the largest difference, in units of the largest value, is above the tolerance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error < tolerance:
        raise SystemExit(f"{name}: both sides must give the same result, but differ by {error:.2g}")


class Sides:
    """Both models and all rows."""

    def __init__(self, checkpoint: Path, sizes: Sizes):
        self.sizes = sizes
        self.native = torch_native.load_native(checkpoint)
        self.torch: Any = self.native.model
        loaded = phi4mm_jax.load(checkpoint, dtype="float32")
        # No token stops an answer, on either side: lengths are given.
        self.torch.generation_config.eos_token_id = None
        self.ours = endless(loaded)
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token="<|endoftext|>", padding_side="left"
        )
        self.extractor = Phi4MultimodalFeatureExtractor()
        self.random = np.random.default_rng(0)
        self.text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        self.text = self.text.replace("<|", "<")  # special tokens in a text are text to ours, and not to theirs
        leave_out_unused(self.torch)

    def rows(self) -> Iterator[tuple[str, Callable[[], Contest]]]:
        s = self.sizes
        for n in s.crops:
            yield f"image encoder, {n} crop{'s' if n > 1 else ''}", lambda n=n: self.image_encoder(n)
        for n in s.seconds:
            yield f"audio encoder, {n} s", lambda n=n: self.audio_encoder(n)
        for n in s.prompts:
            yield f"prefill, {n} tokens", lambda n=n: self.prefill(n)
        for n in (1, 8):
            yield f"decoding, batch {n}, {s.cached} cached", lambda n=n: self.decode(n)
        yield f"mixed batch of {s.mixed}", self.mixed
        yield "processing of images", self.process_images
        yield "processing of audio", self.process_audio
        yield "tokenizer", self.tokenize

    def each_attention(self, function: Callable[[], Any]) -> dict[str, Timed]:
        def under(kind: str) -> Timed:
            call = timed(function)

            def switched() -> float:
                use_attention(self.torch, kind)
                return call()

            return switched

        return {kind: under(kind) for kind in ("sdpa", "eager")}

    def maps(self, function: Callable[[], Any]) -> Counter[LinearMap]:
        with recorded(self.torch) as found:
            function()
        return found

    # --- encoders ---

    def image_encoder(self, count: int) -> Contest:
        vision = self.ours.config.vision
        side, patches = vision.crop_size, vision.patches_per_side
        crops = self.random.uniform(-1, 1, (count, side, side, 3)).astype(np.float32)
        mask = np.ones((count, patches, patches), bool)
        stack = ImageStack(crops, mask)
        encode = jax.jit(lambda variables, stack: self.ours.module.apply(variables, stack, method="encode_images"))
        variables = {"params": self.ours.variables["params"]}
        embedder = self.torch.model.embed_tokens_extend.image_embed
        pixels, masks = torch.from_numpy(crops.transpose(0, 3, 1, 2).copy()), torch.from_numpy(mask)

        def theirs() -> torch.Tensor:
            features = embedder.get_img_features(pixels, masks)
            return embedder.img_projection_down(torch.nn.functional.gelu(embedder.img_projection_up(features)))

        for kind in ("eager", "sdpa"):
            use_attention(self.torch, kind)
            expected = theirs().flatten(0, 1)
            agree(f"image encoder, {kind}", encode(variables, stack)[: len(expected)], expected)
        ours = timed(lambda: encode(variables, stack))
        return Contest(count, "crops", ours, self.each_attention(theirs), self.maps(theirs))

    def audio_encoder(self, seconds: int) -> Contest:
        frames = log_mel(self.noise(seconds), RATE)
        count = num_audio_tokens(len(frames))
        row = Row(np.zeros(count, np.int32), ((Media("audio", 0), 0),), (), (frames,))
        batch = self.ours.processor.batch([row])
        stack, taken = batch.audio, batch.media[0, :count]
        encode = jax.jit(lambda variables, stack: self.ours.module.apply(variables, stack, method="encode_audio"))
        variables = {"params": self.ours.variables["params"]}
        for kind in ("eager", "sdpa"):
            use_attention(self.torch, kind)
            expected = self.native.audio_embeds(frames, "speech")
            agree(f"audio encoder, {kind}", np.asarray(encode(variables, stack))[taken], expected)

        def theirs() -> torch.Tensor:
            return self.native._audio_embeds(frames, "speech")

        ours = timed(lambda: encode(variables, stack))
        return Contest(seconds, "seconds", ours, self.each_attention(theirs), self.maps(theirs))

    # --- the decoder ---

    def prefill(self, length: int) -> Contest:
        engine = self.ours.engine(EngineConfig(slots=1, cache_tokens=4 * length))

        def ours(row: Row) -> tuple[int, float]:
            engine.submit(Request("", max_new_tokens=1), row)
            answers = [u.completion for u in engine.step() if u.completion is not None]
            return answers[0].tokens[0], answers[0].log_probabilities[0]

        def theirs(row: Row) -> torch.Tensor:
            ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
            return self.torch(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1]

        torch_native._use_adapter(self.torch, None)
        row = self.random_row(length)
        token, log_probability = ours(row)
        agree("prefill", log_probability, torch.log_softmax(theirs(row), -1)[token])
        agree("prefill", token, theirs(row).argmax())
        # Other tokens each time: the engine keeps the pages of prompts that it has seen.
        again = self.each_attention(lambda: theirs(self.random_row(length)))
        maps = self.maps(lambda: theirs(row))
        return Contest(length, "tokens", timed(lambda: ours(self.random_row(length))), again, maps)

    def decode(self, batch: int) -> Contest:
        cached = self.sizes.cached
        rows = [self.random_row(cached) for _ in range(batch)]
        answers = self.ours_decoded(rows, 2 * STEPS)
        torch_native._use_adapter(self.torch, None)
        cache = DynamicCache(config=self.torch.config)
        ids = torch.from_numpy(np.stack([r.tokens for r in rows]).astype(np.int64))
        use_attention(self.torch, "sdpa")
        first = self.torch(input_ids=ids, use_cache=True, past_key_values=cache, logits_to_keep=1)
        first = first.logits[:, -1:].argmax(-1)

        def theirs() -> torch.Tensor:
            if more := cache.get_seq_length() - cached:
                cache.crop(-more)
            drawn = [first]
            for _ in range(STEPS):
                logits = self.torch(input_ids=drawn[-1], use_cache=True, past_key_values=cache).logits
                drawn.append(logits[:, -1:].argmax(-1))
            return torch.cat(drawn, 1)

        agree("decoding", [a[: STEPS + 1] for a in answers], theirs())
        ours = decoding(self.ours, rows)
        return Contest(batch * STEPS, "tokens", ours, self.each_attention(theirs), self.maps(theirs))

    def ours_decoded(self, rows: Sequence[Row], count: int) -> list[list[int]]:
        engine = self.ours.engine(EngineConfig(slots=len(rows), cache_tokens=1024 * len(rows), steps=STEPS))
        numbers = [engine.submit(Request("", max_new_tokens=count), row) for row in rows]
        answers: dict[int, list[int]] = {}
        while len(answers) < len(rows):
            answers |= {u.id: u.completion.tokens for u in engine.step() if u.completion is not None}
        return [answers[n] for n in numbers]

    # --- end to end ---

    def mixed(self) -> Contest:
        """Answer prompts of many lengths, a third of them with an image, a third with a clip."""
        prompts = [self.prompt(i % 3) for i in range(self.sizes.mixed)]
        requests = [
            Request(
                f"<|user|>{'<|image_1|>' if p.image else ''}{'<|audio_1|>' if p.clip is not None else ''}"
                f"{p.text}<|end|><|assistant|>",
                images=() if p.image is None else (p.image,),
                audios=() if p.clip is None else ((p.clip, RATE),),
                max_new_tokens=p.new_tokens,
            )
            for p in prompts
        ]

        def ours() -> list[list[int]]:
            engine = self.ours.engine(EngineConfig(slots=16))  # a new one: nothing is in its cache
            answers = dict(engine.run(requests))
            return [answers[i].tokens for i in range(len(requests))]

        def theirs() -> list[list[int]]:
            answers: list[list[int]] = [[]] * len(prompts)
            for adapter in (None, "vision", "speech"):
                group = [i for i, p in enumerate(prompts) if p.adapter == adapter]
                torch_native._use_adapter(self.torch, adapter)
                for i, tokens in zip(group, self.generate([prompts[i] for i in group]), strict=True):
                    answers[i] = tokens[: prompts[i].new_tokens]
            return answers

        use_attention(self.torch, "sdpa")
        for i, (a, b) in enumerate(zip(ours(), theirs(), strict=True)):
            if a != b:
                raise SystemExit(f"mixed batch: prompt {i} ({prompts[i].adapter}) is answered {a} and {b}")
        total = sum(p.new_tokens for p in prompts)
        return Contest(total, "tokens", timed(ours), self.each_attention(theirs))

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Generate as transformers' users must: one modality, padded on the left, until the longest answer ends."""
        media: dict[str, Any] = {}
        before = ""
        if prompts[0].image is not None:
            crops, masks, grids = zip(*(plain_crops(p.image) for p in prompts if p.image is not None), strict=True)
            media = {
                "image_pixel_values": torch.stack(crops), "image_attention_mask": torch.stack(masks),
                "image_sizes": torch.tensor([[448 * rows, 448 * columns] for rows, columns in grids]),
            }  # fmt: skip
            before = IMAGE * (256 + 16 + 1 + sum(16 * r * (16 * c + 1) for r, c in grids[:1]))
        if prompts[0].clip is not None:
            clips = [p.clip for p in prompts if p.clip is not None]
            made = self.extractor(clips, sampling_rate=RATE, return_tensors="pt")
            media = {k: made[k] for k in ("audio_input_features", "audio_embed_sizes")}
            before = AUDIO * int(made["audio_embed_sizes"][0])
        texts = [f"<|user|>{before}{p.text}<|end|><|assistant|>" for p in prompts]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        made = self.torch.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **media,
            max_new_tokens=max(p.new_tokens for p in prompts), do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return made[:, encoded["input_ids"].shape[1] :].tolist()

    def prompt(self, kind: int) -> Prompt:
        start = self.random.integers(len(self.text) // 2)
        text = " ".join(self.text[start:].split()[: self.random.integers(10, 150)])
        pixels = self.random.integers(0, 256, (448, 448, 3)).astype(np.uint8)
        image = Image.fromarray(pixels) if kind == 1 else None
        return Prompt(text, image, self.noise(6) if kind == 2 else None, int(self.random.integers(*self.sizes.answers)))

    # --- processing ---

    def process_images(self) -> Contest:
        width, height = self.sizes.images
        image = Image.fromarray(self.random.integers(0, 256, (height, width, 3)).astype(np.uint8))

        def ours() -> np.ndarray:
            return preprocess_image(load_image(image)).crops

        agree("processing of images", ours(), plain_crops(image)[0].numpy().transpose(0, 2, 3, 1))
        return Contest(1, "images", timed(ours), {"plain torch": timed(lambda: plain_crops(image))})

    def process_audio(self) -> Contest:
        samples = self.noise(self.sizes.clip)

        def theirs() -> torch.Tensor:
            return self.extractor(samples, sampling_rate=RATE, return_tensors="pt")["audio_input_features"]

        agree("processing of audio", log_mel(samples, RATE), theirs()[0])
        return Contest(
            self.sizes.clip, "seconds", timed(lambda: log_mel(samples, RATE)), {"feature extractor": timed(theirs)}
        )

    def tokenize(self) -> Contest:
        texts = self.text.split("\n\n")
        tokenizer = self.ours.processor.tokenizer

        def ours() -> list[list[int]]:
            return [tokenizer.encode(text) for text in texts]

        def one_by_one() -> list[list[int]]:
            return [self.tokenizer(text)["input_ids"] for text in texts]

        def together() -> list[list[int]]:
            return self.tokenizer(texts)["input_ids"]

        if not ours() == one_by_one() == together():
            raise SystemExit("tokenizer: both sides must give the same ids")
        theirs = {"one by one": timed(one_by_one), "together": timed(together)}
        return Contest(sum(map(len, ours())), "tokens", timed(ours), theirs)

    # --- inputs ---

    def noise(self, seconds: float) -> np.ndarray:
        return (0.1 * self.random.standard_normal(int(seconds * RATE))).astype(np.float32)

    def random_row(self, length: int) -> Row:
        return random_row(self.random, length)


# --- PyTorch at its best ---


def use_attention(model: torch.nn.Module, kind: str) -> None:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = kind  # type: ignore[union-attr]


def leave_out_unused(model: Any) -> None:
    """Leave out the last vision layer and the pooling head, and have SDPA attend to all patches."""
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    tower.encoder.layers[-1].forward = lambda hidden, *_, **__: hidden
    tower.post_layernorm.forward = lambda hidden: hidden
    tower.head.forward = lambda hidden_state, attention_mask: hidden_state[:, 0]
    for layer in tower.encoder.layers:
        layer.self_attn.is_causal = False


def plain_crops(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Return crops (C, 3, 448, 448), masks (C, 32, 32), and the grid, by the release's arithmetic in Pillow and torch.

    transformers' image processor needs torchvision, which is not among the requirements of the tests.
    """
    side, width, height = 448, *image.size
    columns, rows = choose_grid(width, height)
    scale = min(columns * side / width, rows * side / height)
    new_width, new_height = (
        (columns * side, int(height * scale)) if columns * side / width == scale else (int(width * scale), rows * side)
    )
    canvas = Image.new("RGB", (columns * side, rows * side), (255, 255, 255))
    canvas.paste(image.convert("RGB").resize((new_width, new_height), Image.Resampling.BILINEAR), (0, 0))
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    whole = torch.nn.functional.interpolate(pixels[None], (side, side), mode="bicubic")
    crops = pixels.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    mask = torch.ones(rows * 32, columns * 32)
    if right := (columns * side - new_width) // 14:
        mask[:, -right:] = 0
    if below := (rows * side - new_height) // 14:
        mask[-below:] = 0
    masks = mask.reshape(rows, 32, columns, 32).transpose(1, 2).reshape(-1, 32, 32)
    return torch.cat([whole, crops]), torch.cat([torch.ones(1, 32, 32), masks]), (rows, columns)


if __name__ == "__main__":
    sys.exit(main())
