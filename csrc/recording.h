// What a step looked like, so that the next one can be checked against it and made ready to launch without any Python.
//
// `check` answers whether everything that decides a step is as it was: the same groups with the same parameters, the
// same hyperparameter flags, gradients where there were gradients, state dicts with the same entries, tensors with the
// same memory, dtype and strides. On the way it reads what may change on every step: the numbers among the
// hyperparameters, and where the gradients lie. `evaluate` runs the scalar programs on them. Any doubt in either is a
// no; the caller then does the step the long way. What was evaluated is committed, and the CPU's kernels run, within the
// same call: no signal handler comes between, so that counters and parameters move together.
//
// Tensors and dicts are not owned: the garbage collector could not see through to them, and a parameter that refers to
// its optimizer would live forever. What `check` has found in the groups is alive; the caller vouches for the state
// dicts (opt.state counts its changes); a state tensor is looked at after its dict was found to hold it. From there to the
// end of the step their memory is owned, or the GIL kept: other threads may do with the tensors what they like.
#pragma once

#include <c10/core/impl/COW.h>
#include <torch/csrc/autograd/python_variable.h>

#include "scalars.h"
#include "stages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

namespace fusedopt {

class Recording {
 public:
  // groups: the param groups. absent: their parameters without gradient. rows: (param, state dict, row address, grad
  // column, param is written, scalar set, entries, param column), an entry being (key, value, kind, column, is written). hypers: per
  // group, in its dict's order, (key, value, parts), a part being (index in a tuple or list, else -1; cell or -1; the
  // lowest number allowed; value; None or, for a tensor that kernels read, addresses of where its own belongs); None in
  // place of the parts for "params". batches: scalar sets that share a program: (program, first set, how many, address of
  // their slots, leaves, columns of its numbers, whether slots become floats); a leaf is (column, []) or (-1, a cell per set).
  // numbers: scalar state, column by column, a value per set or None.
  Recording(const py::list& groups, const py::list& absent, const py::list& rows, const py::list& hypers,
            const py::list& batches, const py::list& numbers) {
    for (size_t g = 0; g < groups.size(); ++g)
      groups_.push_back(read_group(groups[g].cast<py::dict>(), hypers[g].cast<py::list>()));
    for (const auto& item : absent)
      absent_.push_back(checked(item));
    for (const auto& item : rows)
      rows_.push_back(read_row(item.cast<py::tuple>()));
    for (const auto& item : batches)
      batches_.push_back(read_batch(item.cast<py::tuple>()));
    for (const auto& column : numbers) {
      numbers_.emplace_back();
      for (const auto& value : column.cast<py::list>())
        numbers_.back().push_back(value.is_none() ? Scalar() : Scalar::from(value));
    }
    next_ = numbers_;
    size_t tensors = tensors_in_groups_;
    for (Row& row : rows_) {
      row.first_owned = tensors;
      tensors += 2 + row.entries.size();
      elements_ += tensor(row.param).numel();
    }
    owned_.resize(tensors);
  }

  // What `step` runs: (entries, launch, splits) for each launch on the CPU, see `run_cpu`.
  void plan(const py::list& launches) {
    if (running_)
      return;
    launches_.clear();
    for (const auto& item : launches) {
      const auto t = item.cast<py::tuple>();
      launches_.push_back({t[0].cast<std::vector<uintptr_t>>(), t[1].cast<uintptr_t>(),
                           t[2].cast<std::vector<std::vector<int64_t>>>()});
    }
  }

  // Does the step, as far as it was planned, or returns false and has changed nothing that counts. `measure` is called
  // when gradients are in the tables and the step is known to be the same.
  bool step(const py::list& groups, const py::object& measure) {
    if (running_) // in another thread, which uses the tables
      return false;
    const Running running(*this, !measure.is_none() || elements_ > brief);
    if (!check(groups) || !evaluate())
      return false;
    const auto alive = measure.is_none() ? std::vector<py::object>() : objects();
    if (!measure.is_none())
      measure();
    commit(); // before the launch, while what it touches is in cache
    if (owning_) {
      py::gil_scoped_release no_gil;
      launch();
    } else {
      launch();
    }
    return true;
  }

