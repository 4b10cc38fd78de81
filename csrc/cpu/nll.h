// What sweep_nll and joint_nll share: arguments and results, and the clean run's probabilities.
#pragma once

#include "sweep.h"

namespace fc::cpu {

struct NllArguments {
  SweepInputs inputs;
  const int64_t* tokens;          // [T,K]; outside [0, V): absent from this vocabulary slice
  const double* clean_lse;        // [T] or null
  double cap;                     // logits x become cap * tanh(x / cap); 0: they do not
  double *lse, *picked, *change;  // [P,T], logits of `tokens` [P,T,K], zero at first, and [P,T] or null
  int64_t tokens_per_position;    // K
};

}  // namespace fc::cpu

#ifdef FC_TIER

#include "exp_sums.h"

namespace fc::cpu::FC_TIER {

// An epilogue over the rows of a block that knows the clean run's probabilities where it was given its logsumexps.
template <class Scheme, class Source>
struct NllEpilogue : Epilogue {
  using T = typename Scheme::Accumulator;
  static constexpr int64_t kW = kWidth<Scheme>;
  static constexpr int kL = kLanes<T>;

  const NllArguments& nll;
  Sweep<Scheme, Source> sweep;
  Buffer<T> clean{nll.clean_lse ? kPanelsAStripe * kW * sweep.window : 0};  // probabilities, packed as the base

  NllEpilogue(const NllArguments& nll, const Block& block) : nll(nll), sweep{nll.inputs, block} {}

  void base_packed(int64_t row, int64_t columns) {
    if (nll.clean_lse == nullptr) return;
    const double lse = nll.clean_lse[sweep.block.first_position + row % sweep.window];
    probabilities<T>(clean.data + row * kW, sweep.base.data + row * kW, columns, lse, nll.cap);
  }
};

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

namespace fc::cpu {

// The tensors that NllArguments point to. P: of the results.
struct NllTensors {
  OwnedInputs inputs;
  Tensor tokens, lse, picked, change;
  std::optional<Tensor> clean_lse;

  NllTensors(OwnedInputs inputs, const Tensor& like, int64_t P, const Tensor& tokens_given,
             const std::optional<Tensor>& clean_given)
      : inputs(std::move(inputs)),
        tokens(torch::stable::contiguous(tokens_given)),
        lse(torch::stable::new_empty(like, {P, like.size(0)}, ScalarType::Double)),
        picked(torch::stable::new_zeros(like, {P, like.size(0), tokens.size(1)}, ScalarType::Double)),
        change(torch::stable::new_empty(like, {clean_given.has_value() ? P : 0, like.size(0)}, ScalarType::Double)),
        clean_lse(contiguous_as(clean_given, ScalarType::Double)) {}

  NllArguments arguments(std::optional<double> cap) const {
    return {.inputs = inputs.view,
            .tokens = data_of<const int64_t>(tokens),
            .clean_lse = data_of<const double>(clean_lse),
            .cap = cap.value_or(0),
            .lse = data_of<double>(lse),
            .picked = data_of<double>(picked),
            .change = clean_lse.has_value() ? data_of<double>(change) : nullptr,
            .tokens_per_position = tokens.size(1)};
  }
  std::tuple<Tensor, Tensor, Tensor> results() const { return {lse, picked, change}; }
};

}  // namespace fc::cpu

#endif
