// Launches CUDA kernels through the driver's own API, opened at run time: building and loading this needs no CUDA.
//
// What is used of the API is declared here, after NVIDIA's documentation of it.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace fusedopt {

// The driver's functions. One object per library, for as long as the process lives: a driver is not unloaded.
class Driver {
 public:
  using Handle = void*; // CUcontext, CUmodule, CUfunction, CUstream
  using Status = int;
  using Device = int;

  Status (*cuInit)(unsigned flags);
  Status (*cuDriverGetVersion)(int* version);
  Status (*cuGetErrorName)(Status status, const char** text);
  Status (*cuGetErrorString)(Status status, const char** text);
  Status (*cuDeviceGetCount)(int* count);
  Status (*cuDeviceGet)(Device* device, int index);
  Status (*cuDeviceGetName)(char* name, int length, Device device);
  Status (*cuDeviceGetAttribute)(int* value, int attribute, Device device);
  Status (*cuDevicePrimaryCtxRetain)(Handle* context, Device device);
  Status (*cuDevicePrimaryCtxRelease)(Device device);
  Status (*cuCtxPushCurrent)(Handle context);
  Status (*cuCtxPopCurrent)(Handle* context);
  Status (*cuModuleLoadData)(Handle* module, const void* image);
  Status (*cuModuleUnload)(Handle module);
  Status (*cuModuleGetFunction)(Handle* function, Handle module, const char* name);
  Status (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, Handle function, int threads, size_t shared);
  Status (*cuLaunchKernel)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared, Handle stream, void** parameters,
                           void** extra);

  static constexpr int multiprocessors = 16, major = 75, minor = 76; // CU_DEVICE_ATTRIBUTE_...

  explicit Driver(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle)
      throw std::runtime_error("there is no NVIDIA driver here (" + std::string(dlerror()) + "). Remedy: install the " +
                               "driver; in a container, start it with access to the GPUs");
    find(handle, "cuInit", cuInit);
    find(handle, "cuDriverGetVersion", cuDriverGetVersion);
    find(handle, "cuGetErrorName", cuGetErrorName);
    find(handle, "cuGetErrorString", cuGetErrorString);
    find(handle, "cuDeviceGetCount", cuDeviceGetCount);
    find(handle, "cuDeviceGet", cuDeviceGet);
    find(handle, "cuDeviceGetName", cuDeviceGetName);
    find(handle, "cuDeviceGetAttribute", cuDeviceGetAttribute);
    find(handle, "cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain);
    find(handle, "cuDevicePrimaryCtxRelease_v2", cuDevicePrimaryCtxRelease);
    find(handle, "cuCtxPushCurrent_v2", cuCtxPushCurrent);
    find(handle, "cuCtxPopCurrent_v2", cuCtxPopCurrent);
    find(handle, "cuModuleLoadData", cuModuleLoadData);
    find(handle, "cuModuleUnload", cuModuleUnload);
    find(handle, "cuModuleGetFunction", cuModuleGetFunction);
    find(handle, "cuOccupancyMaxActiveBlocksPerMultiprocessor", cuOccupancyMaxActiveBlocksPerMultiprocessor);
    find(handle, "cuLaunchKernel", cuLaunchKernel);
    cuDriverGetVersion(&version_); // works before cuInit, and messages name it
    check("cuInit", cuInit(0));
  }

  int version() const { return version_; }

  int count() const {
    int count = 0;
    check("cuDeviceGetCount", cuDeviceGetCount(&count));
    return count;
  }

  Device device(int index) const {
    Device device = 0;
    check("cuDeviceGet", cuDeviceGet(&device, index));
    return device;
  }

  std::string name(int index) const {
    char name[256] = "";
    check("cuDeviceGetName", cuDeviceGetName(name, sizeof name - 1, device(index)));
    return name;
  }

  int attribute(int which, Device device) const {
    int value = 0;
    check("cuDeviceGetAttribute", cuDeviceGetAttribute(&value, which, device));
    return value;
  }

  // Compute capability, as in "sm_90".
  std::pair<int, int> capability(int index) const {
    return {attribute(major, device(index)), attribute(minor, device(index))};
  }

  void check(const char* call, Status status) const {
    if (status != 0)
      throw std::runtime_error(explained(call, status));
  }

 private:
  template <class F>
  static void find(void* handle, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    if (!function)
      throw std::runtime_error(std::string("the NVIDIA driver here has no ") + name +
                               ": it is too old. Remedy: install a newer driver");
  }

  std::string explained(const char* call, Status status) const {
    const char *name = nullptr, *text = nullptr;
    cuGetErrorName(status, &name);
    cuGetErrorString(status, &text);
    const std::string version = std::to_string(version_ / 1000) + "." + std::to_string(version_ % 1000 / 10);
    return std::string(call) + ": " + (name ? name : "error " + std::to_string(status)) +
           (text ? std::string(" (") + text + ")" : "") + ". The driver supports CUDA " + version +
           ". Remedy: " + remedy(status);
  }

  static const char* remedy(Status status) {
    switch (status) {
      case 2: // CUDA_ERROR_OUT_OF_MEMORY
        return "free GPU memory";
      case 100: // CUDA_ERROR_NO_DEVICE
      case 101: // CUDA_ERROR_INVALID_DEVICE
        return "make a GPU visible: check nvidia-smi and CUDA_VISIBLE_DEVICES";
      case 200: // CUDA_ERROR_INVALID_IMAGE
      case 209: // CUDA_ERROR_NO_BINARY_FOR_GPU
      case 222: // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        return "install a newer driver, or a version of nvidia-cuda-nvrtc no newer than the driver's CUDA";
      case 3:   // CUDA_ERROR_NOT_INITIALIZED
      case 803: // CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
      case 999: // CUDA_ERROR_UNKNOWN
        return "check with nvidia-smi that the driver works; after an update, reload its kernel module or restart";
      case 700: // CUDA_ERROR_ILLEGAL_ADDRESS
      case 702: // CUDA_ERROR_LAUNCH_TIMEOUT
      case 719: // CUDA_ERROR_LAUNCH_FAILED
        return "this kernel or an earlier one failed; to find out which, start Python with CUDA_LAUNCH_BLOCKING=1";
      default:
        return "check with nvidia-smi that the driver works, or use backend=\"triton\"";
    }
  }

  int version_ = 0;
};

