"""Which packages there are; all else is in pyproject.toml.

The recipes lie beside the packages in a checkout and inside ``distill`` in the wheel, where
``distill.paths.recipes_folder`` finds them.
"""

from setuptools import find_packages, setup

ours = [name for package in ("distill", "teachers", "students") for name in (package, f"{package}.*")]
setup(
    packages=[*find_packages(include=ours), "distill.recipes"],
    package_dir={"distill.recipes": "recipes"},
    package_data={"distill.recipes": ["**/*.yaml", "**/*.md"]},
)
