// Host work that needs no torch: facts of the build and the CPU, path enumeration and counting, tile planning.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "../cpu/isa.h"
#include "../plan.h"

namespace py = pybind11;

namespace {

using Path = std::vector<std::pair<int64_t, int64_t>>;

// Paths of each order 0..layers through `layers` layers of `heads` heads: C(layers, order) heads^order.
std::vector<py::int_> count_paths(int64_t layers, int64_t heads) {
  std::vector<py::int_> counts{py::int_(1)};
  const py::int_ per_head(heads);
  for (int64_t k = 1; k <= layers; ++k) {
    const py::object ways = counts.back() * per_head * py::int_(layers - k + 1);
    counts.push_back(ways.attr("__floordiv__")(py::int_(k)).cast<py::int_>());
  }
  return counts;
}

void extend(Path& path, int64_t from, int64_t layers, int64_t heads, int64_t order, std::vector<Path>& out) {
  if (static_cast<int64_t>(path.size()) == order) {
    out.push_back(path);
    return;
  }
  for (int64_t layer = from; layer < layers; ++layer)
    for (int64_t head = 0; head < heads; ++head) {
      path.emplace_back(layer, head);
      extend(path, layer + 1, layers, heads, order, out);
      path.pop_back();
    }
}

std::vector<Path> enumerate_paths(int64_t layers, int64_t heads, int64_t order) {
  if (layers < 0 || heads < 0 || order < 0) throw std::invalid_argument("layers, heads and order must not be negative");
  std::vector<Path> out;
  Path path;
  extend(path, 0, layers, heads, order, out);
  return out;
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = FC_VERSION;
  facts["compiler"] = FC_COMPILER;
  facts["cuda_architectures"] = FC_CUDA_ARCHITECTURES;
  facts["cpu_tier"] = fc::cpu::kTierNames[static_cast<int>(fc::cpu::current_tier())];
  facts["best_cpu_tier"] = fc::cpu::kTierNames[static_cast<int>(fc::cpu::best_tier())];
  return facts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_facts", &build_facts);
  m.def("count_paths", &count_paths, py::arg("layers"), py::arg("heads"));
  m.def("enumerate_paths", &enumerate_paths, py::arg("layers"), py::arg("heads"), py::arg("order"));
  m.def(
      "plan_tiles",
      [](int64_t pairs, int64_t positions, int64_t depth_bytes, int64_t threads) {
        const auto plan = fc::plan_tiles(pairs, positions, depth_bytes, threads);
        return py::make_tuple(plan.pair_block, plan.position_block, plan.tasks);
      },
      py::arg("pairs"), py::arg("positions"), py::arg("depth_bytes"), py::arg("threads"));
}
