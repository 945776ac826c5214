// A CUDA driver that launches nothing: it keeps the modules it is given and writes down what each launch passes,
// a line of JSON to the file that CUDA_LOG names, if it is set. Parameters are counted and measured by the cubin's own table.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 512
#define INFO_OF_PARAMETER 0x17 // EIATTR_KPARAM_INFO of the section .nv.info.<kernel>
#define SIZED 4                // the format of an attribute whose value is followed by that many bytes

typedef struct {
  char name[256];
  int count;
  uint16_t size[MOST];
} Function;

static CUcontext context = (CUcontext)1;

CUresult cuCtxGetCurrent(CUcontext *c) { return *c = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return context = c, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { return *d = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit l) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t value) { return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { return *n = 1, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *found) {
  return *found = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *d, int i) { return *d = i, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return *c = context, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **text) { return *text = "of no driver", CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 1, CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)out = p; // the tensors are the host's
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
  *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) {
  switch (a) { // an H100's
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  const Elf64_Ehdr *elf = image;
  if (memcmp(elf->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  size_t sections = elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize;
  size_t segments = elf->e_phoff + (size_t)elf->e_phnum * elf->e_phentsize;
  size_t size = sections > segments ? sections : segments;
  *m = memcpy(malloc(size), image, size);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  const char *image = (const char *)m;
  const Elf64_Ehdr *elf = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *section = (const Elf64_Shdr *)(image + elf->e_shoff);
  const char *names = image + section[elf->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < elf->e_shnum; i++) {
    if (strcmp(names + section[i].sh_name, wanted)) continue;
    Function *function = calloc(1, sizeof *function);
    snprintf(function->name, sizeof function->name, "%s", name);
    const uint8_t *at = (const uint8_t *)image + section[i].sh_offset, *end = at + section[i].sh_size;
    while (at < end) {
      uint16_t value = at[2] | at[3] << 8;
      if (at[0] == SIZED && at[1] == INFO_OF_PARAMETER) {
        uint16_t place = at[8] | at[9] << 8;
        uint32_t flags;
        memcpy(&flags, at + 12, sizeof flags);
        if (place >= MOST) return CUDA_ERROR_INVALID_VALUE;
        function->size[place] = flags >> 18;
        if (place >= function->count) function->count = place + 1;
      }
      at += 4 + (at[0] == SIZED ? value : 0);
    }
    *f = (CUfunction)function;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  static FILE *log;
  if (!log && !getenv("CUDA_LOG")) return CUDA_SUCCESS;
  if (!log) log = fopen(getenv("CUDA_LOG"), "a");
  const Function *function = (const Function *)f;
  fprintf(log, "{\"name\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"parameters\": [", function->name,
          c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX);
  for (int i = 0; i < function->count; i++) {
    fprintf(log, i ? ", \"" : "\"");
    for (int j = 0; j < function->size[i]; j++) fprintf(log, "%02x", ((uint8_t *)parameters[i])[j]);
    fprintf(log, "\"");
  }
  fprintf(log, "], \"attributes\": [");
  for (unsigned i = 0; i < c->numAttrs; i++) fprintf(log, i ? ", %d" : "%d", (int)c->attrs[i].id);
  fprintf(log, "]}\n");
  return fflush(log), CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *m, CUtensorMapDataType t, cuuint32_t rank, void *p, const cuuint64_t *sizes,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion l,
                                CUtensorMapFloatOOBfill o) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
