// What a program needs that runs on a bare machine: a console. There is no libc, no heap, no thread and no exception.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {
void* memset(void* to, int value, size_t count);
void* memcpy(void* to, const void* from, size_t count);
void* memmove(void* to, const void* from, size_t count);
int memcmp(const void* a, const void* b, size_t count);
}

// The program: returns whether all went well. Defined by each test program, called once.
bool check();

namespace console {
void put(const char* text);
void put(long value);
void put(double value);  // six digits, as 1.23456e+00

inline void put(int value) { put(long(value)); }
inline void put(bool value) { put(value ? "1" : "0"); }
inline void put(float value) { put(double(value)); }

template <class... Parts>
void line(const Parts&... parts) {
  (put(parts), ...);
  put("\n");
}
}  // namespace console
