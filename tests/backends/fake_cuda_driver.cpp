// A stand-in for NVIDIA's driver: it runs kernels that were compiled for the CPU with cuda_emulation.h.
//
// An image is text: the path of such a library, and what the names of the kernels in it begin with. A block is run with
// `fake_threads` threads, whatever is asked for. What was launched is in the log; any call can be made to fail.
#include <dlfcn.h>

#include <cstring>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

using Status = int;
using Emulated = void (*)(void* kernel, bool big, void** parameters, unsigned blocks, unsigned threads);

struct Module {
  void* library;
  std::string prefix;
};
struct Function {
  std::string name;
  void* kernel;
  Emulated emulated;
  bool big() const { return name.size() > 4 && name.compare(name.size() - 4, 4, "_big") == 0; }
};
struct Launch {
  const long long *rows, *pieces;
  double* partials;
  const double* slots;
  const long long* gradients;
  long long others[4];
};
// A launch in a graph: its parameters are what they were when it was captured.
struct Captured {
  const Function* function;
  Launch launch;
  int64_t n;
  std::vector<int64_t> words;
  unsigned blocks;
};

static std::string logged;
static std::vector<Captured> graph;
static int depth = 0;
static const char* const context = "the primary context";

extern "C" {
int fake_version = 13000, fake_devices = 1, fake_major = 9, fake_minor = 0, fake_blocks = 2, fake_threads = 1;
int fake_status = 0, fake_modules = 0, fake_retained = 0;
int fake_capturing = 0, fake_words = 0, fake_big_words = 0;
char fake_failing[64] = "";

const char* fake_log() { return logged.c_str(); }
void fake_clear() { logged.clear(), graph.clear(); }
int fake_depth() { return depth; }
extern int fake_threads;
// Does what was captured.
void fake_replay() {
  for (Captured& c : graph) {
    void* parameters[] = {&c.launch, &c.n, c.words.data()};
    c.function->emulated(c.function->kernel, c.function->big(), parameters, c.blocks, fake_threads);
  }
}

static Status result(const char* call) { return std::strcmp(call, fake_failing) == 0 ? fake_status : 0; }

Status cuInit(unsigned) { return result("cuInit"); }
Status cuDriverGetVersion(int* version) { return *version = fake_version, 0; }
Status cuGetErrorName(Status status, const char** text) {
  *text = status == 100   ? "CUDA_ERROR_NO_DEVICE"
          : status == 200 ? "CUDA_ERROR_INVALID_IMAGE"
          : status == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : status == 222 ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
          : status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == 999 ? "CUDA_ERROR_UNKNOWN"
                          : nullptr;
  return *text ? 0 : 1;
}
Status cuGetErrorString(Status, const char** text) { return *text = "the driver's words", 0; }
Status cuDeviceGetCount(int* count) { return *count = fake_devices, result("cuDeviceGetCount"); }
Status cuDeviceGet(int* device, int index) { return *device = index, index < fake_devices ? 0 : 101; }
Status cuDeviceGetName(char* name, int length, int) { return std::strncpy(name, "a fake GPU", length), 0; }
Status cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 16 ? 2 : attribute == 75 ? fake_major : attribute == 76 ? fake_minor : -1;
  return 0;
}
Status cuDevicePrimaryCtxRetain(void** handle, int) {
  ++fake_retained;
  *handle = const_cast<char*>(context);
  return result("cuDevicePrimaryCtxRetain");
}
Status cuDevicePrimaryCtxRelease_v2(int) { return --fake_retained, 0; }
Status cuCtxPushCurrent_v2(void* handle) { return handle == context ? ++depth, 0 : 201; }
Status cuCtxPopCurrent_v2(void** handle) { return *handle = const_cast<char*>(context), --depth, 0; }

// What needs a current context says so without one, as the real driver does.
#define NEEDS_CONTEXT \
  if (depth == 0) return 201

Status cuModuleLoadData(void** module, const void* image) {
  NEEDS_CONTEXT;
  if (const Status status = result("cuModuleLoadData")) return status;
  std::istringstream text(static_cast<const char*>(image));
  std::string path, prefix;
  text >> path >> prefix;
  void* library = dlopen(path.c_str(), RTLD_NOW);
  if (!library) return 200;
  ++fake_modules;
  *module = new Module{library, prefix};
  return 0;
}
Status cuModuleUnload(void* module) {
  NEEDS_CONTEXT;
  --fake_modules;
  delete static_cast<Module*>(module);
  return 0;
}
Status cuModuleGetFunction(void** function, void* handle, const char* name) {
  NEEDS_CONTEXT;
  const Module* module = static_cast<Module*>(handle);
  std::string symbol = module->prefix + (name + std::strlen("fusedopt_"));
  void* kernel = dlsym(module->library, symbol.c_str());
  if (!kernel) return 500;
  *function = new Function{name, kernel, reinterpret_cast<Emulated>(dlsym(module->library, "emulated"))};
  return 0;
}
Status cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  NEEDS_CONTEXT;
  return *blocks = fake_blocks, 0;
}
// A line of the log: name, blocks, threads, stream, whether scalars and gradients came by value.
Status cuLaunchKernel(void* handle, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                      void* stream, void** parameters, void**) {
  NEEDS_CONTEXT;
  if (const Status status = result("cuLaunchKernel")) return status;
  const Function* function = static_cast<Function*>(handle);
  const Launch* launch = static_cast<Launch*>(parameters[0]);
  std::ostringstream line;
  line << function->name << ' ' << blocks << ' ' << threads << ' ' << reinterpret_cast<size_t>(stream) << ' '
       << !launch->slots << ' ' << !launch->gradients << '\n';
  logged += line.str();
  if (fake_capturing) {
    const auto* words = static_cast<const int64_t*>(parameters[2]);
    graph.push_back({function, *launch, *static_cast<int64_t*>(parameters[1]),
                     {words, words + (function->big() ? fake_big_words : fake_words)}, blocks});
    return 0;
  }
  function->emulated(function->kernel, function->big(), parameters, blocks, fake_threads);
  return 0;
}
}
