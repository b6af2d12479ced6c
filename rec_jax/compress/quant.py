"""Quantization of trained parameters, and fake quantization for quantization-aware training.

    params = quantize_params(params, QuantConfig(names=r".*(kernel|embedding)", inputs="dynamic"))

The model reads the result like any other parameters (`rec_jax.nn.quantized`). Scales are bf16, rounded up so
that no number is clipped; codes are computed with the rounded scale. A table entry of width 128 takes 130
bytes instead of 512.

The quantized arrays and their products are those of qwix. Calibration and quantization-aware training are
written here: qwix has no calibration by percentiles or least squared error, and its quantization-aware
training, which intercepts operations, does not cover embedding tables.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from rec_jax.hashing import row_keys
from rec_jax.nn.dense import dense
from rec_jax.nn.dims import is_stacked
from rec_jax.nn.quantized import (
    FakeQuantizedInputs,
    ParamValue,
    QuantizedKernel,
    QuantizedTable,
    code_limits,
    decode,
    encode,
    fake_quantize,
    pack_int4,
)
from rec_jax.tree import leaf_mask, leaf_names

_SLICE_ELEMENTS = 2**22  # numbers of a table that are quantized at a time: 16 MiB of f32
_SHRINK_FACTORS = np.linspace(1, 0.24, 20, dtype=np.float32)


@dataclass(frozen=True)
class QuantConfig:
    """Settings of quantization: which parameters are stored in integers, and how.

    inputs: how the inputs of kernels are quantized, see `QuantizedKernel`; `observe_inputs` collects the
      samples for "static".
    calibration: the range of numbers that the codes span.
      absmax: the range of all numbers.
      percentile: up to this percentile of the magnitudes; if not symmetric, from percentile
        100 - `percentile` to `percentile` of the numbers.
      mse: the one of 20 ranges, absmax and smaller ones, with the least squared error.
    symmetric: no zero point, for tables and static inputs. Kernels are always symmetric.
    aware: training computes with parameters and inputs as they are after quantization (fake quantization),
      after the share `aware_from` of its steps. Static inputs are then quantized token by token, too.
    """

    names: str = ""  # regex over parameter names; "" = no quantization
    inputs: Literal["float", "dynamic", "static"] = "float"
    table_bits: Literal[8, 4] = 8
    calibration: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = 99.9
    symmetric: bool = True
    per_tensor: bool = False  # one scale per parameter instead of one per output channel or table entry
    aware: bool = False
    aware_from: float = 0.0

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must be in (50, 100] (QuantConfig)")
        if not 0 <= self.aware_from < 1:
            raise ValueError(f"aware_from={self.aware_from} must be in [0, 1) (QuantConfig)")
        if self.aware and not self.names:
            raise ValueError(
                "aware=True quantizes nothing if names is empty: name parameters, such as "
                r"'.*(kernel|embedding)' (QuantConfig)"
            )


def quantize_params(params, config: QuantConfig, input_samples=None, dims=None):
    """The parameters, with those that config.names matches as QuantizedKernel or QuantizedTable.

    dims: `Model.dims`, which say which kernels are stacked; the kernel of each expert is quantized on its
    own. input_samples: the result of `observe_inputs`, needed for static inputs. Tables are quantized slice
    by slice: memory holds the result, a second copy of its codes and a few slices of f32. Only per_tensor
    holds several copies of a whole table.

    Raises ValueError if config.names matches nothing, or a parameter that is neither a kernel nor a table, or
    if samples are missing.
    """

    def quantize(name, leaf):
        if name.endswith("embedding"):
            return _quantize_table(leaf, config)
        if not _is_stacked(name, dims):
            return _quantize_kernel(name, leaf, config, input_samples)
        kernels = [_quantize_kernel(name, kernel, config, input_samples) for kernel in leaf]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *kernels)

    return _change(params, config, quantize)


def fake_quantize_params(params, config: QuantConfig, is_on=True, dims=None):
    """The parameters with the values that the model reads after `quantize_params`, for training: gradients
    pass through the rounding. Kernels whose inputs will be quantized become FakeQuantizedInputs.

    is_on: bool, may be traced; if False, all values stay unchanged. dims: see `quantize_params`.
    """

    def change(name, leaf):
        one = partial(fake_one, name)
        return jax.vmap(one)(leaf) if _is_stacked(name, dims) else one(leaf)

    def fake_one(name, leaf):
        is_table = name.endswith("embedding")
        channels_CN = leaf if is_table else _channels(leaf)
        bits, symmetric = (config.table_bits, config.symmetric) if is_table else (8, True)
        scale_C1, zero_C1 = _find_scale(jax.lax.stop_gradient(channels_CN), config, bits, symmetric)
        faked = fake_quantize(channels_CN, scale_C1, zero_C1, bits)
        faked = jnp.where(is_on, faked if is_table else faked.T.reshape(leaf.shape), leaf)
        if is_table or config.inputs == "float":
            return faked
        return FakeQuantizedInputs(faked, jnp.asarray(is_on))

    return _change(params, config, change)


def _is_stacked(name: str, dims) -> bool:
    return name in (dims or {}) and is_stacked(dims[name])


def dequantize_params(params):
    """The parameters with quantized leaves decoded to f32 arrays."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QuantizedKernel | QuantizedTable)


