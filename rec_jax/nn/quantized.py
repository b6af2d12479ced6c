"""Kernels and embedding tables in 8 or 4 bits, which replace arrays among the parameters of a model.

A number x is stored as an integer code and read as (code - zero) * scale, with a quantization scale and a
zero point; symmetric quantization has no zero point. There is one scale for each output channel of a kernel
and one for each entry of a table. Two 4-bit codes share a byte: byte j of an entry holds dim j in its lower
half and dim j + ceil(D/2) in its upper half.

From the library qwix: `QArray`, codes with their scale, and `dot_general`, the integer product of two of
them. This module adds what qwix lacks: tables (lookups and scores), 4-bit codes that take 4 bits (jnp.int4
takes a byte on a CPU), and inputs with a zero point at the cost of a single product. The providers of qwix
quantize whole models by intercepting their operations; here a model reads its parameters, and a quantized
kernel has its own matrix product (`rec_jax.nn.dense`).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import qwix  # slow to import, and needed only for integer products

_SLICE_ELEMENTS = 2**18  # elements of a table to unpack at a time: 1 MiB of f32
_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


class ParamValue:
    """A value that an nnx.Param can hold in place of an array; read it as `param[...]`. If its arrays stack
    experts in dim 0, `param[...][e]` is the value of expert e."""

    def __getitem__(self, index):
        return self if index is ... else jax.tree.map(lambda x: x[index], self)


def code_limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Returns (lowest code, highest code)."""
    high = 2 ** (bits - 1) - 1
    return (-high if symmetric else -high - 1), high


def encode(x, scale, zero=None, bits: int = 8) -> jax.Array:
    """Returns int8 codes of x, clipped to the limits. scale, zero: broadcast to x. x is 0 where scale is."""
    codes = _unclipped(x, scale, zero)
    return jnp.clip(codes, *code_limits(bits, zero is None)).astype(jnp.int8)


def _unclipped(x, scale, zero):
    scale = scale.astype(jnp.float32)
    codes = jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale))
    return codes if zero is None else codes + zero


def decode(codes, scale, zero=None) -> jax.Array:
    """Returns the f32 numbers that the codes stand for."""
    codes = codes.astype(jnp.float32)
    return (codes if zero is None else codes - zero) * scale.astype(jnp.float32)