// A context is current for as long as this lives.
class Current {
 public:
  Current(const Driver& driver, Driver::Handle context) : driver_(driver) {
    driver.check("cuCtxPushCurrent", driver.cuCtxPushCurrent(context));
  }
  ~Current() {
    Driver::Handle context;
    driver_.cuCtxPopCurrent(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

// The primary context of a device: the one that torch uses.
class Context {
 public:
  Context(std::shared_ptr<Driver> driver, int index) : driver(std::move(driver)), device(this->driver->device(index)) {
    this->driver->check("cuDevicePrimaryCtxRetain", this->driver->cuDevicePrimaryCtxRetain(&handle, device));
  }
  // At exit the driver may be gone already, and a forked child has none: then there is nothing to be done.
  ~Context() {
    if (getpid() == owner)
      driver->cuDevicePrimaryCtxRelease(device);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const std::shared_ptr<Driver> driver;
  const Driver::Device device;
  Driver::Handle handle = nullptr;
  const pid_t owner = getpid();
};

// Machine code, loaded for one device.
class Module {
 public:
  Module(std::shared_ptr<Driver> driver, const std::string& image, int index) : context_(std::move(driver), index) {
    const Current current(*context_.driver, context_.handle);
    check("cuModuleLoadData", context_.driver->cuModuleLoadData(&handle_, image.c_str()));
    multiprocessors_ = context_.driver->attribute(Driver::multiprocessors, context_.device);
  }
  ~Module() {
    if (getpid() != context_.owner || context_.driver->cuCtxPushCurrent(context_.handle) != 0)
      return;
    context_.driver->cuModuleUnload(handle_);
    Driver::Handle context;
    context_.driver->cuCtxPopCurrent(&context);
  }
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  // A kernel's address, and how many blocks of this many threads the whole device runs at a time.
  std::pair<uintptr_t, int64_t> function(const std::string& name, int threads) const {
    const Current current(*context_.driver, context_.handle);
    Driver::Handle function = nullptr;
    int blocks = 0;
    check("cuModuleGetFunction", context_.driver->cuModuleGetFunction(&function, handle_, name.c_str()));
    check("cuOccupancyMaxActiveBlocksPerMultiprocessor",
          context_.driver->cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, 0));
    return {reinterpret_cast<uintptr_t>(function), std::max<int64_t>(1, int64_t(blocks) * multiprocessors_)};
  }

  const Context& context() const { return context_; }
  void check(const char* call, Driver::Status status) const { context_.driver->check(call, status); }

 private:
  Context context_;
  Driver::Handle handle_ = nullptr;
  int multiprocessors_ = 0;
};

// All launches of a kernel's step, over tables that stay; what changes from step to step goes along by value.
class Launcher {
 public:
  // struct Launch of kernels/cuda.cu: addresses on the device, null for what goes along by value.
  struct Launch {
    uintptr_t rows, pieces, partials, slots, gradients;
    int64_t row_words, n_slots, n_reductions, first_gradient;
  };
  using Kernels = std::vector<std::tuple<uintptr_t, unsigned, uintptr_t, int64_t>>;

  // kernels: (function, blocks, pieces, how many), in the order they run. tables: (rows, partials). widths: (words of a
  // row, slots of a set, reductions). gradients: (address of the first on the host, how many), one in each row; none if
  // the address is null. words: what the kernels take by value.
  Launcher(std::shared_ptr<Module> module, const Kernels& kernels, std::pair<uintptr_t, uintptr_t> tables,
           std::tuple<int64_t, int64_t, int64_t> widths, std::pair<uintptr_t, int64_t> gradients, size_t words,
           unsigned threads)
      : module_(std::move(module)), kernels_(kernels),
        launch_{tables.first, 0, tables.second, 0, 0, std::get<0>(widths), std::get<1>(widths), std::get<2>(widths), 0},
        gradients_(reinterpret_cast<const int64_t*>(gradients.first)), n_gradients_(gradients.second),
        threads_(threads), words_(words) {}

  // slots: (address on the host, how many) of what goes along by value, or (address on the device, 0). gradients: their
  // address on the device, or null. Nothing here waits for the device.
  void run(uintptr_t slots, size_t n_slots, uintptr_t gradients, uintptr_t stream) {
    const size_t inline_gradients = gradients || !gradients_ ? 0 : static_cast<size_t>(n_gradients_);
    if (n_slots + inline_gradients > words_.size())
      throw py::value_error(std::to_string(n_slots + inline_gradients) + " words do not fit into the kernel's " +
                            std::to_string(words_.size()));
    Launch launch = launch_;
    launch.slots = n_slots ? 0 : slots;
    launch.gradients = gradients;
    launch.first_gradient = static_cast<int64_t>(n_slots);
    std::memcpy(words_.data(), reinterpret_cast<const void*>(slots), n_slots * sizeof(int64_t));
    for (size_t i = 0; i < inline_gradients; ++i)
      words_[n_slots + i] = gradients_[i * launch.row_words];
    const Context& context = module_->context();
    const Current current(*context.driver, context.handle);
    for (auto& [function, blocks, pieces, n] : kernels_) {
      launch.pieces = pieces;
      void* parameters[] = {&launch, &n, words_.data()};
      module_->check("cuLaunchKernel",
                     context.driver->cuLaunchKernel(reinterpret_cast<Driver::Handle>(function), blocks, 1, 1, threads_, 1,
                                                    1, 0, reinterpret_cast<Driver::Handle>(stream), parameters, nullptr));
    }
  }

 private:
  std::shared_ptr<Module> module_;
  Kernels kernels_;
  Launch launch_;
  const int64_t* gradients_;
  int64_t n_gradients_;
  unsigned threads_;
  std::vector<int64_t> words_;
};

inline void bind_cuda(py::module_& m) {
  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def(py::init<const std::string&>(), py::arg("library"))
      .def_property_readonly("version", &Driver::version)
      .def_property_readonly("count", &Driver::count)
      .def("name", &Driver::name, py::arg("index"))
      .def("capability", &Driver::capability, py::arg("index"));
  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def(py::init([](std::shared_ptr<Driver> driver, const py::bytes& image, int index) {
             return std::make_shared<Module>(std::move(driver), std::string(image), index);
           }),
           py::arg("driver"), py::arg("image"), py::arg("index"))
      .def("function", &Module::function, py::arg("name"), py::arg("threads"));
  py::class_<Launcher>(m, "Launcher")
      .def(py::init<std::shared_ptr<Module>, const Launcher::Kernels&, std::pair<uintptr_t, uintptr_t>,
                    std::tuple<int64_t, int64_t, int64_t>, std::pair<uintptr_t, int64_t>, size_t, unsigned>(),
           py::arg("module"), py::arg("kernels"), py::arg("tables"), py::arg("widths"), py::arg("gradients"),
           py::arg("words"), py::arg("threads"))
      .def("run", &Launcher::run, py::arg("slots"), py::arg("n_slots"), py::arg("gradients"), py::arg("stream"));
}

} // namespace fusedopt
