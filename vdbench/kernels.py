"""Fused float32 kernels for the elementwise work of a variational-dropout step on a CPU.

One pass over the weights and one over the noisy activations instead of a pass an operation, and noise from a
generator that vectorises: that is most of what a step costs above a dense one. `exp` and `log` are polynomials here
(Cephes single precision, relative error below 2e-7) because LLVM turns a loop over arithmetic into vector code, but
not one over library calls. All arrays are flat, contiguous and of one length.
"""

# numba calls an intrinsic without the typing context it is defined with, and infers what Python leaves open
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

f32 = np.float32
_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_EXPONENT_ONE, _SQRT_HALF_BITS = 127, 0x3F3504F3
# As in `posterior`, where they are explained: numba's cache of compiled code notices changes of this file alone.
_EPS, _CLIP = f32(1e-8), f32(8.0)
_K1, _K2, _K3 = f32(0.63576), f32(1.87320), f32(1.48695)
_LARGEST = f32(87.0)  # exp of more does not fit a float32
_LOG2E, _LN2_HIGH, _LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
_BLOCK = 8192  # summed in float32 by itself, then in float64: the sum keeps its precision over millions of weights
_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_W0, _PHILOX_W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_HALF_TURN = f32(np.pi / 2**24)  # a signed 24-bit number to half an angle, in [-pi/2, pi/2)
# least-squares polynomials in t^2 on [-pi/2, pi/2]: sin(t) / t within 7e-9, cos(t) within 3e-10
_SIN0, _SIN1, _SIN2 = f32(9.99999996e-01), f32(-1.66666580e-01), f32(8.33305062e-03)
_SIN3, _SIN4 = f32(-1.98090464e-04), f32(2.60516628e-06)
_COS0, _COS1, _COS2 = f32(1.0), f32(-4.99999994e-01), f32(4.16666362e-02)
_COS3, _COS4, _COS5 = f32(-1.38883608e-03), f32(2.47601355e-05), f32(-2.60510764e-07)
JIT = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},  # all but the assumption that there are no NaNs
}
# Of a function that others call. With code of its own beside its copies in its callers, the process that compiles would
# run the one, and those that load from the cache the others, whose last digits may differ.
_INLINED = {**JIT, "forceinline": True}


@intrinsic
def _power_of_two(typing, n):
    """2^n for a whole n, put together as exponent bits."""

    def build(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], _I32), _I32(_EXPONENT_ONE))
        return builder.bitcast(builder.shl(exponent, _I32(23)), _FLOAT)

    return types.float32(types.float32), build


@intrinsic
def _exponent(typing, x):
    """The n for which x / 2^n lies in [sqrt(1/2), sqrt(2))."""

    def build(context, builder, signature, args):
        bits = builder.sub(builder.bitcast(args[0], _I32), _I32(_SQRT_HALF_BITS))
        return builder.sitofp(builder.ashr(bits, _I32(23)), _FLOAT)

    return types.float32(types.float32), build


@intrinsic
def _full_width(typing):
    """Have LLVM fill the processor's widest vectors: of AVX-512 it takes half on most of Intel's, by itself."""

    def build(context, builder, signature, args):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # past llvmlite's list of known names
        return context.get_dummy_value()

    return types.none(), build


@njit(inline="always")
def exp(x):
    """exp(x) for |x| < 87."""
    n = np.floor(x * _LOG2E + f32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1.0)) * _power_of_two(n)


@njit(inline="always")
def log(x):
    """log(x) for a normal, positive x."""
    n = _exponent(x)
    m = x * _power_of_two(-n) - f32(1.0)
    p = f32(7.0376836292e-2)
    p = p * m - f32(1.1514610310e-1)
    p = p * m + f32(1.1676998740e-1)
    p = p * m - f32(1.2420140846e-1)
    p = p * m + f32(1.4249322787e-1)
    p = p * m - f32(1.6668057665e-1)
    p = p * m + f32(2.0000714765e-1)
    p = p * m - f32(2.4999993993e-1)
    p = p * m + f32(3.3333331174e-1)
    z = m * m
    return m * z * p - f32(0.5) * z + m + n * _LN2_HIGH + n * _LN2_LOW


@njit(inline="always")
def clip(x, limit):
    """x limited to [-limit, limit]; NaN stays NaN, so that a diverged run shows."""
    x = min(x, limit)
    return max(x, -limit)


