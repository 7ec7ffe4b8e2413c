// The extension fusedopt._C: leaf functions of the runtime that are too slow in Python.
//
// fusedopt/extension/leaf.py has each of them in Python as well; that is the place to read what they mean.
// Light headers only: torch/extension.h alone takes longer to compile than all of this.

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bound_step.h"
#include "cuda.h"
#include "profile.h"
#include "survey.h"

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

void run_cpu(std::vector<uintptr_t> entries, uintptr_t launch_ptr, std::vector<std::vector<int64_t>> splits,
             int64_t cost) {
  if (entries.size() != splits.size())
    throw py::value_error(
        std::to_string(entries.size()) + " entries need as many splits, not " + std::to_string(splits.size()));
  for (uintptr_t entry : entries)
    if (entry == 0)
      throw py::value_error("an entry is null");

  py::gil_scoped_release no_gil;
  const fusedopt::Metered metered(entries.size());
  for (size_t k = 0; k < entries.size(); ++k)
    fusedopt::run_stage(entries[k], reinterpret_cast<const void*>(launch_ptr), splits[k], cost);
}

// Wait until gradients are there or gone: where one is being dropped, torch's own `p.grad` would crash.
void settle(const py::list& params) {
  for (const auto& item : params) {
    if (!THPVariable_Check(item.ptr()))
      continue;
    const at::Tensor& grad = THPVariable_Unpack(item.ptr()).grad();
    while (grad.defined() && fusedopt::dropped(grad)) {
      py::gil_scoped_release no_gil;
      std::this_thread::yield();
    }
  }
}

// What a dict has under a name, or a function itself (code, defaults); null if there is nothing. Borrowed.
PyObject* held(PyObject* owner, PyObject* name) {
  static PyObject* const of_functions[] = {
      PyUnicode_InternFromString("__code__"), PyUnicode_InternFromString("__defaults__"),
      PyUnicode_InternFromString("__kwdefaults__")};
  if (PyDict_Check(owner))
    return PyDict_GetItemWithError(owner, name);
  if (!PyFunction_Check(owner))
    throw py::type_error("a dict or a function, a name and a value are wanted");
  return name == of_functions[0]   ? PyFunction_GET_CODE(owner)
         : name == of_functions[1] ? PyFunction_GET_DEFAULTS(owner)
         : name == of_functions[2] ? PyFunction_GET_KW_DEFAULTS(owner)
                                   : throw py::type_error("of a function: __code__, __defaults__ or __kwdefaults__");
}

