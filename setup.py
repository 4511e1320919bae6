"""The list of packages: the repository root is the package seqmix, and its folders are its subpackages."""

from setuptools import find_packages, setup

# folders without __init__.py, such as tests/ and docs/, are not packages; research/ is not installed
setup(packages=["seqmix", *(f"seqmix.{name}" for name in find_packages(exclude=["research", "research.*"]))])
