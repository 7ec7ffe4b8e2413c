// A step's scalar program: Python's arithmetic on ints and floats, equal to the last bit and the type, or a refusal.
//
// fusedopt/trace/replay.py turns a trace into the instructions. Whatever Python would raise for, or would need more
// than an exact double for, is refused; the caller then asks Python itself. Operators are computed here; a function of
// Python's (math.exp) is called, so that its result is Python's own.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <vector>

namespace fusedopt {

struct Scalar {
  enum class Type : uint8_t { real, whole, truth };
  Type type = Type::real;
  double real = 0;   // of every type
  int64_t whole = 0; // unless real

  static constexpr int64_t largest = 1LL << 53; // up to here whole numbers are exact as double

  static Scalar of(double x) { return {Type::real, x, 0}; }
  static Scalar of_truth(bool x) { return {Type::truth, double(x), x}; }
  bool is_real() const { return type == Type::real; }

  static bool of_whole(__int128 x, Scalar& out) {
    out = {Type::whole, double(x), int64_t(x)};
    return -largest < x && x < largest;
  }

  // From Python's int, float or bool.
  static bool read(PyObject* x, Scalar& out) {
    if (PyFloat_CheckExact(x)) {
      out = of(PyFloat_AS_DOUBLE(x));
      return true;
    }
    if (PyBool_Check(x)) {
      out = of_truth(x == Py_True);
      return true;
    }
    int overflow = 0;
    return PyLong_CheckExact(x) && of_whole(PyLong_AsLongLongAndOverflow(x, &overflow), out) && overflow == 0;
  }

  // As `names.number` has it: also what numpy's scalars and torch's one-element tensors hold. A tensor elsewhere than on
  // the CPU would have to be waited for, and is refused.
  static bool number(PyObject* x, Scalar& out) {
    if (PyFloat_CheckExact(x) || PyLong_CheckExact(x))
      return read(x, out);
    if (THPVariable_Check(x))
      return THPVariable_CheckTypeExact(Py_TYPE(x)) && element(THPVariable_Unpack(x), out);
    static const py::handle scalar = numpy("generic"), array = numpy("ndarray");
    const bool is_array = Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(array.ptr());
    if (!is_array && !PyObject_TypeCheck(x, reinterpret_cast<PyTypeObject*>(scalar.ptr())))
      return PyBool_Check(x) && read(x, out);
    if (PyFloat_Check(x)) { // float64, which is one
      out = of(PyFloat_AS_DOUBLE(x));
      return true;
    }
    if (is_array && py::handle(x).attr("size").cast<int64_t>() != 1)
      return false;
    const auto item = py::reinterpret_steal<py::object>(PyObject_CallMethod(x, "item", nullptr));
    if (!item)
      throw py::error_already_set();
    return read(item.ptr(), out);
  }

  static py::handle numpy(const char* name) {
    return py::object(py::module_::import("numpy").attr(name)).release(); // never given back
  }

  static bool element(const at::Tensor& t, Scalar& out) {
    if (t.layout() != at::kStrided || !t.device().is_cpu() || t.numel() != 1 || !t.has_storage() ||
        !t.const_data_ptr() || t.storage().nbytes() < (t.storage_offset() + 1) * t.itemsize())
      return false;
    const at::Scalar x = t.item();
    if (x.isComplex())
      return false;
    if (x.isFloatingPoint())
      out = of(x.toDouble());
    else if (x.isBoolean())
      out = of_truth(x.toBool());
    else
      return of_whole(x.toLong(), out);
    return true;
  }

  static Scalar from(py::handle x) {
    Scalar out;
    if (!read(x.ptr(), out))
      throw py::value_error("not a number that fits: " + py::repr(x).cast<std::string>());
    return out;
  }

  py::object python() const {
    if (is_real())
      return py::float_(real);
    return type == Type::whole ? py::object(py::int_(whole)) : py::object(py::bool_(whole != 0));
  }

  // Equal as numbers; against a real zero the sign counts too.
  bool same(const Scalar& x) const {
    return real == x.real && (real != 0 || !x.is_real() || std::signbit(real) == std::signbit(x.real));
  }
};

// Each operation writes its result and says whether it has one.
namespace python {

inline bool both_whole(const Scalar& a, const Scalar& b) { return !a.is_real() && !b.is_real(); }

inline bool real(double x, Scalar& out) {
  out = Scalar::of(x);
  return true;
}

inline bool add(const Scalar& a, const Scalar& b, Scalar& out) {
  return both_whole(a, b) ? Scalar::of_whole(__int128(a.whole) + b.whole, out) : real(a.real + b.real, out);
}

inline bool sub(const Scalar& a, const Scalar& b, Scalar& out) {
  return both_whole(a, b) ? Scalar::of_whole(__int128(a.whole) - b.whole, out) : real(a.real - b.real, out);
}

inline bool mul(const Scalar& a, const Scalar& b, Scalar& out) {
  return both_whole(a, b) ? Scalar::of_whole(__int128(a.whole) * b.whole, out) : real(a.real * b.real, out);
}

inline bool truediv(const Scalar& a, const Scalar& b, Scalar& out) { return b.real != 0 && real(a.real / b.real, out); }

// The quotient rounded down and what is left, which has the divisor's sign, also if it is zero.
struct Division {
  double quotient, rest;

