// What every CUDA op needs around its launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../plan.h"
#include "../tensors.h"
#include "tile.cuh"

// Lies in torch's CUDA library, so it is weak: this module imports beside a CPU torch too.
extern "C" [[gnu::weak]] int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fc::cuda {

inline constexpr int64_t kBlocksWanted = 1024;  // several waves on the largest GPUs
inline constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

inline void check_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  FC_CHECK(error == cudaSuccess && count > 0, "no CUDA device: ", cudaGetErrorString(error));
  FC_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "no CUDA device: this torch is built without CUDA");
}

// Starts so many blocks of a kernel on the current stream of the device of `like`.
template <class Kernel, class... Arguments>
void start(Kernel* kernel, int64_t blocks, const Tensor& like, const Arguments&... arguments) {
  void* stream = nullptr;
  FC_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0, "torch gave no CUDA stream");
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  FC_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
}

// Calls f<T, Source>(): the type that is computed in and that of an argument, which Sizes has found to have one of
// these.
template <class F>
void with_types(const Tensor& argument, const F& f) {
  switch (argument.scalar_type()) {
    case ScalarType::Double:
      return f.template operator()<double, double>();
    case ScalarType::BFloat16:
      return f.template operator()<float, __nv_bfloat16>();
    default:
      return f.template operator()<float, float>();
  }
}

}  // namespace fc::cuda
