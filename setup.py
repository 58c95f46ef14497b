"""Packaging of megatron-davinci: dependencies and extras. The other metadata is in pyproject.toml."""

from setuptools import Extension, find_packages, setup

# What every command needs, on every platform. Nothing here needs CUDA or a compiler.
CORE = [
    "torch>=2.11,<2.14",
    "megatron-core>=0.16,<0.17",
    "xxhash>=3.4",  # digests of snapshots in memory, as fast as the memory
    "psutil",  # megatron-core needs it to save a checkpoint, and does not say so
    "numpy",
    "pydantic>=2.7",
    "pyyaml>=6",
    "rich>=13",
    "tensorboard>=2.15",
    "safetensors>=0.4.5",
    "tokenizers>=0.20",
    "jinja2>=3.1",
    "matplotlib>=3.8",
]

EXTRAS = {
    # Turning text into datasets.
    "data": ["tokenizers>=0.20", "gigatoken>=0.10,<0.11", "pyarrow>=17", "zstandard>=0.22", "orjson>=3.10"],
    # Loading an exported model in transformers, to compare it with ours and to generate.
    # 5.3 is the first release without CVE-2026-4372 (code execution from a model's config file).
    "eval": ["transformers>=5.3"],
    # Sources in S3, or on a server that speaks its protocol; see docs/recipes/data-on-s3.md.
    "s3": ["boto3>=1.36"],
    # A loader, chosen by data.loader.kind; see docs/recipes/dali.md. The wheel is CUDA 13's and works without a GPU.
    "dali": ["nvidia-dali-cuda130>=2.4,<3"],
    # Curves on Weights & Biases, by logging.wandb; see docs/concepts/step-time.md.
    "wandb": ["wandb>=0.19"],
    # Chosen at run time by configuration; see docs/install-gpu.md.
    "gpu": ["transformer-engine[pytorch]>=2.4", "flash-attn>=2.7"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff",
        "mypy",
        "types-PyYAML",
        "import-linter>=2",
        "pre-commit",
        "mkdocs>=1.6",
        "mkdocs-material>=9.5",
        # An S3 server on loopback, for tests. moto's extra [server] wants far more than its S3 does.
        "boto3>=1.36",
        "moto[s3]>=5.0.20",
        "flask",
        "flask-cors",
    ],
}

# Data is read by C++ where a compiler is there, and by Python where none is: megatron_davinci/data/native.py.
# No -march=native: a package may be built on one machine and run on another.
NATIVE = Extension(
    "megatron_davinci.data._cpu",
    sources=["csrc/cpu/interface.cpp", "csrc/cpu/permute.cpp", "csrc/cpu/read_windows.cpp"],
    extra_compile_args=["-O3", "-std=c++17"],
    language="c++",
    optional=True,
)

setup(
    packages=find_packages(include=["megatron_davinci", "megatron_davinci.*"]),
    package_data={"megatron_davinci": ["py.typed", "report/*.html", "report/*.css"]},
    ext_modules=[NATIVE],
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["davinci = megatron_davinci.cli.main:main"]},
)
