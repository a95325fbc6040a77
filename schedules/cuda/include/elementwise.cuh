// One operation an element: what fusion into a product or a norm left over. Each operand is read and the result written
// once, so memory is the limit. The index of each operand comes from the kernel's own text, since broadcasting is known
// when it is compiled.
#pragma once

#include "device.cuh"

namespace elementwise {

__device__ __forceinline__ float Add(float a, float b) { return a + b; }
__device__ __forceinline__ float Sub(float a, float b) { return a - b; }
__device__ __forceinline__ float Mul(float a, float b) { return a * b; }
__device__ __forceinline__ float Div(float a, float b) { return a / b; }
__device__ __forceinline__ float Neg(float a) { return -a; }
__device__ __forceinline__ float Abs(float a) { return fabsf(a); }
__device__ __forceinline__ float Sqrt(float a) { return sqrtf(a); }
__device__ __forceinline__ float Reciprocal(float a) { return 1.0f / a; }
__device__ __forceinline__ float Relu(float a) { return a > 0.0f ? a : 0.0f; }
__device__ __forceinline__ float Sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }
__device__ __forceinline__ float Tanh(float a) { return tanhf(a); }
__device__ __forceinline__ float Erf(float a) { return erff(a); }
__device__ __forceinline__ float Silu(float a) { return a / (1.0f + expf(-a)); }

// x/2 (1 + erf(x / sqrt 2)). Hendrycks and Gimpel 2016, arXiv:1606.08415
__device__ __forceinline__ float Gelu(float a) { return 0.5f * a * (1.0f + erff(a * 0.70710678118654752f)); }

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
__device__ __forceinline__ float GeluTanh(float a) {
    return 0.5f * a * (1.0f + tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a)));
}

} // namespace elementwise
