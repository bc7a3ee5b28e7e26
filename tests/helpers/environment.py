"""Flags of XLA's CPU backend in the tests, and in the programs that they start."""

# Gradients compile in two thirds of the time without the fusion emitters; code is as fast.
ONE_DEVICE = "--xla_cpu_use_fusion_emitters=false"
EIGHT_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=8"
