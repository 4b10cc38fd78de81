// Host work that needs no torch: facts of the build and the CPU, and how sweeps are cut into tasks.
#include <pybind11/pybind11.h>

#include "../cpu/caches.h"
#include "../plan.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  using namespace fc::cpu;
  const Tier tier = current_tier();
  py::dict facts;
  facts["version"] = FC_VERSION;
  facts["compiler"] = FC_COMPILER;
  facts["cuda_architectures"] = FC_CUDA_ARCHITECTURES;
  facts["cpu_tier"] = kTierNames[static_cast<int>(tier)];
  facts["best_cpu_tier"] = kTierNames[static_cast<int>(best_tier())];
  facts["l1_bytes"] = caches().l1;
  facts["l2_bytes"] = caches().l2;
  facts["stripe_columns"] = kPanelsAStripe * panel_bytes(tier) / static_cast<int64_t>(sizeof(float));
  return facts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_facts", &build_facts);
  m.def(
      "plan_tiles",
      [](int64_t pairs, int64_t positions, int64_t depth_bytes, int64_t threads) {
        const auto plan = fc::plan_tiles(pairs, positions, depth_bytes, threads, fc::cpu::caches().l2);
        return py::make_tuple(plan.pair_block, plan.position_block, plan.tasks);
      },
      py::arg("pairs"), py::arg("positions"), py::arg("depth_bytes"), py::arg("threads"));
}
