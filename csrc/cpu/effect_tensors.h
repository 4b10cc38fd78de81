// The torch-facing half of effects.h: the tensors of sweep_nll and joint_nll, and how parts of the vocabulary are
// joined.
#pragma once

#include "effects.h"

namespace fc::cpu {

// The tensors that EffectArguments point to, and the totals that results are made of. P: of the results.
struct EffectTensors {
  OwnedInputs inputs;
  Tensor tokens, clean_lse, gain, log_total, picked, mean;
  int64_t count, parts;
  bool with_mean;
  std::vector<EffectTotals> totals;  // [parts,P,T]

  EffectTensors(OwnedInputs inputs, const Tensor& like, int64_t P, const Tensor& tokens_given,
                const Tensor& clean_lse_given, bool with_mean, int64_t parts = 1)
      : inputs(std::move(inputs)),
        tokens(torch::stable::contiguous(tokens_given)),
        clean_lse(contiguous_as(clean_lse_given, ScalarType::Double)),
        gain(torch::stable::new_empty(like, {P, like.size(0)}, ScalarType::Double)),
        log_total(torch::stable::new_empty(like, {P, like.size(0)}, ScalarType::Double)),
        picked(torch::stable::new_zeros(like, {P, like.size(0), tokens.size(1)}, ScalarType::Double)),
        mean(torch::stable::new_empty(like, {with_mean ? P : 0, like.size(0)}, ScalarType::Double)),
        count(P * like.size(0)),
        parts(parts),
        with_mean(with_mean),
        totals(static_cast<size_t>(count * parts)) {}

  EffectArguments arguments(std::optional<double> cap) {
    return {.inputs = inputs.view,
            .tokens = data_of<const int64_t>(tokens),
            .clean_lse = data_of<const double>(clean_lse),
            .cap = cap.value_or(0),
            .with_mean = with_mean,
            .totals = totals.data(),
            .anew = nullptr,
            .picked = data_of<double>(picked),
            .tokens_per_position = tokens.size(1)};
  }

  // Joins all parts, and tells which rows are to be made anew: none, if what it returns is empty.
  std::vector<uint8_t> join_parts() {
    std::vector<uint8_t> anew(static_cast<size_t>(count));
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      EffectTotals& all = totals[static_cast<size_t>(i)];
      for (int64_t part = 1; part < parts; ++part) add_part(all, totals[static_cast<size_t>(part * count + i)]);
      anew[static_cast<size_t>(i)] = is_raised(all);
      any |= anew[static_cast<size_t>(i)] != 0;
    }
    return any ? anew : std::vector<uint8_t>{};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
    for (int64_t i = 0; i < count; ++i) {
      const EffectTotals& all = totals[static_cast<size_t>(i)];
      const double log_of_all = all.log_total();
      data_of<double>(log_total)[i] = log_of_all;
      data_of<double>(gain)[i] = log_of_all == log_of_all ? all.gain : log_of_all;
      if (with_mean) data_of<double>(mean)[i] = all.mean;
    }
    return {gain, log_total, picked, mean};
  }
};

}  // namespace fc::cpu
