// What a step looked like, so that the next one can be checked against it and run without any Python per tensor.
//
// `check` answers whether everything that decides a step is as it was: the same groups with the same parameters, the
// same hyperparameter flags, gradients where there were gradients, state dicts with the same entries, tensors with the
// same memory, dtype and strides. On the way it reads what may change on every step: the numbers among the
// hyperparameters, and where the gradients lie. Any doubt is a no; the caller then does the step the long way.
//
// Tensors and dicts are not owned: the garbage collector could not see through to them, and a parameter that refers to
// its optimizer would live forever. What `check` has found in the groups is alive; the caller vouches for the state
// dicts (opt.state counts its changes); a state tensor is looked at after its dict was found to hold it.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace fusedopt {

class Recording {
 public:
  // groups: the param groups. rows: (param, state dict, row address, grad column, param is written, scalar set,
  // entries), an entry being (key, value, kind, column, is written). hypers: per group, in its dict's
  // order, (key, value, parts), a part being (index in a tuple or list, else -1; cell or -1; may be negative; value);
  // None in place of the parts for "params".
  Recording(const py::list& groups, const py::list& absent, const py::list& rows, const py::list& hypers) {
    for (size_t g = 0; g < groups.size(); ++g)
      groups_.push_back(read_group(groups[g].cast<py::dict>(), hypers[g].cast<py::list>()));
    for (const auto& item : absent)
      absent_.push_back(checked(item));
    for (const auto& item : rows)
      rows_.push_back(read_row(item.cast<py::tuple>()));
  }

