/* A libnvidia-ml.so.1 for tests, which the real pynvml loads.
 *
 * The machine is a text file, named by $FAKE_NVML_STATE and read again at every call:
 *
 *     gpu UUID TOTAL RESERVED USED [mig]    bytes; USED without RESERVED; the order is the index; mig: it is divided
 *     slice GPU/NUMBER UUID INSTANCE TOTAL RESERVED USED
 *                                           a slice of a divided GPU; those with the same GPU INSTANCE share its memory
 *     process DEVICE PID BYTES              DEVICE: GPU or GPU/NUMBER; BYTES "unknown": the driver does not tell
 *     hold DEVICE PID BYTES                 a process whose memory adds to USED, and comes free when it has ended
 *     init CODE                             nvmlInit fails with this nvmlReturn_t (9: driver not loaded)
 *     stale                                 nvmlInit fails for ever in a process that has seen this, as after a driver upgrade
 *     version1                              an old driver, without memory info version 2
 *     hang                                  every call for memory sleeps until this line has gone
 *     crash                                 every call for memory ends the process
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, INVALID_ARGUMENT = 2, FUNCTION_NOT_FOUND = 13, LIBRARY_MISMATCH = 18,
       UNKNOWN = 999 };
enum { GPUS = 16, SLICES = 7, DEVICES = GPUS * (1 + SLICES), PROCESSES = 64 };
static const unsigned long long NOT_AVAILABLE = ~0ULL;

/* A GPU, or a slice of one: devices[GPU + GPUS * (1 + NUMBER)]. There is none where the UUID is empty. */
struct device { char uuid[96]; unsigned long long total, reserved, used; unsigned instance; int mig; };
struct process { unsigned device, pid; unsigned long long bytes; };

static struct device devices[DEVICES];
static struct process processes[PROCESSES];
static unsigned gpu_count, process_count;
static int init_code, version1, hang, crash, stale;

static int runs(unsigned pid)
{
	return kill((pid_t)pid, 0) == 0 || errno == EPERM;
}

/* GPU or GPU/NUMBER; DEVICES when it is neither. */
static unsigned parse_device(const char *word)
{
	unsigned gpu, number;

	switch (sscanf(word, "%u/%u", &gpu, &number)) {
	case 1: return gpu < GPUS ? gpu : DEVICES;
	case 2: return gpu < GPUS && number < SLICES ? gpu + GPUS * (1 + number) : DEVICES;
	default: return DEVICES;
	}
}

static void read_slice(const char *line)
{
	struct device slice = { .mig = 0 };
	char where[32];
	unsigned index;

	if (sscanf(line, "slice %31s %95s %u %llu %llu %llu", where, slice.uuid, &slice.instance, &slice.total, &slice.reserved,
		   &slice.used) == 6 && (index = parse_device(where)) < DEVICES)
		devices[index] = slice;
}

static void read_process(const char *line)
{
	struct process process;
	char kind[16], where[32], bytes[32];

	if (sscanf(line, "%15s %31s %u %31s", kind, where, &process.pid, bytes) != 4 || process_count == PROCESSES)
		return;
	process.device = parse_device(where);
	process.bytes = strcmp(bytes, "unknown") ? strtoull(bytes, NULL, 10) : NOT_AVAILABLE;
	if (process.device == DEVICES || (!strcmp(kind, "hold") && !runs(process.pid)))
		return;
	if (!strcmp(kind, "hold"))
		devices[process.device].used += process.bytes;
	processes[process_count++] = process;
}

