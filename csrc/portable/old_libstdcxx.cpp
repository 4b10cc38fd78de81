// What headers of newer compilers call and libraries of glibc 2.28's time do not have, made of what these have; hidden,
// so that each module keeps its own. Linked into wheels alone (see CMakeLists.txt).
#include <new>

#define FC_HIDDEN [[gnu::visibility("hidden")]]

// Whether a process has one thread, which saves atomic operations: 0 says that it is not known to.
extern "C" {
FC_HIDDEN char __libc_single_threaded = 0;
}

namespace std {
[[noreturn]] FC_HIDDEN void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// The counting of std::exception_ptr, which was done by its copy constructor and destructor.
namespace {
struct Pointer {
  void* object;
};
}  // namespace

extern "C" {
void fc_copy(Pointer*, const Pointer*) asm("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void fc_destroy(Pointer*) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");
FC_HIDDEN void fc_add_reference(Pointer*) asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
FC_HIDDEN void fc_release(Pointer*) asm("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void fc_add_reference(Pointer* self) {
  Pointer copy;
  fc_copy(&copy, self);
}

void fc_release(Pointer* self) {
  fc_destroy(self);
  self->object = nullptr;
}
}