@njit(inline="always")
def _divergence(square, log_sigma2):
    """The KL divergence of one weight (Molchanov et al. 2017, equation 14) and its derivative by log alpha, which is
    clipped; `square` is weight^2 + 1e-8."""
    unclipped = log_sigma2 - log(square)
    log_alpha = clip(unclipped, _CLIP)
    inverse_alpha = exp(-log_alpha)
    gate = f32(1.0) / (f32(1.0) + exp(-_K2 - _K3 * log_alpha))
    kl = _K1 * (f32(1.0) - gate) + f32(0.5) * log(f32(1.0) + inverse_alpha)
    slope = -f32(0.5) * inverse_alpha / (f32(1.0) + inverse_alpha) - _K1 * _K3 * gate * (f32(1.0) - gate)
    return kl, slope if log_alpha == unclipped else f32(0.0)


@njit(inline="always")
def _divergence_gradient(weight, square, log_sigma2, scale):
    """The derivatives of the divergence of one weight by weight and by log_sigma2, times `scale`."""
    slope = scale * _divergence(square, log_sigma2)[1]
    return f32(-2.0) * weight / square * slope, slope


@njit(**_INLINED)
def _posterior_block(weight, log_sigma2, mean, variance, alpha_limit):
    _full_width()
    kl = f32(0.0)
    for i in range(weight.size):
        square = weight[i] * weight[i] + _EPS
        variance[i] = exp(clip(log_sigma2[i], _LARGEST))
        mean[i] = f32(0.0) if variance[i] >= alpha_limit * square else weight[i]
        kl += _divergence(square, log_sigma2[i])[0]
    return kl


@njit(**JIT)
def posterior(weight, log_sigma2, mean, variance, alpha_limit):
    """The summed KL divergence; written into the arrays given: mean = 0 where exp(log_sigma2) >= alpha_limit *
    (weight^2 + 1e-8) and else weight, and variance = exp(log_sigma2)."""
    kl = 0.0
    for start in range(0, weight.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, weight.size))
        kl += _posterior_block(weight[part], log_sigma2[part], mean[part], variance[part], f32(alpha_limit))
    return kl


@njit(**JIT)
def posterior_gradients(
    weight, log_sigma2, grad_mean, grad_variance, grad_weight, grad_log_sigma2, grad_kl, alpha_limit
):
    """The gradients of `posterior` by weight and by log_sigma2, written into `grad_weight` and `grad_log_sigma2`."""
    _full_width()
    scale, limit = f32(grad_kl), f32(alpha_limit)
    for i in range(weight.size):
        square = weight[i] * weight[i] + _EPS
        variance = exp(clip(log_sigma2[i], _LARGEST))
        removed = variance >= limit * square
        by_weight, by_log_sigma2 = _divergence_gradient(weight[i], square, log_sigma2[i], scale)
        grad_weight[i] = by_weight + (f32(0.0) if removed else grad_mean[i])
        grad_log_sigma2[i] = by_log_sigma2 + grad_variance[i] * variance


@njit(inline="always")
def _box_muller(a, b):
    """Two independent standard normals from two random 32-bit words."""
    uniform = (f32(np.int32(a >> np.uint64(8))) + f32(1.0)) * f32(2.0**-24)
    radius = np.sqrt(f32(-2.0) * log(uniform))
    t = f32(np.int32(b >> np.uint64(8)) - np.int32(1 << 23)) * _HALF_TURN
    z = t * t
    sine = t * (_SIN0 + z * (_SIN1 + z * (_SIN2 + z * (_SIN3 + z * _SIN4))))
    cosine = _COS0 + z * (_COS1 + z * (_COS2 + z * (_COS3 + z * (_COS4 + z * _COS5))))
    return radius * f32(2.0) * sine * cosine, radius * (f32(1.0) - f32(2.0) * sine * sine)


@njit(inline="always")
def philox(counter, key0, key1):
    """Four random 32-bit words: Philox4x32-10 (Salmon et al., SC 2011) at the counter (counter, 0, 0, 0)."""
    x0, x1, x2, x3 = counter, np.uint64(0), np.uint64(0), np.uint64(0)
    for _ in range(10):
        product0, product1 = _PHILOX_M0 * x0, _PHILOX_M1 * x2
        x0, x1 = (((product1 >> np.uint64(32)) ^ x1 ^ key0) & _LOW_WORD, product1 & _LOW_WORD)
        x2, x3 = (((product0 >> np.uint64(32)) ^ x3 ^ key1) & _LOW_WORD, product0 & _LOW_WORD)
        key0, key1 = (key0 + _PHILOX_W0) & _LOW_WORD, (key1 + _PHILOX_W1) & _LOW_WORD
    return x0, x1, x2, x3


