// libstdc++'s shared pointers ask glibc 2.32 whether there is but one thread. Answered here, "maybe more", the libraries need
// no newer glibc than torch's own wheels do. In a file of its own, since a header declares it as visible to everybody.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