  // Whether the step is as recorded. Writes the numbers to `hypers`, and gradient pointers to the row table.
  bool check(const py::list& groups, uintptr_t hypers) const {
    if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size())
      return false;
    auto* numbers = reinterpret_cast<double*>(hypers);
    for (size_t g = 0; g < groups_.size(); ++g)
      if (PyList_GET_ITEM(groups.ptr(), g) != groups_[g].dict || !check_group(groups_[g], numbers))
        return false;
    for (PyObject* param : absent_)
      if (tensor(param).grad().defined())
        return false;
    for (size_t i = 0; i < rows_.size(); ++i) {
      prefetch(i);
      if (!check_row(rows_[i]))
        return false;
    }
    return true;
  }

  // After the launch: new numbers into the state dicts (`numbers[column][set]`), version counters up.
  void commit(const py::list& numbers) {
    for (Row& row : rows_) {
      bump(tensor(row.param), row.memory.written);
      for (Entry& entry : row.entries) {
        if (entry.kind == Kind::tensor)
          bump(tensor(entry.value), entry.memory.written);
        if (entry.kind != Kind::number)
          continue;
        PyObject* value = PyList_GET_ITEM(PyList_GET_ITEM(numbers.ptr(), entry.column), row.set);
        if (PyDict_SetItem(row.state, entry.key.ptr(), value) != 0)
          throw py::error_already_set();
        entry.own(value);
      }
    }
  }

 private:
  enum class Kind { same = 0, tensor = 1, number = 2 };

  struct Part {
    int64_t index, cell;
    bool is_signed;
    py::object value;
  };
  struct Hyper {
    py::object key, value;
    bool is_params, several; // several: a tuple or list
    std::vector<Part> parts;
  };
  struct Group {
    PyObject* dict;
    std::vector<PyObject*> params;
    std::vector<Hyper> hypers;
  };
  // Where a tensor's elements are. Two tensors may share memory until one is written to: asking for the address to
  // write at separates them.
  struct Memory {
    const void* data;
    at::ScalarType dtype;
    bool written;

    static const void* address(const at::Tensor& t, bool written) {
      return written ? t.mutable_data_ptr() : t.const_data_ptr();
    }
    bool holds(const at::Tensor& t) const {
      return t.layout() == at::kStrided && t.scalar_type() == dtype && !t.is_neg() && address(t, written) == data;
    }
  };
  struct Entry {
    py::object key;
    PyObject* value;
    py::object owned; // the value, unless it is a tensor
    Kind kind;
    int32_t column;
    bool whole; // one number for the whole parameter
    const void* impl; // of a tensor, to fetch early
    Memory memory;

    void own(PyObject* x) {
      owned = py::reinterpret_borrow<py::object>(x);
      value = x;
    }
  };
  struct Row {
    PyObject* param;
    PyObject* state;
    int64_t* words;
    int64_t grad_column, set;
    Memory memory;
    at::ScalarType grad_dtype;
    at::DimVector sizes;
    std::vector<Entry> entries;
  };

  static constexpr double largest = 1LL << 53; // from here on whole numbers are not exact as double

  // After a training step nothing of this is in cache. Pointers are followed a few rows early, one link at a time.
  void prefetch(size_t i) const {
    static constexpr size_t far = 12, middle = 8, near = 4;
    if (i + far < rows_.size()) {
      const Row& row = rows_[i + far];
      __builtin_prefetch(tensor(row.param).unsafeGetTensorImpl());
      __builtin_prefetch(row.state);
      __builtin_prefetch(row.entries.data());
    }
    if (i + middle < rows_.size()) {
      const Row& row = rows_[i + middle];
      __builtin_prefetch(tensor(row.param).unsafeGetTensorImpl()->autograd_meta());
      __builtin_prefetch(reinterpret_cast<PyDictObject*>(row.state)->ma_keys);
      for (const Entry& entry : row.entries)
        __builtin_prefetch(entry.impl);
    }
    if (i + near < rows_.size() && tensor(rows_[i + near].param).grad().defined())
      __builtin_prefetch(tensor(rows_[i + near].param).grad().unsafeGetTensorImpl());
  }

  static const at::Tensor& tensor(PyObject* item) { return THPVariable_Unpack(item); }

  static PyObject* checked(py::handle item) {
    if (!THPVariable_Check(item.ptr()))
      throw py::type_error("a Recording is of tensors");
    return item.ptr();
  }

  static Group read_group(const py::dict& dict, const py::list& hypers) {
    Group group{dict.ptr(), {}, {}};
    for (const auto& p : dict["params"].cast<py::list>())
      group.params.push_back(p.ptr());
    for (const auto& item : hypers) {
      const auto triple = item.cast<py::tuple>();
      const auto value = py::object(triple[1]);
      const bool several = PyTuple_CheckExact(value.ptr()) || PyList_CheckExact(value.ptr());
      Hyper hyper{triple[0], {}, triple[2].is_none(), several, {}};
      if (!hyper.is_params) {
        hyper.value = value;
        for (const auto& part : triple[2].cast<py::list>()) {
          const auto t = part.cast<py::tuple>();
          hyper.parts.push_back({t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<bool>(), t[3]});
        }
      }
      group.hypers.push_back(std::move(hyper));
    }
    return group;
  }

  static Row read_row(const py::tuple& t) {
    PyObject* p = checked(t[0]);
    const at::Tensor& param = tensor(p);
    const bool written = t[4].cast<bool>();
    Row row{p, t[1].cast<py::dict>().ptr(), reinterpret_cast<int64_t*>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(),
            t[5].cast<int64_t>(), memory(param, written), param.grad().scalar_type(), at::DimVector(param.sizes()), {}};
    for (const auto& item : t[6].cast<py::list>()) {
      const auto e = item.cast<py::tuple>();
      Entry entry{e[0], py::object(e[1]).ptr(), {}, static_cast<Kind>(e[2].cast<int>()), e[3].cast<int32_t>(),
                  false, nullptr, {}};
      if (entry.kind == Kind::tensor) {
        const at::Tensor& state = tensor(checked(entry.value));
        entry.whole = state.dim() == 0;
        entry.impl = state.unsafeGetTensorImpl();
        entry.memory = memory(state, e[4].cast<bool>());
      } else {
        entry.own(entry.value);
      }
      row.entries.push_back(std::move(entry));
    }
    return row;
  }

  static Memory memory(const at::Tensor& t, bool written) {
    return {Memory::address(t, written), t.scalar_type(), written};
  }

  // Whether both have the same sizes, and flat position i is the same element in both.
  static bool same_layout(const at::Tensor& a, const at::Tensor& b) {
    const auto x = a.strides(), y = b.strides(), sizes = b.sizes();
    if (a.sizes() != sizes)
      return false;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] != 1 && x[i] != y[i])
        return false;
    return !a.is_neg(); // torch has real tensors whose memory holds their negative
  }

  // Dicts are walked in their order: no hashing, and a new or missing key shows by itself.
  static bool check_group(const Group& group, double* numbers) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Hyper& hyper : group.hypers) {
      if (!PyDict_Next(group.dict, &position, &key, &value) || key != hyper.key.ptr())
        return false;
      if (hyper.is_params ? !same_params(group, value) : !check_hyper(hyper, value, numbers))
        return false;
    }
    return !PyDict_Next(group.dict, &position, &key, &value);
  }

  static bool same_params(const Group& group, PyObject* params) {
    if (!PyList_CheckExact(params) || static_cast<size_t>(PyList_GET_SIZE(params)) != group.params.size())
      return false;
    for (size_t i = 0; i < group.params.size(); ++i)
      if (PyList_GET_ITEM(params, i) != group.params[i])
        return false;
    return true;
  }

  static bool check_hyper(const Hyper& hyper, PyObject* value, double* numbers) {
    if (hyper.several && (Py_TYPE(value) != Py_TYPE(hyper.value.ptr()) ||
                          static_cast<size_t>(PySequence_Fast_GET_SIZE(value)) != hyper.parts.size()))
      return false;
    for (const Part& part : hyper.parts)
      if (!check_part(part, hyper.several ? PySequence_Fast_GET_ITEM(value, part.index) : value, numbers))
        return false;
    return true;
  }

  static bool check_part(const Part& part, PyObject* value, double* numbers) {
    if (part.cell < 0)
      return value == part.value.ptr();
    if (Py_TYPE(value) != Py_TYPE(part.value.ptr()))
      return false;
    const bool whole = PyLong_CheckExact(value);
    const double x = whole ? PyLong_AsDouble(value) : PyFloat_AS_DOUBLE(value);
    if (std::isnan(x) || (x < 0 && !part.is_signed) || (whole && std::abs(x) >= largest) ||
        PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
    numbers[part.cell] = x;
    return true;
  }

  bool check_row(const Row& row) const {
    const at::Tensor& param = tensor(row.param);
    const at::Tensor& grad = param.grad();
    if (!row.memory.holds(param) || param.sizes() != at::IntArrayRef(row.sizes) ||
        !param.is_non_overlapping_and_dense() || !grad.defined() || grad.scalar_type() != row.grad_dtype ||
        grad.layout() != at::kStrided || !grad.device().is_cpu() || !same_layout(grad, param))
      return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& entry : row.entries) {
      if (!PyDict_Next(row.state, &position, &key, &value) || key != entry.key.ptr() || value != entry.value)
        return false;
      if (entry.kind == Kind::tensor &&
          !(entry.memory.holds(tensor(value)) &&
            (entry.whole ? tensor(value).dim() == 0 : same_layout(tensor(value), param))))
        return false;
    }
    if (PyDict_Next(row.state, &position, &key, &value))
      return false;
    if (row.grad_column >= 0)
      row.words[row.grad_column] = reinterpret_cast<int64_t>(grad.const_data_ptr());
    return true;
  }

  static void bump(const at::Tensor& t, bool written) {
    if (written && !t.is_inference()) // inference tensors have no counter
      t.unsafeGetTensorImpl()->bump_version();
  }

  std::vector<Group> groups_;
  std::vector<PyObject*> absent_;
  std::vector<Row> rows_;
};

} // namespace fusedopt
