"""Finds the packages for pyproject.toml, whose `find` cannot say that the repository root is itself a package."""

from setuptools import find_packages, setup

setup(
    packages=["treering", *(f"treering.{name}" for name in find_packages(exclude=["tests", "tests.*"]))],
    script_name="setup.py",  # so that this file is not taken for a module of the package
)
