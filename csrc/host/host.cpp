// Host work that needs no torch: facts of the build and the CPU, how sweeps are cut into tasks, memory, and what Python
// has to say to an op that runs.
#include <pybind11/pybind11.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <memory>

#include "../cpu/caches.h"
#include "../plan.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  using namespace fc::cpu;
  const Tier tier = current_tier();
  py::list tiers;
  for (int i = 0; i <= static_cast<int>(best_tier()); ++i) tiers.append(kTierNames[i]);
  py::dict facts;
  facts["version"] = FC_VERSION;
  facts["compiler"] = FC_COMPILER;
  facts["cuda_architectures"] = FC_CUDA_ARCHITECTURES;
  facts["cpu_tier"] = kTierNames[static_cast<int>(tier)];
  facts["cpu_tiers"] = tiers;
  facts["best_cpu_tier"] = kTierNames[static_cast<int>(best_tier())];
  facts["l1_bytes"] = caches().l1;
  facts["l2_bytes"] = caches().l2;
  facts["stripe_columns"] = kPanelsAStripe * panel_bytes(tier) / static_cast<int64_t>(sizeof(float));
  return facts;
}

// What a signal's handler raised. Torch's bindings raise it again in Python, as they do any builtin_exception; for all
// other code between an op and Python it is an error like any other.
class Interrupted : public py::builtin_exception {
 public:
  explicit Interrupted(const py::error_already_set& raised)
      : py::builtin_exception("interrupted"), raised(std::make_shared<py::error_already_set>(raised)) {}
  void set_error() const override { raised->restore(); }

 private:
  std::shared_ptr<py::error_already_set> raised;
};

// Gives freed memory that the C library keeps for itself back to the system.
void give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

unsigned long main_thread = 0;  // Python's name of it: signals are handled there alone

// Lets the handlers of signals that have come run, and throws what one of them raises.
void ask_python() {
  if (PyThread_get_thread_ident() != main_thread || !Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw Interrupted(py::error_already_set());
}

// The address of ask_python(), for the library of the ops.
uintptr_t question(unsigned long main_thread_name) {
  main_thread = main_thread_name;
  return reinterpret_cast<uintptr_t>(&ask_python);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("question", &question, py::arg("main_thread"));
  m.def("build_facts", &build_facts);
  m.def("give_back", &give_back, py::call_guard<py::gil_scoped_release>());
  m.def(
      "plan_tiles",
      [](int64_t pairs, int64_t positions, int64_t depth_bytes, int64_t threads) {
        const auto plan = fc::plan_tiles(pairs, positions, depth_bytes, threads, fc::cpu::caches().l2);
        return py::make_tuple(plan.pair_block, plan.position_block, plan.tasks);
      },
      py::arg("pairs"), py::arg("positions"), py::arg("depth_bytes"), py::arg("threads"));
}
