"""nnU-Net's weights as parameters of `models.nnunet`, and back, bit for bit.

nnU-Net's file holds every tensor of a block twice, as `conv` and `norm` and within `all_modules`,
and all of the encoder again below `decoder.encoder`. It has a head for each level of the decoder,
of which prediction reads the last; `decoder/head` is that one, the others are kept beside.

    convolution             PyTorch [out, in, *k]     here [*k, in, out]
    transposed convolution  PyTorch [in, out, *s]     here [*s, in, out]
    everything else         as it is

Nothing is flipped: both libraries correlate, and our transposed convolution is y[i * s + r] =
x[i] @ kernel[r], as PyTorch's is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import types
from rndpo_jax.models import nnunet
from rndpo_jax.models.nnunet_architecture import Architecture

Path = tuple[str, ...]
_CONV, _TRANSPOSED, _PLAIN = "convolution", "transposed convolution", "plain"


class Key(NamedTuple):
  """A key of the file.

  Attributes:
    name: nnU-Net's.
    path: of the parameter in the tree; ("other_heads", level, name) is not part of it.
    kind: how its axes are ordered.
  """

  name: str
  path: Path
  kind: str


def keys(architecture: Architecture) -> Iterator[Key]:
  """Every key of nnU-Net's file of such a network, in its order, the duplicates too."""
  for prefix in ("encoder", "decoder.encoder"):
    yield from _encoder(architecture, prefix)
  levels = len(architecture.features) - 1
  has_bias = architecture.has_bias
  for n, count in enumerate(architecture.decoder_counts):
    for i in range(count):
      path = ("decoder", f"stages_{n}", f"convs_{i}")
      yield from _block(f"decoder.stages.{n}.convs.{i}", path, has_bias)
  for n in range(levels):
    yield from _layer(f"decoder.transpconvs.{n}", ("decoder", f"up_{n}"), has_bias, _TRANSPOSED)
  for n in range(levels):
    path = ("decoder", "head") if n == levels - 1 else ("other_heads", str(n))
    yield from _layer(f"decoder.seg_layers.{n}", path, True, _CONV)


def _encoder(architecture: Architecture, prefix: str) -> Iterator[Key]:
  has_bias = architecture.has_bias
  if not architecture.is_residual:
    for n, count in enumerate(architecture.encoder_counts):
      for i in range(count):
        path = ("encoder", f"stages_{n}", f"convs_{i}")
        yield from _block(f"{prefix}.stages.{n}.0.convs.{i}", path, has_bias)
    return
  yield from _block(f"{prefix}.stem.convs.0", ("encoder", "stem", "convs_0"), has_bias)
  channels = architecture.features[0]
  levels = zip(
    architecture.encoder_counts, architecture.features, architecture.strides, strict=True
  )
  for n, (count, features, stride) in enumerate(levels):
    for i in range(count):
      path = ("encoder", f"stages_{n}", f"blocks_{i}")
      name = f"{prefix}.stages.{n}.blocks.{i}"
      for part in ("conv1", "conv2"):
        yield from _block(f"{name}.{part}", (*path, part), has_bias)
      if channels != features:
        place = int(i == 0 and set(stride) != {1})  # after the pooling, if there is one
        yield from _block(f"{name}.skip.{place}", (*path, "skip"), False)
      channels = features


def _block(name: str, path: Path, has_bias: bool) -> Iterator[Key]:
  for conv, norm in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
    yield from _layer(f"{name}.{conv}", (*path, "conv"), has_bias, _CONV)
    yield Key(f"{name}.{norm}.weight", (*path, "norm", "scale"), _PLAIN)
    yield Key(f"{name}.{norm}.bias", (*path, "norm", "bias"), _PLAIN)


def _layer(name: str, path: Path, has_bias: bool, kind: str) -> Iterator[Key]:
  yield Key(f"{name}.weight", (*path, "kernel"), kind)
  if has_bias:
    yield Key(f"{name}.bias", (*path, "bias"), _PLAIN)


