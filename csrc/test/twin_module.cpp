// The host twin from Python, for tests: what it measures, and how and on what machine it runs. scripts/build_twin.py links it
// into the twin's library, which is a module of Python beside its operators; no part of the package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cuda/tile.cuh"

namespace {

namespace py = pybind11;
namespace twin = writesae::tile::twin;
using Held = std::lock_guard<std::mutex>;

std::map<std::string, std::map<std::string, int64_t>> counts() {
  const Held held(twin::lock);
  std::map<std::string, std::map<std::string, int64_t>> all;
  for (const auto& [launch, c] : twin::statistics) {
    auto& to = all[launch];
    to.insert(c.own.begin(), c.own.end());
    to["launches"] = c.launches, to["blocks"] = c.blocks, to["barriers"] = c.barriers;
    to["products"] = c.products, to["multiply_adds"] = c.multiply_adds;
    to["matrix_loads"] = c.matrix_loads, to["conflicts"] = c.conflicts;
    to["copies"] = c.copies, to["copied_bytes"] = c.copied_bytes;
    to["shared_bytes_read"] = c.shared_bytes_read, to["shared_bytes_written"] = c.shared_bytes_written;
    to["shared_bytes_taken"] = c.shared_bytes_taken, to["shared_bytes_asked"] = c.shared_bytes_asked;
  }
  return all;
}

void reset() {
  const Held held(twin::lock);
  twin::statistics.clear();
  twin::watched.clear();
}

void watch(const std::string& name, uintptr_t address, size_t bytes) {
  const Held held(twin::lock);
  twin::watched.push_back({name, reinterpret_cast<const char*>(address), bytes});
}

void schedule(const std::string& name) {
  if (name != "forward" && name != "reverse")
    throw std::invalid_argument("schedule: expected \"forward\" or \"reverse\", got \"" + name + "\"");
  const Held held(twin::lock);
  twin::settings.schedule = name == "reverse" ? twin::Schedule::reverse : twin::Schedule::forward;
}

void truncating(bool on) {
  const Held held(twin::lock);
  twin::settings.truncating = on;
}

void machine(int multiprocessors, int architecture, size_t block_shared, size_t processor_shared) {
  if (multiprocessors < 1) throw std::invalid_argument("multiprocessors: expected at least 1");
  const Held held(twin::lock);
  twin::settings.machine = {multiprocessors, architecture, block_shared, processor_shared};
}

}  // namespace

// Launches of other threads may hold the twin's lock: nothing here waits for it with Python's.
PYBIND11_MODULE(twin, m) {
  using py::arg;
  using Free = py::call_guard<py::gil_scoped_release>;
  const twin::Machine given;
  m.doc() = "The host twin of the CUDA kernels: what it measures, and how and on what machine it runs.";
  m.def("counts", counts, Free(), "{name of a launch: {count: number}} since `reset` (host_twin.h, Statistics).");
  m.def("reset", reset, Free(), "Sets all counts to zero, and watches nothing.");
  m.def("watch", watch, Free(), arg("name"), arg("address"), arg("bytes"),
        "Counts bytes that asynchronous copies read there, under \"bytes of <name>\", until `reset`.");
  m.def("schedule", schedule, Free(), arg("name"), "In which order threads and blocks run: \"forward\" or \"reverse\".");
  m.def("truncating", truncating, Free(), arg("on"), "Whether sums of matrix products are cut off as the machine's are.");
  m.def("machine", machine, Free(), py::kw_only(), arg("multiprocessors") = given.multiprocessors,
        arg("architecture") = given.architecture, arg("block_shared") = given.block_shared,
        arg("processor_shared") = given.processor_shared,
        "What kernels run on, an H100 but for what is given. Shared memory in bytes; architecture 90 is sm_90.");
}