  Division(double a, double b) : rest(std::fmod(a, b)) {
    quotient = (a - rest) / b;
    if (rest == 0) {
      rest = std::copysign(0.0, b);
    } else if ((b < 0) != (rest < 0)) {
      rest += b;
      quotient -= 1;
    }
    if (quotient == 0) {
      quotient = std::copysign(0.0, a / b);
    } else {
      const double below = std::floor(quotient);
      quotient = quotient - below > 0.5 ? below + 1 : below;
    }
  }
};

inline int64_t whole_quotient(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

inline bool floordiv(const Scalar& a, const Scalar& b, Scalar& out) {
  if (b.real == 0)
    return false;
  return both_whole(a, b) ? Scalar::of_whole(whole_quotient(a.whole, b.whole), out)
                          : real(Division(a.real, b.real).quotient, out);
}

inline bool mod(const Scalar& a, const Scalar& b, Scalar& out) {
  if (b.real == 0)
    return false;
  return both_whole(a, b) ? Scalar::of_whole(a.whole - whole_quotient(a.whole, b.whole) * b.whole, out)
                          : real(Division(a.real, b.real).rest, out);
}

inline bool whole_pow(int64_t base, int64_t exponent, Scalar& out) {
  Scalar square;
  for (Scalar::of_whole(1, out), Scalar::of_whole(base, square);; exponent >>= 1) {
    if ((exponent & 1) != 0 && !mul(out, square, out))
      return false;
    if (exponent <= 1)
      return true;
    if (!mul(square, square, square))
      return false;
  }
}

inline bool pow(const Scalar& a, const Scalar& b, Scalar& out) {
  if (both_whole(a, b) && b.whole >= 0)
    return whole_pow(a.whole, b.whole, out);
  const double x = a.real, y = b.real;
  if (std::isfinite(y) && ((x == 0 && y < 0) || (x < 0 && std::isfinite(x) && std::floor(y) != y)))
    return false; // a division by zero; a complex number
  real(std::pow(x, y), out);
  return std::isfinite(out.real) || !std::isfinite(x) || !std::isfinite(y);
}

inline bool neg(const Scalar& a, const Scalar&, Scalar& out) {
  return a.is_real() ? real(-a.real, out) : Scalar::of_whole(-a.whole, out);
}

inline bool abs(const Scalar& a, const Scalar&, Scalar& out) {
  return a.is_real() ? real(std::fabs(a.real), out) : Scalar::of_whole(std::llabs(a.whole), out);
}

template <class Compare>
bool compare(const Scalar& a, const Scalar& b, Scalar& out) {
  out = Scalar::of_truth(Compare()(a.real, b.real));
  return true;
}

} // namespace python

// A function of a module, by its full name: of those for which a call runs no Python code, so that the GIL is kept. Only
// numpy's may: to warn, where a result is not finite. That comes too late to be prevented, but such a result is refused.
class Function {
 public:
  explicit Function(const std::string& name)
      : function_(py::module_::import(name.substr(0, name.find('.')).c_str()).attr(name.c_str() + name.find('.') + 1)),
        numpys_(name.rfind("numpy.", 0) == 0) {}

  bool operator()(const Scalar* const* arguments, size_t count, Scalar& out) const {
    py::object given[2];
    PyObject* pointers[2];
    for (size_t i = 0; i < count; ++i)
      pointers[i] = (given[i] = arguments[i]->python()).ptr();
    const auto made = py::reinterpret_steal<py::object>(PyObject_Vectorcall(function_.ptr(), pointers, count, nullptr));
    if (!made) {
      PyErr_Clear();
      return false;
    }
    if (!PyFloat_Check(made.ptr()))
      return Scalar::read(made.ptr(), out);
    out = Scalar::of(PyFloat_AS_DOUBLE(made.ptr())); // numpy's float64 is a float, too
    return !numpys_ || std::isfinite(out.real);
  }