def to_params(
  weights: Mapping[str, np.ndarray],
  architecture: Architecture,
  *,
  num_channels: int,
  num_classes: int,
  axes: tuple[int, ...] | None = None,
) -> tuple[types.Params, dict[str, Any]]:
  """Parameters of nnU-Net's weights.

  Args:
    weights: name -> f32 array, as in the file.
    architecture: of the file, axes in nnU-Net's order.
    num_channels: I.
    num_classes: C.
    axes: our images' axis n is nnU-Net's axis axes[n], and the network they belong to is that of
      `architecture.transposed(axes)`; None keeps nnU-Net's order.

  Returns:
    The parameters of `models.nnunet`, and those of the heads that prediction does not read, both
    float32 numpy trees.

  Raises:
    ValueError: naming the keys that are missing or left over, or the key with another shape or
      dtype, values that are not finite, or that differs from its duplicate.
  """
  expected = list(keys(architecture))
  names = {key.name for key in expected}
  missing, others = names - weights.keys(), weights.keys() - names
  if missing or others:
    raise ValueError(
      f"{len(missing)} keys are missing ({_some(missing)}) and {len(others)} are left over "
      f"({_some(others)}): its trainer made another network than the plans describe"
    )
  axes = axes or tuple(range(len(architecture.kernels[0])))
  shapes = _shapes(architecture.transposed(axes), num_channels, num_classes)
  flat: dict[Path, np.ndarray] = {}
  for name, path, kind in expected:
    array = np.ascontiguousarray(np.transpose(weights[name], _order(kind, weights[name], axes)))
    if array.dtype != np.float32 or array.shape != shapes[path]:
      raise ValueError(
        f"{name}: found {array.dtype}{list(array.shape)} at {'/'.join(path)}, expected "
        f"float32{list(shapes[path])}"
      )
    if path not in flat and not np.isfinite(array).all():
      raise ValueError(f"{name}: found values that are not finite")
    if not _equal_bits(flat.setdefault(path, array), array):
      raise ValueError(f"{name}: found other values than under the first name of {'/'.join(path)}")
  tree = _unflatten(flat)
  return {part: tree[part] for part in ("encoder", "decoder")}, tree.get("other_heads", {})


def from_params(
  params: types.Params,
  architecture: Architecture,
  *,
  axes: tuple[int, ...] | None = None,
  other_heads: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
  """nnU-Net's weights of parameters, the inverse of `to_params`.

  Args:
    params: of `models.nnunet`.
    architecture: of the file, axes in nnU-Net's order.
    axes: as `to_params` took them.
    other_heads: as `to_params` gave them; None for zeros, which prediction does not read.

  Returns:
    Every key of the file in its order; duplicates are one array.
  """
  axes = axes or tuple(range(len(architecture.kernels[0])))
  tree = {**params, "other_heads": other_heads or _zero_heads(params, architecture)}
  done: dict[Path, np.ndarray] = {}
  weights = {}
  for name, path, kind in keys(architecture):
    if path not in done:
      array = np.asarray(_at(tree, path))
      done[path] = np.ascontiguousarray(np.transpose(array, np.argsort(_order(kind, array, axes))))
    weights[name] = done[path]
  return weights


def _order(kind: str, array: np.ndarray, axes: tuple[int, ...]) -> tuple[int, ...]:
  """The axes of PyTorch's array in the order in which ours has them."""
  if kind == _PLAIN or array.ndim != len(axes) + 2:  # of other ndim: its shape is wrong, later
    return tuple(range(array.ndim))
  return (*(2 + axis for axis in axes), *((1, 0) if kind == _CONV else (0, 1)))


def _shapes(made: Architecture, num_channels: int, num_classes: int) -> dict[Path, tuple[int, ...]]:
  image = jax.ShapeDtypeStruct((1, *made.divisors, num_channels), jnp.float32)
  init = nnunet.build(made, num_classes=num_classes).init
  params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), image)
  shapes = {
    tuple(entry.key for entry in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  ones = (1,) * len(made.divisors)
  for n, features in enumerate(made.features[-2:0:-1]):
    shapes["other_heads", str(n), "kernel"] = (*ones, features, num_classes)
    shapes["other_heads", str(n), "bias"] = (num_classes,)
  return shapes


def _zero_heads(params: types.Params, architecture: Architecture) -> dict[str, Any]:
  *ones, _, num_classes = params["decoder"]["head"]["kernel"].shape
  return {
    str(n): {
      "kernel": np.zeros((*ones, features, num_classes), np.float32),
      "bias": np.zeros(num_classes, np.float32),
    }
    for n, features in enumerate(architecture.features[-2:0:-1])
  }


def _equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return a is b or np.array_equal(a.view(np.uint32), b.view(np.uint32))


def _unflatten(flat: Mapping[Path, np.ndarray]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, array in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = array
  return tree


def _at(tree: Mapping[str, Any], path: Path) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def _some(names: set[str]) -> str:
  return ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])]) or "none"
