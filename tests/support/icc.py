"""ICC profiles made from their numbers, as cameras embed them, and the sRGB that they stand for."""

import struct

import numpy as np

# Colorants (columns: red, green, blue) as XYZ under D50, rows X, Y, Z.
SRGB = np.array(
  [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # fmt: skip
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # fmt: skip


def rgb_profile(colorants: np.ndarray, gamma: float) -> bytes:
  """A profile of three colorants and one exponent."""
  tags = {
    name: _xyz(column) for name, column in zip(("rXYZ", "gXYZ", "bXYZ"), colorants.T, strict=True)
  }
  tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), _curve(gamma))
  return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
  """A profile of grey of one exponent."""
  return _profile(b"GRAY", {"kTRC": _curve(gamma)})


def to_srgb(levels: np.ndarray, colorants: np.ndarray, gamma: float) -> np.ndarray:
  """uint8 [..., 3] under a profile as sRGB levels, not rounded."""
  light = (levels / 255) ** gamma @ colorants.T @ np.linalg.inv(SRGB).T
  light = light.clip(0, 1)
  return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _fixed(values) -> bytes:
  return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _xyz(values) -> bytes:
  return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(gamma: float) -> bytes:
  return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, tags: dict[str, bytes]) -> bytes:
  white = 0.9642, 1.0, 0.8249
  tags = {"wtpt": _xyz(white), **tags}
  table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
  for name, content in tags.items():
    table += name.encode() + struct.pack(">II", start + len(body), len(content))
    body += content
  header = struct.pack(
    ">I4xI4s4s4s12x4s", start + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp"
  )
  header += bytes(28) + _fixed(white)
  return header.ljust(128, b"\0") + table + body
