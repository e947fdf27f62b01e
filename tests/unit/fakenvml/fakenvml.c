/* A libnvidia-ml.so.1 for tests, which the real pynvml loads.
 *
 * The machine is a text file, named by $FAKE_NVML_STATE and read again at every call:
 *
 *     gpu UUID TOTAL RESERVED USED [mig]    bytes; USED without RESERVED; the order is the index
 *     process GPU PID BYTES                 BYTES "unknown": the driver does not tell
 *     init CODE                             nvmlInit fails with this nvmlReturn_t (9: driver not loaded)
 *     version1                              an old driver, without memory info version 2
 *     hang                                  every call for memory sleeps for ever
 *     crash                                 every call for memory ends the process
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, INVALID_ARGUMENT = 2, FUNCTION_NOT_FOUND = 13, UNKNOWN = 999 };
enum { GPUS = 16, PROCESSES = 64 };
static const unsigned long long NOT_AVAILABLE = ~0ULL;

struct gpu { char uuid[96]; unsigned long long total, reserved, used; int mig; };
struct process { unsigned gpu, pid; unsigned long long bytes; };

static struct gpu gpus[GPUS];
static struct process processes[PROCESSES];
static unsigned gpu_count, process_count;
static int init_code, version1, hang, crash;

static void read_state(void)
{
	const char *path = getenv("FAKE_NVML_STATE");
	FILE *file = path ? fopen(path, "r") : NULL;
	char line[512], word[96];

	gpu_count = process_count = 0;
	init_code = version1 = hang = crash = 0;
	if (!file)
		return;
	while (fgets(line, sizeof line, file)) {
		struct gpu *gpu = &gpus[gpu_count];
		struct process *process = &processes[process_count];

		if (gpu_count < GPUS &&
		    sscanf(line, "gpu %95s %llu %llu %llu", gpu->uuid, &gpu->total, &gpu->reserved, &gpu->used) == 4) {
			gpu->mig = strstr(line, " mig") != NULL;
			gpu_count++;
		} else if (process_count < PROCESSES && sscanf(line, "process %u %u %95s", &process->gpu, &process->pid, word) == 3) {
			process->bytes = strcmp(word, "unknown") ? strtoull(word, NULL, 10) : NOT_AVAILABLE;
			process_count++;
		} else if (sscanf(line, "init %d", &init_code) != 1) {
			version1 |= !strncmp(line, "version1", 8);
			hang |= !strncmp(line, "hang", 4);
			crash |= !strncmp(line, "crash", 5);
		}
	}
	fclose(file);
}

/* A handle is the index plus one. */
static struct gpu *find(void *device)
{
	size_t number = (size_t)device;

	read_state();
	if (hang)
		for (;;)
			pause();
	if (crash)
		_exit(42);
	return number >= 1 && number <= gpu_count ? &gpus[number - 1] : NULL;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; read_state(); return init_code; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake library"; }
int nvmlDeviceGetCount_v2(unsigned *count) { read_state(); *count = gpu_count; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
	read_state();
	if (index >= gpu_count)
		return INVALID_ARGUMENT;
	*device = (void *)((size_t)index + 1);
	return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
	read_state();
	for (size_t index = 0; index < gpu_count; index++)
		if (!strcmp(gpus[index].uuid, uuid)) {
			*device = (void *)(index + 1);
			return SUCCESS;
		}
	return NOT_FOUND;
}

int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = (unsigned)(size_t)device - 1; return SUCCESS; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { (void)device; snprintf(name, size, "Fake GPU"); return SUCCESS; }

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size)
{
	struct gpu *gpu = find(device);

	if (!gpu)
		return UNKNOWN;
	snprintf(uuid, size, "%s", gpu->uuid);
	return SUCCESS;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending)
{
	struct gpu *gpu = find(device);

	if (!gpu || !gpu->mig)
		return NOT_SUPPORTED;
	*current = *pending = 1;
	return SUCCESS;
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory)
{
	struct gpu *gpu = find(device);

	if (!gpu)
		return UNKNOWN;
	*memory = (struct memory){ gpu->total, gpu->total - gpu->used - gpu->reserved, gpu->used + gpu->reserved };
	return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory)
{
	struct gpu *gpu = find(device);

	if (!gpu)
		return UNKNOWN;
	if (version1)
		return FUNCTION_NOT_FOUND;
	if (memory->version != (sizeof *memory | 2U << 24))
		return INVALID_ARGUMENT;
	memory->total = gpu->total;
	memory->reserved = gpu->reserved;
	memory->used = gpu->used;
	memory->free = gpu->total - gpu->reserved - gpu->used;
	return SUCCESS;
}

struct process_info { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct process_info *infos)
{
	struct gpu *gpu = find(device);
	unsigned wanted = 0, room = *count;

	if (!gpu)
		return UNKNOWN;
	for (unsigned i = 0; i < process_count; i++) {
		if (&gpus[processes[i].gpu] != gpu)
			continue;
		if (infos && wanted < room)
			infos[wanted] = (struct process_info){ processes[i].pid, processes[i].bytes, ~0U, ~0U };
		wanted++;
	}
	*count = wanted;
	return wanted > room ? INSUFFICIENT_SIZE : SUCCESS;
}