 private:
  py::object function_;
  bool numpys_;
};

class ScalarProgram {
 public:
  // instructions: ("leaf", which leaf), ("value", number), or an operation's name and the instructions it takes.
  // slots, numbers: instructions whose results go to the kernel, and to the state. guards: (instruction, its value).
  ScalarProgram(const py::list& instructions, std::vector<size_t> slots, std::vector<size_t> numbers,
                const py::list& guards)
      : slots_(std::move(slots)), numbers_(std::move(numbers)), results_(instructions.size()) {
    for (const auto& item : instructions) {
      const auto t = item.cast<py::tuple>();
      const auto name = t[0].cast<std::string>();
      const size_t at = program_.size();
      if (name == "leaf") {
        leaves_.push_back({at, t[1].cast<size_t>()});
        program_.push_back({});
      } else if (name == "value") {
        results_[at] = Scalar::from(t[1]);
        program_.push_back({});
      } else {
        Instruction made{nullptr, earlier(t[1], at), earlier(t[t.size() - 1], at), t.size() - 1, functions_.size()};
        if (name.find('.') == std::string::npos)
          made.operation = operations().at(name);
        else
          functions_.emplace_back(name);
        program_.push_back(made);
      }
    }
    for (const auto& item : guards) {
      const auto t = item.cast<py::tuple>();
      guards_.push_back({earlier(t[0], program_.size()), Scalar::from(t[1])});
    }
    for (const auto* outputs : {&slots_, &numbers_})
      for (size_t i : *outputs)
        earlier(py::int_(i), program_.size());
  }

  // Computes everything from leaf(k); whether there is a result and every guard holds.
  template <class Leaf>
  bool run(const Leaf& leaf) {
    for (const auto& [at, k] : leaves_)
      results_[at] = leaf(k);
    for (size_t i = 0; i < program_.size(); ++i)
      if (!compute(program_[i], results_[i]))
        return false;
    for (const auto& [at, value] : guards_)
      if (!results_[at].same(value))
        return false;
    return true;
  }

  size_t slots() const { return slots_.size(); }
  size_t numbers() const { return numbers_.size(); }
  double slot(size_t k) const { return results_[slots_[k]].real; }

  // Whether a float can hold every slot. Where torch would raise, the caller has to ask Python.
  bool fits_float() const {
    for (size_t i : slots_)
      if (std::isfinite(results_[i].real) && !std::isfinite(static_cast<float>(results_[i].real)))
        return false;
    return true;
  }
  const Scalar& number(size_t k) const { return results_[numbers_[k]]; }

  // For one set: (slots, numbers), or None.
  py::object call(const py::list& leaves) {
    std::vector<Scalar> values;
    for (const auto& x : leaves)
      values.push_back(Scalar::from(x));
    if (!run([&](size_t k) { return values.at(k); }))
      return py::none();
    py::list slots, numbers;
    for (size_t k = 0; k < slots_.size(); ++k)
      slots.append(results_[slots_[k]].python());
    for (size_t k = 0; k < numbers_.size(); ++k)
      numbers.append(number(k).python());
    return py::make_tuple(slots, numbers);
  }

 private:
  using Operation = bool (*)(const Scalar&, const Scalar&, Scalar&);
  struct Instruction {
    Operation operation = nullptr; // null: a function's, if it has operands
    size_t a = 0, b = 0, operands = 0, function = 0;
  };

  bool compute(const Instruction& to, Scalar& out) const {
    if (to.operands == 0)
      return true;
    const Scalar* arguments[] = {&results_[to.a], &results_[to.b]};
    return to.operation ? to.operation(*arguments[0], *arguments[1], out)
                        : functions_[to.function](arguments, to.operands, out);
  }
  struct Leaf {
    size_t at, which;
  };
  struct Guard {
    size_t at;
    Scalar value;
  };

  static size_t earlier(py::handle index, size_t end) {
    const auto i = index.cast<size_t>();
    if (i >= end)
      throw py::index_error("instruction " + std::to_string(i) + " is not an earlier one");
    return i;
  }

  static const std::unordered_map<std::string, Operation>& operations() {
    static const std::unordered_map<std::string, Operation> all = {
        {"add", python::add},
        {"sub", python::sub},
        {"mul", python::mul},
        {"truediv", python::truediv},
        {"floordiv", python::floordiv},
        {"mod", python::mod},
        {"pow", python::pow},
        {"neg", python::neg},
        {"abs", python::abs},
        {"gt", python::compare<std::greater<>>},
        {"ge", python::compare<std::greater_equal<>>},
        {"lt", python::compare<std::less<>>},
        {"le", python::compare<std::less_equal<>>},
        {"eq", python::compare<std::equal_to<>>},
        {"ne", python::compare<std::not_equal_to<>>},
    };
    return all;
  }

  std::vector<Instruction> program_;
  std::vector<Function> functions_;
  std::vector<Leaf> leaves_;
  std::vector<size_t> slots_, numbers_;
  std::vector<Guard> guards_;
  std::vector<Scalar> results_;
};

} // namespace fusedopt
