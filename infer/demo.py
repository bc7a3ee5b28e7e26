"""Answer an image, a sound file and a text with the tiny checkpoint, and show what went in and out: make demo."""

from pathlib import Path

import phi4mm_jax
from phi4mm_jax.progress import progress_bar

MODEL = Path(__file__).parents[1] / "tests" / "fixtures" / "ms_tiny"


def main() -> None:
    image, clip = MODEL / "inputs" / "image_1.png", MODEL / "inputs" / "audio_1.flac"
    questions = [
        ([{"type": "image", "image": image}, {"type": "text", "text": "What is shown in this image?"}], image),
        ([{"type": "audio", "audio": clip}, {"type": "text", "text": "Transcribe the audio clip into text."}], clip),
        ([{"type": "text", "text": "How to explain Internet for a medieval knight?"}], None),
    ]
    with progress_bar("Reading the weights", size=True) as advance:
        model = phi4mm_jax.load(MODEL, dtype="float32", progress=advance)
    with progress_bar("Compiling and generating"):
        answers = model.generate([[{"role": "user", "content": q}] for q, _ in questions], max_new_tokens=24)
    for (question, file), answer in zip(questions, answers, strict=True):
        print(f"\nin   {question[-1]['text']}")
        if file:
            print(f"     {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
        print(f"out  {answer.text!r}")
        print(f"     {answer.prompt_tokens} tokens in, {len(answer.tokens)} out")
    print("\nThe tiny checkpoint's weights are random: the answers are noise. See README.md for real weights.")


if __name__ == "__main__":
    main()
