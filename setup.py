"""Builds the sparse kernels. All other settings of the package are in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = "robsparse/kernels"
KERNELS = runpy.run_path(str(Path(__file__).parent / FOLDER / "sources.py"))


class BuildKernels(build_ext):
    """Build with OpenMP if the compiler has it. Without a compiler, install without kernels."""

    def build_extension(self, ext: Extension) -> None:
        for flags in KERNELS["FLAGS"]:
            ext.extra_compile_args, ext.extra_link_args = flags, flags[1:]
            try:
                super().build_extension(ext)
                return
            except (CompileError, LinkError) as error:
                reason = error
        raise reason


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "robsparse.kernels._kernels",
            sources=[f"{FOLDER}/{KERNELS['COMPILED']}"],
            depends=[
                *(f"{FOLDER}/{name}" for name in KERNELS["INCLUDED"]),
                f"{FOLDER}/sources.py",
                "setup.py",
            ],
            define_macros=[("SOURCES", f'"{KERNELS["digest"]()}"')],
            optional=True,
        )
    ],
)
