"""Draw the losses of all stages as one picture: python -m train.tiny.curves RUNS PICTURE.png"""

import sys

from matplotlib.figure import Figure

from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.paths import path_argument

STAGES = {
    "text": "decoder: text, pages and clips as text",
    "more": "decoder: misheard clips, pages",
    "pages": "tower: letters of pages",
    "clips": "speech encoder: letters of clips (CTC)",
    "speech": "speech adapter",
    "vision": "vision adapter",
}


@cli_entrypoint
def main() -> int:
    parser = make_parser("train.tiny.curves", __doc__)
    parser.add_argument("runs", metavar="RUNS", type=path_argument, help="the folder of the stages' outputs")
    parser.add_argument("picture", metavar="PICTURE", type=path_argument)
    arguments = parser.parse_args()
    figure = Figure((3 * len(STAGES), 3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(STAGES)), STAGES.items(), strict=True):
        points = [(line["step"], line["loss"]) for line in read_log(arguments.runs / name)]
        axes.semilogy(*zip(*points, strict=True), linewidth=0.9)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss")
    figure.savefig(arguments.picture, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
