"""Flags of XLA's CPU backend in the tests, and in the programs that they start."""

from importlib.metadata import version

# Gradients compile in two thirds of the time without the fusion emitters; code is as fast. A later jax does not know
# the flag, and ends at flags that it does not know.
ONE_DEVICE = "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
EIGHT_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=8"
