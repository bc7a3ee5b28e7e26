"""Flags of XLA's CPU backend in the tests, and in the programs that they start."""

from importlib.metadata import version

# Gradients compile in two thirds of the time without the fusion emitters, and in three quarters of that when a program
# is not split among threads, which share what cores there are with other workers; code is as fast. A later jax does not
# know the flags, and ends at flags that it does not know.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
ONE_DEVICE = QUICK if version("jax").startswith("0.10.") else ""
EIGHT_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=8"