static void read_state(void)
{
	const char *path = getenv("FAKE_NVML_STATE");
	FILE *file = path ? fopen(path, "r") : NULL;
	char line[512];

	memset(devices, 0, sizeof devices);
	gpu_count = process_count = 0;
	init_code = version1 = hang = crash = 0;
	if (!file)
		return;
	while (fgets(line, sizeof line, file)) {
		struct device *gpu = &devices[gpu_count];

		if (gpu_count < GPUS &&
		    sscanf(line, "gpu %95s %llu %llu %llu", gpu->uuid, &gpu->total, &gpu->reserved, &gpu->used) == 4) {
			gpu->mig = strstr(line, " mig") != NULL;
			gpu_count++;
		} else if (!strncmp(line, "slice ", 6)) {
			read_slice(line);
		} else if (!strncmp(line, "process ", 8) || !strncmp(line, "hold ", 5)) {
			read_process(line);
		} else if (sscanf(line, "init %d", &init_code) != 1) {
			version1 |= !strncmp(line, "version1", 8);
			stale |= !strncmp(line, "stale", 5);
			hang |= !strncmp(line, "hang", 4);
			crash |= !strncmp(line, "crash", 5);
		}
	}
	fclose(file);
}

/* A handle is the place in devices plus one. */
static void *handle_of(unsigned index)
{
	return (void *)((size_t)index + 1);
}

static unsigned index_of(void *handle)
{
	return (unsigned)(size_t)handle - 1;
}

static struct device *find(void *handle)
{

	for (read_state(); hang; read_state())
		usleep(10000);
	if (crash)
		_exit(42);
	return handle && index_of(handle) < DEVICES && *devices[index_of(handle)].uuid ? &devices[index_of(handle)] : NULL;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; read_state(); return stale ? LIBRARY_MISMATCH : init_code; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake library"; }
int nvmlDeviceGetCount_v2(unsigned *count) { read_state(); *count = gpu_count; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
	read_state();
	if (index >= gpu_count)
		return INVALID_ARGUMENT;
	*device = handle_of(index);
	return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
	read_state();
	for (unsigned index = 0; index < DEVICES; index++)
		if (*devices[index].uuid && !strcmp(devices[index].uuid, uuid)) {
			*device = handle_of(index);
			return SUCCESS;
		}
	return NOT_FOUND;
}

/* Of a slice: its number. */
int nvmlDeviceGetIndex(void *device, unsigned *index)
{
	unsigned place = index_of(device);

	*index = place < GPUS ? place : place / GPUS - 1;
	return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned size) { (void)device; snprintf(name, size, "Fake GPU"); return SUCCESS; }

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size)
{
	struct device *gpu = find(device);

	if (!gpu)
		return UNKNOWN;
	snprintf(uuid, size, "%s", gpu->uuid);
	return SUCCESS;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending)
{
	struct device *gpu = find(device);

	if (!gpu || !gpu->mig)
		return NOT_SUPPORTED;
	*current = *pending = 1;
	return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { (void)device; *count = SLICES; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned number, void **slice)
{
	unsigned place = index_of(device) + GPUS * (1 + number);

	if (!find(device)->mig)
		return NOT_SUPPORTED;
	if (number >= SLICES || !*devices[place].uuid)
		return NOT_FOUND;
	*slice = handle_of(place);
	return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *slice, void **device)
{
	if (index_of(slice) < GPUS)
		return INVALID_ARGUMENT;
	*device = handle_of(index_of(slice) % GPUS);
	return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(void *slice, unsigned *id)
{
	struct device *found = find(slice);

	if (!found)
		return UNKNOWN;
	*id = found->instance;
	return SUCCESS;
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory)
{
	struct device *gpu = find(device);

	if (!gpu)
		return UNKNOWN;
	*memory = (struct memory){ gpu->total, gpu->total - gpu->used - gpu->reserved, gpu->used + gpu->reserved };
	return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory)
{
	struct device *gpu = find(device);

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
	struct device *gpu = find(device);
	unsigned wanted = 0, room = *count;

	if (!gpu)
		return UNKNOWN;
	for (unsigned i = 0; i < process_count; i++) { /* a divided GPU has those of all its slices */
		if (&devices[processes[i].device] != gpu && (!gpu->mig || processes[i].device % GPUS != index_of(device)))
			continue;
		if (infos && wanted < room)
			infos[wanted] = (struct process_info){ processes[i].pid, processes[i].bytes, ~0U, ~0U };
		wanted++;
	}
	*count = wanted;
	return wanted > room ? INSUFFICIENT_SIZE : SUCCESS;
}
