// The extension fusedopt._C: leaf functions of the runtime that are too slow in Python.
//
// fusedopt/runtime/leaf.py has each of them in Python as well; that is the place to read what they mean.
// Light headers only: torch/extension.h alone takes longer to compile than all of this.

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include "cuda.h"
#include "recording.h"
#include "stages.h"

#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

// leaf.py finds this text in the file before it loads it: against another torch, loading may crash.
extern "C" [[gnu::used]] const char fusedopt_built_for_torch[] = "fusedopt built for torch " FUSEDOPT_TORCH_VERSION;

namespace {

const at::Tensor& tensor_at(const py::list& tensors, int64_t index) {
  PyObject* item = PyList_GET_ITEM(tensors.ptr(), index);
  if (!THPVariable_Check(item))
    throw py::type_error("tensors[" + std::to_string(index) + "] must be a Tensor, not " + Py_TYPE(item)->tp_name);
  return THPVariable_Unpack(item);
}

// The memory that pointers were read from. As long as this is there, so is that, whatever becomes of the tensors.
struct Kept {
  std::vector<c10::Storage> storages;
};

Kept write_pointers(
    const py::list& tensors, uintptr_t table_ptr, std::optional<int64_t> rows, int64_t columns, int64_t column) {
  const auto count = static_cast<int64_t>(tensors.size());
  if (count > rows.value_or(count))
    throw py::value_error(
        std::to_string(count) + " tensors do not fit into a table of " + std::to_string(*rows) + " rows");
  if (column < 0 || column >= columns)
    throw py::value_error(
        "column " + std::to_string(column) + " is outside a table of " + std::to_string(columns) + " columns");
  if (table_ptr == 0)
    throw py::value_error("table_ptr is null");
  auto* cell = reinterpret_cast<int64_t*>(table_ptr) + column;
  Kept kept;
  kept.storages.reserve(count);
  for (int64_t row = 0; row < count; ++row, cell += columns) {
    const at::Tensor& tensor = tensor_at(tensors, row);
    // Not const_data_ptr: a kernel may write there, so a lazy clone must get its own memory now.
    *cell = reinterpret_cast<int64_t>(tensor.mutable_data_ptr());
    if (tensor.has_storage())
      kept.storages.push_back(tensor.storage());
  }
  return kept;
}

void run_cpu(std::vector<uintptr_t> entries, uintptr_t launch_ptr, std::vector<std::vector<int64_t>> splits) {
  if (entries.size() != splits.size())
    throw py::value_error(
        std::to_string(entries.size()) + " entries need as many splits, not " + std::to_string(splits.size()));
  for (uintptr_t entry : entries)
    if (entry == 0)
      throw py::value_error("an entry is null");

  const fusedopt::Stages stages{std::move(entries), launch_ptr, std::move(splits)};
  py::gil_scoped_release no_gil;
  stages.run();
}

// Wait until gradients are there or gone. A thread that drops one lets go of the GIL while the memory is freed, and till
// then the parameter refers to what is no more: torch's own `p.grad` would crash.
void settle(const py::list& params) {
  for (const auto& item : params) {
    if (!THPVariable_Check(item.ptr()))
      continue;
    const at::Tensor& grad = THPVariable_Unpack(item.ptr()).grad();
    while (grad.defined() && grad.use_count() == 0) {
      py::gil_scoped_release no_gil;
      std::this_thread::yield();
    }
  }
}

// A number among the hyperparameters as Python's, or None.
py::object number(const py::object& x) {
  fusedopt::Scalar out;
  return fusedopt::Scalar::number(x.ptr(), out) ? out.python() : py::none();
}

// Whether all are ordinary tensors whose storage is as large as they need.
bool have_memory(const py::list& tensors) {
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const at::Tensor& t = tensor_at(tensors, i);
    if (!THPVariable_CheckTypeExact(Py_TYPE(PyList_GET_ITEM(tensors.ptr(), i))) || t.layout() != at::kStrided ||
        !t.has_storage())
      return false;
    if (t.storage().nbytes() < at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset()))
      return false;
  }
  return true;
}

void bump_versions(const py::list& tensors) {
  const auto count = static_cast<int64_t>(tensors.size());
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& tensor = tensor_at(tensors, i);
    if (!tensor.is_inference()) // inference tensors have no counter
      tensor.unsafeGetTensorImpl()->bump_version();
  }
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Leaf functions of the runtime; fusedopt/runtime/leaf.py documents them.";
  m.attr("torch_version") = FUSEDOPT_TORCH_VERSION;
  m.def("write_pointers", torch::wrap_pybind_function(write_pointers),
        py::arg("tensors"), py::arg("table_ptr"), py::arg("rows").none(true), py::arg("columns"), py::arg("column"));
  m.def("run_cpu", torch::wrap_pybind_function(run_cpu),
        py::arg("entries"), py::arg("launch_ptr"), py::arg("splits"));
  m.def("have_memory", torch::wrap_pybind_function(have_memory), py::arg("tensors"));
  m.def("settle", torch::wrap_pybind_function(settle), py::arg("params"));
  m.def("number", torch::wrap_pybind_function(number), py::arg("x"));
  py::class_<Kept>(m, "Kept");
  py::class_<fusedopt::Recording>(m, "Recording")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&>(),
           py::arg("groups"), py::arg("absent"), py::arg("rows"), py::arg("hypers"), py::arg("batches"),
           py::arg("numbers"))
      .def("plan", &fusedopt::Recording::plan, py::arg("launches"))
      .def("step", &fusedopt::Recording::step, py::arg("groups"), py::arg("measure").none(true));
  py::class_<fusedopt::ScalarProgram>(m, "ScalarProgram")
      .def(py::init<const py::list&, std::vector<size_t>, std::vector<size_t>, const py::list&>(),
           py::arg("instructions"), py::arg("slots"), py::arg("numbers"), py::arg("guards"))
      .def("__call__", &fusedopt::ScalarProgram::call, py::arg("leaves"));
  m.def("bump_versions", torch::wrap_pybind_function(bump_versions), py::arg("tensors"));
  fusedopt::bind_cuda(m);
}
