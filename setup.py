"""Packages of the wheel: the programs, at the top of a clone, are beneath `phi4mm_jax.commands` in it."""

from setuptools import find_packages, setup

PROGRAMS = {f"phi4mm_jax.commands.{name}": name for name in ("convert", "infer", "train")}

setup(
    packages=[*find_packages(include=["phi4mm_jax*"]), *PROGRAMS],
    package_dir=PROGRAMS,
    package_data={"phi4mm_jax": ["py.typed", "serve/page/*"], "phi4mm_jax.commands.train": ["recipes/*.yaml"]},
)
