/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * C frames are taken by glibc's backtrace, which needs no frame pointers. They are recorded as places in files; the report finds the
 * functions and lines.
 *
 * Python frames are asked for by Python's public functions, which need the GIL. Without it (ctypes and mmap let go of it around a call)
 * there is what faulthandler uses, where Python exports it: it reads the thread's frames without counting references. Waiting for
 * the GIL here could wait for a thread that waits for a lock of this one's.
 */
#define _GNU_SOURCE
#include "audit/stack.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PYTHON_FRAMES 64
#define PYTHON_TEXT 8192

extern const char own_start[] __asm__("__ehdr_start") __attribute__((visibility("hidden")));
extern const char own_end[] __asm__("_end") __attribute__((visibility("hidden")));

bool stack_is_own(const void *address)
{
	return (const char *)address >= own_start && (const char *)address < own_end;
}

/* ---- Python ---- */

typedef struct object object;

static struct {
	int (*is_initialized)(void);
	int (*gil_check)(void);
	void *(*this_thread)(void);
	object *(*get_frame)(void);
	object *(*frame_back)(object *);
	object *(*frame_code)(object *);
	int (*frame_line)(object *);
	object *(*attribute)(object *, const char *);
	const char *(*utf8)(object *);
	void (*forget)(object *);
	void (*clear)(void);
	void (*dump)(int, void *);
} py;

/* Not only once: a program may load Python later. */
static bool find_python(void)
{
	if (py.is_initialized)
		return true;
#define FIND(name, symbol) (*(void **)&py.name = dlsym(RTLD_DEFAULT, symbol))
	FIND(gil_check, "PyGILState_Check");
	if (!py.gil_check)
		return false;
	FIND(this_thread, "PyGILState_GetThisThreadState");
	FIND(get_frame, "PyEval_GetFrame");
	FIND(frame_back, "PyFrame_GetBack");
	FIND(frame_code, "PyFrame_GetCode");
	FIND(frame_line, "PyFrame_GetLineNumber");
	FIND(attribute, "PyObject_GetAttrString");
	FIND(utf8, "PyUnicode_AsUTF8");
	FIND(forget, "Py_DecRef");
	FIND(clear, "PyErr_Clear");
	if (!FIND(dump, "PyUnstable_DumpTraceback"))
		FIND(dump, "_Py_DumpTraceback");
	if (!py.this_thread || !py.get_frame || !py.frame_back || !py.frame_code || !py.frame_line || !py.attribute || !py.utf8 ||
	    !py.forget || !py.clear)
		return false;
	FIND(is_initialized, "Py_IsInitialized");
	return py.is_initialized;
}

/* Adds one frame's line. */
static size_t add_frame(char *text, size_t length, object *frame)
{
	object *code = py.frame_code(frame);
	object *file = py.attribute(code, "co_filename"), *name = py.attribute(code, "co_name");
	const char *file_text = file ? py.utf8(file) : NULL, *name_text = name ? py.utf8(name) : NULL;
	int added = snprintf(text + length, PYTHON_TEXT - length, "  File \"%s\", line %d in %s\n", file_text ? file_text : "?",
			     py.frame_line(frame), name_text ? name_text : "?");

	if (!file_text || !name_text)
		py.clear();
	py.forget(name);
	py.forget(file);
	py.forget(code);
	return added > 0 && (size_t)added < PYTHON_TEXT - length ? length + (size_t)added : length;
}

static size_t walk_frames(char *text)
{
	object *frame = py.get_frame(); /* borrowed */
	size_t length = 0;

	for (int i = 0; frame && i < PYTHON_FRAMES; i++) {
		object *back = py.frame_back(frame);

		length = add_frame(text, length, frame);
		if (i)
			py.forget(frame);
		frame = back;
		if (i + 1 == PYTHON_FRAMES && frame)
			py.forget(frame);
	}
	return length;
}