def memory_bytes(params) -> int:
    """The bytes of all arrays, including scales and zero points."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


class _Observer(ParamValue):
    """A kernel that records its inputs."""

    def __init__(self, kernel, inputs: list):
        self._kernel, self.inputs, self.shape = kernel, inputs, kernel.shape

    def __getitem__(self, index):
        return self if index is ... else _Observer(self._kernel[index], self.inputs)

    def matmul(self, x_TD):
        self.inputs.append(np.asarray(x_TD))
        return dense(x_TD, self._kernel)

    def matmul_transposed(self, y_TF):
        return jnp.dot(y_TF, self._kernel.T)


def observe_inputs(model, params, batches) -> dict[str, np.ndarray]:
    """Returns {kernel name: all its inputs f32[T, D]} over a few batches, without jit.

    batches: packed rows; padding (segment 0) is left out.
    """
    params = jax.tree.map(jnp.asarray, params)
    samples = {name: [] for name in leaf_names(params) if name.endswith("kernel")}
    for batch in batches:
        named = leaf_names(params)
        observers = {name: _Observer(leaf, []) for name, leaf in named.items() if name in samples}
        leaves = [observers.get(name, leaf) for name, leaf in named.items()]
        module = model.bind(jax.tree.unflatten(jax.tree.structure(params), leaves))
        with jax.disable_jit():  # so that inside a scan, too, the inputs are concrete arrays
            module(module.training_batch(batch, row_keys(0, jnp.arange(len(batch.segments)))))
        is_real_T = np.asarray(batch.segments).reshape(-1) > 0
        for name, observer in observers.items():
            samples[name] += [x[is_real_T] if len(x) == len(is_real_T) else x for x in observer.inputs]
    return {name: np.concatenate(inputs) for name, inputs in samples.items() if inputs}


def pack_leaf(leaf) -> tuple[str, dict, dict]:
    """Returns (kind, {part: array}, {setting: value} for JSON), to store a leaf, quantized or not, in a
    file."""
    if isinstance(leaf, QuantizedTable):
        parts = {"codes": leaf.codes, "scale": leaf.scale_V, "zero": leaf.zero_V}
        kind, meta = "table", {"bits": leaf.bits, "dim": leaf.dim}
    elif isinstance(leaf, QuantizedKernel):
        parts = {"codes": leaf.weight.qvalue, "scale": leaf.weight.scale}
        parts |= {"input_scale": leaf.input_scale, "input_zero": leaf.input_zero}
        kind, meta = "kernel", {"inputs": leaf.inputs}
    else:
        kind, parts, meta = "array", {"array": leaf}, {}
    return kind, {part: array for part, array in parts.items() if array is not None}, meta


def unpack_leaf(kind: str, parts: dict, meta: dict):
    """The inverse of `pack_leaf`."""
    if kind == "table":
        return QuantizedTable(parts["codes"], parts["scale"], parts.get("zero"), **meta)
    if kind == "kernel":
        weight = qwix.QArray(parts["codes"], parts["scale"])
        return QuantizedKernel(weight, parts.get("input_scale"), parts.get("input_zero"), **meta)
    return parts["array"]


def _change(params, config: QuantConfig, change):
    """The parameters, with change(name, leaf) in place of each leaf that config.names matches."""
    if not config.names:
        return params
    mask = jax.tree.leaves(leaf_mask(params, config.names, field="compress.quant.names"))
    named = leaf_names(params)
    for name, matches in zip(named, mask, strict=True):
        if matches and not name.endswith(("kernel", "embedding")):
            raise ValueError(
                f"compress.quant.names={config.names!r} matches {name}, which is neither a kernel nor an "
                "embedding: leave it out (QuantConfig)"
            )
    leaves = [
        change(name, leaf) if matches else leaf
        for (name, leaf), matches in zip(named.items(), mask, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _quantize_kernel(name, kernel, config: QuantConfig, input_samples) -> QuantizedKernel:
    channels_FD = _channels(kernel)
    scale_F1, _ = _find_scale(channels_FD, config, 8, True)
    codes = _encode(channels_FD, scale_F1, None, 8).T.reshape(kernel.shape)
    scale = jnp.broadcast_to(scale_F1, (len(channels_FD), 1)).reshape(1, *kernel.shape[1:])
    weight = qwix.QArray(codes, scale)
    if config.inputs != "static":
        return QuantizedKernel(weight, inputs=config.inputs)
    if input_samples is None or name not in input_samples:
        raise ValueError(
            f"inputs='static' has no samples of the inputs of {name}: pass the result of observe_inputs, or "
            "use inputs='dynamic' (QuantConfig)"
        )
    samples_1N = input_samples[name].reshape(1, -1)
    return QuantizedKernel(weight, *_find_scale(samples_1N, config, 8, config.symmetric), "static")


def _quantize_table(table_VD, config: QuantConfig) -> QuantizedTable:
    table_VD = np.asarray(table_VD)
    (num_entries, dim), bits = table_VD.shape, config.table_bits
    size = max(1, _SLICE_ELEMENTS // dim)
    shared = _find_scale(table_VD, config, bits, config.symmetric) if config.per_tensor else None
    codes = np.empty((num_entries, dim if bits == 8 else -(-dim // 2)), np.int8 if bits == 8 else np.uint8)
    scale_V1 = np.empty((num_entries, 1), jnp.bfloat16)
    zero_V1 = None if config.symmetric else np.empty((num_entries, 1), np.int8)
    for first in range(0, num_entries, size):
        part = slice(first, first + size)
        entries_vD = table_VD[part]
        scale_v1, zero_v1 = shared or _find_scale(entries_vD, config, bits, config.symmetric)
        codes_vD = _encode(entries_vD, scale_v1, zero_v1, bits)
        codes[part] = codes_vD if bits == 8 else pack_int4(codes_vD)
        scale_V1[part] = scale_v1
        if zero_V1 is not None:
            zero_V1[part] = zero_v1
    zero_V = None if zero_V1 is None else jnp.asarray(zero_V1[:, 0])
    return QuantizedTable(jnp.asarray(codes), jnp.asarray(scale_V1[:, 0]), zero_V, bits, dim)


_encode = jax.jit(encode, static_argnums=3)


def _channels(kernel):
    """channels_FD: one row of weights per output channel."""
    return kernel.reshape(kernel.shape[0], -1).T


@partial(jax.jit, static_argnums=(1, 2, 3))
def _find_scale(x_CN, config: QuantConfig, bits: int, symmetric: bool):
    """Returns (scale bf16[C, 1], zero int8[C, 1], or None if symmetric), one per channel; C = 1 for
    per_tensor."""
    x_CN = x_CN.astype(jnp.float32)
    if config.per_tensor:
        x_CN = x_CN.reshape(1, -1)
    low_C1, high_C1 = _find_range(x_CN, config, symmetric)
    if config.calibration == "mse":
        factor_C1 = _best_factor(x_CN, low_C1, high_C1, bits, symmetric)
        low_C1, high_C1 = factor_C1 * low_C1, factor_C1 * high_C1
    return _scale_of(low_C1, high_C1, bits, symmetric)


def _find_range(x_CN, config: QuantConfig, symmetric: bool):
    """Returns (low f32[C, 1] <= 0, high f32[C, 1] >= 0), the range of each channel."""
    share = config.percentile / 100 if config.calibration == "percentile" else 1.0
    if symmetric:
        high_C1 = _quantile(jnp.abs(x_CN), share)
        return -high_C1, high_C1
    return jnp.minimum(_quantile(x_CN, 1 - share), 0), jnp.maximum(_quantile(x_CN, share), 0)


def _quantile(x_CN, share: float):
    if share in (0, 1):  # needs no sorting
        return (jnp.max if share else jnp.min)(x_CN, -1, keepdims=True)
    return jnp.quantile(x_CN, share, axis=-1, keepdims=True)


def _best_factor(x_CN, low_C1, high_C1, bits: int, symmetric: bool):
    """f32[C, 1]: the factor of the range that gives the least squared error."""

    def error_of(factor):
        scale_C1, zero_C1 = _scale_of(factor * low_C1, factor * high_C1, bits, symmetric)
        read_CN = decode(encode(x_CN, scale_C1, zero_C1, bits), scale_C1, zero_C1)
        return jnp.sum((read_CN - x_CN) ** 2, -1, keepdims=True)

    errors_GC1 = jax.lax.map(error_of, jnp.asarray(_SHRINK_FACTORS))
    return jnp.asarray(_SHRINK_FACTORS)[jnp.argmin(errors_GC1, 0)]


def _scale_of(low, high, bits: int, symmetric: bool):
    """Returns (scale bf16, zero int8 or None) with which the codes span the range."""
    least, greatest = code_limits(bits, symmetric)
    if symmetric:
        return _round_up(high / greatest), None
    scale = _round_up((high - low) / (greatest - least))
    steps = low / jnp.where(scale == 0, 1, scale.astype(jnp.float32))
    return scale, jnp.clip(least - jnp.round(steps), least, greatest).astype(jnp.int8)


def _round_up(x):
    """f32 x >= 0 rounded up to bf16. Works on the bits, because XLA may remove a cast to bf16 and back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0xFFFF)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
