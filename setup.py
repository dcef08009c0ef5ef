"""Builds the sparse kernels. All other settings of the package are in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

SOURCES = "robsparse/kernels/"


class BuildKernels(build_ext):
    """Build with OpenMP if the compiler has it. Without a compiler, install without kernels."""

    def build_extension(self, ext: Extension) -> None:
        for flags in (["-O3", "-fopenmp"], ["-O3"]):
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
            sources=[f"{SOURCES}_kernels.c"],
            depends=[f"{SOURCES}_template.h"],
            optional=True,
        )
    ],
)