// The first of (dict or function, name, value) that has another object under the name, where None is as good as nothing;
// -1 if there is none.
int64_t first_other(const py::list& looked) {
  for (int64_t i = 0; i < static_cast<int64_t>(looked.size()); ++i) {
    PyObject* one = PyList_GET_ITEM(looked.ptr(), i);
    if (!PyTuple_CheckExact(one) || PyTuple_GET_SIZE(one) != 3)
      throw py::type_error("a dict or a function, a name and a value are wanted");
    PyObject* found = held(PyTuple_GET_ITEM(one, 0), PyTuple_GET_ITEM(one, 1));
    if (!found && PyErr_Occurred())
      throw py::error_already_set();
    if ((found ? found : Py_None) != PyTuple_GET_ITEM(one, 2))
      return i;
  }
  return -1;
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

// Whether none of the tensors that are written, in the list and in the dicts, has memory in common with another one, be it
// written or read.
bool apart(const py::list& written, const py::list& read, const std::vector<py::dict>& states) {
  const auto own = [](PyObject* x) -> const at::TensorImpl* {
    if (!fusedopt::own_memory(x))
      return nullptr;
    const at::TensorImpl* t = fusedopt::tensor(x).unsafeGetTensorImpl();
    return t->layout() == at::kStrided && t->has_storage() ? t : nullptr;
  };
  fusedopt::Spans spans;
  for (const py::handle x : written)
    if (const at::TensorImpl* t = own(x.ptr()))
      spans.add(*t);
  for (const py::dict& state : states)
    for (const auto& [key, x] : state)
      if (const at::TensorImpl* t = own(x.ptr()))
        spans.add(*t);
  if (!spans.sort())
    return false;
  for (const py::handle x : read)
    if (const at::TensorImpl* t = own(x.ptr()); t && spans.meet(*t))
      return false;
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

// Bounds of the ranges of chunks, at this address, one per thread.
std::vector<int64_t> splits(uintptr_t chunks, int64_t count, int64_t threads) {
  return fusedopt::splits(reinterpret_cast<const int64_t*>(chunks), count, threads);
}

void bind_step(py::module_& m) {
  using namespace fusedopt;
  py::class_<Hyper>(m, "Hyper")
      .def(py::init([](py::object key, int64_t index, py::object value, int64_t cell, double lowest,
                       std::vector<uintptr_t> words, py::object container) {
             return Hyper{std::move(key), index, std::move(value), cell, lowest, std::move(words), std::move(container)};
           }),
           py::kw_only(), py::arg("key"), py::arg("index"), py::arg("value"), py::arg("cell"), py::arg("lowest"),
           py::arg("words"), py::arg("container"));
  py::class_<Group>(m, "Group")
      .def(py::init([](const py::list& params, std::vector<py::object> keys, std::vector<Hyper> hypers) {
             Group group{{}, std::move(keys), std::move(hypers)};
             for (const auto& p : params)
               group.params.push_back(p.ptr());
             return group;
           }),
           py::kw_only(), py::arg("params"), py::arg("keys"), py::arg("hypers"));
  py::enum_<Entry::Kind>(m, "Kind")
      .value("flag", Entry::Kind::flag)
      .value("element", Entry::Kind::element)
      .value("whole", Entry::Kind::whole)
      .value("part", Entry::Kind::part)
      .value("number", Entry::Kind::number)
      .value("other", Entry::Kind::other)
      .value("ignored", Entry::Kind::ignored);
  py::class_<Entry>(m, "Entry")
      .def(py::init([](py::object key, Entry::Kind kind, py::object value, int64_t column, bool written, bool nested,
                       py::object inner, py::object owner, int64_t extra, std::optional<at::ScalarType> held) {
             return Entry{std::move(key), kind,  std::move(value), column, written, nested, std::move(inner),
                          std::move(owner), extra, Scalar::Type::real, std::nullopt, held};
           }),
           py::kw_only(), py::arg("key"), py::arg("kind"), py::arg("value"), py::arg("column"), py::arg("written"),
           py::arg("nested"), py::arg("inner"), py::arg("owner") = py::none(), py::arg("extra") = -1,
           py::arg("held") = py::none());
  py::class_<Bucket>(m, "Bucket")
      .def(py::init([](size_t group, size_t launch, at::ScalarType param, at::ScalarType grad, int64_t param_column,
                       int64_t grad_column, bool param_written, bool grad_written, bool looked_at, std::vector<Entry> entries,
                       py::object program, std::vector<std::pair<bool, size_t>> leaves, std::vector<size_t> outputs,
                       bool narrow) {
             return Bucket{group, launch, param, grad, param_column, grad_column, param_written, grad_written, looked_at,
                           std::move(entries), std::move(program), std::move(leaves), std::move(outputs), narrow};
           }),
           py::kw_only(), py::arg("group"), py::arg("launch"), py::arg("param"), py::arg("grad"),
           py::arg("param_column"), py::arg("grad_column"), py::arg("param_written"), py::arg("grad_written"), py::arg("looked_at"),
           py::arg("entries"), py::arg("program"), py::arg("leaves"), py::arg("outputs"), py::arg("narrow"));
  py::class_<Launch>(m, "Launch")
      .def(py::init<std::vector<uintptr_t>, std::vector<uintptr_t>, uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t>(),
           py::kw_only(), py::arg("stages"), py::arg("before"), py::arg("scalars"), py::arg("rows"), py::arg("n_rows"),
           py::arg("row_words"), py::arg("chunks"), py::arg("n_chunks"), py::arg("chunk_words"), py::arg("n_slots"),
           py::arg("n_reductions"), py::arg("n_results"));
  py::class_<Run>(m, "Run")
      .def(py::init([](py::object native, uintptr_t rows, int64_t row_words, uintptr_t slots, bool movable) {
             auto* launch = native.is_none() ? nullptr : native.cast<Launch*>();
             return Run{std::move(native), launch, reinterpret_cast<int64_t*>(rows), row_words,
                        reinterpret_cast<double*>(slots), movable};
           }),
           py::kw_only(), py::arg("native"), py::arg("rows"), py::arg("row_words"), py::arg("slots"),
           py::arg("movable"));
  py::class_<Summing>(m, "Summing")
      .def(py::init([](py::object native, size_t of, std::vector<std::pair<int64_t, int64_t>> words,
                       std::vector<int64_t> sums) {
             auto* launch = native.cast<Launch*>();
             return Summing{std::move(native), launch, of, std::move(words), std::move(sums)};
           }),
           py::kw_only(), py::arg("native"), py::arg("of"), py::arg("words"), py::arg("sums"));
  py::class_<Round>(m, "Round")
      .def(py::init([](std::vector<Summing> summing, py::object join, bool limits) {
             auto* launch = join.is_none() ? nullptr : join.cast<Launch*>();
             return Round{std::move(summing), std::move(join), launch, limits};
           }),
           py::kw_only(), py::arg("summing"), py::arg("join"), py::arg("limits"));
  py::class_<BoundStep>(m, "BoundStep")
      .def(py::init<std::vector<Group>, std::vector<Bucket>, std::vector<Run>, const py::list&, const py::list&,
                    const std::vector<size_t>&, const std::vector<int64_t>&, const py::list&, std::vector<Round>, bool>(),
           py::kw_only(), py::arg("groups"), py::arg("buckets"), py::arg("runs"), py::arg("params"),
           py::arg("states"), py::arg("bucket_of"), py::arg("indices"), py::arg("absent"), py::arg("rounds"),
           py::arg("graded") = true)
      .def("stepped", &BoundStep::stepped)
      .def("step", &BoundStep::step, py::arg("groups"), py::arg("state"), py::arg("limit"),
           py::arg("measure").none(true), py::arg("extras") = std::vector<py::list>());
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Leaf functions of the runtime; fusedopt/extension/leaf.py documents them.";
  m.attr("torch_version") = FUSEDOPT_TORCH_VERSION;
  m.def("write_pointers", torch::wrap_pybind_function(write_pointers),
        py::arg("tensors"), py::arg("table_ptr"), py::arg("rows").none(true), py::arg("columns"), py::arg("column"));
  m.def("run_cpu", torch::wrap_pybind_function(run_cpu),
        py::arg("entries"), py::arg("launch_ptr"), py::arg("splits"), py::arg("cost") = fusedopt::Contention::slice);
  m.def("launched", [] { return std::pair(fusedopt::meter.stages.load(), fusedopt::meter.nanoseconds.load() * 1e-9); },
        "How many stages have run in this process, and for how many seconds.");
  m.def("splits", splits, py::arg("chunks"), py::arg("count"), py::arg("threads"));
  m.def("have_memory", torch::wrap_pybind_function(have_memory), py::arg("tensors"));
  m.def("apart", torch::wrap_pybind_function(apart), py::arg("written"), py::arg("read"), py::arg("states"));
  m.def("survey", [](const py::list& params, const py::list& states) {
          const fusedopt::Survey found(params, states);
          return py::make_tuple(found.kinds, found.grads, found.states);
        }, py::arg("params"), py::arg("states"));
  m.def("settle", torch::wrap_pybind_function(settle), py::arg("params"));
  m.def("first_other", torch::wrap_pybind_function(first_other), py::arg("looked"));
  m.def("number", torch::wrap_pybind_function(number), py::arg("x"));
  py::class_<Kept>(m, "Kept");
  py::class_<fusedopt::Profile>(m, "Profile")
      .def(py::init<py::object, py::object>(), py::arg("note"), py::arg("is_library"))
      .def("__call__", &fusedopt::Profile::note)
      .def("start", [](const py::object& self) { fusedopt::Profile::start(self); });
  bind_step(m);
  py::class_<fusedopt::ScalarProgram>(m, "ScalarProgram")
      .def(py::init<const py::list&, std::vector<size_t>, std::vector<size_t>, const py::list&>(),
           py::arg("instructions"), py::arg("slots"), py::arg("numbers"), py::arg("guards"))
      .def("__call__", &fusedopt::ScalarProgram::call, py::arg("leaves"));
  m.def("bump_versions", torch::wrap_pybind_function(bump_versions), py::arg("tensors"));
  fusedopt::bind_cuda(m);
}