static size_t dump_frames(char *text, void *thread)
{
	int fd = memfd_create("ummunotify-stack", MFD_CLOEXEC);
	ssize_t length;

	if (fd < 0)
		return 0;
	py.dump(fd, thread);
	length = pread(fd, text, PYTHON_TEXT - 1, 0);
	close(fd);
	return length > 0 ? (size_t)length : 0;
}

/* Not on the stack: a signal handler's may be small. */
static char *python_frames(void)
{
	size_t length = 0;
	void *thread;
	char *text;

	if (!find_python() || !py.is_initialized())
		return NULL;
	thread = py.this_thread();
	text = thread ? malloc(PYTHON_TEXT) : NULL;
	if (!text)
		return NULL;
	if (py.gil_check())
		length = walk_frames(text);
	else if (py.dump)
		length = dump_frames(text, thread);
	text[length] = 0;
	return text;
}

/* ---- Both ---- */

bool stacks_wanted(void)
{
	static int answer; /* 1: no, 2: yes */

	if (!answer)
		answer = getenv("UMMUNOTIFY_AUDIT_NO_STACKS") ? 1 : 2;
	return answer == 2;
}

void stack_take(struct stack *stack)
{
	void *all[STACK_FRAMES + 8];
	int count, first = 0;

	*stack = (struct stack){0};
	if (!stacks_wanted())
		return;
	count = backtrace(all, STACK_FRAMES + 8);
	/* A sanitizer's own backtrace is further in. */
	while (first < count && !stack_is_own(all[first]))
		first++;
	while (first < count && stack_is_own(all[first]))
		first++;
	stack->count = count - first < STACK_FRAMES ? count - first : STACK_FRAMES;
	memcpy(stack->frames, all + first, (size_t)stack->count * sizeof *all);
	stack->python = python_frames();
}

void stack_free(struct stack *stack)
{
	free(stack->python);
	stack->python = NULL;
}

/* glibc's struct dl_find_object, since 2.35. */
struct found_object {
	unsigned long long flags;
	void *start, *end;
	struct link_map *map;
	void *rest[12];
};

/* What was loaded there. dladdr takes the dynamic linker's lock, which a thread that runs a library's constructor holds. */
static struct link_map *object_at(void *address)
{
	static int (*find)(void *, struct found_object *);
	static bool tried;
	struct found_object found;
	struct link_map *map = NULL;
	Dl_info info;

	if (!tried)
		*(void **)&find = dlsym(RTLD_DEFAULT, "_dl_find_object");
	tried = true;
	if (find)
		return find(address, &found) ? NULL : found.map;
	return dladdr1(address, &info, (void **)&map, RTLD_DL_LINKMAP) ? map : NULL;
}

/* The file that an object was loaded from: the program's has no name there. */
static void find_module(const struct link_map *map, char *path, size_t room)
{
	ssize_t length = 0;

	if (*map->l_name)
		snprintf(path, room, "%s", map->l_name);
	else if ((length = readlink("/proc/self/exe", path, room - 1)) >= 0)
		path[length] = 0;
	else
		*path = 0;
}

/* Inside a record, whose lock keeps other threads from the buffers. */
void stack_record(const char *prefix, const struct stack *stack)
{
	static char path[2048], module[2048], name[32];

	snprintf(name, sizeof name, "%sframes", prefix);
	record_list(name);
	for (int i = 0; i < stack->count; i++) {
		char *at = (char *)stack->frames[i] - 1; /* the call; the frame has the address to return to */
		const struct link_map *map = object_at(at);

		*path = 0;
		if (map)
			find_module(map, path, sizeof path);
		record_escape(module, sizeof module, path);
		record_item("[\"%s\",%llu]", module, (unsigned long long)((uintptr_t)at - (map ? map->l_addr : 0)));
	}
	record_list_end();
	snprintf(name, sizeof name, "%spython", prefix);
	if (stack->python && *stack->python)
		record_text(name, stack->python);
}
