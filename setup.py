"""Where the two packages lie; everything else about the distribution is in pyproject.toml.

`kernels/` is a source root and must never be a package itself: one named `kernels` would shadow the PyPI package of
that name, which Hugging Face transformers probes for.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("kernels"), *find_packages(include=["vivit", "vivit.*"])],
    package_dir={"vivit_kernels": "kernels/vivit_kernels", "vivit": "vivit"},
    package_data={"vivit": ["configs/*.json", "configs/*.toml"]},
)