def token_scale(x_TD) -> jax.Array:
    """f32[T, 1]: for each token, the smallest scale at which symmetric 8-bit codes clip no number."""
    return jnp.max(jnp.abs(x_TD.astype(jnp.float32)), -1, keepdims=True) / 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKernel(ParamValue):
    """A kernel [D, ...] in symmetric int8.

    weight: codes in the shape of the kernel, with a scale [1, ...].
    inputs: "float" multiplies the codes by unquantized inputs. "dynamic" quantizes each token with a scale
    from its own largest number. "static" quantizes all tokens with the calibrated input_scale [1, 1] and,
    unless symmetric, input_zero int8[1, 1]. The latter two multiply integers.
    """

    weight: "qwix.QArray"
    input_scale: jax.Array | None = None
    input_zero: jax.Array | None = None
    inputs: Literal["float", "dynamic", "static"] = field(default="float", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(D, F), with further dims flattened."""
        codes = self.weight.qvalue
        return codes.shape[0], codes.size // codes.shape[0]

    def matmul(self, x_TD) -> jax.Array:
        """Returns y_TF in the type of x."""
        codes_DF = self.weight.qvalue.reshape(self.shape)
        scale_1F = self.weight.scale.reshape(1, -1).astype(jnp.float32)
        if self.inputs == "float":  # scaled after the product: with few tokens, y is smaller than the kernel
            y_TF = jnp.dot(x_TD, codes_DF.astype(x_TD.dtype), preferred_element_type=jnp.float32)
            return (y_TF * scale_1F).astype(x_TD.dtype)
        import qwix

        scale_T1 = token_scale(x_TD) if self.inputs == "dynamic" else self.input_scale.astype(jnp.float32)
        x_codes = qwix.QArray(encode(x_TD, scale_T1, self.input_zero), scale_T1)
        y_TF = qwix.dot_general(x_codes, qwix.QArray(codes_DF, scale_1F), _ROWS_BY_COLUMNS)
        if self.input_zero is not None:
            sums_F = jnp.sum(codes_DF, 0, dtype=jnp.int32)
            y_TF -= self.input_zero.astype(jnp.int32) * sums_F * scale_T1 * scale_1F
        return y_TF.astype(x_TD.dtype)

    def matmul_transposed(self, y_TF) -> jax.Array:
        """Returns x_TD = y @ kernel.T in the type of y. Computed in f32: the scales are on the summed dim."""
        scaled_TF = y_TF.astype(jnp.float32) * self.weight.scale.reshape(1, -1).astype(jnp.float32)
        codes_FD = self.weight.qvalue.reshape(self.shape).T.astype(jnp.float32)
        return jnp.dot(scaled_TF, codes_FD).astype(y_TF.dtype)

    def dequantize(self) -> jax.Array:
        """Returns the kernel in f32, in its own shape."""
        return decode(self.weight.qvalue, self.weight.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTable(ParamValue):
    """An embedding table [V, D] in 8 or 4 bits.

    codes: int8[V, D], or uint8[V, ceil(D/2)] from `pack_int4`. zero_V: int8, or None if symmetric.
    """

    codes: jax.Array
    scale_V: jax.Array
    zero_V: jax.Array | None = None
    bits: Literal[8, 4] = field(default=8, metadata={"static": True})
    dim: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.dim

    def _unpack(self, codes):
        return codes if self.bits == 8 else unpack_int4(codes, self.dim)

    def look_up(self, ids) -> jax.Array:
        """Returns the entries f32[..., D] of integer ids [...]. An id outside [0, V) reads as NaN."""
        scale = self.scale_V.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        zero = None if self.zero_V is None else self.zero_V.at[ids].get(mode="clip")[..., None]
        return decode(self._unpack(self.codes.at[ids].get(mode="clip")), scale[..., None], zero)

    def dequantize(self) -> jax.Array:
        """Returns table_VD in f32."""
        zero_V1 = None if self.zero_V is None else self.zero_V[:, None]
        return decode(self._unpack(self.codes), self.scale_V[:, None], zero_V1)

    def scores(self, x_BD) -> jax.Array:
        """f32[B, V]: dot products of x with all entries, computed in f32."""
        x_BD = x_BD.astype(jnp.float32)
        out_BV = self._float_dot(x_BD)
        if self.zero_V is not None:
            out_BV -= jnp.sum(x_BD, -1, keepdims=True) * self.zero_V
        return out_BV * self.scale_V.astype(jnp.float32)

    def _float_dot(self, x_BD):
        """f32[B, V]: dot products with the codes, converted slice by slice to avoid a whole table in f32."""
        num_rows = self.shape[0]
        size = min(num_rows, max(1, _SLICE_ELEMENTS // self.dim))

        def fill(i, out_BV):  # the last slice is clamped: it overlaps the one before
            codes_vD = self._unpack(jax.lax.dynamic_slice_in_dim(self.codes, i * size, size))
            out_Bv = jax.lax.dot_general(x_BD, codes_vD.astype(jnp.float32), _ROWS_BY_ROWS)
            return jax.lax.dynamic_update_slice(out_BV, out_Bv, (0, i * size))

        return jax.lax.fori_loop(0, -(-num_rows // size), fill, jnp.zeros((len(x_BD), num_rows)))


def pack_int4(codes) -> jax.Array:
    """Returns uint8[..., ceil(D/2)] of codes [..., D] from -8 to 7. If D is odd, a code 0 is added."""
    half = -(-codes.shape[-1] // 2)
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 2 * half - codes.shape[-1])])
    bits = (padded + 8).astype(jnp.uint8)
    return bits[..., :half] | bits[..., half:] << 4


def unpack_int4(packed, dim: int) -> jax.Array:
    """Returns codes int8[..., dim], the inverse of `pack_int4`."""
    bits = jnp.concatenate([packed & 15, packed >> 4], -1)[..., :dim]
    return bits.astype(jnp.int8) - 8


def score_items(x_BD, table) -> jax.Array:
    """f32[B, V]: dot products with all entries of a table, an array or a QuantizedTable."""
    if isinstance(table, QuantizedTable):
        return table.scores(x_BD)
    return jnp.matmul(x_BD, table.T, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fake_quantize(x, scale, zero, bits: int):
    """Returns x quantized and decoded again. scale, zero (or None): broadcast to x.

    The gradient treats rounding as the identity (straight-through): it is 0 where a code is clipped, and for
    scale and zero. Source: Jacob et al., CVPR'18 (arXiv 1712.05877), section 3.
    """
    return decode(encode(x, scale, zero, bits), scale, zero).astype(x.dtype)


def _fake_quantize_fwd(x, scale, zero, bits):
    codes = _unclipped(x, scale, zero)
    low, high = code_limits(bits, zero is None)
    return fake_quantize(x, scale, zero, bits), (low <= codes) & (codes <= high)


def _fake_quantize_bwd(bits, is_inside, grad):
    return jnp.where(is_inside, grad, 0), None, None


fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuantizedInputs(ParamValue):
    """A kernel for quantization-aware training: it rounds its inputs as dynamic quantization would, with one
    scale per token.

    is_on: whether inputs are rounded; a bool scalar that may be traced.
    """

    kernel: jax.Array
    is_on: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(D, F), with further dims flattened."""
        return self.kernel.shape[0], self.kernel.size // self.kernel.shape[0]

    def matmul(self, x_TD) -> jax.Array:
        """Returns y_TF, with gradients for x and the kernel."""
        scale_T1 = jax.lax.stop_gradient(token_scale(x_TD))
        x_TD = jnp.where(self.is_on, fake_quantize(x_TD, scale_T1, None, 8), x_TD)
        return jnp.dot(x_TD, self.kernel.reshape(self.shape).astype(x_TD.dtype))

    def matmul_transposed(self, y_TF) -> jax.Array:
        """Returns x_TD = y @ kernel.T; the inputs are not rounded, as in QuantizedKernel."""
        return jnp.dot(y_TF, self.kernel.reshape(self.shape).T.astype(y_TF.dtype))
