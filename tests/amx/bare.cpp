// Starts the program, prints to the serial port, reports processor exceptions, shuts the emulator down.
#include "bare.h"

extern "C" {

// The four functions that a compiler may call by itself, even in freestanding code. String instructions, because it
// would turn a loop into a call of the function that holds it.
void* memset(void* to, int value, size_t count) {
  void* at = to;
  asm volatile("rep stosb" : "+D"(at), "+c"(count) : "a"(value) : "memory");
  return to;
}

void* memcpy(void* to, const void* from, size_t count) {
  void* at = to;
  asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(count) : : "memory");
  return to;
}

void* memmove(void* to, const void* from, size_t count) {
  if (to <= from) return memcpy(to, from, count);
  char* last = static_cast<char*>(to) + count - 1;
  const char* last_from = static_cast<const char*>(from) + count - 1;
  asm volatile("std; rep movsb; cld" : "+D"(last), "+S"(last_from), "+c"(count) : : "memory");
  return to;
}

int memcmp(const void* a, const void* b, size_t count) {
  const auto *x = static_cast<const unsigned char*>(a), *y = static_cast<const unsigned char*>(b);
  for (size_t i = 0; i < count; ++i)
    if (x[i] != y[i]) return x[i] - y[i];
  return 0;
}

// What kernels call of the mathematical library: m 2^e with m near 1 is 2 atanh((m - 1) / (m + 1)) + e log 2.
double log(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int exponent = int(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
  memcpy(&x, &bits, sizeof x);
  const double z = (x - 1) / (x + 1);
  double sum = 0, power = z;
  for (int i = 1; i < 60; i += 2, power *= z * z) sum += power / i;
  return 2 * sum + exponent * 0.69314718055994530942;
}

extern const char exception_entries[];
[[noreturn]] void start_program();
[[noreturn]] void report_exception(long vector, const long* frame);
}

namespace {

constexpr uint16_t kSerial = 0x3f8, kSerialStatus = kSerial + 5;
constexpr uint8_t kCanTake = 0x20, kAllSent = 0x40;
constexpr uint16_t kShutdown = 0x8900;  // the emulator ends when this port is told so

void out(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "d"(port)); }

uint8_t in(uint16_t port) {
  uint8_t value;
  asm volatile("inb %1, %0" : "=a"(value) : "d"(port));
  return value;
}

void wait_for(uint8_t bit) {
  while (!(in(kSerialStatus) & bit)) continue;
}

void put_character(char c) {
  wait_for(kCanTake);
  out(kSerial, uint8_t(c));
}

void open_console() {
  out(kSerial + 3, 0x80);  // set the divisor: 115200 baud
  out(kSerial, 1);
  out(kSerial + 1, 0);
  out(kSerial + 3, 3);  // 8 bits, no parity, one stop bit
}

[[noreturn]] void end(bool passed) {
  console::put(passed ? "PASS\n" : "FAIL\n");
  wait_for(kAllSent);
  for (const char* c = "Shutdown"; *c; ++c) out(kShutdown, uint8_t(*c));
  for (;;) asm volatile("hlt");
}

struct Gate {
  uint16_t low, selector;
  uint8_t stack, type;
  uint16_t middle;
  uint32_t high, reserved;
};

struct __attribute__((packed)) GatePointer {
  uint16_t limit;
  const Gate* gates;
};

constexpr int kVectors = 32, kEntryBytes = 16;
Gate gates[kVectors];

void catch_exceptions() {
  for (int i = 0; i < kVectors; ++i) {
    const auto entry = reinterpret_cast<uintptr_t>(exception_entries + i * kEntryBytes);
    gates[i] = {uint16_t(entry), 0x18, 0, 0x8e, uint16_t(entry >> 16), uint32_t(entry >> 32), 0};
  }
  const GatePointer pointer{sizeof gates - 1, gates};
  asm volatile("lidt %0" : : "m"(pointer));
}

bool has_error_code(long vector) { return vector < 32 && (0x60227d00u >> vector & 1); }

}  // namespace

void console::put(const char* text) {
  for (; *text; ++text) put_character(*text);
}

void console::put(long value) {
  if (value < 0) put_character('-');
  char digits[20];
  int count = 0;
  for (unsigned long rest = value < 0 ? 0ul - value : value; rest || !count; rest /= 10)
    digits[count++] = char('0' + rest % 10);
  while (count) put_character(digits[--count]);
}

void console::put(double value) {
  if (value != value) return put("nan");
  if (value < 0) put_character('-');
  value = value < 0 ? -value : value;
  if (value > 1e300) return put("inf");
  int exponent = 0;
  for (; value >= 9.999995; ++exponent) value /= 10;
  for (; value && value < 0.999999; --exponent) value *= 10;
  long digits = long(value * 1e5 + 0.5);
  put(digits / 100000);
  put_character('.');
  for (long unit = 10000; unit; unit /= 10) put_character(char('0' + digits / unit % 10));
  put("e");
  put(long(exponent));
}

void start_program() {
  open_console();
  catch_exceptions();
  end(check());
}

void report_exception(long vector, const long* frame) {
  console::line("processor exception ", vector, " at ", frame[has_error_code(vector)]);
  end(false);
}