 private:
  enum class Kind { same = 0, tensor = 1, number = 2 };

  // The time of a step, at the end of which the memory it has used is let go of.
  struct Running {
    Recording& recording;
    Running(Recording& r, bool owning) : recording(r) {
      recording.running_ = true;
      recording.owning_ = owning;
    }
    Running(const Running&) = delete;
    ~Running() {
      if (recording.owning_)
        for (c10::Storage& storage : recording.owned_)
          storage = {};
      recording.running_ = false;
    }
  };

  struct Part {
    int64_t index, cell;
    double lowest;
    py::object value;
    Scalar::Type type;                 // of a number
    std::optional<at::ScalarType> dtype; // of a tensor that kernels read
    std::vector<int64_t*> words;       // where its address belongs
    size_t first_owned;
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
  // Where a tensor's elements are. Two tensors may share memory until one is written to; what is still shared is left
  // to the long way, which separates them.
  struct Memory {
    const void* data;
    at::ScalarType dtype;
    bool written;

    // Memory that is freed or cut is other memory from then on.
    bool holds(const at::Tensor& t) const {
      return t.layout() == at::kStrided && t.scalar_type() == dtype && !t.is_neg() && t.const_data_ptr() == data &&
             !(written && c10::impl::cow::is_cow_data_ptr(t.storage().data_ptr()));
    }
  };
  // Whether the storage of a dense tensor is as large as that needs: it may have been freed or cut.
  static bool is_there(const at::Tensor& t) {
    return t.storage().nbytes() >= (t.storage_offset() + t.numel()) * t.itemsize() || !t.numel();
  }
  struct Entry {
    py::object key;
    PyObject* value;
    py::object owned; // the value, unless it is a tensor
    Kind kind;
    int32_t column;
    bool whole; // one number for the whole parameter
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
    size_t first_owned;
    Memory memory;
    at::ScalarType grad_dtype;
    int64_t bytes; // of the parameter or its gradient, whichever has more
    at::DimVector sizes;
    std::vector<Entry> entries;
    std::vector<const void*> dict_lines, tensor_lines; // of cache, to fetch early
  };

  struct Leaf {
    int64_t column;            // of the numbers, or -1
    std::vector<size_t> cells; // then one for each set
  };
  struct Batch {
    py::object owned;
    ScalarProgram* program;
    size_t first, sets;
    double* slots;
    std::vector<Leaf> leaves;
    std::vector<size_t> columns;
    bool narrow;
  };

  // Whether the step is as recorded. Reads the numbers of the groups, and writes gradient pointers to the row tables.
  bool check(const py::list& groups) {
    if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size())
      return false;
    for (size_t g = 0; g < groups_.size(); ++g)
      if (PyList_GET_ITEM(groups.ptr(), g) != groups_[g].dict || !check_group(groups_[g]))
        return false;
    for (PyObject* param : absent_)
      if (tensor(param).grad().defined())
        return false;
    // This thread holds the GIL and waits, so nobody changes what the others read. They count no Python references.
    std::atomic<bool> same = true;
    parallel_for(static_cast<int64_t>(rows_.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
        if (i + 3 * ahead < end) {
          prefetch(rows_[i + 3 * ahead].tensor_lines);
          prefetch(rows_[i + 3 * ahead].dict_lines);
        }
        // Gradients are new in every step: their memory is known once the parameter is here.
        if (i + 2 * ahead < end)
          prefetch_gradient(rows_[i + 2 * ahead]);
        if (i + ahead < end)
          prefetch_storage(rows_[i + ahead]);
        if (!check_row(rows_[i]))
          same = false;
      }
    });
    return same;
  }

  // Slots and new scalar state of every set.
  bool evaluate() {
    for (Batch& batch : batches_) {
      double* slot = batch.slots;
      for (size_t k = 0; k < batch.sets; ++k) {
        const size_t set = batch.first + k;
        if (!batch.program->run([&](size_t i) -> const Scalar& {
              const Leaf& leaf = batch.leaves[i];
              return leaf.column < 0 ? cells_[leaf.cells[k]] : numbers_[leaf.column][set];
            }))
          return false;
        if (batch.narrow && !batch.program->fits_float())
          return false;
        for (size_t i = 0; i < batch.program->slots(); ++i)
          *slot++ = batch.program->slot(i);
        for (size_t i = 0; i < batch.columns.size(); ++i)
          next_[batch.columns[i]][set] = batch.program->number(i);
      }
    }
    return true;
  }