@njit(**JIT)
def fill_normal(out, seed):
    """Standard normals from a 64-bit seed, whatever the machine. The length of `out` is a multiple of 4."""
    _full_width()
    quarter = out.size // 4
    q0, q1, q2, q3 = (out[:quarter], out[quarter : 2 * quarter], out[2 * quarter : 3 * quarter], out[3 * quarter :])
    key0, key1 = np.uint64(seed) & _LOW_WORD, np.uint64(seed) >> np.uint64(32)
    for i in range(quarter):
        a, b, c, d = philox(np.uint64(i), key0, key1)
        q0[i], q1[i] = _box_muller(a, b)
        q2[i], q3[i] = _box_muller(c, d)


@njit(**JIT)
def add_noise(mean, variance, noise):
    """`mean` becomes mean + std * noise, and `noise` the derivative of that by the variance."""
    _full_width()
    for i in range(mean.size):
        std = np.sqrt(max(variance[i], f32(0.0)) + _EPS)
        mean[i] = mean[i] + std * noise[i]
        noise[i] = f32(0.5) * noise[i] / std


@njit(**_INLINED)
def _divergence_block(weight, log_sigma2):
    _full_width()
    kl = f32(0.0)
    for i in range(weight.size):
        kl += _divergence(weight[i] * weight[i] + _EPS, log_sigma2[i])[0]
    return kl


@njit(**JIT)
def divergence(weight, log_sigma2):
    """The KL divergence summed over all weights."""
    kl = 0.0
    for start in range(0, weight.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, weight.size))
        kl += _divergence_block(weight[part], log_sigma2[part])
    return kl


@njit(**JIT)
def divergence_gradients(weight, log_sigma2, grad_weight, grad_log_sigma2, grad_kl):
    """The gradients of `divergence`, times `grad_kl`, written into `grad_weight` and `grad_log_sigma2`."""
    _full_width()
    scale = f32(grad_kl)
    for i in range(weight.size):
        square = weight[i] * weight[i] + _EPS
        grad_weight[i], grad_log_sigma2[i] = _divergence_gradient(weight[i], square, log_sigma2[i], scale)


@njit(**_INLINED)
def _sample_block(weight, log_sigma2, noise, out, alpha_limit):
    _full_width()
    kl = f32(0.0)
    for i in range(weight.size):
        square = weight[i] * weight[i] + _EPS
        std = exp(f32(0.5) * clip(log_sigma2[i], _LARGEST))
        out[i] = (f32(0.0) if std * std >= alpha_limit * square else weight[i]) + std * noise[i]
        kl += _divergence(square, log_sigma2[i])[0]
    return kl


@njit(**JIT)
def sample(weight, log_sigma2, out, seed, alpha_limit):
    """A sample of every weight, written into `out`: its mean, 0 where exp(log_sigma2) >= alpha_limit * (weight^2 +
    1e-8), plus its standard deviation times a standard normal drawn from the 64-bit seed. Returns the KL divergence."""
    kl, noise = 0.0, np.empty(_BLOCK, np.float32)
    for start in range(0, weight.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, weight.size))
        fill_normal(noise, np.uint64(seed) + np.uint64(start // _BLOCK))
        kl += _sample_block(weight[part], log_sigma2[part], noise, out[part], f32(alpha_limit))
    return kl


@njit(**_INLINED)
def _sample_gradients_block(weight, log_sigma2, noise, grad, grad_weight, grad_log_sigma2, scale, alpha_limit):
    _full_width()
    for i in range(weight.size):
        square = weight[i] * weight[i] + _EPS
        std = exp(f32(0.5) * clip(log_sigma2[i], _LARGEST))
        removed = std * std >= alpha_limit * square
        by_weight, by_log_sigma2 = _divergence_gradient(weight[i], square, log_sigma2[i], scale)
        grad_weight[i] = by_weight + (f32(0.0) if removed else grad[i])
        grad_log_sigma2[i] = by_log_sigma2 + f32(0.5) * std * noise[i] * grad[i]


@njit(**JIT)
def sample_gradients(weight, log_sigma2, grad, grad_weight, grad_log_sigma2, grad_kl, seed, alpha_limit):
    """The gradients of `sample`, written into `grad_weight` and `grad_log_sigma2`. The noise is drawn again, from the
    same seed, rather than kept: that is as fast, and saves memory the size of all weights."""
    noise = np.empty(_BLOCK, np.float32)
    for start in range(0, weight.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, weight.size))
        fill_normal(noise, np.uint64(seed) + np.uint64(start // _BLOCK))
        _sample_gradients_block(
            weight[part],
            log_sigma2[part],
            noise,
            grad[part],
            grad_weight[part],
            grad_log_sigma2[part],
            f32(grad_kl),
            f32(alpha_limit),
        )
