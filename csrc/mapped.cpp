// Mapped files that are shortened, or whose disk fails, while they are read: the system then sends SIGBUS, of which a
// process dies without a word. Here it leaves with a line that names the file, and with the exit code of an error. There
// is no way back into the computation: what it has read so far may be anything.

#include <atomic>
#include <cstdint>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <unistd.h>

namespace smidgen {
namespace {

constexpr int kExitCode = 2;  // as for every error that a user can mend
constexpr int kMost = 1024;   // files at once; beyond that the oldest is forgotten

struct Watched {
    std::atomic<uintptr_t> begin, end;
    std::atomic<char*> line;
};
Watched watched[kMost];
std::atomic<int64_t> count{0};
struct sigaction before;

// Called by the thread that touched the page. Nothing but what may be called in a signal handler.
void on_bus_error(int, siginfo_t* info, void*) {
    const uintptr_t at = (uintptr_t)info->si_addr;
    const int64_t last = count.load();
    for (int64_t i = last - 1; i >= 0 && i >= last - kMost; i--) {  // the newest first: addresses come again
        const Watched& file = watched[i % kMost];
        if (at < file.begin.load() || at >= file.end.load()) continue;
        const char* line = file.line.load();
        ssize_t written = write(STDERR_FILENO, line, strlen(line));
        (void)written;
        _exit(kExitCode);
    }
    sigaction(SIGBUS, &before, nullptr);  // not ours: it comes again, as if we had not been here
}

}  // namespace

// From now on the process ends with `line` where memory from `begin` on, `length` bytes, can no longer be read.
API void smidgen_watch(const void* begin, int64_t length, const char* line) {
    const int64_t number = count.fetch_add(1);
    Watched& file = watched[number % kMost];
    file.begin = file.end = 0;
    file.line = strdup(line);  // an older one stays: the handler may be reading it
    file.begin = (uintptr_t)begin;
    file.end = (uintptr_t)begin + (uintptr_t)length;
    if (number == 0) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &before);
    }
}

}  // namespace smidgen

#else

API void smidgen_watch(const void*, int64_t, const char*) {}

#endif
