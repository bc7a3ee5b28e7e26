"""Speed on one NVIDIA GPU, kernels and the full-size model, beside XLA and PyTorch in the same run: one table.

    python -m benchmarks.gpu [--small] [--minutes 25] [--parts NAME ...]

Unattended and bounded: each part is a process of its own with its share of the time, near the end of which it starts no
more rows, so that what fails, does not fit or takes too long is a row that says so, and not the end. Weights are
random, of the release's sizes, in bfloat16; no token stops an answer. Both sides are warm, and their fastest round
counts. Ceilings are measured beside: the bandwidth of reading and of a copy, and a product of large matrices. `--small`
shows only that it runs, on any platform.

PyTorch's columns need torch and transformers, built for CUDA.
"""
