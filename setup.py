"""Where the two packages lie, and the native library; everything else about the distribution is in pyproject.toml.

`kernels/` is a source root and must never be a package itself: one named `kernels` would shadow the PyPI package of
that name, which Hugging Face transformers probes for.

The library is not tied to a version of Python or PyTorch: a wheel that holds it is tagged py3-none-<platform>, and one
without it py3-none-any. csrc/build.py decides which of them it is; docs/building.md explains.
"""

import importlib.util
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation pip takes what there is
    raise SystemExit(f"setuptools >= 77 is needed, this is {setuptools.__version__}\n  -> pip install -U setuptools")
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("native_build", Path(__file__).resolve().parent / "csrc" / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class WithLibrary(Distribution):
    """Decides once, and not for an sdist, which needs no compiler; says so when something is built."""

    plan, said = None, False

    def native_plan(self):
        if self.plan is None:
            try:
                self.plan = native.plan()
            except native.BuildError as error:
                raise SystemExit(f"native library: {error}") from None
        return self.plan

    def say_plan(self):
        if not self.said:
            self.said = True
            print(self.native_plan().line(), flush=True)
        return self.native_plan()

    def has_ext_modules(self):
        return self.native_plan().kind != "none"


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], native.library.NAME))

    def run(self):
        if self.distribution.say_plan().kind == "none":  # `setup.py build_ext --inplace`; otherwise it is not called
            native.write_note(self.distribution.native_plan(), native.library.PACKAGE)
        else:
            super().run()

    def build_extension(self, ext):
        try:
            native.build(Path(self.get_ext_fullpath(ext.name)), self.distribution.native_plan())
        except native.BuildError as error:
            raise SystemExit(f"native library: {error}") from None


class BuildPython(build_py):
    """Beside the modules: why there is no library, if there is none."""

    def run(self):
        super().run()
        plan = self.distribution.say_plan()
        if plan.kind == "none":
            package = native.library.PACKAGE if self.editable_mode else Path(self.build_lib, "vivit_kernels")
            native.write_note(plan, package)


class TaggedWheel(bdist_wheel):
    def get_tag(self):
        platform = super().get_tag()[2]
        return ("py3", "none", "any" if self.root_is_pure else platform)


setup(
    packages=[*find_packages("kernels"), *find_packages(include=["vivit", "vivit.*"])],
    package_dir={"vivit_kernels": "kernels/vivit_kernels", "vivit": "vivit"},
    include_package_data=False,  # only what the next line names
    package_data={"vivit": ["configs/*.json", "configs/*.toml"], "vivit_kernels": ["gains.jsonl"]},
    ext_modules=[Extension("vivit_kernels._C", [])],
    distclass=WithLibrary,
    cmdclass={
        "build_ext": BuildLibrary,
        "build_py": BuildPython,
        "bdist_wheel": TaggedWheel,
    },
)