  // References to everything that `commit` touches.
  std::vector<py::object> objects() const {
    std::vector<py::object> out;
    out.reserve(owned_.size());
    const auto own = [&](PyObject* x) { out.push_back(py::reinterpret_borrow<py::object>(x)); };
    for (const Row& row : rows_) {
      own(row.param);
      own(row.state);
      for (const Entry& entry : row.entries)
        if (entry.kind == Kind::tensor) // others are owned for good
          own(entry.value);
    }
    return out;
  }

  // New numbers into the state dicts, version counters up.
  void commit() {
    parallel_for(static_cast<int64_t>(rows_.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        bump(tensor(rows_[i].param), rows_[i].memory.written);
        for (const Entry& entry : rows_[i].entries)
          if (entry.kind == Kind::tensor)
            bump(tensor(entry.value), entry.memory.written);
      }
    });
    numbers_ = next_;
    std::vector<std::vector<py::object>> made; // one object per set, shared by its rows
    for (const auto& column : numbers_) {
      made.emplace_back();
      for (const Scalar& number : column)
        made.back().push_back(number.python());
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (i + ahead < rows_.size())
        prefetch(rows_[i + ahead].dict_lines);
      for (Entry& entry : rows_[i].entries) {
        if (entry.kind != Kind::number)
          continue;
        const py::object& value = made[entry.column][rows_[i].set];
        if (PyDict_SetItem(rows_[i].state, entry.key.ptr(), value.ptr()) != 0)
          throw py::error_already_set();
        entry.own(value.ptr());
      }
    }
  }

  void launch() const {
    for (const Stages& stages : launches_)
      stages.run();
  }

  static constexpr int64_t grain = 128; // rows that are worth a thread
  // Elements that are stepped in some ten microseconds. Counting references to what they lie in would take as long;
  // keeping the GIL for that time serves as well.
  static constexpr int64_t brief = 1 << 17;
  static constexpr int64_t ahead = 2;   // rows

  // After a training step nothing of this is in cache, and following pointers one by one would take most of the time.
  // So the memory behind them is remembered and asked for some rows early. It may be somebody else's by now: fetching
  // it is harmless, and `check_row` follows the pointers themselves.
  static void prefetch(const std::vector<const void*>& lines) {
    for (const void* line : lines)
      __builtin_prefetch(line);
  }

  static void prefetch_gradient(const Row& row) {
    if (const at::Tensor& grad = tensor(row.param).grad(); grad.defined())
      for (size_t k = 0; k < sizeof(at::TensorImpl); k += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(grad.unsafeGetTensorImpl()) + k);
  }

  static void prefetch_storage(const Row& row) {
    if (const at::Tensor& grad = tensor(row.param).grad(); grad.defined() && grad.has_storage())
      __builtin_prefetch(grad.storage().unsafeGetStorageImpl());
  }

  static void remember(std::vector<const void*>& lines, const void* start, size_t bytes) {
    for (size_t k = 0; k < bytes; k += 64)
      lines.push_back(static_cast<const char*>(start) + k);
  }

  static void remember_tensor(std::vector<const void*>& lines, const at::Tensor& t) {
    remember(lines, t.unsafeGetTensorImpl(), sizeof(at::TensorImpl));
    remember(lines, t.storage().unsafeGetStorageImpl(), 64);
  }

  static const at::Tensor& tensor(PyObject* item) { return THPVariable_Unpack(item); }

  static PyObject* checked(py::handle item) {
    if (!THPVariable_Check(item.ptr()))
      throw py::type_error("a Recording is of tensors");
    return item.ptr();
  }

  Group read_group(const py::dict& dict, const py::list& hypers) {
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
          hyper.parts.push_back(read_part(t));
        }
      }
      group.hypers.push_back(std::move(hyper));
    }
    return group;
  }

  Part read_part(const py::tuple& t) {
    Part part{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<double>(), t[3], {}, {}, {}, 0};
    if (part.cell >= 0) {
      cells_.emplace_back();
      if (!Scalar::number(part.value.ptr(), cells_.back()))
        throw py::value_error("not a number that fits");
      part.type = cells_.back().type;
    }
    if (!t[4].is_none()) {
      part.dtype = tensor(checked(t[3])).scalar_type();
      part.first_owned = tensors_in_groups_++;
      for (const auto& address : t[4].cast<py::list>())
        part.words.push_back(reinterpret_cast<int64_t*>(address.cast<uintptr_t>()));
    }
    return part;
  }

  static Row read_row(const py::tuple& t) {
    PyObject* p = checked(t[0]);
    const at::Tensor& param = tensor(p);
    const bool written = t[4].cast<bool>();
    Row row{p, t[1].cast<py::dict>().ptr(), reinterpret_cast<int64_t*>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(),
            t[5].cast<int64_t>(), 0, memory(param, written), param.grad().scalar_type(), 0, at::DimVector(param.sizes()), {}, {}, {}};
    row.bytes = std::max<int64_t>(param.nbytes(), param.grad().defined() ? param.grad().nbytes() : 0);
    check_address(row, t[7].cast<int64_t>(), row.memory);
    remember(row.tensor_lines, p, 64);
    remember(row.dict_lines, row.state, 64);
    remember(row.dict_lines, reinterpret_cast<PyDictObject*>(row.state)->ma_keys, 128);
    remember(row.tensor_lines, param.unsafeGetTensorImpl()->autograd_meta(), 64);
    remember_tensor(row.tensor_lines, param);
    for (const auto& item : t[6].cast<py::list>()) {
      const auto e = item.cast<py::tuple>();
      Entry entry{e[0], py::object(e[1]).ptr(), {}, static_cast<Kind>(e[2].cast<int>()), e[3].cast<int32_t>(),
                  false, {}};
      if (entry.kind == Kind::tensor) {
        const at::Tensor& state = tensor(checked(entry.value));
        entry.whole = state.dim() == 0;
        remember(row.tensor_lines, entry.value, 64);
        remember_tensor(row.tensor_lines, state);
        entry.memory = memory(state, e[4].cast<bool>());
        check_address(row, entry.column, entry.memory);
      } else {
        entry.own(entry.value);
      }
      row.entries.push_back(std::move(entry));
    }
    return row;
  }

  // Another thread may have given a tensor other memory since it was stepped.
  static void check_address(const Row& row, int64_t column, const Memory& memory) {
    if (column >= 0 && row.words[column] != reinterpret_cast<int64_t>(memory.data))
      throw py::value_error("the table has another address");
  }

  static Batch read_batch(const py::tuple& t) {
    Batch batch{t[0], t[0].cast<ScalarProgram*>(), t[1].cast<size_t>(), t[2].cast<size_t>(),
                reinterpret_cast<double*>(t[3].cast<uintptr_t>()), {}, t[5].cast<std::vector<size_t>>(), t[6].cast<bool>()};
    for (const auto& item : t[4].cast<py::list>()) {
      const auto leaf = item.cast<py::tuple>();
      batch.leaves.push_back({leaf[0].cast<int64_t>(), leaf[1].cast<std::vector<size_t>>()});
    }
    return batch;
  }

  static Memory memory(const at::Tensor& t, bool written) {
    return {written ? t.mutable_data_ptr() : t.const_data_ptr(), t.scalar_type(), written};
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
  bool check_group(const Group& group) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Hyper& hyper : group.hypers) {
      if (!PyDict_Next(group.dict, &position, &key, &value) || key != hyper.key.ptr())
        return false;
      if (hyper.is_params ? !same_params(group, value) : !check_hyper(hyper, value))
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

  bool check_hyper(const Hyper& hyper, PyObject* value) {
    if (hyper.several && (Py_TYPE(value) != Py_TYPE(hyper.value.ptr()) ||
                          static_cast<size_t>(PySequence_Fast_GET_SIZE(value)) != hyper.parts.size()))
      return false;
    for (const Part& part : hyper.parts)
      if (!check_part(part, hyper.several ? PySequence_Fast_GET_ITEM(value, part.index) : value))
        return false;
    return true;
  }

  bool check_part(const Part& part, PyObject* value) {
    if (part.dtype)
      return check_tensor(part, value);
    if (part.cell < 0)
      return value == part.value.ptr() || same_text(value, part.value.ptr());
    Scalar& x = cells_[part.cell];
    return Scalar::number(value, x) && x.type == part.type && !std::isnan(x.real) && x.real >= part.lowest;
  }

  // A number that kernels read where it is, which may be elsewhere now.
  bool check_tensor(const Part& part, PyObject* value) {
    if (!THPVariable_Check(value) || !THPVariable_CheckTypeExact(Py_TYPE(value)))
      return false;
    const at::Tensor &now = tensor(value), &then = tensor(part.value.ptr());
    if (now.layout() != at::kStrided || now.scalar_type() != *part.dtype || now.device() != then.device() ||
        now.numel() != 1 || now.is_neg() || !is_there(now) || !now.const_data_ptr())
      return false;
    if (owning_)
      owned_[part.first_owned] = now.storage();
    for (int64_t* word : part.words)
      *word = reinterpret_cast<int64_t>(now.const_data_ptr());
    return true;
  }

  static bool same_text(PyObject* a, PyObject* b) {
    return PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0;
  }

  bool check_row(const Row& row) {
    const at::Tensor& param = tensor(row.param);
    const at::Tensor& grad = param.grad();
    // A count of zero: another thread is freeing it, see `settle`.
    if (!row.memory.holds(param) || param.sizes() != at::IntArrayRef(row.sizes) ||
        !param.is_non_overlapping_and_dense() || !grad.defined() || !grad.use_count() || grad.scalar_type() != row.grad_dtype ||
        grad.layout() != at::kStrided || grad.device() != param.device() || !same_layout(grad, param) ||
        !grad.has_storage() || !is_there(grad))
      return false;
    c10::Storage* owned = owning_ ? &owned_[row.first_owned] : nullptr;
    if (owned) {
      *owned++ = param.storage();
      *owned++ = grad.storage();
    }
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& entry : row.entries) {
      if (!PyDict_Next(row.state, &position, &key, &value) || key != entry.key.ptr() || value != entry.value)
        return false;
      if (entry.kind == Kind::tensor &&
          !(entry.memory.holds(tensor(value)) &&
            (entry.whole ? tensor(value).dim() == 0 : same_layout(tensor(value), param))))
        return false;
      if (owned && entry.kind == Kind::tensor)
        *owned++ = tensor(value).storage();
    }
    if (PyDict_Next(row.state, &position, &key, &value))
      return false;
    const void* data = grad.const_data_ptr();
    if (!data && grad.numel()) // a DTensor, say, whose elements are in another tensor
      return false;
    // A gradient in the parameter's own memory would change while kernels read it: the long way copies it first.
    const int64_t apart = reinterpret_cast<intptr_t>(data) - reinterpret_cast<intptr_t>(row.memory.data);
    if (std::abs(apart) < row.bytes)
      return false;
    if (row.grad_column >= 0)
      row.words[row.grad_column] = reinterpret_cast<int64_t>(data);
    return true;
  }

  static void bump(const at::Tensor& t, bool written) {
    if (written && !t.is_inference()) // inference tensors have no counter
      t.unsafeGetTensorImpl()->bump_version();
  }

  std::vector<Group> groups_;
  std::vector<PyObject*> absent_;
  std::vector<Row> rows_;
  std::vector<Batch> batches_;
  std::vector<Scalar> cells_;
  std::vector<std::vector<Scalar>> numbers_, next_; // by column and set
  std::vector<Stages> launches_;
  std::vector<c10::Storage> owned_; // while a step runs: of tensors in groups, then row by row
  size_t tensors_in_groups_ = 0;
  int64_t elements_ = 0;
  bool running_ = false, owning_ = false;
};

} // namespace fusedopt
